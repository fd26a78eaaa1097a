"""Metrics: what is kept, what goes to the run, what the bar shows."""

import contextlib
import logging
import os
import pty
import re
import subprocess
import sys
import termios
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learnax.cluster.processes import OneProcess
from learnax.log import Log, Means, in_notebook, progress_bar
from learnax.log.pace import Pace
from learnax.profiling.phases import Phases
from learnax.step import Part, Scalars
from tests.helpers import ROOT, MemoryRun, make_data, make_trainer, run_script

STEP = ["loss", "rmse", "gradient norm", "update_time", "has_nan", "nan_data", "learning_rate"]


def test_every_documented_metric_is_there_per_step_and_per_epoch():
    trainer = make_trainer(val_datasets={"near": make_data(8)})
    trainer.train()
    lengths = {name: len(values) for name, values in trainer.metrics.items()}
    assert lengths == (
        {f"train/{name}": 10 for name in STEP}
        | {f"train_epoch/{name}": 2 for name in STEP}
        | {f"near{kind}/{name}": 2 for kind in ("", "_epoch") for name in ("loss", "rmse")}
    )
    assert all(type(value) is float for values in trainer.metrics.values() for value in values)


def test_an_epochs_metrics_are_the_means_of_its_steps():
    trainer = make_trainer()
    trainer.train()
    for name in STEP:
        values = np.reshape(trainer.metrics[f"train/{name}"], (2, 5))
        np.testing.assert_allclose(trainer.metrics[f"train_epoch/{name}"], values.mean(1), rtol=1e-6)


