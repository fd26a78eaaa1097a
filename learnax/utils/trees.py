"""Pytrees: a list of data to one stacked batch and back."""

from __future__ import annotations

import collections
import functools
import operator
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from learnax.utils.leaves import NUMBERS, UnfitError, array_of, as_held, is_array, stack_numbers

PyTree = Any


def tree_stack(trees: Sequence[PyTree], *, indices: Sequence[int] | None = None) -> PyTree:
    """Stacks pytrees of one structure along a new leading axis.

    Args:
        trees: n pytrees of one structure; a leaf of shape `s` becomes one of shape `(n, *s)`.
            Python and numpy numbers count as arrays of shape `()`, and whatever gives a numpy array
            (`__array__`, the buffer protocol) as that; text, bytes and None become None.
        indices: what to call each tree in an error, 0 to n - 1 by default.

    Returns:
        One pytree of the same structure, of arrays that share no memory with the trees: of JAX where
        one of the n leaves is a `jax.Array`, else of numpy.

    Raises:
        ValueError: no trees, trees that differ in structure or in the shape of a leaf, or a number
            that its dtype cannot hold. The text has the leaf's path, the index, and both structures or
            shapes, or the number.
        TypeError: a leaf that is neither array, number, text nor None, by path, index and type.
    """
    rows = Rows(len(trees))
    for name, tree in zip(range(len(trees)) if indices is None else indices, trees, strict=True):
        rows.add(name, tree)
    return rows.stacked()


class Rows:
    """Stacks trees as they come: the memory of one may be used again once it was added.

    Args:
        room: trees at most.
        held: whether leaves become numpy arrays of the dtypes that devices hold, all but random keys, which
            have no form in numpy.
    """

    def __init__(self, room: int, *, held: bool = False):
        self._room = room
        self._held = held
        self._names: list[int] = []
        self._first: PyTree = None
        self._structure: Any = None
        self._flat = False
        self._shapes: list[tuple[int, ...] | None] = []
        # Of each leaf: arrays are copied into the rows of one; what cannot change (numbers, text) is kept in a list.
        self._columns: list[Any] = []
        # Of each leaf, what needs no second look: shape and dtype of an array, else a type.
        self._usual: list[Any] = []

    def __len__(self) -> int:
        """Trees that were added."""
        return len(self._names)

    def add(self, name: int, tree: PyTree) -> None:
        """Adds a tree.

        Args:
            name: what to call it in an error.
            tree: see `tree_stack`, for what is raised, too.
        """
        if not self._names:
            self._begin(name, tree)
        # This runs for each leaf of each datum: what is usual is asked for cheaply.
        elif not (self._flat and type(tree) is list and self._put(tree)):
            leaves, structure = _flatten(tree)
            if structure != self._structure:
                raise ValueError(_structure_text(self._names[0], self._first, name, tree))
            if not self._put(leaves):
                for position, leaf in enumerate(leaves):
                    self._add(position, name, leaf)
        self._names.append(name)

    def tree(self, number: int) -> PyTree:
        """One of the trees that were added: its arrays are copies."""
        return jax.tree_util.tree_unflatten(self._structure, [column[number] for column in self._columns])

    def stacked(self) -> PyTree:
        """All of them; where there is room left, the last one is repeated."""
        if not self._names:
            raise ValueError("tree_stack: expected at least one tree, got none")
        leaves = [self._finished(position) for position in range(len(self._columns))]
        return jax.tree_util.tree_unflatten(self._structure, leaves)

    def _put(self, leaves: list[Any]) -> bool:
        """Puts leaves into their rows, if all of them are as usual."""
        number = len(self._names)
        if len(leaves) != len(self._usual):
            return False
        for leaf, usual, column in zip(leaves, self._usual, self._columns, strict=True):
            kind = type(leaf)
            if (kind is np.ndarray and (leaf.shape, leaf.dtype) == usual) or kind is usual:
                column[number] = leaf
            else:
                return False
        return True

    def _begin(self, name: int, tree: PyTree) -> None:
        self._first = tree
        leaves, self._structure = _flatten(tree)
        self._flat = type(tree) is list and len(leaves) == len(tree) and all(map(operator.is_, leaves, tree))
        for position, leaf in enumerate(leaves):
            array = self._array(position, name, leaf)
            self._shapes.append(None if array is None else np.shape(array))
            if isinstance(array, np.ndarray):
                column: Any = np.empty((self._room, *array.shape), array.dtype.newbyteorder("="))
                self._usual.append((array.shape, column.dtype))
            else:
                column = [None] * self._room
                self._usual.append(type(leaf) if type(leaf) in NUMBERS or type(leaf) in _TEXT else None)
            column[0] = leaf if array is None else array
            self._columns.append(column)

    def _add(self, position: int, name: int, leaf: Any) -> None:
        array, number, column = self._array(position, name, leaf), len(self._names), self._columns[position]
        shape = None if array is None else np.shape(array)
        if shape != self._shapes[position]:
            first = _flatten(self._first)[0][position]
            raise ValueError(
                f"leaf {_paths(self._first)[position]} differs within a batch: datum {self._names[0]} has "
                f"{_kind(first)}, datum {name} has {_kind(leaf)}; pad the data to one shape"
            )
        if isinstance(column, list):
            column[number] = leaf if array is None else np.array(array) if isinstance(array, np.ndarray) else array
        elif self._held or not isinstance(array, jax.Array):
            array = np.asarray(array)
            dtype = np.result_type(column.dtype, array.dtype)
            if dtype != column.dtype:
                self._columns[position] = column = column.astype(dtype)
                self._usual[position] = (array.shape, dtype)
            column[number] = array
        else:
            self._columns[position], self._usual[position] = [*column[:number], *[array] * (self._room - number)], None

    def _finished(self, position: int) -> Any:
        column, count = self._columns[position], len(self._names)
        if self._shapes[position] is None:
            return None
        for number in range(count, self._room):
            column[number] = column[count - 1]
        try:
            if isinstance(column, list):
                arrays = [leaf for leaf in column if isinstance(leaf, jax.Array)]
                keys = arrays and jnp.issubdtype(arrays[0].dtype, jax.dtypes.extended)
                if keys or (arrays and not self._held):
                    return jnp.stack([_one_held(row, leaf) for row, leaf in enumerate(column)])
                column = stack_numbers(column)
            return as_held(column) if self._held else column
        except UnfitError as error:
            name = self._names[min(error.row, count - 1)]
            raise ValueError(f"leaf {_paths(self._first)[position]} of datum {name} {error}") from None

    def _array(self, position: int, name: int, leaf: Any) -> Any:
        try:
            return array_of(leaf)
        except (TypeError, ValueError) as error:
            path = _paths(self._first)[position]
            raise type(error)(f"leaf {path} of datum {name} {error}") from error.__cause__


