"""Small leaves packed into one vector come back as they were, and are measured as one by one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learnax.step.optimizers import adam
from learnax.step.packing import ROW, SMALL, Packing
from learnax.utils import leaves_by_path
from tests.helpers import assert_trees_equal

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
