"""The order in which an epoch reads its data: a permutation of which only a small part is ever in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, overload

import numpy as np

from learnax.utils.permutation import permuted, rounds_of

_PIECE = 1 << 13
"""Places that are computed together: numpy takes as long for a few as for some thousands."""


class Order:
    """The indices of a dataset in the order of an epoch: a function of seed and epoch alone.

    It is computed where it is looked at, and takes no more memory for 1e9 data than for a thousand.

    Args:
        size: data.
        seed: of the run.
        epoch: from 0.

    Raises:
        IndexError: a place that it does not have.
    """

    def __init__(self, size: int, seed: int, epoch: int):
        self._size, self._seed, self._epoch = size, seed, epoch
        self.rounds = rounds_of(size, seed, epoch)
        self._piece: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, place: int) -> int: ...

    @overload
    def __getitem__(self, place: slice) -> np.ndarray: ...

    def __getitem__(self, place: int | slice) -> int | np.ndarray:
        """The index at a place; of a slice, an array of int64."""
        if isinstance(place, slice):
            places = range(self._size)[place]
            return self._at(np.arange(places.start, places.stop, places.step))
        number, within = divmod(range(self._size)[place], _PIECE)
        if self._piece is None or self._piece[0] != number:
            self._piece = number, self._at(np.arange(number * _PIECE, min((number + 1) * _PIECE, self._size)))
        return int(self._piece[1][within])

    def __iter__(self) -> Iterator[int]:
        return (self[place] for place in range(self._size))

    def __repr__(self) -> str:
        return f"Order({self._size} data, seed {self._seed}, epoch {self._epoch})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_piece": None}

    def _at(self, places: np.ndarray) -> np.ndarray:
        return permuted(places.astype(self.rounds.dtype), self._size, self.rounds).astype(np.int64)
