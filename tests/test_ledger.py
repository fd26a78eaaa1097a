"""Where a run's time goes: known times are found in their rows, and the rows sum to the whole."""

import dataclasses
import json
import os
import time

import jax
import numpy as np
import pytest

from learnax.profiling.costs import Costs, amount, costs_of, memory_of, peak_of
from learnax.profiling.ledger import START, TITLES, Ledger, Setting
from learnax.profiling.phases import MarkedPhase, Phases
from learnax.registry import Registry
from tests.helpers import MemoryRun, make_data, make_trainer, run_script


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""

    class Clock:
        now = 100.0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr("learnax.profiling.phases.time.perf_counter", clock)
    return clock


def test_a_phases_time_is_its_own_and_all_sum_to_the_whole(clock):
    phases = Phases(imported=3.0)
    clock.now += 1
    phases.ready()
    clock.now += 50  # between two calls of the trainer: nobody's
    with phases.other:
        clock.now += 2
        with phases.dispatch:
            clock.now += 4
            with phases.compile:
                clock.now += 8
            clock.now += 16
        clock.now += 32
        assert phases.seconds()["other"] == 34  # also in the midst of it
        assert phases.current is phases.other
    expected = {"import": 3, "init": 1, "other": 34, "dispatch": 20, "compile": 8}
    assert {name: seconds for name, seconds in phases.seconds().items() if seconds} == expected
    assert list(phases.seconds()) == list(TITLES)


def test_what_is_raised_inside_leaves_the_phases_in_order(clock):
    phases = Phases()
    phases.ready()

    def broken():
        yield 1
        clock.now += 2
        raise KeyError

    def train():
        with phases.other:
            for _ in phases.waiting(phases.data, broken()):
                clock.now += 1

    with pytest.raises(KeyError):
        train()
    assert phases.seconds()["data"] == 2
    assert phases.seconds()["other"] == 1
    assert not phases.outer


def test_marks_see_each_phase_begin_and_end():
    class Mark:
        def __init__(self):
            self.seen = []

        def push(self, name):
            self.seen.append(name)

        def pop(self):
            self.seen.append("end")

    mark = Mark()
    phases = Phases(marks=[mark])
    with phases.save, pytest.raises(KeyError), phases.drain:
        raise KeyError
    assert mark.seen == ["save", "drain", "end", "end"]
    assert isinstance(phases.save, MarkedPhase)
    assert not isinstance(Phases().save, MarkedPhase)


class Slow:
    """A dataset whose data take their time."""

    def __init__(self, data, seconds):
        self._data, self._seconds = data, seconds

    def __len__(self):
        return len(self._data)

    def __getitem__(self, index):
        time.sleep(self._seconds)
        return self._data[index]


class SlowRun(MemoryRun):
    def log(self, values):
        time.sleep(0.02)
        super().log(values)


@pytest.mark.thorough
def test_known_times_are_found_in_their_rows_and_the_rows_sum_to_the_wall_time():
    def plot(run, outputs, batch):
        time.sleep(0.3)

    run = SlowRun()
    began = time.perf_counter()
    trainer = make_trainer(
        train_dataset=Slow(make_data(41), 0.01),
        val_datasets=[Slow(make_data(6, 1), 0.05)],
        run=run,
        plot_pipe=plot,
        plot_every=5,
        steps_per_execution=1,
    )
    trainer.train()
    wall = time.perf_counter() - began
    ledger = trainer.ledger
    assert ledger.wall - ledger.seconds["import"] == pytest.approx(wall, rel=0.01)
    assert sum(ledger.seconds.values()) == ledger.wall
    assert list(ledger.seconds) == list(TITLES)
    # 2 epochs of 40 data; 6 data each validation; a plot in each epoch; 15 rows or so that the run logs late.
    assert ledger.seconds["data"] == pytest.approx(0.8, abs=0.15)
    assert ledger.seconds["validate, data"] == pytest.approx(0.6, abs=0.1)
    assert ledger.seconds["plot"] == pytest.approx(0.6, abs=0.1)
    # Rows are logged while data are read: what is waited for is less than all of it, but for the last.
    assert 0.02 < ledger.seconds["log"] < 0.02 * len(run.rows) + 0.1
    assert ledger.steps == 10


