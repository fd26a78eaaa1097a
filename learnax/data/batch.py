"""Batches: data stacked on the host, a block of them on the devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from learnax.data.order import Order
from learnax.utils import PyTree, Rows, describe, held, same_structure


@dataclasses.dataclass(frozen=True)
class Block:
    """Batches on their way into a dispatch, or several.

    Attributes:
        host: stacked data as a list of arguments, numpy leaves of shape `(n, batch_size, ...)`. A device may read this
            very memory: see `copied`.
        device: the same on the devices.
        size: data in it that are real; behind them the last one is repeated. More than the n batches
            hold: they are used again from the first.
        batch_size: data per batch.
        signature: structure, shapes and dtypes: what decides which program takes it.
        first: the first batch that is to be used.
    """

    host: list[Any]
    device: PyTree
    size: int
    batch_size: int
    signature: Hashable
    first: int = 0

    def __len__(self) -> int:
        """Batches, with those that are used again."""
        return -(-self.size // self.batch_size)

    def batch(self, number: int) -> list[Any]:
        """One batch on the host, leaves `(batch_size, ...)`: views of `host`."""
        return jax.tree.map(lambda leaf: leaf[number % len(leaf)], self.host)


@dataclasses.dataclass(frozen=True)
class ShuffledBlock(Block):
    """All data of an epoch, of which each step gathers its batch.

    Attributes:
        host: all data, in their own order, leaves `(size of the dataset, ...)`.
        order: the indices of the epoch.
    """

    order: Order = dataclasses.field(kw_only=True)

    def batch(self, number: int) -> list[Any]:
        """One batch on the host, leaves `(batch_size, ...)`: copies."""
        rows = self.order[number * self.batch_size : (number + 1) * self.batch_size]
        return jax.tree.map(lambda leaf: leaf[rows], self.host)


def as_list(datum: Any) -> list[Any]:
    """A datum as the list of arguments that the model is applied to and that losses see."""
    return datum if isinstance(datum, list) else [datum]


def copied(tree: PyTree) -> PyTree:
    """Numpy arrays in memory of their own.

    A CPU device goes on using numpy's memory where it can. So what user code is given goes through this, for it may
    change what it has; and what user code gave, too, for it may change it later.
    """
    return jax.tree.map(lambda leaf: np.array(leaf) if isinstance(leaf, np.ndarray) else leaf, tree)


def stack_on_host(data: Iterable[Any], indices: Sequence[int], room: int | None = None) -> list[Any]:
    """Data of one structure stacked into numpy arrays of the dtypes that devices will hold.

    Args:
        data: each is copied before the next one is asked for.
        indices: what to call each in an error.
        room: rows; those behind the data repeat the last one. As many as there are data by default.
    """
    rows = Rows(len(indices) if room is None else room, held=True)
    for index, datum in zip(indices, data, strict=True):
        rows.add(index, datum if isinstance(datum, list) else [datum])
    return cast("list[Any]", rows.stacked())


def stack_batches(batches: Sequence[list[Any]], room: int) -> list[Any]:
    """Stacked batches of one signature as one, leaves `(room, batch_size, ...)`; the last one fills up."""
    if room == 1:
        return jax.tree.map(lambda leaf: leaf[None], batches[0])
    filled = [*batches, *[batches[-1]] * (room - len(batches))]
    return jax.tree.map(lambda *leaves: (np if isinstance(leaves[0], np.ndarray) else jnp).stack(leaves), *filled)


def signature_of(tree: PyTree) -> Hashable:
    """What of a batch decides which program takes it: structure, shapes, dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def arranged(batch: Any, datum: list[Any], batch_size: int, shards: int) -> list[Any]:
    """A batch given by hand, as arguments with leaves of shape `(batch_size, ...)`, in memory of their own.

    Args:
        batch: a list of `batch_size` data, or data stacked to `(batch_size, ...)` or to
            `(shards, batch_size // shards, ...)`.
        datum: any datum, as a list.
        batch_size: data per batch.
        shards: devices that a batch is split over.

    Raises:
        ValueError: anything else; what was expected and what came are in the text.
    """
    wanted = jax.tree.leaves(datum)
    given = as_list(batch)
    if same_structure(given, datum):
        leaves = jax.tree.leaves(given)
        for lead in ((batch_size,), (shards, batch_size // shards)):
            if all(np.shape(leaf) == (*lead, *np.shape(want)) for leaf, want in zip(leaves, wanted, strict=True)):
                return jax.tree.map(lambda leaf, want: leaf.reshape(batch_size, *np.shape(want)), held(given), datum)
    if isinstance(batch, (list, tuple)) and len(batch) == batch_size:
        stacked = stack_on_host(batch, range(batch_size))
        if same_structure(stacked, datum):
            return stacked
    raise ValueError(
        f"expected a batch of {batch_size} data, as a list or stacked, each of this structure:\n{describe(datum)}\n"
        f"but got:\n{describe(given)}"
    )