def test_the_run_gets_the_same_and_gradient_norms_by_parameter():
    run = MemoryRun()
    trainer = make_trainer(run=run, val_datasets=[make_data(8)])
    trainer.train()
    count = sum(leaf.size for leaf in trainer.train_state.params["Dense_0"].values())
    count += sum(leaf.size for leaf in trainer.train_state.params["Dense_1"].values())
    assert [row for row in run.rows if "model/num_params" in row] == [{"model/num_params": count}]
    steps = [row for row in run.rows if "train/loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 11))
    assert [row["epoch"] for row in steps] == [0] * 5 + [1] * 5
    for name in STEP:
        assert [row[f"train/{name}"] for row in steps] == trainer.metrics[f"train/{name}"]
    norms = ["grads/Dense_0/bias", "grads/Dense_0/kernel", "grads/Dense_1/bias", "grads/Dense_1/kernel"]
    for row in steps:
        assert sorted(name for name in row if name.startswith("grads/")) == norms
        whole = np.sqrt(sum(row[name] ** 2 for name in norms))
        assert row["train/gradient norm"] == pytest.approx(whole, rel=1e-5)
    (first, _) = [row for row in run.rows if "val/loss" in row]
    assert first == {
        "val/loss": trainer.metrics["val/loss"][0],
        "val/rmse": trainer.metrics["val/rmse"][0],
        "val_epoch/loss": trainer.metrics["val/loss"][0],
        "val_epoch/rmse": trainer.metrics["val/rmse"][0],
        "step": 5,
        "epoch": 0,
    }


def test_update_times_are_seconds_that_sum_to_no_more_than_the_run(monkeypatch):
    now = [0.0]

    def clock():
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr("learnax.log.log.time.perf_counter", clock)
    trainer = make_trainer(num_epochs=1)
    began = now[0]
    trainer.train()
    assert 5 <= sum(trainer.metrics["train/update_time"]) <= now[0] - began


class Failing(MemoryRun):
    def log(self, values):
        super().log(values)
        raise ConnectionError("no route to host")


def test_a_run_that_raises_is_told_of_once_and_loses_nothing(caplog):
    run = Failing()
    trainer = make_trainer(run=run)
    with caplog.at_level(logging.WARNING, "learnax"):
        assert trainer.train() is run
    assert [record.message for record in caplog.records] == [
        "run.log raised ConnectionError: no route to host; training goes on",
        "run.log raised for 13 of 13 rows",
    ]
    assert len(trainer.metrics["train/loss"]) == 10
    assert sum("train/loss" in row for row in run.rows) == 10


def make_log(in_flight, steps):
    return Log(None, in_flight, steps, Phases(), OneProcess(), batch_data=8, max_dropped=None)


def scalars(names, rows):
    """A dispatch's scalars; none of its data has a loss of NaN."""
    return Scalars((*names, "nan_data"), jnp.array([[*row, 0] for row in rows], jnp.float32))


@pytest.mark.parametrize("in_flight", [0, 2])
@pytest.mark.parametrize(("bulk", "seconds"), [(1, 1e9), (3, 1e9), (100, 0)])
def test_scalars_are_read_in_bulk_when_later_steps_are_under_way(in_flight, bulk, seconds, monkeypatch):
    monkeypatch.setattr("learnax.log.log._BULK", bulk)
    monkeypatch.setattr("learnax.log.log._BULK_S", seconds)
    monkeypatch.setattr("learnax.log.pace._MOST", in_flight)  # no further ahead
    log = make_log(in_flight, 8)
    with log.session(0, 0):
        for step in range(8):
            log.wait_for_room()
            done = max(0, step - in_flight)
            assert len(log.metrics.get("train/loss", [])) == (done if seconds == 0 else done - done % bulk)
            log.push(scalars(("loss", "has_nan"), [[step, 0]]), 1, 0)
            assert log.step_at_most == step + 1
        log.drain()
    assert log.metrics["train/loss"] == list(range(8))
    assert log.step == 8


def test_dispatches_with_other_metrics_are_not_mixed_up():
    log = make_log(10, 4)
    for step, name in enumerate(["a", "a", "b", "a"]):
        log.push(scalars(("loss", name, "has_nan"), [[step, 10 * step, 0]]), 1, 0)
    log.drain()
    assert log.metrics["train/loss"] == [0, 1, 2, 3]
    assert log.metrics["train/a"] == [0, 10, 30]
    assert log.metrics["train/b"] == [20]


def test_steps_count_but_for_dropped_ones_however_they_are_dispatched():
    log = make_log(2, 5)
    log.push(scalars(("loss", "has_nan", "learning_rate"), [[1, 0, 1], [2, 1, 1], [3, 0, 1], [9, 9, 9]]), 3, 0)
    assert log.step_at_most == 3
    log.push(scalars(("loss", "has_nan", "learning_rate"), [[4, 0, 1], [5, 0, 1]]), 2, 0)
    assert log.step_at_most == 5
    log.drain()
    assert log.step == log.step_at_most == 4
    assert log.metrics["train/loss"] == [1, 2, 3, 4, 5]


def test_the_newest_steps_metrics_can_be_added_to():
    log = make_log(2, 2)
    for step in range(2):
        log.push(scalars(("loss", "has_nan"), [[step, 0]]), 1, 0)
    with log.newest() as metrics:
        assert metrics["loss"] == 1
        metrics["more"] = 5.0
    assert log.metrics["train/loss"] == [0, 1]
    assert log.metrics["train/more"] == [5]


def test_means_are_of_all_data_however_they_are_cut():
    means = Means("val", 1)
    for sums, count, size in (([[6, 1, 0]], 1, 3), ([[1, 1, 3], [3, 0, 1], [jnp.nan, jnp.nan, 9]], 2, 2)):
        names = (Part("loss", "data"), Part("hits", "data"), Part("hits", "data", unit=1 << 40))
        means.push(Scalars(names, jnp.array(sums, jnp.float32)), count, size)
    assert means.result() == {"loss": 2.0, "hits": (2 + 4 * 2**40) / 5}


def test_many_dropped_updates_are_not_told_one_by_one(caplog):
    log = make_log(0, 300)
    for _ in range(250):
        log.push(scalars(("loss", "has_nan", "learning_rate", "grads/w"), [[1, 1, 0.1, jnp.nan]]), 1, 0)
    log.drain()
    assert len(caplog.records) == 12
    assert caplog.records[-1].message == (
        "step 1: the update would put NaN into the parameters and was dropped (200 so far): "
        "the gradient is not finite in w"
    )


BAR = """
import logging
from tests.helpers import make_trainer
trainer = make_trainer()
trainer.epoch(0)
logging.getLogger("elsewhere").warning("between two calls")
def plot(run, outputs, batch):
    logging.getLogger("elsewhere").warning("said in a plot")
make_trainer(plot_pipe=plot, plot_every=3).train()
"""


def in_terminal(columns, tmp_path):
    """What a terminal shows of `BAR`, line by line, with what was drawn over left out."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, columns))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    for name in ("TQDM_DISABLE", "COLUMNS"):
        env.pop(name, None)
    process = subprocess.Popen([sys.executable, "-c", BAR], cwd=tmp_path, env=env, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(master, 4096):
            shown += part
    assert process.wait() == 0, shown.decode()
    return [line.split("\r") for line in shown.decode().replace("\r\n", "\n").split("\n")]


@pytest.mark.processes
@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_shows_one_bar_that_fits_and_that_nothing_breaks(columns, tmp_path):
    lines = in_terminal(columns, tmp_path)
    assert [part for line in lines for part in line if "|" in part and len(part) > columns] == []
    (last,) = [line[-1] for line in lines if " 10/10, " in line[-1]]
    wanted = ["loss", "steps/s", "data"] + (["items/s", "rate"] if columns == 200 else [])
    assert re.search(r"^epoch 2/2: 100%\|.+\| 10/10, ", last), last
    assert [name for name in wanted if name not in last] == [], last
    said = [line[-1].strip() for line in lines if "said in a plot" in line[-1]]
    assert said == ["said in a plot"] * 3


@pytest.mark.processes
def test_a_file_gets_a_line_at_the_end_of_a_run_and_one_a_minute(tmp_path):
    shown = run_script(BAR, tmp_path, env={"TQDM_DISABLE": None}).stderr.splitlines()
    lines = [line for line in shown if line.startswith("epoch ")]
    assert [line.partition(", ")[0] for line in lines] == ["epoch 1/2: 5/10 (50%)", "epoch 2/2: 10/10 (100%)"]
    assert re.search(r", loss [\d.]+, [\d.]+ steps/s, data \d+%, [\d.]+k? items/s, rate [\d.]+", lines[0]), lines
    assert not [line for line in shown if "\r" in line]


def test_a_line_is_written_a_minute_after_the_last_one(monkeypatch, capsys):
    monkeypatch.setattr("learnax.log.bar._LINE_S", 0.0)
    monkeypatch.delenv("TQDM_DISABLE")
    lines = progress_bar(100, 20, shown=True, what="epoch 1/2")
    lines.advance(40)
    lines.tell(["loss 1"])
    lines.close()
    written = capsys.readouterr().err.splitlines()
    assert len(written) == 2
    assert re.fullmatch(r"epoch 1/2: 60/100 \(60%\), loss 1, [\d:]+ left", written[0])


def test_this_is_no_notebook():
    assert not in_notebook()


class Heavy(nn.Module):
    """A model whose steps keep the device busy for longer than the host takes to send them."""

    @nn.compact
    def __call__(self, x, y=None):
        def body(_, z):
            return jnp.sin(z) + 1e-3 * z

        return nn.Dense(3)(jax.lax.scan(lambda z, _: (body(0, z), None), jnp.tile(x, 64), None, length=200)[0][:8])


@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 1}, {"plot_every": 3, "plot_pipe": lambda *_: None}])
def test_update_times_sum_to_all_of_the_time_that_the_devices_were_waited_for(options):
    trainer = make_trainer(model=Heavy(), num_epochs=2, **options)
    trainer.train()
    waited, first = trainer.phases.drain.seconds, trainer.startup["first step"]
    assert sum(trainer.metrics["train/update_time"]) >= 0.999 * (waited + first) > 0


# ---- how far ahead


def test_the_host_runs_ahead_by_a_tenth_of_a_second_and_no_further(monkeypatch):
    clock = iter(np.arange(1, 100, 0.0625))
    monkeypatch.setattr("learnax.log.pace.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    pace = Pace(2, fixed=False)
    assert (pace.room, pace.left) == (2, 2)
    pace.waited(5)  # from when is not known
    assert pace.room == 2
    pace.waited(5)  # 12.5 ms each
    assert (pace.room, pace.left) == (8, 4)
    pace.waited(1000)
    assert (pace.room, pace.left) == (32, 16)
    pace.waited(1)
    assert (pace.room, pace.left) == (2, 2)
    for pace in (Pace(0, fixed=False), Pace(2, fixed=True)):
        for _ in range(3):
            pace.waited(100)
        assert pace.room == pace.left == (2 if pace.room else 0)
