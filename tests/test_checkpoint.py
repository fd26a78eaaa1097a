"""The checkpointer by itself, on real folders: what it saves when, what it keeps, what a name loads."""

import logging
import math
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learnax.checkpoint import Checkpointer, SaveError
from learnax.checkpoint.folder import Folder
from learnax.step.optimizers import adam
from learnax.step.state import TrainState
from tests.helpers import ROOT, assert_trees_equal

RESUME = {
    "rng": np.array([3, 4], np.uint32),
    "position": {"epoch": 1, "batch": 2, "marks": {"train/loss": 5}},
    "history": {"train/loss": [0.1, 1 / 3, math.nan], "val/loss": [2.0]},
}


def make_params(scale=1.0):
    kernel = jnp.arange(6, dtype=jnp.float32).reshape(2, 3) * scale
    return {"Dense_0": {"kernel": kernel, "bias": jnp.full(3, scale, jnp.bfloat16)}, "scale": jnp.float32(scale)}


def make_state(step, optimizer=None):
    """A state whose parameters tell its step, and whose optimiser's state is not all zeros."""
    params = make_params(float(step))
    optimizer = optimizer or adam(1e-2)
    with jax.numpy_dtype_promotion("standard"):  # optax asks for the highest dtype of all
        opt_state = optimizer.init(params)
    return TrainState(params, jax.tree.map(lambda leaf: leaf + jnp.ones_like(leaf), opt_state), jnp.int32(step))


@pytest.fixture
def make(tmp_path):
    """Checkpointers on one folder, all let go of at the end."""
    made = []

    def one(**options):
        made.append(Checkpointer.at(tmp_path / "checkpoints", **options))
        return made[-1]

    yield one
    for checkpointer in made:
        checkpointer.close()


def step_of(loaded):
    """The step that a loaded checkpoint is of, by its number and by its parameters alike."""
    assert float(loaded["state"].params["scale"]) == loaded["step"] == int(loaded["state"].step)
    return loaded["step"]


def saves_in(path):
    """What is on disk: folders of saves, and whatever else is no longer wanted."""
    rest = [entry.name for entry in path.iterdir() if not entry.name.isdecimal()]
    assert rest == ["index.json"]
    return sorted(int(entry.name) for entry in path.iterdir() if entry.name.isdecimal())


# ---- when


def test_the_latest_and_numbered_ones_have_their_own_cadence(make):
    checkpointer = make(save_every=2, checkpoint_every=3)
    assert [step for step in range(8) if checkpointer.should_save_latest(step)] == [2, 4, 6]
    assert [step for step in range(8) if checkpointer.should_save_numbered(step)] == [3, 6]
    never = make(save_every=None, checkpoint_every=None)
    assert not any(never.should_save_latest(step) or never.should_save_numbered(step) for step in range(8))


def test_maybe_save_saves_what_is_due_and_says_whether_it_did(make):
    checkpointer = make(save_every=2, checkpoint_every=3)
    saved = [step for step in range(8) if checkpointer.maybe_save_checkpoints(make_state(step), step, {"loss": 1.0})]
    assert saved == [2, 3, 4, 6]
    assert list(checkpointer.list_available_checkpoints()) == ["latest", 3, 4, 6]
    checkpointer.close()
    assert len(saves_in(checkpointer.path)) == 3  # step 6 once, though both were due
    assert checkpointer.load_latest()["metrics"] == {"loss": 1.0}


# ---- what comes back


@pytest.mark.parametrize("rate", [1e-2, optax.linear_schedule(1e-2, 1e-3, 10)], ids=["rate", "schedule"])
@pytest.mark.parametrize("targeted", [True, False], ids=["target", "no target"])
def test_a_state_comes_back_as_it_was_in_its_containers(make, rate, targeted):
    state = make_state(7, adam(rate))
    checkpointer = make()
    checkpointer.save_latest(state, 7)
    loaded = checkpointer.load_latest(target=jax.eval_shape(lambda: state) if targeted else None)["state"]
    assert type(loaded) is TrainState
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    assert_trees_equal(loaded, state)
    assert jax.tree.map(lambda leaf: leaf.dtype, loaded.params) == jax.tree.map(lambda leaf: leaf.dtype, state.params)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves((loaded.params, loaded.opt_state)))
    with jax.numpy_dtype_promotion("standard"):
        adam(rate).update(loaded.params, loaded.opt_state)  # the optimiser takes it


