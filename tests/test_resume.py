"""A run that was stopped goes on as if it had not been; what it asks to load is what it gets."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learnax.checkpoint import Checkpointer
from learnax.loss import LossPipe
from learnax.registry import Registry
from tests.helpers import MLP, MemoryRun, Poisonable, StopAt, assert_trees_equal, host, make_data, make_trainer

STEPS, EPOCHS = 5, 3
"""Steps of an epoch, and epochs, of the runs here."""
TIMES = ("train/update_time", "train_epoch/update_time")


class Noisy(nn.Module):
    """Draws from the `params` stream, and drops units through a stream of its own."""

    @nn.compact
    def __call__(self, x, y=None):
        x = x + 0.1 * jax.random.normal(self.make_rng("params"), x.shape)
        return nn.Dense(3)(nn.Dropout(0.25, deterministic=False)(nn.relu(nn.Dense(16)(x))))


def make(**overrides):
    """A trainer with checkpoints and two validation sets, one with a tail."""
    held_out = {"val": make_data(21, seed=1), "other": make_data(8, seed=2)}
    options = {"num_epochs": EPOCHS, "val_datasets": held_out, "registry": "tests", "run": MemoryRun(), "save_every": 4}
    return make_trainer(**(options | overrides))


def stop(*, step, **overrides):
    """A trainer that was stopped when the metrics of a step were logged, too suddenly to save anything."""
    trainer = make(**overrides)
    trainer.loop.session.save_stopped = lambda why: None
    trainer.hooks.saves.append(StopAt(step))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer


def trained(**overrides):
    trainer = make(**overrides)
    trainer.train()
    return trainer


def assert_same_run(left, right):
    """Bit for bit, but for the time that steps took."""
    np.testing.assert_equal(*({k: v for k, v in each.metrics.items() if k not in TIMES} for each in (left, right)))
    assert [len(left.metrics[name]) for name in TIMES] == [len(right.metrics[name]) for name in TIMES]
    assert_trees_equal(left.train_state, right.train_state)
    assert_trees_equal(jax.random.key_data(left.rng_seq), jax.random.key_data(right.rng_seq))


def on_disk(registry_path, name="checkpoints"):
    return Checkpointer.at(registry_path / "tests" / MemoryRun.id / name)


# ---- going on


@pytest.mark.parametrize(("count", "again"), [(1, "a new trainer"), (4, "the same trainer")])
def test_a_run_stopped_in_mid_epoch_goes_on_as_if_it_had_not_been(count, again):
    options = {"model": Noisy(), "devices": jax.devices()[:count]}
    untouched = trained(registry=None, **options)
    trainer = stop(step=9, **options)
    if again == "a new trainer":
        trainer = make(load_checkpoint=True, **options)
        assert trainer.train_state.step == 8  # stopped at 9, saved at 8, in the midst of the second epoch
        assert (trainer.position.epoch, trainer.position.batch) == (1, 3)
        assert trainer.metrics["train/loss"] == untouched.metrics["train/loss"][:8]
        assert trainer.metrics["val/loss"] == untouched.metrics["val/loss"][:1]
    assert isinstance(trainer.train(), MemoryRun)
    assert_same_run(trainer, untouched)


@pytest.mark.thorough
def test_a_run_stopped_again_and_again_is_still_the_same_run():
    untouched = trained(model=Noisy(), registry=None)
    for step in (5, 10, 13):
        stop(step=step, model=Noisy(), load_checkpoint=step > 5)
    resumed = trained(model=Noisy(), load_checkpoint=True)
    assert_same_run(resumed, untouched)
    assert [row["step"] for row in resumed.run.rows if "train/loss" in row] == [13, 14, 15]


class Interrupted:
    """A validation set whose reading is interrupted once, in its second batch of the second epoch."""

    def __init__(self):
        self._data = make_data(21, seed=1)
        self._reads = 0

    def __len__(self):
        return len(self._data)

    def __getitem__(self, index):
        self._reads += index == 9
        if index == 9 and self._reads == 2:
            raise KeyboardInterrupt
        return self._data[index]


@pytest.mark.thorough
@pytest.mark.parametrize("again", ["a new trainer", "the same trainer"])
def test_a_run_stopped_in_a_validation_goes_on_as_if_it_had_not_been(again):
    held_out = {"val": make_data(21, seed=1), "other": Interrupted()}
    untouched = trained(model=Noisy(), registry=None, val_datasets=held_out | {"other": make_data(21, seed=1)})
    options = {"model": Noisy(), "save_every": STEPS, "val_datasets": held_out}
    trainer = make(**options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    if again == "a new trainer":
        trainer = make(load_checkpoint=True, **options)
        assert (trainer.position.epoch, trainer.position.batch) == (1, STEPS)
    trainer.train()
    assert_same_run(trainer, untouched)


@pytest.mark.thorough
def test_a_run_stopped_by_its_save_model_or_its_dataset_goes_on():
    class Unplugged:
        """Data that can be pulled away."""

        plugged = True
        data = make_data(43)

        def __len__(self):
            return len(self.data)

        def __getitem__(self, index):
            if index == 30 and not self.plugged:
                raise OSError("unplugged")
            return self.data[index]

    calls = []

    def save_model(params):
        calls.append(len(calls))
        if len(calls) == 2:
            dataset.plugged = False
            raise KeyboardInterrupt

    untouched = trained(registry=None)
    dataset = Unplugged()
    trainer = make(save_model=save_model, train_dataset=dataset)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(RuntimeError, match="unplugged"):
        trainer.train()
    dataset.plugged = True
    trainer.train()
    assert_same_run(trainer, untouched)


@pytest.mark.thorough
def test_updates_that_were_dropped_are_not_done_again_by_a_run_that_goes_on():
    data = make_data(43)
    data[12][1][0] = data[37][1][0] = 7  # in the second and in the fifth batch
    options = {"train_dataset": data, "losses": LossPipe([Poisonable()])}
    untouched = trained(registry=None, **options)
    assert untouched.metrics["train/has_nan"] == [0, 1, 0, 0, 1] * EPOCHS
    assert untouched.train_state.step == 3 * EPOCHS
    stop(step=5, **options)
    resumed = make(load_checkpoint=True, **options)
    assert resumed.train_state.step == 4
    assert (resumed.position.epoch, resumed.position.batch) == (1, 1)
    resumed.train()
    assert_same_run(resumed, untouched)


def test_after_training_the_last_state_is_on_disk_and_a_finished_run_trains_no_more(registry_path):
    finished = trained()
    loaded = on_disk(registry_path).load_latest()
    assert loaded["step"] == STEPS * EPOCHS
    assert_trees_equal(loaded["state"], finished.train_state)
    assert jax.tree.structure(loaded["state"]) == jax.tree.structure(finished.train_state)

    again = trained(load_checkpoint=True)
    assert_same_run(again, finished)
    assert again.metrics == finished.metrics  # the times of its steps, too
    assert not [row for row in again.run.rows if "train/loss" in row]
    assert_trees_equal(on_disk(registry_path).load_latest()["state"], finished.train_state)

    assert_same_run(trained(load_checkpoint=True, num_epochs=EPOCHS + 1), trained(registry=None, num_epochs=EPOCHS + 1))


def test_a_checkpoint_that_was_saved_by_hand_gives_its_state_to_a_run_from_the_beginning_of_the_data():
    first = make()
    state = first.train_state._replace(params=jax.tree.map(jnp.ones_like, first.train_state.params), step=7)
    first.checkpointer.save_latest(state, 7, {"val/loss": 1.0})
    first.checkpointer.close()
    second = make(load_checkpoint=MemoryRun.id)
    assert_trees_equal(second.train_state.params, state.params)
    assert second.train_state.step == 7
    assert (second.position.epoch, second.position.batch, second.metrics) == (0, 0, {})
    second.train()
    assert second.train_state.step == 7 + STEPS * EPOCHS


# ---- what is loaded, and what is left


def test_a_fresh_start_moves_what_was_there_aside(registry_path, caplog):
    trained(num_epochs=1)
    before = on_disk(registry_path).load_latest()
    with caplog.at_level(logging.WARNING, "learnax"):
        for falsy in (None, False, 0, ""):
            fresh = make(load_checkpoint=falsy, seed=1, num_epochs=1)
            assert fresh.train_state.step == 0, falsy
        assert not caplog.messages
        fresh.train()
    aside = registry_path / "tests" / MemoryRun.id / "checkpoints.1"
    assert caplog.messages == [f"2 checkpoint(s) of an earlier run moved to {aside}"]
    moved = on_disk(registry_path, "checkpoints.1").load_latest()
    assert moved["time"] == before["time"]
    assert_trees_equal(moved["state"], before["state"])
    assert_trees_equal(on_disk(registry_path).load_latest()["state"], fresh.train_state)


@pytest.mark.thorough
def test_fresh_starts_never_write_over_one_another(registry_path):
    for seed in range(3):
        trained(seed=seed, num_epochs=1, val_datasets=None)
    folders = sorted(path.name for path in (registry_path / "tests" / MemoryRun.id).iterdir() if path.is_dir())
    assert folders == ["checkpoints", "checkpoints.1", "checkpoints.2"]
    states = [on_disk(registry_path, name).load_latest()["state"] for name in folders]
    expected = [trained(seed=seed, num_epochs=1, val_datasets=None, registry=None).train_state for seed in (2, 0, 1)]
    assert_trees_equal(states, expected)


@pytest.mark.thorough
def test_a_run_goes_on_from_the_step_it_asks_for_and_what_came_later_is_moved_aside(registry_path):
    finished = trained(model=Noisy(), checkpoint_every=6)
    assert list(on_disk(registry_path).list_available_checkpoints()) == ["latest", 6, 12, 15]
    resumed = make(model=Noisy(), checkpoint_every=6, load_checkpoint=6)
    assert resumed.train_state.step == 6
    resumed.train()
    assert_same_run(resumed, finished)
    assert list(on_disk(registry_path).list_available_checkpoints()) == ["latest", 6, 12, 15]
    assert list(on_disk(registry_path, "checkpoints.1").list_available_checkpoints()) == ["latest", 12, 15]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("metric", "minimize"), [pytest.param("val/loss", True, marks=pytest.mark.soak), ("other/rmse", False)]
)
def test_the_best_checkpoint_is_that_of_the_best_epoch(registry_path, metric, minimize):
    options = {"keep_best_checkpoint": True, "learning_rate": 0.1, "num_epochs": 5}
    if metric != "val/loss":  # the default
        options |= {"best_metric_name": metric, "minimize_metric": minimize}
    trainer = trained(**options)
    values = trainer.metrics[metric]
    epoch = int(np.argmin(values) if minimize else np.argmax(values))
    assert epoch < 4  # later ones are worse
    best = on_disk(registry_path).load_best()
    assert best["step"] == STEPS * (epoch + 1)
    assert best["metrics"][metric] == values[epoch]
    assert list(on_disk(registry_path).list_available_checkpoints()) == [
        "latest",
        "best",
        *sorted({best["step"], 24, 25}),
    ]

    resumed = make(load_checkpoint="best", **options)
    assert resumed.train_state.step == best["step"]
    assert resumed.metrics[metric] == values[: epoch + 1]
    resumed.train()
    assert_same_run(resumed, trainer)


@pytest.mark.thorough
def test_the_best_survives_a_run_that_goes_on_and_does_worse(registry_path):
    options = {"keep_best_checkpoint": True, "learning_rate": 1e-3}
    trainer = trained(**options)
    step = int(on_disk(registry_path).load_best()["step"])
    assert trainer.metrics["val/loss"][-1] == min(trainer.metrics["val/loss"])
    trained(**options | {"learning_rate": 10.0, "num_epochs": EPOCHS + 1, "load_checkpoint": True})
    assert on_disk(registry_path).load_best()["step"] == step
    assert on_disk(registry_path).load_latest()["step"] == step + STEPS


@pytest.mark.thorough
def test_only_so_many_numbered_checkpoints_are_kept(registry_path):
    trained(checkpoint_every=2, max_checkpoints=3)
    assert list(on_disk(registry_path).list_available_checkpoints()) == ["latest", 10, 12, 14, 15]
    folders = [path for path in on_disk(registry_path).path.iterdir() if path.name.isdecimal()]
    assert len(folders) == 4


@pytest.mark.thorough
def test_weights_alone_begin_a_new_run(registry_path):
    finished = trained()
    params = host(finished.train_state.params)
    options = {"load_checkpoint": True, "load_weights": True, "seed": 5}
    trainer = make(learning_rate=optax.constant_schedule(1e-3), **options)  # of another optimiser's state
    assert_trees_equal(trainer.train_state.params, params)
    assert trainer.train_state.step == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(trainer.train_state.opt_state.inner_state))
    assert (trainer.position.epoch, trainer.position.batch, trainer.metrics) == (0, 0, {})
    trainer.train()
    assert trainer.train_state.step == STEPS * EPOCHS
    assert_trees_equal(on_disk(registry_path, "checkpoints.1").load_latest()["state"].params, params)


def test_the_latest_asked_for_and_missing_starts_fresh_and_says_so(registry_path, caplog):
    with caplog.at_level(logging.WARNING, "learnax"):
        trainer = make(load_checkpoint="3kx81bz0")
    assert caplog.messages == [f"no checkpoint in {registry_path}/tests/memory/checkpoints yet: starting fresh"]
    assert trainer.train_state.step == 0
    trainer.train()
    assert_same_run(trainer, trained(registry=None))


def test_a_named_checkpoint_that_is_missing_is_an_error_when_the_trainer_is_built(registry_path):
    trained(checkpoint_every=6)
    for name in (7, "best"):
        with pytest.raises(FileNotFoundError) as error:
            make(load_checkpoint=name)
        path = registry_path / "tests" / "memory" / "checkpoints"
        assert str(error.value) == f"no checkpoint '{name}' in {path}; there are: latest, 6, 12, 15"
    with pytest.raises(
        TypeError, match=r"load_checkpoint must be True, -1, 'best', a step, a path or a run's id, but is 2\.5"
    ):
        make(load_checkpoint=2.5)


def test_a_registry_without_a_folder_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.delenv("TRAINAX_REGISTRY_PATH")
    with pytest.raises(ValueError, match="no folder") as error:
        make()
    assert str(error.value) == (
        "registry 'tests': no folder to keep runs in; set the environment variable TRAINAX_REGISTRY_PATH, "
        "or give Registry a base_path"
    )
    trained(registry=Registry("tests", tmp_path), run=None, num_epochs=1)
    assert Checkpointer.at(tmp_path / "tests" / "trainer" / "checkpoints").load_latest()["step"] == STEPS


# ---- what may have changed in between


@pytest.mark.thorough
def test_another_rate_applies_from_where_the_run_goes_on(registry_path):
    stop(step=9)
    before = on_disk(registry_path).load_latest()["state"]
    resumed = make(load_checkpoint=True, learning_rate=5e-3)
    assert_trees_equal(resumed.train_state.opt_state.inner_state, before.opt_state.inner_state)
    resumed.train()
    expected = [np.float32(1e-2)] * 8 + [np.float32(5e-3)] * 7
    np.testing.assert_array_equal(np.float32(resumed.metrics["train/learning_rate"]), expected)


@pytest.mark.thorough
def test_a_schedule_goes_on_at_its_own_count():
    schedule = optax.linear_schedule(1e-2, 1e-3, STEPS * EPOCHS)
    stop(step=9, learning_rate=schedule)
    resumed = trained(load_checkpoint=True, learning_rate=schedule)
    assert_same_run(resumed, trained(registry=None, learning_rate=schedule))
    assert len(set(resumed.metrics["train/learning_rate"])) == STEPS * EPOCHS


def test_a_rate_that_became_a_schedule_is_an_error_that_says_what_differs(registry_path):
    stop(step=5)
    with pytest.raises(ValueError, match="does not match") as error:
        make(load_checkpoint=True, learning_rate=optax.constant_schedule(1e-2))
    assert str(error.value) == (
        f"checkpoint {registry_path}/tests/memory/checkpoints/0 does not match this model and optimiser; "
        "leaves that differ (1):\n"
        "  opt_state/hyperparams_states/learning_rate/count: in the model only, int32[]"
    )


def test_another_model_is_an_error_that_says_what_differs(registry_path):
    stop(step=5)
    for weights in (False, True):
        with pytest.raises(ValueError, match="does not match this model and optimiser; ") as error:
            make(load_checkpoint=True, load_weights=weights, model=MLP(width=4))
        assert str(error.value).endswith(
            "  params/Dense_0/kernel: float32[16, 3] in the checkpoint, float32[4, 3] in the model\n"
            "  params/Dense_1/bias: float32[16] in the checkpoint, float32[4] in the model\n"
            "  params/Dense_1/kernel: float32[8, 16] in the checkpoint, float32[8, 4] in the model"
        )
    assert on_disk(registry_path).load_latest()["step"] == 4  # asking for what does not fit changes nothing


@pytest.mark.thorough
def test_the_last_epoch_is_validated_whatever_val_every_says():
    trainer = make_trainer(num_epochs=6, val_every=4, val_datasets={"val": make_data(21)})
    trainer.train()
    assert len(trainer.metrics["val/loss"]) == 3  # epochs 0, 4 and the last, 5
    made = make_trainer(num_epochs=5, val_every=4, val_datasets={"val": make_data(21)})
    made.train()
    assert len(made.metrics["val/loss"]) == 2  # it was due in the last epoch


@pytest.mark.thorough
@pytest.mark.parametrize("model", [pytest.param(MLP(), marks=pytest.mark.soak), Noisy()], ids=["plain", "random"])
def test_a_run_that_is_made_longer_is_the_run_that_it_would_have_been(model):
    options = {"model": model, "val_every": 3, "val_datasets": {"val": make_data(21)}}
    straight = make_trainer(num_epochs=5, **options)
    straight.train()
    make_trainer(num_epochs=2, registry="r", **options).train()  # its last epoch, 1, is validated beside the cadence
    longer = make_trainer(num_epochs=5, registry="r", load_checkpoint=True, **options)
    longer.train()
    assert_trees_equal(straight.train_state, longer.train_state)
    assert jax.random.key_data(straight.rng_seq).tolist() == jax.random.key_data(longer.rng_seq).tolist()
    assert straight.metrics["train/loss"] == longer.metrics["train/loss"]
    assert straight.metrics["val/loss"] == [longer.metrics["val/loss"][place] for place in (0, 2, 3)]


@pytest.mark.thorough
def test_what_a_loop_over_epochs_has_trained_is_saved_after_each():
    trainer = make_trainer(registry="r", num_epochs=3)
    for epoch in range(2):
        trainer.epoch(epoch)
        assert trainer.checkpointer.load_latest()["step"] == 5 * (epoch + 1)
    again = make_trainer(registry="r", num_epochs=3, load_checkpoint=True)
    assert (again.log.step, again.position.epoch) == (10, 2)
    again.train()
    straight = make_trainer(num_epochs=3)
    straight.train()
    assert_trees_equal(again.train_state, straight.train_state)


def test_a_run_that_is_complete_says_so_and_trains_nothing(caplog):
    make_trainer(registry="r").train()
    caplog.clear()
    again = make_trainer(registry="r", load_checkpoint=True, learning_rate=0.5)
    before = again.checkpointer.load_latest()["time"]
    again.train()
    assert again.log.step == 10
    (line,) = caplog.messages
    assert line.startswith("this run is complete: 2 of 2 epochs, 10 steps; train() makes no step.")
    assert "num_epochs" in line
    assert "run=" in line
    assert again.checkpointer.load_latest()["time"] == before


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (lambda rate: optax.inject_hyperparams(optax.sgd)(learning_rate=rate), "learning_rate is {} in the checkpoint"),
        (
            lambda rate: optax.chain(
                optax.clip(1.0), optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3, weight_decay=rate)
            ),
            "weight_decay at [1] is {} in the checkpoint",
        ),
        pytest.param(lambda rate: optax.sgd(rate), None, marks=pytest.mark.soak),
        (lambda rate: optax.inject_hyperparams(optax.sgd)(learning_rate=optax.constant_schedule(rate)), None),
    ],
    ids=["rate", "another one", "not kept", "scheduled"],
)
def test_hyperparameters_that_a_checkpoint_keeps_against_the_script_are_named(optimizer, told, caplog):
    options = {"registry": "r", "learning_rate": 0.5}
    make_trainer(optimizer=optimizer(0.25), **options).train()
    make_trainer(optimizer=optimizer(0.25), load_checkpoint=True, **options)
    assert not [line for line in caplog.messages if "hyperparameters" in line]
    make_trainer(optimizer=optimizer(0.5), load_checkpoint=True, **options)
    lines = [line for line in caplog.messages if "hyperparameters" in line]
    assert len(lines) == bool(told)
    assert not told or f"{told.format(0.25)} and 0.5 in the script" in lines[0]
