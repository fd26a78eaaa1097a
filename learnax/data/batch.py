"""Batches: data stacked on the host, a block of them on the devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from learnax.utils import PyTree, describe, same_structure, tree_stack


@dataclasses.dataclass(frozen=True)
class Block:
    """Batches on their way into a dispatch, or several.

    Attributes:
        host: stacked data as a list of arguments, numpy leaves of shape `(n, batch_size, ...)`.
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
        """One batch on the host, leaves `(batch_size, ...)`."""
        return jax.tree.map(lambda leaf: leaf[number % len(leaf)], self.host)


def as_list(datum: Any) -> list[Any]:
    """A datum as the list of arguments that the model is applied to and that losses see."""
    return datum if isinstance(datum, list) else [datum]


def stack_on_host(data: Sequence[Any], indices: Sequence[int]) -> list[Any]:
    """Data of one structure stacked into numpy arrays of the dtypes that devices will hold."""
    return tree_stack([as_list(datum) for datum in data], indices=indices, stack=_stack_leaves)


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


def _stack_leaves(leaves: list[Any]) -> Any:
    if jnp.issubdtype(getattr(leaves[0], "dtype", np.float32), jax.dtypes.extended):
        return jnp.stack(leaves)  # random keys have no numpy form
    stacked = np.stack([np.asarray(leaf) for leaf in leaves])
    return stacked.astype(jax.dtypes.canonicalize_dtype(stacked.dtype), copy=False)


def arranged(batch: Any, datum: list[Any], batch_size: int, shards: int) -> list[Any]:
    """A batch given by hand, as arguments with leaves of shape `(batch_size, ...)`.

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
            if all(jnp.shape(leaf) == (*lead, *jnp.shape(want)) for leaf, want in zip(leaves, wanted, strict=True)):
                return jax.tree.map(lambda leaf, want: leaf.reshape(batch_size, *jnp.shape(want)), given, datum)
    if isinstance(batch, (list, tuple)) and len(batch) == batch_size:
        stacked = stack_on_host(batch, range(batch_size))
        if same_structure(stacked, datum):
            return stacked
    raise ValueError(
        f"expected a batch of {batch_size} data, as a list or stacked, each of this structure:\n{describe(datum)}\n"
        f"but got:\n{describe(given)}"
    )
