"""A state that is divided over processes: what each has of it, and the whole in JAX's terms for orbax."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "processes"


class Piece(NamedTuple):
    """Where an array that is a piece of another one lies in it.

    Attributes:
        path: the whole array's.
        axis: along which the whole is divided.
        start: the piece's first index along it.
        shape: the whole array's.
    """

    path: str
    axis: int
    start: int
    shape: tuple[int, ...]


def own(leaves: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Piece]]:
    """What this process has of arrays that lie on the devices of several: of one that is divided, its pieces, once.

    Returns:
        Arrays by a name, and which of them are pieces.
    """
    arrays: dict[str, Any] = {}
    pieces: dict[str, Piece] = {}
    for path, leaf in leaves.items():
        if not isinstance(leaf, jax.Array) or leaf.is_fully_replicated:
            arrays[path] = leaf
            continue
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                (axis,) = [axis for axis, size in enumerate(shard.data.shape) if size < leaf.shape[axis]]
                piece = Piece(path, axis, shard.index[axis].start or 0, leaf.shape)
                arrays[f"{path}@{piece.start}"], pieces[f"{path}@{piece.start}"] = shard.data, piece
    return arrays, pieces


def whole(arrays: Mapping[str, np.ndarray], pieces: Mapping[str, Piece]) -> dict[str, jax.Array]:
    """Arrays over all processes, from what each has on its host; all processes call it with theirs."""
    mesh, here = _mesh(), _cpus()[jax.process_index()]
    parts: dict[str, list[str]] = {}
    for name in sorted(arrays, key=lambda name: pieces[name].start if name in pieces else 0):
        parts.setdefault(pieces[name].path if name in pieces else name, []).append(name)
    result: dict[str, jax.Array] = {}
    for path, names in parts.items():
        piece = pieces.get(names[0])
        if piece is None:
            spec, shape, local = PartitionSpec(), arrays[path].shape, arrays[path]
        else:
            spec, shape = sharding(piece.axis).spec, piece.shape
            local = arrays[names[0]] if len(names) == 1 else np.concatenate([arrays[n] for n in names], piece.axis)
        held = [jax.device_put(local, here)]
        result[path] = jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, spec), held)
    return result


def divided_axes(leaves: Mapping[str, Any]) -> dict[str, int]:
    """Of arrays, or shapes with their shardings: those that are divided over processes, and along which axis."""
    axes = {}
    for path, leaf in leaves.items():
        lies = getattr(leaf, "sharding", None)
        if isinstance(lies, NamedSharding) and not lies.is_fully_replicated and not lies.is_fully_addressable:
            (axes[path],) = [axis for axis, name in enumerate(lies.spec) if name is not None]
    return axes


def sharding(axis: int) -> NamedSharding:
    """How an array lies on the hosts' CPUs that is divided over the processes along an axis."""
    return NamedSharding(_mesh(), PartitionSpec(*[None] * axis, AXIS))


def part_of(array: jax.Array) -> tuple[slice, ...]:
    """Where this process's part of such an array lies."""
    return array.addressable_shards[0].index


def spread(array: jax.Array) -> np.ndarray:
    """An array in which this process's part is filled in; pages that nobody touches cost no memory."""
    filled = np.empty(array.shape, array.dtype)
    filled[part_of(array)] = np.asarray(array.addressable_shards[0].data)
    return filled


@functools.cache
def _cpus() -> list[jax.Device]:
    """A CPU device of each process."""
    first: dict[int, jax.Device] = {}
    for device in jax.devices("cpu"):
        first.setdefault(device.process_index, device)
    return [first[index] for index in sorted(first)]


@functools.cache
def _mesh() -> Mesh:
    return Mesh(np.asarray(_cpus()), (AXIS,))
