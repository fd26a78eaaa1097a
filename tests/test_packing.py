"""Small leaves packed into one vector come back as they were, and are measured as one by one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from learnax.step.optimizers import adam
from learnax.step.packing import ROW, SMALL, Packing
from learnax.step.proofs import conditions_of
from learnax.utils import leaves_by_path
from tests.helpers import assert_trees_close, assert_trees_equal, make_data, make_trainer

SHAPES = {
    "small": {"bias": (10,), "kernel": (7, 13), "scalar": (), "whole rows": (2, ROW), "empty": (0, 3)},
    "large": {"kernel": (SMALL + 1,), "at the limit": (SMALL,)},
}


def make_tree(seed=0):
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(
        lambda s: jnp.array(rng.normal(size=s), jnp.float32), SHAPES, is_leaf=lambda s: type(s) is tuple
    )
    tree["half"] = jnp.array(rng.normal(size=5), jnp.bfloat16)
    return tree


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_a_tree_comes_back_as_it_was():
    tree = make_tree()
    packing = Packing(tree)
    packed = packing.pack(tree)
    rows, less = 2 + SMALL // ROW, 10 + 7 * 13 + 1  # a leaf is filled up to whole rows where it has one
    assert [leaf.shape for leaf in packed] == [(rows * ROW + less,), (5,), (SMALL + 1,), (0, 3)]
    assert_same(packing.unpack(packed), tree)


@pytest.mark.parametrize("aligned", [False, True])
def test_squares_are_those_of_each_leaf(aligned):
    tree = make_tree(1)
    packing = Packing(tree, aligned=aligned)
    assert_same(packing.unpack(packing.pack(tree)), tree)
    squares = dict(zip(packing.paths, packing.squares(packing.pack(tree)).tolist(), strict=True))
    leaves = leaves_by_path(tree)
    assert list(squares) == list(leaves)
    for path, leaf in leaves.items():
        np.testing.assert_allclose(squares[path], np.sum(np.asarray(leaf, np.float64) ** 2), rtol=1e-5)


def test_squares_are_summed_together_however_they_are_used():
    tree = {str(number): jnp.ones(200 + number) for number in range(30)}
    packing = Packing(tree)

    def used(tree):
        squares = packing.squares(packing.pack(tree))
        return jnp.sqrt(squares.sum()), [jnp.sqrt(square) for square in squares]

    text = jax.jit(used).lower(tree).compile().as_text()
    assert len(re.findall(r" reduce(?:-window)?\(", text)) < 8


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_in_one_leaf_is_in_no_other(bad, aligned):
    tree = make_tree(2)
    tree["small"]["kernel"] = tree["small"]["kernel"].at[3, 4].set(bad)
    packing = Packing(tree, aligned=aligned)
    finite = dict(zip(packing.paths, np.isfinite(packing.squares(packing.pack(tree))), strict=True))
    assert [path for path in finite if not finite[path]] == ["small/kernel"]
    squares, all_finite = packing.squares_and_finite(packing.pack(tree))
    np.testing.assert_allclose(squares, packing.squares(packing.pack(tree)), rtol=1e-5)
    assert not all_finite


@pytest.mark.parametrize("place", [("small", "kernel"), ("large", "kernel"), ("half",)])
def test_a_square_that_overflows_is_of_a_finite_number(place):
    tree = make_tree(4)
    branch = tree
    for name in place[:-1]:
        branch = branch[name]
    branch[place[-1]] = branch[place[-1]].at[(0,) * branch[place[-1]].ndim].set(1e30)
    packing = Packing(tree, aligned=True)
    squares, finite = packing.squares_and_finite(packing.pack(tree))
    assert finite
    assert [path for path, square in zip(packing.paths, squares, strict=True) if np.isinf(square)] == ["/".join(place)]


def test_adam_on_packed_moments_is_adam():
    params = make_tree(3)
    optimizer, packing = adam(1e-2), Packing(params, moments=True)
    with jax.numpy_dtype_promotion("standard"):
        plain = optimizer.init(params)
        packed = packing.pack_moments(plain)
        assert len(jax.tree.leaves(packed)) < len(jax.tree.leaves(plain))
        for seed in range(3):
            grads = make_tree(10 + seed)
            expected, plain = optimizer.update(grads, plain)
            updates, packed = optimizer.update(packing.pack(grads), packed)
            assert_same(packing.unpack(updates), expected)
    assert_same(packing.unpack_moments(packed, plain), plain)


BY_ELEMENT = {
    "adamw": optax.adamw(optax.cosine_decay_schedule(1e-2, 100), weight_decay=0.1),
    "lion": optax.lion(1e-2),
    "sgd": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "rmsprop": optax.rmsprop(1e-2, momentum=0.9),
    "adagrad": optax.adagrad(1e-2),
    "amsgrad": optax.amsgrad(1e-2),
    "radam": optax.radam(1e-2),
    "adan": optax.adan(1e-2),
    "adamax": optax.adamax(1e-2),
    "adabelief": optax.adabelief(1e-2),
    "signs": optax.chain(optax.ema(0.9), optax.sign_sgd(1e-2)),
    "a clip behind": optax.chain(optax.adam(1e-2), optax.clip_by_global_norm(1e-3), optax.clip(1e-3)),
    "injected": optax.inject_hyperparams(optax.nadamw)(learning_rate=1e-2),
}


def float_tree(seed):
    tree = make_tree(seed)
    del tree["half"]  # of which nothing is known
    return tree


@pytest.mark.parametrize("name", BY_ELEMENT)
def test_an_optimizer_that_treats_each_element_alone_does_so_packed(name):
    optimizer, params = BY_ELEMENT[name], float_tree(3)
    packing = Packing(params, moments=True)
    with jax.numpy_dtype_promotion("standard"):
        plain = optimizer.init(params)
        packed = packing.pack_moments(plain)
        assert conditions_of(optimizer, plain, params, 1.0).by_element
        for seed in range(3):
            grads = float_tree(10 + seed)
            expected, plain = optimizer.update(grads, plain, params)
            updates, packed = optimizer.update(packing.pack(grads), packed, packing.pack(params))
            assert_trees_close(packing.unpack(updates), expected)
            params = optax.apply_updates(params, expected)
            assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(packed))  # and what fills up the vector
    assert_trees_close(packing.unpack_moments(packed, plain), plain)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(1e-2, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
        optax.multi_transform({"all": optax.adam(1e-2)}, lambda params: jax.tree.map(lambda _: "all", params)),
        optax.adafactor(1e-2),
        optax.lamb(1e-2),
        optax.novograd(1e-2),
        optax.contrib.muon(1e-2),
    ],
    ids=["a mask", "parts", "adafactor", "lamb", "novograd", "muon"],
)
def test_one_that_looks_at_leaves_does_not(optimizer):
    params = float_tree(3)
    assert not conditions_of(optimizer, optimizer.init(params), params, 1.0).by_element


class EverySecond:
    """Something that is due after every other step, and does nothing."""

    def next_due(self, step):
        return step + 2 - step % 2

    def __call__(self, moment):
        pass


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", ["adamw", pytest.param("lion", marks=pytest.mark.soak)])
def test_a_run_with_packed_moments_is_the_same_however_it_is_cut(name, count):
    options = {"optimizer": BY_ELEMENT[name], "devices": jax.devices()[:count], "train_dataset": make_data(43)}
    whole, other = (make_trainer(**options, steps_per_execution=5) for _ in range(2))
    other.hooks.saves.append(EverySecond())
    plain = make_trainer(**options, steps_per_execution=1)
    for trainer in (whole, other, plain):
        trainer.train()
    assert_trees_equal(other.train_state, whole.train_state)
    assert_trees_close(plain.train_state, whole.train_state)


def test_a_model_of_one_leaf_has_no_packed_moments():
    # Its structure is that of a count, too.
    optimizer, params = optax.adamw(1e-2), jnp.ones(3)
    state = optimizer.init(params)
    assert_trees_equal(Packing(params, moments=True).pack_moments(state), state)


def test_no_leaves_and_no_small_ones():
    assert Packing({}).squares(Packing({}).pack({})).shape == (0,)
    assert Packing({}, moments=True).pack_moments(optax.adam(1.0).init({})) == optax.adam(1.0).init({})
    large = {"kernel": jnp.ones(SMALL + 1)}
    packing = Packing(large)
    assert packing.squares(packing.pack(large)).tolist() == [SMALL + 1]
    assert_same(packing.unpack(packing.pack(large)), large)


def test_leaves_that_stay_apart_have_the_same_norms():
    rng = np.random.default_rng()
    shapes = {"a": (3,), "b": (7, 5), "large": (300, 300), "half": (4, 4)}
    tree = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tree["half"] = jnp.asarray(tree["half"], jnp.bfloat16)
    together, apart = Packing(tree), Packing(tree, apart=True)
    assert len(together.pack(tree)) == 3
    packed = apart.pack(tree)
    assert [leaf.shape for leaf in packed] == [(0,), *(tree[name].shape for name in sorted(shapes))]
    np.testing.assert_array_equal(apart.squares(packed), together.squares(together.pack(tree)))
    assert_trees_equal(apart.unpack(packed), tree)


def test_what_is_unpacked_in_a_program_shares_its_code():
    shapes = {f"{name}{place}": shape for place in range(20) for name, shape in {"a": (3,), "b": (7, 40)}.items()}
    tree = {name: jnp.full(shape, place, jnp.float32) for place, (name, shape) in enumerate(shapes.items())}

    def unpacked(packed, step):
        return Packing(tree, step=step).unpack(packed)

    packed = Packing(tree).pack(tree)
    compiled = jax.jit(unpacked).lower(packed, jnp.int32(0)).compile()
    assert_trees_equal(compiled(packed, jnp.int32(0)), tree)
    assert_trees_equal(compiled(packed, jnp.int32(7)), tree)
    if jax.default_backend() == "cpu":
        # Where a slice begins is no constant in its code, which is then the same for all of a shape.
        text = compiled.as_text()
        slices = re.findall(r"dynamic-slice\(.*?, (%[\w.]+)\)", text)
        assert len(slices) == 40
        assert all(re.search(rf"{re.escape(start)} = s32\[\]\S* parameter", text) for start in slices)
