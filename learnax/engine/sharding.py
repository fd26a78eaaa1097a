"""A state that is divided over the devices: which arrays, along which axis, and gathered where a step needs them."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from learnax.step.packing import SMALL
from learnax.utils import PyTree


def divided(shapes: PyTree, devices: int, axis_name: str) -> PyTree:
    """How each array of a state lies: along its first axis that the devices divide, or the same on each.

    The first, as parts of it are contiguous: what is gathered or scattered along another one is transposed before and
    after, and so is the state.

    Those that a step packs into one vector stay whole: of a state that is worth dividing, they are a small part.

    Args:
        shapes: arrays or their shapes.
        devices: how many.
        axis_name: the mesh's axis.

    Returns:
        A `PartitionSpec` for each.
    """

    def spec(leaf: Any) -> PartitionSpec:
        axis = next((axis for axis, size in enumerate(leaf.shape) if size and size % devices == 0), None)
        if leaf.size <= SMALL or axis is None or devices == 1:
            return PartitionSpec()
        return PartitionSpec(*[None] * axis, axis_name)

    return jax.tree.map(spec, shapes)


_MOVES = frozenset(
    (
        *("custom_vjp_call", "sharding_constraint", "convert_element_type"),
        *("transpose", "reshape", "squeeze", "broadcast_in_dim", "copy"),
    )
)
"""What takes a parameter from its parts to its use, and computes nothing."""


@dataclasses.dataclass(frozen=True)
class Gather:
    """Gathers parameters for a loss, and divides their gradients again.

    Attributes:
        mesh: the devices.
        specs: how the parameters lie; one for each leaf, in order.
        types: what each is computed in, see `used_types`.
        shapes: of those that are divided, whole.
    """

    mesh: Mesh
    specs: tuple[PartitionSpec, ...]
    types: tuple[Any, ...]
    shapes: frozenset[tuple[int, ...]]

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of whole parameters as one of those that lie in parts.

        What is gathered is let go after its use, and gathered again for the gradient: it would take the memory that
        dividing the state saves. A gradient is summed straight into the devices' parts.
        """
        if not self.shapes:
            return function
        return jax.checkpoint(lambda params, *rest: function(self._whole(params), *rest), policy=self._keeps)

    def _whole(self, params: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(params)
        whole = NamedSharding(self.mesh, PartitionSpec())
        gathered = [
            _gather(leaf, whole, NamedSharding(self.mesh, spec), used) if spec else leaf
            for leaf, spec, used in zip(leaves, self.specs, self.types, strict=True)
        ]
        return jax.tree.unflatten(structure, gathered)

    def _keeps(self, primitive: Any, *given: Any, **settings: Any) -> bool:
        """Whether the gradient finds a value as it was; else it is made again, from a parameter's parts."""
        del settings
        return not (primitive.name in _MOVES and given and given[0].shape in self.shapes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(leaf: jax.Array, whole: NamedSharding, part: NamedSharding, used: Any) -> jax.Array:
    # What is computed in half precision crosses the devices in that; the model, which makes it that, gets it back wide.
    narrow = jax.lax.with_sharding_constraint(leaf.astype(used), part)
    return jax.lax.with_sharding_constraint(narrow, whole).astype(leaf.dtype)


def _forward(leaf: jax.Array, whole: NamedSharding, part: NamedSharding, used: Any) -> tuple[jax.Array, None]:
    return _gather(leaf, whole, part, used), None


def _backward(whole: NamedSharding, part: NamedSharding, used: Any, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, part),)


_gather.defvjp(_forward, _backward)


def used_types(jaxpr: Any, count: int) -> tuple[Any, ...]:
    """The types that a computation makes its first arguments before it does anything else with them.

    Args:
        jaxpr: the computation.
        count: how many of its arguments are asked after.

    Returns:
        For each the one type that all its uses have in common, or its own type.
    """
    made, found = _made(jaxpr), []
    for variable in jaxpr.invars[:count]:
        types = made[id(variable)]
        found.append(next(iter(types)) if len(types) == 1 else variable.aval.dtype)
    return tuple(found)


def _made(jaxpr: Any) -> Mapping[int, set[Any]]:
    """The types that each variable, by its `id`, is made; its own, where anything else is done with it."""
    made: dict[int, set[Any]] = collections.defaultdict(set)
    for variable in jaxpr.outvars:
        made[id(variable)].add(variable.aval.dtype)
    for equation in jaxpr.eqns:
        inner = _called(equation)
        called = inner is not None and len(inner.invars) == len(equation.invars)
        within = _made(inner) if called else {}
        for place, variable in enumerate(equation.invars):
            if equation.primitive.name == "convert_element_type":
                made[id(variable)].add(equation.params["new_dtype"])
            elif called:
                made[id(variable)] |= within[id(inner.invars[place])]
            else:
                made[id(variable)].add(variable.aval.dtype)
    return made


def _called(equation: Any) -> Any:
    """What an equation calls once, on its own arguments; or None."""
    if equation.primitive.name not in (
        "jit",
        "pjit",
        "closed_call",
        "remat2",
        "checkpoint",
        "custom_jvp_call",
        "custom_vjp_call",
    ):
        return None
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    return getattr(inner, "jaxpr", inner)
