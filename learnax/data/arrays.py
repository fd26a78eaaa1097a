"""Whole arrays as data: a row of each is a datum."""

from __future__ import annotations

import mmap
from typing import Any

import jax
import numpy as np

from learnax.utils import PyTree


class Arrays:
    """Data that lie in whole arrays, in memory or in files; see `arrays`.

    Args:
        tree: arrays with equal first axis.
    """

    def __init__(self, tree: PyTree):
        leaves, self._structure = jax.tree.flatten(tree)
        self._leaves = [_OfFile(leaf) if _is_h5py(leaf) else leaf for leaf in leaves]
        self._size = len(leaves[0])

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> PyTree:
        """One datum: a row of each array."""
        if not 0 <= index < self._size:
            raise IndexError(f"datum {index} of {self._size}")
        return jax.tree.unflatten(self._structure, [leaf[index] for leaf in self._leaves])

    @property
    def in_memory(self) -> bool:
        """Whether all of them are in this process's memory, and not mapped from files."""
        return all(_in_memory(leaf) for leaf in self._leaves)

    def __repr__(self) -> str:
        return f"arrays of {self._size} data"


def arrays(*given: Any) -> Arrays:
    """Data that lie in whole arrays with a row for each datum: `arrays(X, y)`, `arrays({"image": X, "label": y})`.

    Arrays in memory are treated as a list of data is. What is read from a file stays there: of an `np.memmap`, an h5py
    dataset or a zarr array rows are read one by one, and worker processes open the file themselves, by its path.

    Args:
        given: arrays with equal first axis, of which each datum is a list of rows, the model's arguments; a tuple or
            list of them stands for the same. Or one array, or one dict of them, of which each datum is a row or a dict
            of rows.

    Returns:
        A dataset.

    Raises:
        TypeError: something that is no array, by its path.
        ValueError: no array, or arrays of unequal lengths, with the path and length of each.
    """
    tree: Any = list(given) if len(given) > 1 else given[0] if given else []
    if isinstance(tree, tuple):
        tree = list(tree)
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is None)[0]
    if not flat:
        raise ValueError("arrays: expected at least one array, got none")
    named = {jax.tree_util.keystr(path) or "(the whole)": leaf for path, leaf in flat}
    for path, leaf in named.items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "__getitem__")):
            raise TypeError(f"arrays: {path} is {type(leaf).__name__}, and no array; np.asarray(...) makes one of it")
        if not len(leaf.shape):
            raise ValueError(f"arrays: {path} is one number, and has no row for each datum")
    sizes = {path: leaf.shape[0] for path, leaf in named.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{path} has {size}" for path, size in sizes.items())
        raise ValueError(f"arrays: all of them must have a row for each datum, but {told}")
    return Arrays(tree)


class _OfFile:
    """A dataset of an h5py file, which each process opens for itself.

    Args:
        dataset: it, of an open file.
    """

    def __init__(self, dataset: Any):
        self._path, self._name = dataset.file.filename, dataset.name
        self._dataset = dataset

    def __getitem__(self, index: int) -> Any:
        if self._dataset is None:
            import h5py

            self._dataset = h5py.File(self._path, "r")[self._name]
        return self._dataset[index]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_dataset": None}


def _is_h5py(leaf: Any) -> bool:
    return type(leaf).__module__.partition(".")[0] == "h5py"


def _in_memory(leaf: Any) -> bool:
    if not isinstance(leaf, np.ndarray):
        return isinstance(leaf, jax.Array)
    while isinstance(leaf, np.ndarray):
        if isinstance(leaf, np.memmap):
            return False
        leaf = leaf.base
    return not isinstance(leaf, mmap.mmap)
