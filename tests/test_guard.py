"""The NaN guard as GPUs have it, a select between two states: forced on a CPU, it keeps all that the loop keeps."""

import jax
import numpy as np
import optax
import pytest

from learnax.loss import LossPipe
from learnax.models import Linen
from tests.helpers import (
    MLP,
    MemoryRun,
    Noisy,
    Poisonable,
    StopAt,
    assert_trees_close,
    assert_trees_equal,
    host,
    make_data,
    make_trainer,
)


@pytest.fixture
def selecting(monkeypatch):
    monkeypatch.setattr("learnax.engine.plan.selects", lambda platform: True)


def poisoned():
    data = make_data(43)
    for number in (15, 31):
        data[number][1] = np.full(3, 7, np.float32)
    return data


OPTIONS = {
    "adam": {},
    "a known one": {"optimizer": optax.adamw(1e-2)},
    "an unknown one": {"optimizer": optax.adafactor(1e-2)},
    "huge gradients": {"max_grad": 1e30},
    "averaged": {"ema": 0.9, "accumulate_steps": 2},
    "halves": {"model": Linen(MLP(), precision="fp16")},
    "patterns": {"optimizer": {"Dense_1/.*": optax.sgd(0.1), ".*": None}},
}

_MARKS = {"adam": []} | {name: [pytest.mark.thorough] for name in ("an unknown one", "averaged", "halves")}


@pytest.mark.parametrize("name", [pytest.param(name, marks=_MARKS.get(name, [pytest.mark.soak])) for name in OPTIONS])
def test_both_guards_train_alike_and_drop_the_same_updates(name, monkeypatch):
    ends = []
    for selected in (False, True):
        monkeypatch.setattr("learnax.engine.plan.selects", lambda platform, selected=selected: selected)
        options = {"losses": LossPipe([Poisonable()]), "train_dataset": poisoned(), "num_epochs": 3} | OPTIONS[name]
        trainer = make_trainer(**options)
        trainer.train()
        (program,) = [program for program in trainer.engine.programs.values() if program.kind == "train"]
        ends.append((host(trainer.train_state), trainer.metrics, program.compiled.as_text()))
    (loop, expected, _), (select, metrics, _) = ends
    assert_trees_close(select, loop, rtol=1e-5)
    assert metrics["train/has_nan"] == expected["train/has_nan"]
    assert sum(metrics["train/has_nan"]) + sum(metrics.get("train/overflow", [])) > 0
    np.testing.assert_allclose(metrics["train/loss"], expected["train/loss"], rtol=1e-4)


@pytest.mark.usefixtures("selecting")
@pytest.mark.parametrize("count", [1, 4])
def test_a_selecting_run_has_the_same_bits_however_it_is_cut_and_resumed(count, registry_path):
    options = {"model": Noisy(), "devices": jax.devices()[:count], "train_dataset": make_data(43)}
    straight = make_trainer(**options, steps_per_execution=5)
    straight.train()
    kept = {"registry": "select", "run": MemoryRun(), "save_every": 2}
    stopped = make_trainer(**options, **kept, steps_per_execution=5)
    stopped.hooks.saves.append(StopAt(7))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make_trainer(**options, **kept, steps_per_execution=5, load_checkpoint=True)
    resumed.train()
    assert_trees_equal(resumed.train_state, straight.train_state)
    assert resumed.metrics["train/loss"] == straight.metrics["train/loss"]


@pytest.mark.usefixtures("selecting")
@pytest.mark.parametrize("options", [{}, {"optimizer": optax.adafactor(1e-2)}], ids=["adam", "unknown"])
def test_a_step_that_selects_has_no_branch_and_no_loop_of_an_unknown_count(options):
    trainer = make_trainer(steps_per_execution=1, compile=True, **options)
    (program,) = [program for program in trainer.engine.programs.values() if program.kind == "train"]
    text = program.compiled.as_text()
    assert " conditional(" not in text
    assert text.count(" while(") == text.count("known_trip_count")
