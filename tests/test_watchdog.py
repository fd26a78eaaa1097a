"""A run that hangs is told of, once, with all stacks; training is not touched."""

import logging
import threading

import pytest

from learnax.profiling import watchdog
from learnax.profiling.watchdog import Watchdog
from tests.helpers import make_data, make_trainer


class Hanging:
    """A dataset whose datum 20 comes when something was logged."""

    def __init__(self, data, told):
        self._data, self._told = data, told

    def __len__(self):
        return len(self._data)

    def __getitem__(self, index):
        if index == 20:
            self.wait_for_what_never_comes()
        return self._data[index]

    def wait_for_what_never_comes(self):
        assert self._told.wait(60)


@pytest.fixture
def told():
    """Is set by the watchdog's line."""
    event = threading.Event()

    class Handler(logging.Handler):
        def emit(self, record):
            if record.getMessage().startswith("nothing was dispatched"):
                event.set()

    handler = Handler()
    logging.getLogger("learnax").addHandler(handler)
    yield event
    logging.getLogger("learnax").removeHandler(handler)


@pytest.mark.thorough
def test_a_run_that_hangs_is_told_of_once_with_phase_and_stacks_and_goes_on(told, monkeypatch, caplog):
    trainer = make_trainer(train_dataset=Hanging(make_data(43), told), num_epochs=1, steps_per_execution=1)
    trainer.parts.watchdog = Watchdog(
        lambda: trainer.engine.calls, lambda: trainer.phases.current.name, floor_s=0.3, first_s=30
    )
    trainer.train()
    (line,) = [line for line in caplog.messages if line.startswith("nothing was dispatched")]
    assert "after 2 dispatches: the run is in 'data'. It is left alone; what each thread does:\n" in line
    stacks = line.split("thread ")
    assert stacks[2].startswith("MainThread:\n")  # the one that trains comes first
    assert "wait_for_what_never_comes" in stacks[2]
    assert "learnax-watchdog" not in line
    assert trainer.log.step == 5
    assert not [thread for thread in threading.enumerate() if thread.name == "learnax-watchdog"]


def test_a_start_has_more_time_and_a_run_that_goes_on_is_watched_on(monkeypatch, caplog):
    class Clock:
        now = 0.0

    monkeypatch.setattr(watchdog.time, "monotonic", lambda: Clock.now)
    script = iter(
        # seconds, dispatches made since the beginning
        [(0, 0), (500, 0), (599, 0), (601, 0), (700, 0), (701, 1), (800, 1), (900, 1), (950, 2), (1000, 2), (1500, 3),
         (6900, 3), (20000, 3), (20100, 3)]
    )  # fmt: skip

    class Over:
        """An event that moves the clock, and is set when the script is over."""

        @staticmethod
        def wait(seconds):
            assert seconds == 2.0
            nonlocal made
            try:
                Clock.now, made = next(script)
            except StopIteration:
                return True
            return False

    made = 0
    dog = Watchdog(lambda: made, lambda: "drain")
    dog._watch(Over, threading.current_thread())
    told = [line.split(":")[0] for line in caplog.messages]
    assert told == [
        "nothing was dispatched for 601 s, after 0 dispatches",
        # One dispatch took 701 s: 20 times as long would be news, and so is no silence that follows. The mean of
        # three is 500 s: after 10,000 s of silence it is.
        "nothing was dispatched for 18500 s, after 3 dispatches",
    ]


def test_a_run_that_does_not_hang_says_nothing(caplog):
    make_trainer().train()
    assert not caplog.messages