def test_time_waited_for_a_slow_log_is_loggings():
    run = SlowRun()
    trainer = make_trainer(run=run)
    trainer.train()
    assert trainer.ledger.seconds["log"] == pytest.approx(0.02 * len(run.rows), rel=0.2)


def test_checkpoints_and_what_the_model_costs_are_in_the_ledger(devices, tmp_path):
    trainer = make_trainer(registry=Registry("tests", tmp_path), save_every=5, val_datasets=[make_data(9)])
    trainer.train()
    assert trainer.ledger.seconds["save"] > 0
    assert set(trainer.ledger.programs) == {"train", "evaluate"}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_flops_are_those_of_the_matrix_products(accumulate):
    from tests.helpers import MLP

    trainer = make_trainer(model=MLP(512), train_dataset=make_data(64), accumulate_steps=accumulate)
    trainer.train()
    products = 6 * (8 * 512 + 512 * 3) - 2 * 8 * 512  # forward and twice backward, but not to the data
    train = trainer.ledger.programs["train"]
    # Adam, the guard and the norms are counted beside them, once an update.
    assert 8 * products < train.flops < 8 * products + 40 * (8 * 512 + 512 * 3 + 515) + 8 * 20 * 512
    assert train.reused > sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.train_state)) * 0.99
    assert train.memory >= train.reused
    ledger = trainer.ledger
    assert ledger.flops_per_second == pytest.approx(train.flops * accumulate * ledger.steps / ledger.training)


def make_ledger(seconds, **setting):
    given = {"platform": "gpu", "room": 16, "batches": 1, "num_workers": 0, "overlaps": True}
    return Ledger(
        dict.fromkeys(TITLES, 0.0) | seconds, 100, {"train": Costs(3e9, 1e9, 10**9, 10**8)}, Setting(**given | setting)
    )


@pytest.mark.parametrize(
    ("seconds", "setting", "verdict"),
    [
        ({"data": 38, "other": 5, "dispatch": 57}, {"platform": "cpu"}, "38% of the time waits for data: try num_wo"),
        ({"data": 60, "dispatch": 40}, {"num_workers": 64}, "60% of the time waits for data: make reading a datum ch"),
        # Read while the devices compute, and the devices are waited for: reading holds nothing back.
        ({"data": 38, "drain": 62}, {}, "nothing on the host holds this run back: 62% of the time is the devices' own"),
        ({"data": 38, "drain": 62}, {"overlaps": False}, "38% of the time waits for data"),
        (
            {"compile": 30, "import": 5, "drain": 65},
            {},
            "35% of the time is the start, most of it compile: a second st",
        ),
        (
            {"dispatch": 80, "drain": 5},
            {"room": 1},
            "94% of the time is the host's, between dispatches: try steps_per_",
        ),
        ({"dispatch": 80, "drain": 5}, {}, "94% of the time is the host's, between dispatches: the host's own work is"),
        ({"dispatch": 95, "other": 5}, {"platform": "cpu"}, "nothing on the host holds this run back: 95% of the ti"),
        ({"log": 50, "dispatch": 50}, {"platform": "cpu"}, "50% of the time is logging: the run takes longer to log"),
        ({"save": 20, "drain": 80}, {}, "20% of the time is held by checkpoints: save less often (save_every, check"),
        ({"validate": 40, "drain": 60}, {}, "40% of the time is validation: validate less often (val_every)"),
        ({"validate": 4, "validate, data": 36, "drain": 60}, {}, "40% of the time is validation: try num_workers="),
        (
            {"plot": 40, "drain": 60},
            {},
            "40% of the time goes into plots and samples: make them less often (plot_every",
        ),
    ],
)
def test_the_verdict_names_what_holds_the_run_back(seconds, setting, verdict):
    seconds = {"other": 0.0} | seconds
    if verdict.startswith("94%"):
        verdict = verdict.replace("94%", f"{80 / 85:.0%}")
    assert make_ledger(seconds, **setting).verdict.startswith(verdict)