@pytest.mark.parametrize("targeted", [True, False], ids=["target", "no target"])
def test_all_that_a_state_carries_comes_back(make, targeted):
    plain = make_state(7, adam(1e-2))
    state = plain._replace(model_state={"batch_stats": {"mean": jnp.arange(3.0)}}, ema=plain.params)
    checkpointer = make()
    checkpointer.save_latest(state, 7)
    loaded = checkpointer.load_latest(target=jax.eval_shape(lambda: state) if targeted else None)["state"]
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    assert_trees_equal(loaded, state)
    with pytest.raises(ValueError, match="model_state/batch_stats/mean: in the checkpoint only"):
        checkpointer.load_latest(target=jax.eval_shape(lambda: plain))


def test_another_optimisers_state_comes_back_in_the_targets_containers_or_as_dicts(make):
    state = make_state(1, optax.chain(optax.clip(1.0), optax.sgd(1e-2, momentum=0.9)))
    checkpointer = make()
    checkpointer.save_latest(state, 1)
    loaded = checkpointer.load_latest(target=state)["state"]
    assert jax.tree.structure(loaded.opt_state) == jax.tree.structure(state.opt_state)
    assert_trees_equal(loaded, state)
    plain = checkpointer.load_latest()["state"]
    assert_trees_equal(plain.params, state.params)
    assert_trees_equal(plain.opt_state["1"]["0"]["trace"], state.opt_state[1][0].trace)


def test_a_target_without_an_optimiser_reads_the_parameters_alone(make):
    checkpointer = make()
    checkpointer.save_latest(make_state(3), 3)
    state = checkpointer.load_latest(target=TrainState(make_params(), None))["state"]
    assert state.opt_state is None
    assert_trees_equal(state.params, make_params(3.0))


def test_a_load_tells_step_and_time_and_leaves_out_metrics_that_were_not_saved(make):
    checkpointer = make()
    before = time.time()
    checkpointer.save_checkpoint(make_state(4), 4)
    loaded = checkpointer.load_checkpoint(4)
    assert set(loaded) == {"state", "step", "time", "number", "resume"}
    assert step_of(loaded) == 4
    assert before <= loaded["time"] <= time.time()
    assert loaded["resume"] is None


def test_step_and_metrics_may_be_scalars_of_any_library(make):
    state = make_state(4)
    checkpointer = make()
    checkpointer.save_latest(state, state.step, {"loss": jnp.float32(0.5), "nan": np.float32("nan"), "n": 3})
    loaded = checkpointer.load_latest()
    np.testing.assert_equal(loaded["metrics"], {"loss": 0.5, "nan": math.nan, "n": 3.0})
    assert step_of(loaded) == 4


@pytest.mark.parametrize("metrics", [None, {"loss": 0.25}], ids=["no metrics", "metrics"])
def test_the_resume_point_comes_back_bit_for_bit(make, metrics):
    checkpointer = make()
    checkpointer.save_checkpoint(make_state(5), 5, metrics, resume=RESUME)
    loaded = checkpointer.load_checkpoint(5)
    resume = loaded["resume"]
    np.testing.assert_array_equal(resume["rng"], RESUME["rng"])
    assert resume["position"] == RESUME["position"]
    np.testing.assert_equal({name: list(values) for name, values in resume["history"].items()}, RESUME["history"])
    assert loaded.get("metrics") == metrics


def test_a_state_without_parameters_can_be_saved(make):
    checkpointer = make()
    state = TrainState({}, optax.EmptyState(), jnp.int32(1))
    checkpointer.save_latest(state, 1)
    assert_trees_equal(checkpointer.load_latest(target=state)["state"], state)


def test_the_state_that_was_saved_may_be_donated_right_after(make):
    checkpointer = make()
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + jnp.ones_like(leaf), state), donate_argnums=0)
    state = make_state(2)
    expected = jax.tree.map(np.array, state)
    checkpointer.save_latest(state, 2)
    step(state)
    assert_trees_equal(checkpointer.load_latest(target=expected)["state"], expected)


# ---- what is kept


def test_a_later_latest_takes_the_place_of_the_one_before(make):
    checkpointer = make()
    for step in (1, 2, 3):
        checkpointer.save_latest(make_state(step), step)
    checkpointer.close()
    assert len(saves_in(checkpointer.path)) == 2  # and the one before, should it be damaged
    assert list(checkpointer.list_available_checkpoints()) == ["latest", 2, 3]
    assert step_of(checkpointer.load_latest()) == 3


