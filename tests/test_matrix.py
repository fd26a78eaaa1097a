"""Each kind of data, on 1, 2 and 4 devices, of one process and of two, read here and by workers, killed: one run.

All of them are the same 43 data, in the same orders of three epochs. So all runs on as many devices end with the same
bits, and those on others have seen the same batches.
"""

import json
import random
import signal

import numpy as np
import pytest

from tests.cells import CELLS, EPOCHS, SAVE_EVERY, cell
from tests.helpers import assert_trees_close, assert_trees_equal, make_trainer
from tests.peers import together

pytestmark = [pytest.mark.processes, pytest.mark.thorough, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def alone():
    """A run of one process, on one device, of a list, that nothing stopped."""
    trainer = make_trainer(**cell("list"))
    trainer.train()
    return trainer


def seen(metrics):
    """What of the metrics says which data each step was trained on."""
    return [metrics[f"train/{name}"] for name in ("lowest", "highest", "middle")]


LAYOUTS = [(2, 2), *(pytest.param(*layout, marks=pytest.mark.soak) for layout in [(1, 1), (1, 4), (2, 1)])]
"""Processes, and devices of each."""


@pytest.mark.parametrize(("processes", "devices"), LAYOUTS)
def test_every_kind_of_data_gives_the_same_run_after_a_kill(alone, tmp_path, processes, devices):
    assert [len(values) for values in seen(alone.metrics)] == [5 * EPOCHS] * 3
    # Where processes may take part, their sums are rounded otherwise than those of devices alone.
    asked = {"registry": str(tmp_path / "w"), "kills": {"list": 0}}
    ended = together("cells", tmp_path / "p", processes, devices, env={"PEERS": json.dumps(asked)})
    _, metrics, state = ended[0].results["runs"]["list"]
    np.testing.assert_equal(seen(metrics), seen(alone.metrics))
    assert_trees_close(state.params, alone.train_state.params)

    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    kills = {name: chance.randrange(2, 5 * EPOCHS) for name in CELLS}
    asked = {"registry": str(tmp_path / "r"), "kills": kills}
    results, deaths = [{} for _ in range(processes)], 0
    for _ in range(len(CELLS) + 1):
        ended = together(
            *("cells", tmp_path / "p", processes, devices),
            env={"PEERS": json.dumps(asked), "LEARNAX_COMPILATION_CACHE": str(tmp_path / "cache")},
            codes=(0, -signal.SIGKILL, -signal.SIGABRT),
        )
        # The loss of the first process ends the other one, where that does not kill itself before; nothing else may.
        ends = {one.code for one in ended}
        assert -signal.SIGKILL in ends or -signal.SIGABRT not in ends, f"seed {seed}: {ended}"
        for mine, one in zip(results, ended, strict=True):
            mine |= one.results.get("runs", {})
        if all(one.code == 0 for one in ended):
            break
        deaths += 1
    assert deaths == len(CELLS), f"seed {seed}"
    for each in results:
        assert set(each) == set(CELLS)
        for name, (begins, own, after) in each.items():
            what = f"{name}, seed {seed}: killed after step {kills[name]}, went on from {begins}"
            assert begins == (kills[name] - 1) // SAVE_EVERY * SAVE_EVERY, what
            assert seen(own) == seen(metrics), what
            assert own["train/loss"] == metrics["train/loss"], what
            assert_trees_equal(after.params, state.params)
            assert_trees_equal(after.opt_state, state.opt_state)