def test_the_table_has_a_row_for_each_phase_that_took_time_and_a_verdict():
    ledger = make_ledger({"data": 38.0, "drain": 1.0, "dispatch": 61.0}, peak=("H200", 989e12))
    assert str(ledger).splitlines() == [
        "waiting for data           38.000 s    38%",
        "dispatch                   61.000 s    61%",
        "waiting for the device      1.000 s     1%",
        "in all                    100.000 s  100 steps",
        "train: 3 GFLOP a batch, 1 GB read and written; 1 GB of memory, 100 MB of it updated in place",
        "while training, each device makes 3 GFLOP/s, 0.0% of what a H200 can at most, 989 TFLOP/s in bfloat16",
        ledger.verdict,
    ]
    summary = ledger.summary()
    assert summary["ledger/data"] == 38
    assert summary["ledger/wall"] == 100
    assert summary["ledger/train flops"] == 3e9
    assert summary["ledger/utilisation"] == pytest.approx(3e9 / 989e12)
    assert set(START) < set(TITLES)


def test_peaks_are_found_by_the_devices_own_name():
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    names = {
        "NVIDIA H200": 989e12,
        "NVIDIA H200 NVL": 835e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L4": 121e12,
        "NVIDIA GH200 480GB": 989e12,
        "TPU v5 lite": 197e12,
        "TPU v5p": 459e12,
    }
    assert {name: peak_of(Device(name))[1] for name in names} == names
    assert peak_of(Device("cpu")) is None
    assert peak_of(jax.devices()[0]) is None


def test_a_cpu_devices_memory_is_its_share_of_the_machines():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_of(jax.devices()[0]) == total // 4


def test_a_backend_that_tells_nothing_costs_nothing():
    class Compiled:
        def cost_analysis(self):
            raise NotImplementedError

    assert costs_of(Compiled()) == Costs(0.0, 0.0, 0, 0)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0, "B", "0 B"), (999, "B", "999 B"), (999.6, "B", "1 kB"), (1.2096e9, "B", "1.21 GB"), (4.1e15, "B", "4.1 PB"),
     (1.5e-5, "s", "15 µs"), (0.0153, "s", "15.3 ms"), (12.5, "s", "12.5 s"), (86400, "s", "86,400 s")],
)  # fmt: skip
def test_amounts_have_three_digits_and_a_prefix(value, unit, text):
    assert amount(value, unit) == text


SHOWN = """
from tests.helpers import make_trainer
trainer = make_trainer()
trainer.train()
print(trainer.ledger.verdict)
"""


@pytest.mark.processes
@pytest.mark.parametrize("disabled", [None, "1"])
def test_the_table_is_shown_where_the_progress_bar_is(tmp_path, disabled):
    result = run_script(SHOWN, tmp_path, env={"TQDM_DISABLE": disabled})
    lines = result.stderr.splitlines()
    if disabled:
        assert lines == []
    else:
        assert lines[-1] == result.stdout.strip()
        assert any(line.startswith("start: import") for line in lines)


@pytest.mark.processes
def test_the_ledger_goes_into_the_runs_summary(registry_path):
    run = Registry("ledgers").new_run()
    trainer = make_trainer(run=run)
    trainer.train()
    kept = {name: run.summary[name] for name in trainer.ledger.summary()}
    run.finish()
    assert kept["ledger/steps"] == 10
    assert kept["ledger/wall"] == pytest.approx(trainer.ledger.wall, rel=0.05)


def test_a_summary_that_raises_is_told_of(caplog):
    class Run(MemoryRun):
        class summary:  # noqa: N801
            @staticmethod
            def update(values):
                raise OSError("no network")

    make_trainer(run=Run()).train()
    assert caplog.messages == ["run.summary.update raised OSError: no network"]


def test_an_interrupted_run_has_a_ledger_too():
    from tests.helpers import StopAt

    trainer = make_trainer(steps_per_execution=1)
    trainer.hooks.saves.append(StopAt(3))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.ledger.steps == 3
    trainer.train()
    assert trainer.ledger.steps == 10
    assert json.dumps(trainer.ledger.summary())
    assert dataclasses.is_dataclass(trainer.ledger)
    assert np.isfinite(trainer.ledger.wall)
