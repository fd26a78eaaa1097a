"""Pytrees: a list of data to one stacked batch and back."""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any

_NUMBERS = (bool, int, float, complex, np.generic)


def is_array(leaf: Any) -> bool:
    """Whether a leaf can be stacked: an array or a number, but no text, object or date."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        return leaf.dtype.kind not in "OSUMm"
    return isinstance(leaf, (jax.Array, *_NUMBERS))


def tree_stack(
    trees: Sequence[PyTree],
    *,
    indices: Sequence[int] | None = None,
    stack: Callable[[list[Any]], Any] | None = None,
) -> PyTree:
    """Stacks pytrees of one structure along a new leading axis.

    Args:
        trees: n pytrees of one structure; a leaf of shape `s` becomes one of shape `(n, *s)`.
            Python and numpy numbers count as arrays of shape `()`; a leaf that is no array
            (a string, None) becomes None.
        indices: what to call each tree in an error, 0 to n - 1 by default.
        stack: joins n leaves of one shape; by default `jnp.stack` where one of them is a
            `jax.Array`, else `np.stack`.

    Returns:
        One pytree of the same structure.

    Raises:
        ValueError: no trees, or trees that differ in structure or in the shape of a leaf. The
            text has the leaf's path, the index, and both structures or shapes.
    """
    if not len(trees):
        raise ValueError("tree_stack: expected at least one tree, got none")
    names = range(len(trees)) if indices is None else indices
    first, structure = _flatten(trees[0])
    rows = [first]
    for name, tree in zip(names[1:], trees[1:], strict=True):
        leaves, other = _flatten(tree)
        if other != structure:
            raise ValueError(_structure_text(names[0], trees[0], name, tree))
        rows.append(leaves)
    stack = stack or _stack
    columns: list[Any] = []
    for position, column in enumerate(zip(*rows, strict=True)):
        _check_column(column, names, trees[0], position)
        columns.append(stack(list(column)) if is_array(column[0]) else None)
    return jax.tree_util.tree_unflatten(structure, columns)


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


def key_data(leaf: Any) -> Any:
    """The numbers of an array of typed random keys; any other leaf as it is."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def like_key(key: Any, data: Any) -> Any:
    """An array of typed random keys of the kind of another one, from its numbers."""
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def tree_bytes(tree: PyTree) -> int:
    """What a pytree's arrays take."""
    return sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(tree))


def same_structure(tree: PyTree, other: PyTree) -> bool:
    """Whether two pytrees have the same containers and leaves in the same places."""
    structure: Any = jax.tree.structure(tree)
    return bool(structure == jax.tree.structure(other))


def describe(tree: PyTree) -> str:
    """A pytree's leaves for a person: `path: dtype[shape]`, a line each."""
    lines = []
    for path, leaf in zip(_paths(tree), _flatten(tree)[0], strict=True):
        if isinstance(leaf, jax.ShapeDtypeStruct) or is_array(leaf):
            dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
            lines.append(f"  {path}: {dtype}{list(np.shape(leaf))}")
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


def _flatten(tree: PyTree) -> tuple[list[Any], Any]:
    # None counts as a leaf: a batch whose strings became None has the structure of its data.
    return jax.tree_util.tree_flatten(tree, is_leaf=lambda x: x is None)


def _paths(tree: PyTree) -> list[str]:
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)[0]
    return [jax.tree_util.keystr(path) or "(the whole)" for path, _ in flat]


def _stack(leaves: list[Any]) -> Any:
    return jnp.stack(leaves) if any(isinstance(leaf, jax.Array) for leaf in leaves) else np.stack(leaves)


def _check_column(column: Sequence[Any], names: Sequence[int], tree: PyTree, position: int) -> None:
    if _alike(column):
        return
    shape = _shape(column[0])
    for name, leaf in zip(names, column, strict=True):
        if _shape(leaf) != shape:
            raise ValueError(
                f"leaf {_paths(tree)[position]} differs within a batch: datum {names[0]} has {_kind(column[0])}, "
                f"datum {name} has {_kind(leaf)}; pad the data to one shape"
            )


def _alike(column: Sequence[Any]) -> bool:
    """Whether all are numpy arrays of one shape and dtype, asked cheaply: this runs for every leaf of every datum."""
    first = column[0]
    if type(first) is not np.ndarray or not is_array(first):
        return False
    shape, dtype = first.shape, first.dtype
    return all(type(leaf) is np.ndarray and leaf.shape == shape and leaf.dtype == dtype for leaf in column)


def _shape(leaf: Any) -> tuple[int, ...] | None:
    return np.shape(leaf) if is_array(leaf) else None


def _kind(leaf: Any) -> str:
    return f"shape {np.shape(leaf)}" if is_array(leaf) else f"{type(leaf).__name__} {leaf!r:.40}"


def _structure_text(name: int, tree: PyTree, other_name: int, other: PyTree) -> str:
    return (
        f"data differ in structure within a batch:\n datum {name}: {jax.tree_util.tree_structure(tree)}\n"
        f"{describe(tree)}\n datum {other_name}: {jax.tree_util.tree_structure(other)}\n{describe(other)}"
    )
