"""A training state lies in few arrays between dispatches, and comes back as it was."""

import collections
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learnax.step.keys import split_in_two
from learnax.step.packed import REST, Form, Packed
from learnax.step.packing import SMALL
from learnax.step.state import TrainState
from tests.helpers import assert_trees_close, assert_trees_equal, host, make_data, make_trainer


class Deep(nn.Module):
    """So many layers, the first of them large where that is wanted; the target rides along."""

    layers: int = 3
    large: bool = False

    @nn.compact
    def __call__(self, x, y=None):
        if self.large:
            x = nn.Dense(1 + SMALL // x.shape[-1])(x)
        for _ in range(self.layers):
            x = nn.relu(nn.Dense(8)(x))
        return nn.Dense(3)(x)


def make_state(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"bias": (10,), "kernel": (7, 13), "large": (SMALL + 1,), "scalar": ()}
    tree = lambda: {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}  # noqa: E731
    params = tree()
    moments = optax.ScaleByAdamState(np.int32(3), tree(), tree())
    carried = {
        "mean": rng.normal(size=5).astype(np.float32),
        "counts": np.arange(4, dtype=np.uint8),
        "table": rng.normal(size=REST + 1).astype(np.float32),
        "target": tree(),  # shaped like the parameters, but the model's own
        "nothing": np.zeros((0, 2), np.float32),
    }
    return TrainState(params, (moments, optax.EmptyState()), np.int32(7), carried, tree())


def test_a_state_comes_back_as_it_was():
    state = make_state()
    form = Form(state)
    packed = form.pack(state)
    assert all(isinstance(array, np.ndarray) for array in packed.arrays)
    back = form.whole(packed, Form.small)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert [leaf.dtype for leaf in jax.tree.leaves(back)] == [leaf.dtype for leaf in jax.tree.leaves(state)]
    assert_trees_equal(back, state)
    shapes = form.shapes(jax.tree.map(jnp.asarray, packed))
    assert [leaf.shape for leaf in jax.tree.leaves(shapes)] == [leaf.shape for leaf in jax.tree.leaves(state)]


def test_what_is_in_each_array():
    state = make_state()
    form = Form(state)
    arrays = form.pack(state).arrays
    sizes = {paths[0]: array.size for paths, array in zip(form.held, arrays, strict=True)}
    assert sorted(path for paths in form.held for path in paths) == sorted(form.paths)
    assert sizes == {
        "params/bias": 102,
        "params/large": SMALL + 1,
        "opt_state/0/mu/bias": 102,
        "opt_state/0/mu/large": SMALL + 1,
        "opt_state/0/nu/bias": 102,
        "opt_state/0/nu/large": SMALL + 1,
        "ema/bias": 102,
        "ema/large": SMALL + 1,
        "model_state/table": REST + 1,
        "model_state/target/large": SMALL + 1,
        "opt_state/0/count": 2,
        "model_state/counts": 4,
        "model_state/mean": 5 + 10 + 7 * 13 + 1,
    }


def test_an_opened_state_has_packed_parameters_and_closes_to_the_same_arrays():
    state = make_state()
    form = Form(state)
    packed = jax.tree.map(jnp.asarray, form.pack(state))
    opened = packed.opened()
    assert [leaf.shape for leaf in opened.params] == [(102,), (SMALL + 1,)]
    assert_trees_equal(opened.model_state, state.model_state)
    assert_trees_equal(form.close(opened), packed)
    assert form.fits(make_state(1))
    assert not form.fits(state._replace(ema=None))


@pytest.mark.parametrize("layers", [pytest.param(2, marks=pytest.mark.soak), 12])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_dispatch_takes_as_many_arrays_however_many_layers_there_are(layers, steps, devices):
    given = {"model": Deep(layers), "devices": devices, "steps_per_execution": steps}
    trainer = make_trainer(train_dataset=make_data(32), num_epochs=1, **given)
    assert len(jax.tree.leaves(trainer.train_state)) == 8 + 6 * (layers + 1)
    trainer.train()
    (program,) = [program for (kind, _), program in trainer.engine.programs.items() if kind == "train"]
    # The parameters, two moments, counts, hyperparameters; the random sequence, data and targets, where in them,
    # and how many steps.
    assert len(jax.tree.leaves(program.compiled.in_avals)) == 5 + 1 + 2 + 2
    # The metrics in one array.
    assert len(jax.tree.leaves(program.compiled.out_info)) == 5 + 1 + 1
    assert isinstance(trainer.parts.progress.live, Packed)


def test_large_parameters_are_the_live_ones_and_small_ones_are_made_once():
    trainer = make_trainer(model=Deep(1, large=True), train_dataset=make_data(16), num_epochs=1)
    trainer.train()
    state = trainer.train_state
    assert trainer.train_state is state
    live = {id(array) for array in trainer.parts.progress.live.arrays}
    assert [leaf.size > SMALL for leaf in jax.tree.leaves(state)] == [
        id(leaf) in live for leaf in jax.tree.leaves(state)
    ]


@pytest.mark.parametrize("steps", [1, 4])
def test_a_state_that_is_looked_at_or_put_back_changes_no_bit(steps, devices):
    given = {"model": Deep(2, large=True), "devices": devices, "train_dataset": make_data(64), "num_epochs": 3}
    plain, looked = (make_trainer(steps_per_execution=steps, **given) for _ in range(2))
    plain.train()
    looked.maybe_init()
    for epoch in range(3):
        looked.epoch(epoch)
        looked.train_state = host(looked.train_state) if epoch == 1 else looked.train_state
    assert_trees_equal(looked.train_state, plain.train_state)
    assert looked.metrics["train/loss"] == plain.metrics["train/loss"]


@pytest.mark.parametrize("steps", [1, 4])
def test_an_average_of_the_parameters_is_packed_with_them(steps):
    given = {"model": Deep(2), "train_dataset": make_data(32), "num_epochs": 1, "steps_per_execution": steps}
    trainer, plain = make_trainer(ema=0.5, **given), make_trainer(**given)
    trainer.train()
    plain.train()
    assert len(trainer.parts.progress.live.arrays) == 6
    assert_trees_equal(trainer.train_state.params, plain.train_state.params)
    assert jax.tree.structure(trainer.train_state.ema) == jax.tree.structure(plain.train_state.params)


@pytest.mark.parametrize("optimizer", [optax.adafactor(0.1), optax.lamb(0.1)], ids=["adafactor", "lamb"])
def test_an_optimiser_that_sees_whole_leaves_has_its_state_as_it_is(optimizer):
    trainer = make_trainer(optimizer=optimizer, train_dataset=make_data(16), num_epochs=1)
    trainer.train()
    assert trainer.parts.progress.live is trainer.train_state


_BY_ELEMENT = [
    pytest.param(optax.adamw(0.1), id="adamw"),
    pytest.param(optax.sgd(0.1), marks=pytest.mark.soak, id="sgd"),
    pytest.param(optax.lion(0.1), marks=pytest.mark.soak, id="lion"),
]


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("optimizer", _BY_ELEMENT)
def test_another_optimiser_that_treats_elements_alone_is_packed_and_trains_as_by_itself(optimizer, steps, devices):
    given = {"model": Deep(3), "train_dataset": make_data(32), "num_epochs": 1, "steps_per_execution": steps}
    packed = make_trainer(optimizer=optimizer, devices=devices, **given)
    # The same one behind a function of one's own, which nobody knows.
    unknown = optax.GradientTransformation(optimizer.init, lambda *given: optimizer.update(*given))
    plain = make_trainer(optimizer=unknown, devices=devices, **given)
    packed.train()
    plain.train()
    assert isinstance(packed.parts.progress.live, Packed)
    assert not isinstance(plain.parts.progress.live, Packed)
    assert_trees_close(packed.train_state.params, plain.train_state.params)


def test_the_guard_copies_no_vector_of_the_state():
    trainer = make_trainer(model=Deep(12), train_dataset=make_data(16), num_epochs=1, steps_per_execution=1)
    trainer.maybe_init()
    trainer.parts.compile()
    (program,) = [program for (kind, _), program in trainer.engine.programs.items() if kind == "train"]
    live = trainer.parts.progress.live
    memory = program.compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(array.nbytes for array in live.arrays)
    assert not re.search(rf"f32\[{live.arrays[0].size}\]\S* copy\(", program.compiled.as_text())


# ---- what a dispatch costs the host, in calls


def test_the_python_of_a_dispatch_is_counted(one_device, monkeypatch):
    monkeypatch.setattr("learnax.log.log._BULK_S", 1e9)  # no clock decides how much is read at once

    def calls_of(steps, layers):
        given = {"devices": one_device, "steps_per_execution": 1, "num_epochs": 2}
        trainer = make_trainer(model=Deep(layers), train_dataset=make_data(8 * steps), **given)
        trainer.maybe_init()
        trainer.epoch(0)  # which reads the data
        calls = collections.Counter()

        def count(frame, event, arg):
            calls[event] += 1

        sys.setprofile(count)
        try:
            trainer.epoch(1)
        finally:
            sys.setprofile(None)
        return calls

    for layers in (2, 12):
        few, many = calls_of(64, layers), calls_of(320, layers)
        more = {event: (many[event] - few[event]) / 256 for event in ("call", "c_call")}
        # 39 and 26; a few more where the loop has to wait for the device more often.
        assert more["call"] < 48, more
        assert more["c_call"] < 38, more


# ---- the split of a key


def test_a_key_is_split_as_jax_does():
    for seed in np.random.default_rng().integers(0, 2**31, 20):
        key = jax.random.fold_in(jax.random.key(seed), seed)
        assert_trees_equal(jax.random.key_data(split_in_two(key)), jax.random.key_data(jax.random.split(key)))


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_a_key_of_another_kind_is_split_by_jax(kind):
    key = jax.random.key(3, impl=kind)
    assert_trees_equal(jax.random.key_data(split_in_two(key)), jax.random.key_data(jax.random.split(key)))


def test_keys_are_split_in_the_old_way_where_jax_is_told_so():
    with jax.threefry_partitionable(False):
        key = jax.random.key(5)
        assert_trees_equal(jax.random.key_data(split_in_two(key)), jax.random.key_data(jax.random.split(key)))


def test_a_split_is_one_operation():
    text = jax.jit(lambda key: jax.random.key_data(split_in_two(key))).lower(jax.random.key(0)).compile().as_text()
    assert "while" not in text
