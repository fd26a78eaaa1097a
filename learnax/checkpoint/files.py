"""One save on disk: a folder that orbax writes, sealed so that a damaged one is known for what it is."""

from __future__ import annotations

import functools
import itertools
import json
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from learnax.checkpoint.pieces import Piece, part_of, sharding, spread, whole
from learnax.checkpoint.trees import as_dicts
from learnax.utils import leaves_by_path

_STATE, _META = "state", "meta"
_DRAFT = "*.orbax-checkpoint-tmp*"
_LETTERS = 200
"""Of another library's error that are repeated, from its beginning and from its end."""


class DamagedError(ValueError):
    """A save that is not what was written: the folder and what is wrong with it are in the text."""


def write(folder: Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Writes a save; the folder has its name only once all of it is on disk.

    Args:
        folder: where; it must not be there yet.
        arrays: by their paths.
        meta: plain values.
    """
    import orbax.checkpoint as ocp

    # orbax takes no array without elements.
    tree = as_dicts({path: array for path, array in arrays.items() if array.size})
    sealed = _sealed(arrays, {}, [], meta)
    args = ocp.args.Composite(state=ocp.args.PyTreeSave(tree), meta=ocp.args.JsonSave(sealed))
    _orbax(together=False).save(folder, args=args)


def write_together(
    folder: Path,
    arrays: Mapping[str, np.ndarray],
    pieces: Mapping[str, Piece],
    seals: Iterable[Mapping[str, int]],
    rest: Mapping[str, np.ndarray],
    meta: Mapping[str, Any],
) -> None:
    """`write` by all processes of a run, each with what it has; it returns when all of it is on disk.

    Args:
        folder: where, on storage that all share.
        arrays: by their paths, or pieces of them by a name.
        pieces: which are pieces.
        seals: `piece_seals` of each process.
        rest: more arrays by their paths, those of the first process.
        meta: plain values, those of the first process.
    """
    import orbax.checkpoint as ocp

    # What is plain numpy, orbax writes on the first process alone.
    given: dict[str, Any] = {**whole({path: array for path, array in arrays.items() if array.size}, pieces), **rest}
    tree = as_dicts({path: array for path, array in given.items() if array.size})
    sealed = _sealed({**arrays, **rest}, pieces, seals, meta)
    args = ocp.args.Composite(state=ocp.args.PyTreeSave(tree), meta=ocp.args.JsonSave(sealed))
    _orbax(together=True).save(folder, args=args)


def piece_seals(arrays: Mapping[str, np.ndarray], pieces: Mapping[str, Piece]) -> dict[str, int]:
    """Checksums of a process's pieces, by their names."""
    return {name: _checksum(arrays[name]) for name in pieces}


def _sealed(
    arrays: Mapping[str, np.ndarray],
    pieces: Mapping[str, Piece],
    seals: Iterable[Mapping[str, int]],
    meta: Mapping[str, Any],
) -> dict[str, Any]:
    own = {path: array for path, array in arrays.items() if path not in pieces}
    content = {
        **meta,
        "checksums": {path: _checksum(array) for path, array in own.items() if array.size},
        "empty": {path: [list(array.shape), array.dtype.name] for path, array in own.items() if not array.size},
    }
    if pieces:
        # A divided array has a checksum for each piece, by the piece's beginning along its axis.
        axes = {piece.path: piece.axis for piece in pieces.values()}
        starts: dict[str, dict[str, int]] = {path: {} for path in axes}
        for name, checksum in itertools.chain.from_iterable(process.items() for process in seals):
            path, start = name.rsplit("@", 1)
            starts[path][start] = checksum
        content["pieces"] = {path: [axes[path], sums] for path, sums in starts.items()}
    return {"content": content, "checksum": seal(content)}


def read(folder: Path, axes: Mapping[str, int] = MappingProxyType({})) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a save: nested dicts of numpy arrays, and the meta values.

    Args:
        folder: the save.
        axes: of arrays, by their paths, that are divided over the processes along an axis: of such a one this process's
            part alone is read and looked at, and the rest is memory that nobody has touched.

    Raises:
        DamagedError: a file is missing or cut short, or a byte is another one.
    """
    import orbax.checkpoint as ocp

    meta = read_meta(folder)
    try:
        shapes = _orbax(together=False).metadata(folder).item_metadata[_STATE].tree
        # As numpy, so that a checkpoint does not ask for the devices that it was written on.
        as_numpy = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in leaves_by_path(shapes)}
        in_part = {path: ocp.ArrayRestoreArgs(sharding=sharding(axis)) for path, axis in axes.items()}
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(restore_args=as_dicts({**as_numpy, **in_part})))
        arrays = leaves_by_path(_orbax(together=False).restore(folder, args=args)[_STATE])
        parts = {path: part_of(arrays[path]) for path in axes}
        arrays |= {path: spread(arrays[path]) for path in axes}
    except (PermissionError, MemoryError):
        raise
    except Exception as error:
        raise _damaged(folder, reason(error)) from error
    divided = meta.get("pieces", {})
    written: dict[str, Any] = {path: checksum for path, checksum in meta["checksums"].items() if path not in parts}
    found: dict[str, Any] = {
        path: _checksum(array) for path, array in arrays.items() if path not in divided and path not in parts
    }
    for path, (axis, sums) in divided.items():
        # Of a part, the pieces that lie in it whole.
        place = parts[path][axis] if path in parts and path in arrays else slice(None)
        written[path], found[path] = _piece_sums(arrays.get(path), axis, sums, place)
    if found != written:
        wrong = [path for path in {**found, **written} if found.get(path) != written.get(path)]
        raise _damaged(folder, f"other content than was written in {', '.join(sorted(wrong)[:5])}")
    for path, (shape, dtype) in meta["empty"].items():
        arrays[path] = np.zeros(shape, jax.numpy.dtype(dtype))
    return as_dicts(arrays), meta


def read_meta(folder: Path) -> dict[str, Any]:
    """Reads the meta values of a save alone; a DamagedError as for `read`."""
    import orbax.checkpoint as ocp

    try:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        sealed = _orbax(together=False).restore(folder, args=args)[_META]
        content, checksum = sealed["content"], sealed["checksum"]
    except (PermissionError, MemoryError):
        raise
    except Exception as error:
        raise _damaged(folder, reason(error)) from error
    if checksum != seal(content):
        raise _damaged(folder, "other content than was written in its meta values")
    return content


def warm_up() -> None:
    """Loads what writing needs."""
    _orbax(together=False)


def remove_drafts(path: Path) -> None:
    """Deletes what is left of saves that were not finished."""
    for draft in path.glob(_DRAFT):
        shutil.rmtree(draft, ignore_errors=True)


def reason(error: BaseException) -> str:
    """An error in some words; those of the storage library have a page of its settings."""
    text = re.sub(r" \[tensorstore_spec=.*\]", "", str(error))
    if len(text) > 2 * _LETTERS:
        text = f"{text[:_LETTERS]} ... {text[-_LETTERS:]}"  # where it was, and at the end why
    return f"{type(error).__name__}: {text}"


def _damaged(folder: Path, why: str) -> DamagedError:
    return DamagedError(f"checkpoint {folder} is damaged: {why}")


def _checksum(array: np.ndarray) -> int:
    data: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return zlib.crc32(data)


def seal(content: Any) -> int:
    """A checksum of plain values, the same before they are written as JSON and after."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _piece_sums(
    array: np.ndarray | None, axis: int, written: Mapping[str, int], place: slice = slice(None)
) -> tuple[dict[str, int], dict[str, int]]:
    """Checksums of the pieces that an array was written in, as written and as found, by their beginnings on an axis.

    Args:
        array: None where it is missing.
        axis: along which it was divided.
        written: of all pieces.
        place: the part along the axis that is looked at.
    """
    if array is None:
        return dict(written), {}
    size = array.shape[axis]
    starts = sorted(map(int, written))
    spans = zip(starts, [*starts[1:], size], strict=True)
    first, last, _ = place.indices(size)
    seen = [(start, end) for start, end in spans if first <= start and end <= last]
    along = np.moveaxis(array, axis, 0)
    found = {str(start): _checksum(np.moveaxis(along[start:end], 0, axis)) for start, end in seen}
    return {start: written[start] for start in found}, found


@functools.cache
def _orbax(*, together: bool) -> Any:
    """Orbax's parts, for this process alone or for all of a run.

    Named all, they wait for one another through JAX's store of keys, which may be done beside the training; else it
    would be a collective on the devices.
    """
    import orbax.checkpoint as ocp

    here = jax.process_index()
    active = set(range(jax.process_count())) if together else {here}
    options = ocp.options.MultiprocessingOptions(
        primary_host=0 if together else here, active_processes=active, barrier_sync_key_prefix=f"learnax-{min(active)}"
    )
    # Not compressed: parameters hardly are smaller for it, and it takes twice the time of a core that trains.
    state = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False, multiprocessing_options=options)
    handlers = {_STATE: state, _META: ocp.JsonCheckpointHandler(multiprocessing_options=options)}
    composite = ocp.CompositeOptions(multiprocessing_options=options)
    handler = ocp.CompositeCheckpointHandler(composite_options=composite, **handlers)
    return ocp.Checkpointer(handler, multiprocessing_options=options)