def test_of_two_saves_at_one_step_the_later_one_counts(make):
    checkpointer = make(max_to_keep=2)
    for step, loss in ((1, 0.0), (2, 1.0), (2, 2.0)):
        checkpointer.save_checkpoint(make_state(step), step, {"loss": loss})
    assert checkpointer.load_latest()["metrics"] == {"loss": 2.0}
    assert checkpointer.load_checkpoint(2)["metrics"] == {"loss": 2.0}
    assert list(checkpointer.list_available_checkpoints()) == ["latest", 1, 2]  # two of two steps
    checkpointer.save_latest(make_state(2), 2, {"loss": 3.0})
    assert checkpointer.load_latest()["metrics"] == checkpointer.load_checkpoint(2)["metrics"] == {"loss": 3.0}
    checkpointer.close()
    assert len(saves_in(checkpointer.path)) == 3


@pytest.mark.parametrize(("most", "kept"), [(None, [1, 2, 3, 4]), (2, [3, 4]), (1, [4])])
def test_only_the_newest_numbered_ones_are_kept(make, most, kept):
    checkpointer = make(max_to_keep=most)
    for step in (1, 2, 3, 4):
        checkpointer.save_checkpoint(make_state(step), step)
    checkpointer.save_latest(make_state(5), 5)
    checkpointer.close()
    assert list(checkpointer.list_available_checkpoints()) == ["latest", *kept, 5]
    assert len(saves_in(checkpointer.path)) == len(kept) + 1
    again = make(max_to_keep=most)
    again.save_checkpoint(make_state(6), 6)
    kept = [*kept, 6] if most is None else [*kept, 6][-most:]
    assert list(again.list_available_checkpoints()) == ["latest", *sorted([*kept, 5])]


@pytest.mark.parametrize(
    ("minimize", "values", "best"),
    [(True, [3.0, 1.0, 2.0, 1.0], [1, 2]), (False, [0.1, 0.3, 0.2, 0.3], [1, 2]), (True, [math.nan, 5.0], [2])],
)
def test_the_best_is_kept_through_later_saves(make, minimize, values, best):
    checkpointer = make(keep_best=True, metric_name="val/score", minimize_metric=minimize)
    for step, value in enumerate(values, start=1):
        metrics = {"val/score": value, "other": 0.0}
        better = checkpointer.update_best_checkpoint(make_state(step), value, step, metrics=metrics)
        assert better is (step in best)
        checkpointer.save_latest(make_state(step + 10), step + 10)
    loaded = checkpointer.load_best()
    assert step_of(loaded) == best[-1]
    assert loaded["metrics"] == {"val/score": values[best[-1] - 1], "other": 0.0}
    last = 10 + len(values)
    spare = [last - 1] if best[-1] < len(values) else []
    assert list(checkpointer.list_available_checkpoints()) == ["latest", "best", best[-1], *spare, last]
    checkpointer.close()
    assert len(saves_in(checkpointer.path)) == 2 + len(spare)
    again = make(keep_best=True, metric_name="val/score", minimize_metric=minimize)
    assert not again.update_best_checkpoint(make_state(20), values[best[-1] - 1], 20)


def test_a_fresh_run_is_not_judged_by_the_best_of_the_one_before_it(make):
    before = make(keep_best=True)
    assert before.update_best_checkpoint(make_state(5), 0.1, 5)
    before.wait()
    before.close()
    again = make(keep_best=True)
    again.leave_behind(None)
    assert again.update_best_checkpoint(make_state(1), 0.5, 1)
    again.wait()
    assert step_of(again.load_best()) == 1
    assert not again.update_best_checkpoint(make_state(2), 0.6, 2)


def test_nothing_is_the_best_without_its_metric_or_without_being_asked_for(make):
    asked = make(keep_best=True)
    assert asked.maybe_save_checkpoints(make_state(1), 1, {"val/rmse": 1.0}) == {}
    assert not asked.update_best_checkpoint(make_state(1), math.nan, 1)
    assert not make().update_best_checkpoint(make_state(1), 1.0, 1)
    assert not asked.path.exists()
    with pytest.raises(TypeError, match=r"takes the value of 'val/loss', a number, but got a dict of metrics$"):
        asked.update_best_checkpoint(make_state(1), {"val/loss": 1.0})
    assert asked.update_best_checkpoint(make_state(1), np.float32(1.0)) is True


# ---- what a name stands for