def held(stacked: PyTree) -> PyTree:
    """Stacked data given by hand, as arrays of the dtypes that devices hold, in memory of their own.

    Raises:
        ValueError: a number that its dtype cannot hold, by the leaf's path and the row.
        TypeError: a leaf that is no array, by its path.
    """

    def one(path: str, leaf: Any) -> Any:
        try:
            array = array_of(leaf)
            return as_held(np.array(array)) if array is not None and not isinstance(array, jax.Array) else array
        except UnfitError as error:
            raise ValueError(f"leaf {path} of datum {error.row} {error}") from None
        except (TypeError, ValueError) as error:
            raise type(error)(f"leaf {path} {error}") from error.__cause__

    leaves, structure = _flatten(stacked)
    return jax.tree_util.tree_unflatten(structure, [one(*pair) for pair in zip(_paths(stacked), leaves, strict=True)])


def tree_unstack(tree: PyTree) -> list[PyTree]:
    """Takes a stacked pytree apart: the inverse of `tree_stack`.

    Args:
        tree: a pytree whose array leaves share their leading axis, of length n; leaves that are
            None stay None.

    Returns:
        n pytrees of the same structure, leaves without the leading axis.

    Raises:
        ValueError: a tree without arrays, a leaf without a leading axis, or leaves of different
            lengths (the path and both lengths are in the text).
    """
    leaves, structure = _flatten(tree)
    paths = _paths(tree)
    length = None
    for path, leaf in zip(paths, leaves, strict=True):
        if leaf is None:
            continue
        if not np.ndim(leaf):
            raise ValueError(f"tree_unstack: leaf {path} has no leading axis")
        length = len(leaf) if length is None else length
        if len(leaf) != length:
            raise ValueError(
                f"tree_unstack: leaf {path} has leading length {len(leaf)}, but the leaves before it have {length}"
            )
    if length is None:
        raise ValueError("tree_unstack: expected a tree with at least one array, got none")
    return [
        jax.tree_util.tree_unflatten(structure, [None if leaf is None else leaf[i] for leaf in leaves])
        for i in range(length)
    ]


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """A pytree's leaves under names like `Dense_0/kernel`, in the tree's order.

    No two leaves have one name, and none has the name of a container that holds others. In a key, all but letters,
    digits, `_`, `-` and single spaces within is written as `%` and two digits, so that no storage takes it for
    something else; `unescaped` undoes it. Keys of several types that are spelled alike (0 and "0") are told apart by
    their types where they meet.
    """
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = ["/".join(map(_escaped, path)) for path, _ in flat]
    for spelled in (_typed, _numbered):
        for place in _clashes(names):
            names[place] = spelled(flat[place][0], place)
    return dict(zip(names, (leaf for _, leaf in flat), strict=True))


