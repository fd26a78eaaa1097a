"""Data of one structure become one batch and come apart again; those that differ say where."""

import dataclasses
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learnax.data import arranged
from learnax.utils import describe, leaves_by_path, same_structure, tree_stack, tree_unstack
from learnax.utils.memory import give_back


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass
class Point:
    position: np.ndarray
    name: str

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return ((key("position"), self.position), (key("name"), self.name)), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


def raises(text):
    return pytest.raises(ValueError, match=f"^{re.escape(text)}$")


def test_array_leaves_get_a_leading_axis():
    trees = [{"x": np.full((2, 3), i, np.float32), "y": (np.arange(i, i + 4),)} for i in range(5)]
    stacked = tree_stack(trees)
    assert stacked["x"].shape == (5, 2, 3)
    assert stacked["x"].dtype == np.float32
    np.testing.assert_array_equal(stacked["y"][0], np.arange(5)[:, None] + np.arange(4))


def test_numpy_stays_numpy_and_one_jax_array_makes_jax_arrays():
    assert type(tree_stack([np.ones(2), np.ones(2)])) is np.ndarray
    stacked = tree_stack([{"x": jnp.full(2, i), "y": np.ones(1)} for i in range(3)])
    assert isinstance(stacked["x"], jax.Array)
    assert type(stacked["y"]) is np.ndarray
    np.testing.assert_array_equal(stacked["x"], [[0, 0], [1, 1], [2, 2]])
    assert isinstance(tree_stack([np.ones(2, np.float32), jnp.ones(2)]), jax.Array)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2, 3], "i"),
        ([1.5, 2.5, 3.5], "f"),
        ([True, False, True], "b"),
        ([1j, 2j, 3j], "c"),
        ([np.float16(1), np.float16(2), np.float16(3)], "f"),
        ([np.int8(1), np.int8(2), np.int8(3)], "i"),
        ([np.bool_(1), np.bool_(0), np.bool_(1)], "b"),
    ],
)
def test_python_and_numpy_numbers_are_stacked(values, kind):
    stacked = tree_stack([[value] for value in values])[0]
    assert stacked.shape == (3,)
    assert stacked.dtype.kind == kind
    assert stacked.tolist() == values
    if isinstance(values[0], np.generic):
        assert stacked.dtype == values[0].dtype


@pytest.mark.parametrize(
    "leaf",
    ["text", b"bytes", None, bytearray(b"bytes"), np.str_("text"), np.bytes_(b"bytes"), np.array(["a", "b"])],
    ids=lambda leaf: type(leaf).__name__,
)
def test_text_and_none_become_none(leaf):
    stacked = tree_stack([{"leaf": leaf, "x": 1.0}, {"leaf": leaf, "x": 2.0}])
    assert stacked["leaf"] is None
    assert stacked["x"].tolist() == [1.0, 2.0]


def test_strings_may_differ():
    assert tree_stack([["a", 1], ["b", 2]])[0] is None


def test_a_registered_pytree_keeps_its_class():
    stacked = tree_stack([Point(np.full(3, i), f"point {i}") for i in range(4)])
    assert isinstance(stacked, Point)
    assert stacked.position.shape == (4, 3)
    assert stacked.name is None


def test_what_was_stacked_comes_apart_again():
    trees = [
        {"x": np.full((2, 3), i, np.float32), "point": Point(jnp.full(2, i), "p"), "number": 0.5 * i, "none": None}
        for i in range(3)
    ]
    apart = tree_unstack(tree_stack(trees))
    assert len(apart) == 3
    for tree, back in zip(trees, apart, strict=True):
        assert isinstance(back["point"], Point)
        assert back["point"].name is None
        assert back["none"] is None
        assert back["number"] == tree["number"]
        np.testing.assert_array_equal(back["x"], tree["x"])
        np.testing.assert_array_equal(back["point"].position, tree["point"].position)


def test_what_came_apart_is_stacked_again():
    stacked = {"x": np.arange(12).reshape(4, 3), "y": [None, np.arange(4.0)]}
    again = tree_stack(tree_unstack(stacked))
    np.testing.assert_array_equal(again["x"], stacked["x"])
    np.testing.assert_array_equal(again["y"][1], stacked["y"][1])
    assert again["y"][0] is None


def test_leaves_of_two_shapes_name_path_index_and_both_shapes():
    trees = [{"atoms": [np.zeros((4, 3))]}, {"atoms": [np.zeros((4, 3))]}, {"atoms": [np.zeros((5, 3))]}]
    with raises(
        "leaf ['atoms'][0] differs within a batch: datum 0 has shape (4, 3), datum 2 has shape (5, 3); "
        "pad the data to one shape"
    ):
        tree_stack(trees)


