"""Small leaves of a tree side by side in one vector.

A model has many small parameters, and each costs an operation of its own wherever something is done to
all: a norm, a mean over the devices, an update. Measured on a 2-core CPU, MLP of width 128, 16 steps in a
dispatch: the norm of each of six gradients took 20 to 30 µs a step leaf by leaf and 4 packed.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from learnax.utils import PyTree, leaves_by_path

SMALL = 1 << 16
"""Elements of the largest leaf that is packed. Copying a larger one costs more than an operation of its own."""
ROW = 128
"""Elements that a leaf in the vector is filled up to a multiple of, with zeros, where it has as many."""


class Packing:
    """How trees of one structure are packed.

    A packed tree is a list: the vector, float32, of the small float32 leaves, then each other leaf. It is a
    tree itself, for optimisers that treat each element alone to work on.

    Args:
        like: a tree of parameters, or its shapes.
        moments: whether an optimiser's moments are packed, too.
        params: whether the parameters themselves are, in the state that a step takes.
        apart: whether a packed tree has each leaf as it is after all, and small ones are side by side for their norms
            alone. What is packed has to be unpacked for an update by the leaf. Measured on 2 cores, a single step
            of a ResNet with 27 small parameters: 1.06 of a hand-written one packed, 1.01 so.
        step: a number of the program's that its compiler does not know, for shorter code to unpack; see `_untold`.
        aligned: whether each leaf takes whole rows of the vector, for norms in as few operations as may be: on a GPU,
            where each is a kernel. Where they are many, a CPU's compiler takes long for them.

    Attributes:
        moments: see above.
        paths: of the leaves.
    """

    def __init__(
        self,
        like: PyTree,
        *,
        moments: bool = False,
        params: bool = False,
        apart: bool = False,
        step: Any = None,
        aligned: bool = False,
    ):
        leaves = leaves_by_path(like)
        self._norms = Packing(like) if apart else None
        self._structure: Any = jax.tree.structure(like)
        # A tree that is one leaf is no container: each array of an optimiser would be taken for one like it.
        self.moments = moments and bool(leaves) and not jax.tree_util.treedef_is_leaf(self._structure)
        self.params = params and self.moments
        self._shapes = [leaf.shape for leaf in leaves.values()]
        # What each leaf takes of the vector; 0 for one that is not packed. Those that take the same are side by side,
        # so that something is done to all of them at once.
        self._aligned = aligned
        self._widths = [0 if apart else _width(leaf, aligned=aligned) for leaf in leaves.values()]
        self._order = sorted(range(len(leaves)), key=lambda place: -self._widths[place])
        self.paths = list(leaves)
        widths = [self._widths[place] for place in self._order if self._widths[place]]
        self._starts: list[Any] = list(itertools.accumulate(widths, initial=0))[:-1]
        if step is not None:
            self._starts = _untold(self._starts, step)

    def at(self, step: Any) -> Packing:
        """The same with `step`."""
        other = copy.copy(self)
        other._starts = _untold(self._starts, step)
        return other

    @property
    def small(self) -> list[bool]:
        """Whether each leaf is in the vector."""
        return [width > 0 for width in self._widths]

    @property
    def arrays(self) -> int:
        """How many a packed tree has."""
        return 1 + self._widths.count(0)

    def close(self, state: Any) -> Any:
        """A training state, so packed, as a loop carries it: in fewer arrays where there is a form for it."""
        return state

    def opened(self, carried: Any) -> Any:
        """The inverse of `close`."""
        return carried

    def pack(self, tree: PyTree) -> list[Any]:
        """A tree, packed; small leaves that are numpy arrays into another one."""
        leaves = jax.tree.leaves(tree)
        small = [leaf for leaf, width in zip(leaves, self._widths, strict=True) if width]
        numpy: Any = np if small and all(isinstance(leaf, np.ndarray) for leaf in small) else jnp
        vector: list[Any] = []
        large: list[Any] = []
        for place in self._order:
            leaf, width = leaves[place], self._widths[place]
            if not width:
                large.append(leaf)
                continue
            vector.append(leaf.reshape(-1))
            if width > leaf.size:
                vector.append(numpy.zeros(width - leaf.size, numpy.float32))
        return [numpy.concatenate(vector) if vector else jnp.zeros(0), *large]

    def unpack(self, packed: list[jax.Array]) -> PyTree:
        """The inverse of `pack`."""
        return jax.tree.unflatten(self._structure, self.leaves(packed))

    def leaves(self, packed: list[Any]) -> list[Any]:
        """The leaves of the tree that a packed one is of; where that is on the host, those that have an array."""
        starts, large = iter(self._starts), iter(packed[1:])
        leaves: dict[int, Any] = {}
        for place in self._order:
            if not self._widths[place]:
                leaves[place] = next(large)
                continue
            shape, start = self._shapes[place], next(starts)
            part: Any
            if isinstance(packed[0], np.ndarray):
                part = packed[0][start : start + math.prod(shape)]
            else:
                part = jax.lax.dynamic_slice(packed[0], (start,), (math.prod(shape),), allow_negative_indices=False)
            leaves[place] = part.reshape(shape)
        return [leaves[place] for place in range(len(leaves))]

    def pack_moments(self, opt_state: PyTree) -> PyTree:
        """An optimiser's state in which all that is shaped like the parameters is packed."""
        if not self.moments:
            return opt_state
        return jax.tree.map(
            lambda part: self.pack(part) if self.is_known(part) else part, opt_state, is_leaf=self.is_known
        )

    def unpack_moments(self, packed: PyTree, like: PyTree) -> PyTree:
        """The inverse of `pack_moments`; `like` is the state before it."""
        if not self.moments:
            return packed
        return jax.tree.map(
            lambda known, part: self.unpack(part) if self.is_known(known) else part,
            like,
            packed,
            is_leaf=self.is_known,
        )

    def squares(self, packed: list[jax.Array]) -> jax.Array:
        """The sum of the squares of each leaf, float32, `(len(paths),)`: what is not finite in one is in no other."""
        (sums,) = self._reduced(packed, lambda leaf: (_squared(leaf),), (jnp.add,))
        return self._in_order(sums)

    def squares_and_finite(self, packed: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """`squares`, and whether all is finite, where a sum may not be; both by one pass over the memory."""
        sums, most = self._reduced(packed, _square_and_size, (jnp.add, jnp.maximum))
        finite = functools.reduce(jnp.logical_and, [jnp.isfinite(each).all() for each in most], jnp.asarray(True))
        return self._in_order([each.astype(jnp.float32) for each in sums]), finite

    def _reduced(
        self, packed: list[jax.Array], parts: Callable[[jax.Array], tuple[jax.Array, ...]], each: tuple[Any, ...]
    ) -> list[list[jax.Array]]:
        """Numbers of each leaf, in vectors, in the order in which they are packed.

        Args:
            packed: a packed tree.
            parts: what of an array's elements is put together; 0 of one that is 0.
            each: how, for each of these parts; all of them in one pass.
        """
        if self._norms is not None:
            return self._norms._reduced(self._norms.pack(packed[1:]), parts, each)

        def reduced(arrays: Sequence[jax.Array], axes: Sequence[int]) -> list[jax.Array]:
            starts = [jnp.zeros((), array.dtype) for array in arrays]
            both = lambda a, b: [put(x, y) for put, x, y in zip(each, a, b, strict=True)]  # noqa: E731
            return list(jax.lax.reduce(list(arrays), starts, both, axes))

        found, start = [], 0
        if self._aligned and self._starts:
            found.append(reduced(self._tables(reduced(parts(packed[0].reshape(-1, ROW)), (1,))), (1,)))
        for width, count in itertools.groupby(self._widths[place] for place in self._order):
            if not width or self._aligned:
                continue
            number = len(list(count))
            block = packed[0][start : start + number * width]
            # In rows: the compiler sums many short ones faster than few long ones.
            rows = parts(block.reshape(number, -1, min(width, ROW)))
            found.append(reduced(reduced(rows, (2,)), (1,)))
            start += number * width
        for leaf in packed[1:]:
            found.append([number[None] for number in reduced(parts(leaf), range(leaf.ndim))])
        return [[own[kind] for own in found] for kind in range(len(each))]

    def _tables(self, rows: list[jax.Array]) -> list[jax.Array]:
        """Numbers of the vector's rows as tables with a row for each leaf, filled up with zeros."""
        widths = [self._widths[place] // ROW for place in self._order if self._widths[place]]
        ends = list(itertools.accumulate(widths))
        places = [(end - width, end, max(widths) - width) for width, end in zip(widths, ends, strict=True)]
        return [jnp.stack([jnp.pad(row[a:b], (0, fill)) for a, b, fill in places]) for row in rows]

    def _in_order(self, numbers: list[jax.Array]) -> jax.Array:
        """Numbers of each leaf in the order of the leaves."""
        if not numbers:
            return jnp.zeros(0)
        order = self._order if self._norms is None else self._norms._order
        places = np.argsort(order, kind="stable")
        if self._aligned:
            each = [number for vector in numbers for number in vector]
            return jnp.stack([each[place] for place in places])
        return jnp.concatenate(numbers).at[places].get(mode="promise_in_bounds", unique_indices=True)

    def is_known(self, tree: Any) -> bool:
        """Whether a part of an optimiser's state is packed: it is shaped like the parameters."""
        if not self.moments or jax.tree.structure(tree) != self._structure:
            return False
        leaves = zip(jax.tree.leaves(tree), self._shapes, self._widths, strict=True)
        return all(leaf.shape == shape and (not width or leaf.dtype == jnp.float32) for leaf, shape, width in leaves)


def _squared(leaf: jax.Array) -> jax.Array:
    return jnp.square(jnp.abs(leaf).astype(jnp.float32))


def _square_and_size(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Of one type, float32 at least, as one reduction takes both.
    size = jnp.abs(leaf)
    size = size if size.dtype == jnp.float64 else size.astype(jnp.float32)
    return jnp.square(size), size


def _width(leaf: Any, *, aligned: bool) -> int:
    """What a leaf takes of the vector: whole rows; or less than one, where not all are to be aligned."""
    if leaf.dtype != jnp.float32 or leaf.size > SMALL:
        return 0
    return leaf.size if leaf.size < ROW and not aligned else -(-leaf.size // ROW) * ROW


def _untold(starts: list[int], step: Any) -> list[jax.Array]:
    """The same numbers, as ones that the compiler does not know.

    A CPU's compiler makes code for each slice that begins at another number, 7 ms each: of a model with 240 small
    parameters, whose moments are unpacked, that was most of what compiling took. Slices of one shape that begin at a
    number of the program's share their code. So the numbers come out of a branch. Both sides have the same, but the
    compiler does not look.
    """
    numbers = lambda: [jnp.int32(start) for start in starts]  # noqa: E731
    return jax.lax.cond(step >= 0, numbers, numbers)
