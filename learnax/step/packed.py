"""The training state between dispatches: a few arrays in place of one for each of its leaves.

What a dispatch costs the host grows by about 1 µs with each array that goes in and comes out (a 2-core CPU), and in the
program each of many small leaves costs an operation of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from learnax.step.guard import treats_elements_alone
from learnax.step.packing import Packing
from learnax.step.recipe import Recipe
from learnax.step.state import TrainState
from learnax.utils import is_key, leaves_by_path

REST = 1 << 12
"""Elements of the largest leaf that is put beside others, of those that are not shaped like the parameters."""


class Form:
    """How a training state is packed.

    What is shaped like the parameters is packed as `Packing` has it. Of all else, counts and batch statistics for
    instance, small leaves lie side by side, in a vector for each type.

    Args:
        like: the state, or its shapes.

    Attributes:
        packing: of what is shaped like the parameters.
        paths: of all leaves, in the state's order.
        held: by array, the paths of its leaves.
    """

    def __init__(self, like: TrainState):
        self.packing = packing = _PackingOf(self, like.params)
        self._signature = _signature(like)
        own = like._replace(model_state=None)
        # The model is given what it carries on as it is, whatever that is shaped like.
        self._parts: Any = jax.tree.structure(own, is_leaf=packing.is_known)
        self._own: Any = jax.tree.structure(own)
        self._carried: Any = jax.tree.structure(like.model_state)
        parts = self._split(like)
        self._known = [packing.is_known(part) for part in parts]
        self._shapes = [() if known else part.shape for part, known in zip(parts, self._known, strict=True)]
        self._groups: dict[Any, list[int]] = {}
        for place, part in enumerate(parts):
            if not self._known[place] and not is_key(part) and part.size <= REST:
                self._groups.setdefault(np.dtype(part.dtype), []).append(place)
        self._grouped = {place for group in self._groups.values() for place in group}
        # By leaf: whether it shares an array with others. By array: whether it is a leaf of its own.
        self._shared: list[bool] = []
        for place, known in enumerate(self._known):
            self._shared += packing.small if known else [place in self._grouped]
        self.paths = list(leaves_by_path(like))
        told = self._told(self.paths)
        self.held = [paths for paths, _ in told]
        self._alone = [alone for _, alone in told]

    def fits(self, state: TrainState) -> bool:
        """Whether this is the form of such a state."""
        return _signature(state) == self._signature

    def pack(self, state: TrainState) -> Packed:
        """A state, packed: on the host, where all its small leaves are numpy arrays."""
        parts = zip(self._split(state), self._known, strict=True)
        return self._packed([self.packing.pack(part) if known else part for part, known in parts])

    def close(self, state: TrainState) -> Packed:
        """The inverse of `Packed.opened`."""
        return self._packed(self._split(state))

    def opened(self, arrays: Sequence[Any]) -> TrainState:
        """See `Packed.opened`."""
        return self._joined(self._parts, self._opened(arrays))

    def small(self, arrays: Sequence[Any]) -> list[Any]:
        """Leaves that share an array; None for each that has its own, which may be None as well."""
        leaves: list[Any] = []
        for part, known in zip(self._opened(arrays), self._known, strict=True):
            leaves += self.packing.leaves(part) if known else [part]
        return leaves

    def whole(self, packed: Packed, small: Callable[[Form, Sequence[Any]], Sequence[Any]]) -> TrainState:
        """The state of a packed one: leaves that share an array are new.

        Args:
            packed: it.
            small: the method of this name, or what puts its result where it is wanted.
        """
        own = iter([array for array, alone in zip(packed.arrays, self._alone, strict=True) if alone])
        shared = [None if alone else array for array, alone in zip(packed.arrays, self._alone, strict=True)]
        leaves = small(self, shared)
        return self._joined(self._own, [next(own) if leaf is None else leaf for leaf in leaves])

    @staticmethod
    def with_params(function: Callable[[Any], Any], state: TrainState) -> TrainState:
        """A state, with a function applied to its parameters, and to their average where there is one."""
        return state._replace(params=function(state.params), ema=None if state.ema is None else function(state.ema))

    def map_small(self, function: Callable[[Any], Any], state: TrainState) -> TrainState:
        """A state, with a function applied to each leaf that shares an array with others."""
        leaves = self._own.flatten_up_to(state._replace(model_state=None))
        leaves += self._carried.flatten_up_to(state.model_state)
        pairs = zip(leaves, self._shared, strict=True)
        return self._joined(self._own, [function(leaf) if shared else leaf for leaf, shared in pairs])

    def shapes(self, packed: Packed) -> TrainState:
        """Those of the state that a packed one is of."""
        shapes: TrainState = jax.eval_shape(lambda packed: self.whole(packed, Form.small), packed)
        return shapes

    def _split(self, state: TrainState) -> list[Any]:
        own: list[Any] = self._parts.flatten_up_to(state._replace(model_state=None))
        return own + self._carried.flatten_up_to(state.model_state)

    def _joined(self, own: Any, values: list[Any]) -> TrainState:
        state: TrainState = own.unflatten(values[: own.num_leaves])
        return state._replace(model_state=self._carried.unflatten(values[own.num_leaves :]))

    def _packed(self, parts: list[Any]) -> Packed:
        """Of parts, those like the parameters packed: their arrays, then leaves of their own, then the vectors."""
        arrays: list[Any] = []
        for place, part in enumerate(parts):
            if place not in self._grouped:
                arrays += part if self._known[place] else [part]
        for group in self._groups.values():
            leaves = [parts[place] for place in group]
            numpy = np if all(isinstance(leaf, (np.ndarray, np.generic)) for leaf in leaves) else jnp
            arrays.append(numpy.concatenate([leaf.reshape(-1) for leaf in leaves]))
        return Packed(tuple(arrays), self)

    def _opened(self, arrays: Sequence[Any]) -> list[Any]:
        """The inverse of `_packed`."""
        parts: list[Any] = [None] * len(self._known)
        rest = iter(arrays)
        for place, known in enumerate(self._known):
            if place not in self._grouped:
                parts[place] = [next(rest) for _ in range(self.packing.arrays)] if known else next(rest)
        for group in self._groups.values():
            vector, start = next(rest), 0
            for place in group:
                size = math.prod(self._shapes[place])
                parts[place] = vector[start : start + size].reshape(self._shapes[place])
                start += size
        return parts

    def _told(self, paths: list[str]) -> list[tuple[list[str], bool]]:
        """Of each array: the paths of its leaves, and whether it is a leaf of its own."""
        carried = [path for path in paths if path.split("/")[0] == "model_state"]
        rest = iter([path for path in paths if path not in set(carried)] + carried)
        parts = [[next(rest) for _ in (self.packing.paths if known else (0,))] for known in self._known]
        told: list[tuple[list[str], bool]] = []
        for place, known in enumerate(self._known):
            if known:
                pairs = list(zip(parts[place], self.packing.small, strict=True))
                told.append(([path for path, small in pairs if small], False))
                told += [([path], True) for path, small in pairs if not small]
            elif place not in self._grouped:
                told.append((parts[place], True))
        return told + [([parts[place][0] for place in group], False) for group in self._groups.values()]


class _PackingOf(Packing):
    """Of a state that has a form."""

    def __init__(self, form: Form, like: Any):
        super().__init__(like, moments=True, params=True)
        self._form = form

    def close(self, state: TrainState) -> Packed:
        return self._form.close(state)

    def opened(self, carried: Packed) -> TrainState:
        return carried.opened()


def _signature(state: TrainState) -> tuple[Any, list[Any]]:
    leaves, structure = jax.tree.flatten(state)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def packs(recipe: Recipe, like: TrainState) -> bool:
    """Whether a state may be packed: the optimiser treats each element alone, and there is something to pack.

    On other devices than a CPU none is, until that is measured: compiled for an H100, a step of a small model starts
    fewer kernels on a packed state, but copies a vector of it.
    """
    packing = Packing(like.params, moments=True)
    small = packing.moments and any(packing.small)
    return small and not recipe.selects and treats_elements_alone(recipe, like)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Packed:
    """A training state, packed.

    Attributes:
        arrays: what it is made of.
        form: how.
    """

    arrays: tuple[Any, ...]
    form: Form = dataclasses.field(metadata={"static": True})

    def opened(self) -> TrainState:
        """The state, in which each part that is shaped like the parameters is packed, see `Packing`."""
        return self.form.opened(self.arrays)
