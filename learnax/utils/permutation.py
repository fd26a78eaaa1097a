"""Permutations by arithmetic: what stands at a place is computed from the place, and nothing is kept.

This is the swap-or-not shuffle. In each round a number and its mirror image about a pivot change places, or do not, by
a bit that both of them share. So each round is a permutation of any size, by a fixed count of operations: with no
division, and with no loop whose end a device would have to ask the host for. It runs in numpy and in a compiled step
alike.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROUNDS = 24
"""Two numbers whose places still depend on each other after them are one pair of 2**24."""
MOST_ON_DEVICE = 1 << 31
"""Numbers below this are permuted in 32 bits, which every device has."""
_MIX: dict[Any, tuple[int, int, int]] = {
    np.dtype(np.uint32): (0x9E3779B1, 15, 0x85EBCA77),
    np.dtype(np.uint64): (0x9E3779B97F4A7C15, 31, 0xC2B2AE3D27D4EB4F),
}


def rounds_of(size: int, seed: int, epoch: int) -> np.ndarray:
    """What the permutation of an epoch is made of, `(2, ROUNDS)`: a pivot and a salt for each round.

    Args:
        size: of the permutation.
        seed: a whole number from 0.
        epoch: a whole number from 0.
    """
    words = np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(2 * ROUNDS, np.uint64).reshape(2, ROUNDS)
    words[0] %= np.uint64(size)
    return words.astype(np.uint32 if size <= MOST_ON_DEVICE else np.uint64)


def permuted(places: Any, size: int, rounds: Any, xp: Any = np) -> Any:
    """What stands at some places of a permutation of the numbers below `size`.

    Args:
        places: whole numbers below `size`, an array of the dtype of `rounds`.
        size: of the permutation.
        rounds: see `rounds_of`.
        xp: numpy, or `jax.numpy`.
    """
    kind = rounds.dtype.type
    factor, shift, other_factor = map(kind, _MIX[rounds.dtype])
    half = kind(1 << (8 * rounds.dtype.itemsize - 1))
    numbers = places
    for pivot, salt in zip(*rounds, strict=True):
        distance = pivot - numbers
        mirrored = xp.where(numbers <= pivot, distance, distance + kind(size))
        bits = (xp.maximum(numbers, mirrored) ^ salt) * factor
        bits = (bits ^ (bits >> shift)) * other_factor
        numbers = xp.where(bits >= half, mirrored, numbers)
    return numbers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shuffled:
    """Data on the devices, of which a step gathers its batch in the order of an epoch.

    Attributes:
        rows: all data, leaves `(size, ...)`, the same on each device.
        rounds: of the epoch's permutation, see `rounds_of`.
        size: data.
        lies: how batches are to lie on the devices, where XLA's partitioner divides them; None else.
    """

    rows: Any
    rounds: Any
    size: int = dataclasses.field(metadata={"static": True})
    lies: Any = dataclasses.field(default=None, metadata={"static": True})

    def batches(self, first: Any, count: int, size: int, start: Any, share: int) -> Any:
        """Some batches of the order, gathered at once: an array of places costs a program little more than one place.

        Args:
            first: the number of the first of them; those beyond the end of the data are of the last datum.
            count: batches.
            size: data of a batch.
            start: the first datum of each that is wanted.
            share: data of each that are wanted.

        Returns:
            Leaves `(count, share, ...)`.
        """
        numbers = jnp.asarray(first).astype(jnp.uint32) + jnp.arange(count, dtype=jnp.uint32)
        places = numbers[:, None] * jnp.uint32(size) + jnp.asarray(start).astype(jnp.uint32)
        places = jnp.minimum(places + jnp.arange(share, dtype=jnp.uint32), jnp.uint32(self.size - 1))
        rows = permuted(places, self.size, self.rounds, jnp)
        batches = jax.tree.map(lambda leaf: leaf.at[rows].get(mode="promise_in_bounds"), self.rows)
        return batches if self.lies is None else jax.lax.with_sharding_constraint(batches, self.lies)