def test_every_form_of_asking_finds_its_checkpoint(make):
    checkpointer = make(keep_best=True)
    checkpointer.save_checkpoint(make_state(300), 300)
    checkpointer.update_best_checkpoint(make_state(400), 1.0, 400)
    checkpointer.save_latest(make_state(500), 500)
    for latest in (True, -1, np.int64(-1), "3kx81bz0", "latest", "", "-1"):
        assert step_of(checkpointer.load_checkpoint(latest)) == 500
    for numbered in (300, "300", np.int32(300)):
        assert step_of(checkpointer.load_checkpoint(numbered)) == 300
    assert step_of(checkpointer.load_checkpoint("best")) == step_of(checkpointer.load_best()) == 400
    assert step_of(checkpointer.load_checkpoint()) == 500


def test_a_named_one_that_is_missing_is_an_error_with_those_there_are(make):
    checkpointer = make()
    checkpointer.save_checkpoint(make_state(3), 3)
    checkpointer.save_latest(make_state(5), 5)
    for name in (4, 0, -2, "best", "12345678"):
        assert checkpointer.load_checkpoint(name) is None
        with pytest.raises(FileNotFoundError) as error:
            checkpointer.load(name)
        assert str(error.value) == f"no checkpoint '{name}' in {checkpointer.path}; there are: latest, 3, 5"


def test_asking_by_another_type_is_an_error(make):
    for asked in (None, False, 3.0, [3], b"best"):
        with pytest.raises(TypeError) as error:
            make().load_checkpoint(asked)
        expected = f"load_checkpoint must be True, -1, 'best', a step, a path or a run's id, but is {asked!r}"
        assert str(error.value) == expected


def test_reading_where_nothing_was_saved_finds_nothing_and_makes_nothing(make):
    checkpointer = make()
    assert list(checkpointer.list_available_checkpoints()) == []
    asked = (True, "run id", "7", 7, "best")
    assert [checkpointer.load_checkpoint(name) for name in asked] == [None] * 5
    assert checkpointer.load_latest() is checkpointer.load_best() is None
    for name in ("7", 7, "best"):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint '(best|7)' in .*checkpoints; there are: none$"):
            checkpointer.load(name)
    checkpointer.wait()
    checkpointer.close()
    assert not checkpointer.path.exists()


def test_a_checkpoint_that_does_not_fit_names_every_leaf_that_differs(make):
    checkpointer = make()
    checkpointer.save_latest(make_state(1), 1)
    bias, kernel = jnp.zeros(3, jnp.float32), jnp.zeros((2, 4))
    target = TrainState({"Dense_0": {"kernel": kernel, "bias": bias}, "Dense_1": {"bias": bias}}, None)
    with pytest.raises(ValueError, match="does not match") as error:
        checkpointer.load_latest(target=target)
    assert str(error.value) == (
        f"checkpoint {checkpointer.path / '0'} does not match this model and optimiser; leaves that differ (4):\n"
        "  params/Dense_0/bias: bfloat16[3] in the checkpoint, float32[3] in the model\n"
        "  params/Dense_0/kernel: float32[2, 3] in the checkpoint, float32[2, 4] in the model\n"
        "  params/Dense_1/bias: in the model only, float32[3]\n"
        "  params/scale: in the checkpoint only, float32[]"
    )


# ---- folders that something went wrong in