def unescaped(key: str) -> str:
    """A key as it was, from a part of a name of `leaves_by_path`."""
    return re.sub("(?:%[0-9A-F]{2})+|%", lambda found: _decoded(found[0]), key)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed random keys, which has no form in numpy."""
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def any_key() -> jax.ShapeDtypeStruct:
    """What stands for a random key where a function is traced: to make one takes a program of its own."""
    key: jax.ShapeDtypeStruct = jax.eval_shape(lambda: jax.random.key(0))
    return key


def key_data(leaf: Any) -> Any:
    """The numbers of an array of typed random keys; any other leaf as it is."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def like_key(key: Any, data: Any) -> Any:
    """An array of typed random keys of the kind of another one, from its numbers."""
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def tree_bytes(tree: PyTree) -> int:
    """What a pytree's arrays, or those of such shapes, take."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)


def same_structure(tree: PyTree, other: PyTree) -> bool:
    """Whether two pytrees have the same containers and leaves in the same places."""
    structure: Any = jax.tree.structure(tree)
    return bool(structure == jax.tree.structure(other))


def describe(tree: PyTree) -> str:
    """A pytree's leaves for a person: `path: dtype[shape]`, a line each."""
    lines = []
    for path, leaf in zip(_paths(tree), _flatten(tree)[0], strict=True):
        if isinstance(leaf, jax.ShapeDtypeStruct) or is_array(leaf):
            array = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else array_of(leaf)
            dtype = array.dtype if hasattr(array, "dtype") else np.asarray(array).dtype
            lines.append(f"  {path}: {dtype}{list(np.shape(array))}")
        else:
            lines.append(f"  {path}: {type(leaf).__name__} (no array)")
    return "\n".join(lines) or "  (empty)"


def _escaped(key: Any) -> str:
    """One step of a leaf's path, as a part of its name."""
    return _escaped_text(jax.tree_util.keystr((key,), simple=True))


@functools.lru_cache(1 << 14)  # each save names all leaves again
def _escaped_text(text: str) -> str:
    return re.sub(r"[^\w -]|^ | $| (?= )", lambda found: _encoded(found[0]), text) or "%"


def _encoded(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode("utf-8", "surrogatepass"))


def _decoded(text: str) -> str:
    try:
        return bytes.fromhex(text.replace("%", "")).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:  # of another's making
        return text


def _typed(path: tuple[Any, ...], place: int) -> str:
    """A leaf's name that tells the types of keys that are no text."""
    kinds = [type(key.key).__name__ if isinstance(key, jax.tree_util.DictKey) else "" for key in path]
    return "/".join(
        _escaped(key) + (f"~{kind}" if kind not in ("", "str") else "") for key, kind in zip(path, kinds, strict=True)
    )


def _numbered(path: tuple[Any, ...], place: int) -> str:
    """A leaf's name that tells its place in the tree: the last resort, where a container gives two leaves one key."""
    return f"{_typed(path, place)}~{place}"


def _clashes(names: Sequence[str]) -> list[int]:
    """Places of names that are there twice, or that are the beginning of another one's path, and of those others."""
    counts = collections.Counter(names)
    parents = {name[: match.start()] for name in counts for match in re.finditer("/", name)}
    if len(counts) == len(names) and parents.isdisjoint(counts):
        return []
    bad = {name for name, count in counts.items() if count > 1} | parents & counts.keys()
    return [place for place, name in enumerate(names) if name in bad or any(name.startswith(f"{b}/") for b in bad)]


_TEXT = (str, bytes, type(None))
_is_none = functools.partial(operator.is_, None)  # asked of each node of each datum: no Python is faster


def _flatten(tree: PyTree) -> tuple[list[Any], Any]:
    # None counts as a leaf: a batch whose strings became None has the structure of its data.
    return jax.tree_util.tree_flatten(tree, is_leaf=_is_none)


def _paths(tree: PyTree) -> list[str]:
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_none)[0]
    return [jax.tree_util.keystr(path) or "(the whole)" for path, _ in flat]


def _one_held(row: int, leaf: Any) -> Any:
    """A leaf as devices hold it, beside arrays of JAX."""
    if isinstance(leaf, jax.Array):
        return leaf
    try:
        return as_held(stack_numbers([leaf]))[0]
    except UnfitError as error:
        raise UnfitError(row, str(error)) from None


def _kind(leaf: Any) -> str:
    return f"shape {np.shape(leaf)}" if is_array(leaf) else f"{type(leaf).__name__} {leaf!r:.40}"


def _structure_text(name: int, tree: PyTree, other_name: int, other: PyTree) -> str:
    return (
        f"data differ in structure within a batch:\n datum {name}: {jax.tree_util.tree_structure(tree)}\n"
        f"{describe(tree)}\n datum {other_name}: {jax.tree_util.tree_structure(other)}\n{describe(other)}"
    )
