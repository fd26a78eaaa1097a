"""A state that is divided over the devices: which arrays, along which axis, and gathered where a step needs them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from learnax.step.packing import SMALL
from learnax.utils import PyTree


def divided(shapes: PyTree, devices: int, axis_name: str) -> PyTree:
    """How each array of a state lies: along its longest axis that the devices divide, or the same on each.

    Those that a step packs into one vector stay whole: of a state that is worth dividing, they are a small part.

    Args:
        shapes: arrays or their shapes.
        devices: how many.
        axis_name: the mesh's axis.

    Returns:
        A `PartitionSpec` for each.
    """

    def spec(leaf: Any) -> PartitionSpec:
        fitting = [axis for axis, size in enumerate(leaf.shape) if size % devices == 0]
        if leaf.size <= SMALL or not fitting or devices == 1:
            return PartitionSpec()
        axis = max(fitting, key=lambda axis: leaf.shape[axis])
        return PartitionSpec(*[None] * axis, axis_name)

    return jax.tree.map(spec, shapes)


@dataclasses.dataclass(frozen=True)
class Gather:
    """Gathers parameters for a loss, and divides their gradients again.

    Attributes:
        mesh: the devices.
        specs: how the parameters lie; one for each leaf, in order.
    """

    mesh: Mesh
    specs: tuple[PartitionSpec, ...]

    def __call__(self, params: PyTree) -> PyTree:
        """The same values on every device; a gradient through it is summed straight into the devices' parts."""
        leaves, structure = jax.tree.flatten(params)
        whole = NamedSharding(self.mesh, PartitionSpec())
        gathered = [
            _gather(leaf, whole, NamedSharding(self.mesh, spec)) if spec else leaf
            for leaf, spec in zip(leaves, self.specs, strict=True)
        ]
        return jax.tree.unflatten(structure, gathered)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(leaf: jax.Array, whole: NamedSharding, part: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(leaf, whole)


def _forward(leaf: jax.Array, whole: NamedSharding, part: NamedSharding) -> tuple[jax.Array, None]:
    return jax.lax.with_sharding_constraint(leaf, whole), None


def _backward(whole: NamedSharding, part: NamedSharding, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, part),)


_gather.defvjp(_forward, _backward)
