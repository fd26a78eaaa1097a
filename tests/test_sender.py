"""Rows to `run.log` from a thread: in order, each once, never in the training's way."""

import logging
import threading

import pytest

from learnax.log import sender as module
from learnax.log.sender import NoRun, Sender, sender
from tests.helpers import MemoryRun, make_trainer

SOON = 30
"""Seconds after which a test that waits for what must come gives up."""


@pytest.fixture(autouse=True)
def warnings(caplog):
    caplog.set_level(logging.WARNING, "learnax")
    return caplog


def made(numbers):
    return ({"row": number} for number in numbers)


class Gated(MemoryRun):
    """A run whose `log` waits for a gate, and tells that it was entered."""

    def __init__(self):
        super().__init__()
        self.gate, self.entered = threading.Event(), threading.Event()
        self.threads = set()

    def log(self, values):
        self.threads.add(threading.current_thread())
        self.entered.set()
        assert self.gate.wait(SOON)
        super().log(values)


# ---- by itself


def test_rows_arrive_in_order_and_each_once(caplog):
    run = MemoryRun()
    rows = Sender(run)
    for start in range(0, 600, 3):
        rows.send(made(range(start, start + 3)), 3)
    rows.send([{"row": 600}], 1)
    rows.flush()
    assert run.rows == [{"row": number} for number in range(601)]
    rows.close()
    assert len(run.rows) == 601
    assert not caplog.messages


def test_a_sender_that_was_closed_sends_again():
    run = MemoryRun()
    rows = Sender(run)
    for number in range(3):
        rows.send(made([number]), 1)
        rows.close()
        assert run.rows[-1] == {"row": number}
    assert not [thread for thread in threading.enumerate() if thread.name == "learnax-sender"]


def test_rows_are_made_in_the_thread_and_copied():
    row, run, where = {"row": 0}, MemoryRun(), []

    def late():
        where.append(threading.current_thread().name)
        yield row

    rows = Sender(run)
    rows.send(late(), 1)
    rows.close()
    assert where == ["learnax-sender"]
    assert run.rows == [row]
    assert run.rows[0] is not row