@pytest.mark.processes
def test_a_kill_in_the_middle_of_a_save_leaves_the_one_before(make, tmp_path):
    source = f"""
import os, signal, sys
import jax.numpy as jnp
from learnax.checkpoint import Checkpointer
from learnax.step.state import TrainState

def state(step):
    return TrainState({{"wide": jnp.full((3000, 3000), step), "scale": jnp.float32(step)}}, {{}}, jnp.int32(step))

checkpointer = Checkpointer.at({str(tmp_path / "checkpoints")!r})
checkpointer.save_latest(state(1), 1)
checkpointer.wait()
checkpointer.save_latest(state(2), 2)
while not list(checkpointer.path.glob("1.*tmp*/*")):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert killed.returncode == -9, killed.stderr
    checkpointer = make()
    assert any("tmp" in entry.name for entry in checkpointer.path.iterdir())
    assert list(checkpointer.list_available_checkpoints()) == ["latest", 1]
    assert step_of(checkpointer.load_latest()) == 1
    checkpointer.save_latest(make_state(3), 3)
    checkpointer.close()
    assert saves_in(checkpointer.path) == [0, 1]
    assert list(checkpointer.list_available_checkpoints()) == ["latest", 1, 3]


@pytest.mark.thorough
@pytest.mark.parametrize("text", [None, "", '{"0": [1, tr'], ids=["lost", "empty", "cut short"])
def test_without_its_index_a_folder_says_the_same(make, text):
    options = {"max_to_keep": 2, "keep_best": True}
    checkpointer = make(**options)
    for step in (1, 2):
        checkpointer.save_checkpoint(make_state(step), step)
    checkpointer.update_best_checkpoint(make_state(3), 1.0, 3)
    checkpointer.save_latest(make_state(4), 4)
    checkpointer.close()
    index = checkpointer.path / "index.json"
    index.unlink() if text is None else index.write_text(text)

    again = make(**options)
    assert list(again.list_available_checkpoints()) == ["latest", "best", 1, 2, 3, 4]
    assert step_of(again.load_latest()) == 4
    assert [step_of(again.load_checkpoint(name)) for name in (1, "2", "best")] == [1, 2, 3]
    saver = make(**options)
    assert not saver.update_best_checkpoint(make_state(5), 2.0, 5)
    saver.save_latest(make_state(5), 5)
    assert list(saver.list_available_checkpoints()) == ["latest", "best", 1, 2, 3, 4, 5]
    saver.save_checkpoint(make_state(6), 6)
    saver.close()
    assert list(make().list_available_checkpoints()) == ["latest", "best", 2, 3, 5, 6]


def test_a_past_that_was_left_is_moved_aside_and_can_still_be_read(make, tmp_path, caplog):
    checkpointer = make()
    for step in (1, 2, 3):
        checkpointer.save_checkpoint(make_state(step), step, {"loss": 0.0})
    number = checkpointer.load_checkpoint(2)["number"]
    checkpointer.close()

    goes_on = make()
    goes_on.leave_behind(number)
    assert list(goes_on.list_available_checkpoints()) == ["latest", 1, 2, 3]  # until it saves
    with caplog.at_level(logging.WARNING, "learnax"):
        goes_on.save_checkpoint(make_state(3), 3, {"loss": 1.0})
        goes_on.wait()
    aside = tmp_path / "checkpoints.1"
    assert caplog.messages == [f"1 checkpoint(s) of an earlier run moved to {aside}"]
    assert list(goes_on.list_available_checkpoints()) == ["latest", 1, 2, 3]
    assert goes_on.load_checkpoint(3)["metrics"] == {"loss": 1.0}
    goes_on.close()

    fresh = make()
    fresh.leave_behind(None)
    fresh.save_latest(make_state(1), 1)
    assert list(fresh.list_available_checkpoints()) == ["latest", 1]
    assert list(Checkpointer.at(aside).list_available_checkpoints()) == ["latest", 3]
    assert Checkpointer.at(aside).load_checkpoint(3)["metrics"] == {"loss": 0.0}
    assert list(Checkpointer.at(tmp_path / "checkpoints.2").list_available_checkpoints()) == ["latest", 1, 2, 3]


def test_a_kill_after_a_past_was_left_leaves_no_word_of_it(make, monkeypatch):
    checkpointer = make(keep_best=True)
    checkpointer.save_checkpoint(make_state(1), 1)
    checkpointer.update_best_checkpoint(make_state(2), 1.0, 2)
    checkpointer.close()
    goes_on = make()
    goes_on.leave_behind(0)
    with monkeypatch.context() as killed:
        killed.setattr(Folder, "add", lambda self, number, entry: None)  # between the save and its entry
        goes_on.save_latest(make_state(7), 7)
        goes_on.wait()
    assert list(make().list_available_checkpoints()) == ["latest", 1, 7]
    assert step_of(make().load_checkpoint(7)) == 7


def test_a_save_that_fails_in_the_background_is_told_of(make, caplog):
    checkpointer = make()
    checkpointer.save_latest(make_state(1), 1)
    checkpointer.wait()
    for step in (2, 3):
        checkpointer.save_latest(make_state(step), step, resume={"position": {"not": "json"}.keys()})
        with pytest.raises(SaveError) as raised:
            checkpointer.wait()
        assert str(raised.value) == (
            f"the checkpoint of step {step} could not be saved: TypeError: Object of type dict_keys is not JSON "
            f"serializable; the newest whole one is {checkpointer.path / '0'}"
        )
        assert isinstance(raised.value.__cause__, TypeError)
    assert [line.partition(";")[0] for line in caplog.messages] == [
        "the checkpoint of step 2 could not be saved: TypeError: Object of type dict_keys is not JSON serializable"
    ]
    assert step_of(make().load_latest()) == 1
    checkpointer.save_latest(make_state(4), 4)
    checkpointer.wait()
    assert step_of(make().load_latest()) == 4
    assert len(saves_in(checkpointer.path)) == 2