def test_a_leaf_of_a_registered_pytree_is_named_by_its_attribute():
    with raises(
        "leaf .position differs within a batch: datum 10 has shape (3,), datum 11 has shape (4,); "
        "pad the data to one shape"
    ):
        tree_stack([Point(np.zeros(3), "a"), Point(np.zeros(4), "b")], indices=[10, 11])


def test_a_lone_leaf_is_named_the_whole():
    with raises(
        "leaf (the whole) differs within a batch: datum 0 has shape (3,), datum 1 has shape (); "
        "pad the data to one shape"
    ):
        tree_stack([np.zeros(3), 1.0])


@pytest.mark.parametrize(("other", "came"), [("text", "str 'text'"), (None, "NoneType None")])
def test_an_array_here_and_none_there_is_an_error(other, came):
    text = f"differs within a batch: datum 0 has shape (), datum 1 has {came}; pad the data to one shape"
    with raises(f"leaf ['x'] {text}"):
        tree_stack([{"x": 1.0}, {"x": other}])


def test_none_here_and_an_array_there_is_an_error():
    with raises(
        "leaf ['x'] differs within a batch: datum 0 has NoneType None, datum 1 has shape (2,); "
        "pad the data to one shape"
    ):
        tree_stack([{"x": None}, {"x": np.zeros(2)}])


def test_two_structures_are_both_shown():
    with raises(
        "data differ in structure within a batch:\n"
        " datum 0: PyTreeDef([*])\n"
        "  [0]: float64[3]\n"
        " datum 1: PyTreeDef([*, *])\n"
        "  [0]: float64[3]\n"
        "  [1]: str (no array)"
    ):
        tree_stack([[np.zeros(3)], [np.zeros(3), "more"]])


def test_no_trees_are_an_error():
    with raises("tree_stack: expected at least one tree, got none"):
        tree_stack([])


def test_a_tree_without_arrays_does_not_come_apart():
    with raises("tree_unstack: expected a tree with at least one array, got none"):
        tree_unstack({"name": None})


def test_a_leaf_without_a_leading_axis_does_not_come_apart():
    with raises("tree_unstack: leaf ['y'] has no leading axis"):
        tree_unstack({"x": np.zeros(2), "y": 1.0})


def test_leaves_of_two_lengths_do_not_come_apart():
    with raises("tree_unstack: leaf ['y'] has leading length 3, but the leaves before it have 2"):
        tree_unstack({"x": np.zeros(2), "y": np.zeros(3)})


def test_leaves_have_short_names():
    params = {"Dense_0": {"kernel": 1, "bias": 2}, "scale": 3}
    assert leaves_by_path(params) == {"Dense_0/bias": 2, "Dense_0/kernel": 1, "scale": 3}


def test_structure_is_containers_and_places():
    assert same_structure([np.zeros(3), {"x": 1}], [jnp.ones(2), {"x": 2.0}])
    assert not same_structure([np.zeros(3)], (np.zeros(3),))
    assert not same_structure([np.zeros(3)], [None])


def test_a_tree_is_described_leaf_by_leaf():
    assert describe({"x": np.zeros((2, 3), np.int8), "y": [1.5, "text", None]}) == (
        "  ['x']: int8[2, 3]\n  ['y'][0]: float64[]\n  ['y'][1]: str (no array)\n  ['y'][2]: NoneType (no array)"
    )
    assert describe([]) == "  (empty)"


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_a_batch_by_hand_may_be_stacked_in_either_layout(shape):
    (result,) = arranged([np.arange(12.0).reshape(*shape, 3)], [np.zeros(3)], 4, 2)
    np.testing.assert_array_equal(result, np.arange(12.0).reshape(4, 3))


def test_a_batch_by_hand_may_be_a_list_of_data():
    (points,) = arranged([Point(np.full(2, i), "p") for i in range(4)], [Point(np.zeros(2), None)], 4, 2)
    np.testing.assert_array_equal(points.position[:, 0], range(4))


def test_a_batch_by_hand_of_another_size_is_an_error():
    with raises(
        "expected a batch of 4 data, as a list or stacked, each of this structure:\n  [0]: float32[3]\n"
        "but got:\n  [0]: float32[5, 3]"
    ):
        arranged([np.zeros((5, 3), np.float32)], [np.zeros(3, np.float32)], 4, 2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no /proc")
def test_freed_memory_is_given_back():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    kept = [bytearray(os.urandom(100_000)) for _ in range(1000)]
    fence = bytes(100_000)  # above them: what is freed below it stays with the process
    before = resident()
    kept.clear()
    give_back()
    assert resident() < before - 90_000_000
    assert len(fence) == 100_000