def test_without_a_run_no_rows_are_made():
    nothing = sender(None)
    assert isinstance(nothing, NoRun)
    nothing.send((1 // 0 for _ in range(1)), 1)
    nothing.flush()
    nothing.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "learnax-sender"]


def test_being_behind_is_told_once_at_half_and_holds_the_sending_up_at_the_whole(monkeypatch, caplog):
    monkeypatch.setattr(module, "BEHIND", 10)
    events = []
    go = threading.Event()

    class Slow:
        def log(self, values):
            assert go.wait(SOON)
            events.append(("logged", values["row"]))

    rows = Sender(Slow())
    for number in range(10):
        rows.send(made([number]), 1)
        assert len(caplog.messages) == (number >= 5)
    assert not events
    go.set()
    for number in range(10, 60):
        rows.send(made([number]), 1)
        events.append(("sent", number))
    rows.close()
    assert caplog.messages == ["run.log is 6 rows behind the training; past 10 the training will wait for it"]
    for number in range(10, 60):
        assert events.index(("sent", number)) > events.index(("logged", number - 10))
    assert [number for what, number in events if what == "logged"] == list(range(60))


def test_a_log_that_raises_is_told_at_once_and_counted_at_the_end(caplog):
    class Failing(MemoryRun):
        def log(self, values):
            super().log(values)
            if values["row"] % 2:
                raise ConnectionError(f"no route for {values['row']}")

    run = Failing()
    rows = Sender(run)
    rows.send(made(range(3)), 3)
    rows.flush()
    first = "run.log raised ConnectionError: no route for 1; training goes on"
    assert caplog.messages == [first]
    rows.send(made(range(3, 7)), 4)
    rows.close()
    assert caplog.messages == [first, "run.log raised for 3 of 7 rows"]
    assert len(run.rows) == 7


def test_a_log_that_hangs_is_given_up_once_and_tried_again_when_it_comes_back(monkeypatch, caplog):
    monkeypatch.setattr(module, "PATIENCE_S", 0.2)
    run = Gated()
    rows = Sender(run)
    rows.send(made(range(4)), 4)
    rows.send(made(range(4, 6)), 2)
    rows.close()
    line = (
        "run.log has not returned for 0.2 s: 6 rows are given up, and all that follow until it has; trainer.metrics "
        "has them"
    )
    assert caplog.messages == [line]
    monkeypatch.setattr(module, "PATIENCE_S", SOON)  # whoever waits now is not forgotten
    for number in range(6, 16):
        rows.send(made([number]), 1)
        rows.flush()
    rows.close()
    (hung,) = run.threads
    assert [thread for thread in threading.enumerate() if thread.name == "learnax-sender"] == [hung]
    run.gate.set()
    hung.join(SOON)
    assert not hung.is_alive()
    assert run.rows == [{"row": 0}]
    rows.send(made(range(16, 19)), 3)
    rows.close()
    assert run.rows == [{"row": 0}, {"row": 16}, {"row": 17}, {"row": 18}]
    assert caplog.messages == [line]


def test_a_summary_is_not_written_to_a_run_that_hangs(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.2)
    run = Gated()
    run.summary = {}
    rows = Sender(run)
    rows.send(made(range(4)), 4)
    rows.close()
    rows.summarise({"ledger": 1.0})
    assert run.summary == {}
    run.gate.set()
    next(iter(run.threads)).join(SOON)
    rows.summarise({"ledger": 1.0})
    assert run.summary == {"ledger": 1.0}


def test_what_was_abandoned_takes_no_later_rows():
    run = MemoryRun()
    rows = Sender(run)
    rows.send(made(range(3)), 3)
    rows.flush()
    (first,) = [thread for thread in threading.enumerate() if thread.name == "learnax-sender"]
    rows.abandon()
    first.join(SOON)
    assert not first.is_alive()
    rows.send(made(range(3, 6)), 3)
    rows.close()
    assert run.rows == [{"row": number} for number in range(6)]


@pytest.mark.thorough
def test_a_log_that_is_slow_but_moves_is_waited_for(monkeypatch, caplog):
    """Patience is for one call, not for all of them."""
    monkeypatch.setattr(module, "PATIENCE_S", 0.3)
    calls = []

    class Slow:
        def log(self, values):
            threading.Event().wait(0.05)
            calls.append(values["row"])

    rows = Sender(Slow())
    rows.send(made(range(12)), 12)
    rows.close()
    assert calls == list(range(12))
    assert not caplog.messages


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_stop_that_log_raises_surfaces_where_rows_are_sent(stop):
    class Stopping(MemoryRun):
        def log(self, values):
            super().log(values)
            if values["row"] == 1:
                raise stop

    run = Stopping()
    rows = Sender(run)
    rows.send(made(range(3)), 3)
    with pytest.raises(stop):
        rows.flush()
    rows.close()
    assert len(run.rows) == 3


# ---- through the trainer


def steps_of(run):
    return [row["step"] for row in run.rows if "train/loss" in row]


@pytest.mark.parametrize("room", [1, 16])
def test_a_slow_log_does_not_hold_the_training_up(room):
    run, seen = Gated(), []

    def save_model(params):
        assert run.entered.wait(SOON)
        seen.append((int(trainer.train_state.step), len(run.rows)))
        run.gate.set()

    trainer = make_trainer(run=run, save_every=10, save_model=save_model, steps_per_execution=room)
    assert trainer.train() is run
    assert seen == [(10, 0)], "the last step was to be made while the first row was still being logged"
    assert steps_of(run) == list(range(1, 11))
    (thread,) = run.threads
    assert thread.name == "learnax-sender"
    assert thread is not threading.main_thread()


def test_every_row_of_every_sort_is_logged_in_its_order():
    run = MemoryRun()
    trainer = make_trainer(run=run, val_datasets=[make_trainer().train_dataset[:9]], steps_per_execution=4)
    trainer.train()
    kinds = [
        next(
            kind for kind in ("model/", "train/", "train_epoch/", "val/") if any(name.startswith(kind) for name in row)
        )
        for row in run.rows
    ]
    epoch = ["train/"] * 5 + ["train_epoch/", "val/"]
    assert kinds == ["model/", *epoch, *epoch]
    assert [row["step"] for row in run.rows[1:]] == [1, 2, 3, 4, 5, 5, 5, 6, 7, 8, 9, 10, 10, 10]
    for name in ("loss", "rmse", "update_time"):
        assert [row[f"train/{name}"] for row in run.rows if f"train/{name}" in row] == trainer.metrics[f"train/{name}"]


@pytest.mark.parametrize("room", [1, 16])
def test_before_a_plot_the_run_has_every_earlier_row(room):
    run, seen = MemoryRun(), []
    trainer = make_trainer(
        run=run, steps_per_execution=room, plot_every=4, plot_pipe=lambda run, *_: seen.append(steps_of(run))
    )
    trainer.train()
    assert seen == [list(range(1, 4)), list(range(1, 8))]


@pytest.mark.thorough
def test_plots_do_not_wait_for_a_log_that_was_given_up(monkeypatch, caplog):
    monkeypatch.setattr(module, "PATIENCE_S", 0.2)
    run, plots = Gated(), []

    def plot(*_):
        plots.append(len(caplog.messages))
        monkeypatch.setattr(module, "PATIENCE_S", SOON)  # from now on nobody is to wait

    trainer = make_trainer(run=run, plot_pipe=plot, plot_every=2)
    try:
        trainer.train()
        assert plots == [1] * 5
        assert len([thread for thread in threading.enumerate() if thread.name == "learnax-sender"]) == 1
        assert len(trainer.metrics["train/loss"]) == 10
    finally:
        run.gate.set()


def test_a_log_that_hangs_does_not_keep_train_from_returning(monkeypatch, caplog):
    monkeypatch.setattr(module, "PATIENCE_S", 0.2)
    run = Gated()
    trainer = make_trainer(run=run)
    try:
        assert trainer.train() is run
        assert caplog.messages == [
            "run.log has not returned for 0.2 s: 13 rows are given up, and all that follow until it has; "
            "trainer.metrics has them"
        ]
        assert not run.rows
        assert len(trainer.metrics["train/loss"]) == 10
    finally:
        run.gate.set()


def test_a_log_that_always_raises_loses_nothing_of_the_metrics(caplog):
    class Failing(MemoryRun):
        def log(self, values):
            raise OSError("disk full")

    trainer = make_trainer(run=Failing())
    trainer.train()
    assert caplog.messages == [
        "run.log raised OSError: disk full; training goes on",
        "run.log raised for 13 of 13 rows",
    ]
    reference = make_trainer()
    reference.train()
    assert trainer.metrics["train/loss"] == reference.metrics["train/loss"]


@pytest.mark.parametrize("row", [1, 4, 13])
def test_a_keyboard_interrupt_inside_log_stops_the_training_which_can_go_on(row):
    class Interrupted(MemoryRun):
        calls = 0

        def log(self, values):
            super().log(values)
            self.calls += 1
            if self.calls == row:
                raise KeyboardInterrupt

    run = Interrupted()
    trainer = make_trainer(run=run, steps_per_execution=1)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.train() is run
    reference = make_trainer(steps_per_execution=1)
    reference.train()
    assert trainer.metrics["train/loss"] == reference.metrics["train/loss"]
    assert steps_of(run) == list(range(1, 11))
