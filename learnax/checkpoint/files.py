"""One save on disk: a folder that orbax writes, sealed so that a damaged one is known for what it is."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from learnax.checkpoint import seals
from learnax.checkpoint.pieces import Piece, part_of, sharding, spread, whole
from learnax.checkpoint.places import look, memory, spelled
from learnax.checkpoint.trees import flat, nested

_STATE, _META, _META_FILE = "state", "meta", "metadata"
_DRAFT, _DRAFTS = "{}.orbax-checkpoint-tmp-unread", "*.orbax-checkpoint-tmp*"
_LETTERS = 200
"""Of another library's error that are repeated, from its beginning and from its end."""


class DamagedError(ValueError):
    """A save that is not what was written: the folder and what is wrong with it are in the text."""


def write(folder: Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Writes a save, and looks whether it can be read; the folder has its name only once all of it is on disk.

    Args:
        folder: where; it must not be there yet.
        arrays: by their paths.
        meta: plain values.

    Raises:
        OSError: what was written could not be read; it is gone.
    """
    _save(folder, _stored(arrays), seals.sealed(arrays, {}, [], meta), together=False)


def write_together(
    folder: Path,
    arrays: Mapping[str, np.ndarray],
    pieces: Mapping[str, Piece],
    sums: Iterable[Mapping[str, int]],
    rest: Mapping[str, np.ndarray],
    meta: Mapping[str, Any],
) -> None:
    """`write` by all processes of a run, each with what it has; it returns when all of it is on disk.

    Args:
        folder: where, on storage that all share.
        arrays: by their paths, or pieces of them by a name.
        pieces: which are pieces.
        sums: `piece_seals` of each process.
        rest: more arrays by their paths, those of the first process.
        meta: plain values, those of the first process.
    """
    # orbax writes plain numpy arrays on the first process alone.
    given = {**whole(_stored(arrays), pieces), **_stored(rest)}
    _save(folder, given, seals.sealed({**arrays, **rest}, pieces, sums, meta), together=True)


def read(folder: Path, meta: Mapping[str, Any], axes: Mapping[str, int] = MappingProxyType({})) -> dict[str, Any]:
    """Reads the arrays of a save, as numpy arrays by their paths.

    Args:
        folder: the save.
        meta: what `read_meta` gives.
        axes: of arrays, by their paths, that are divided over the processes along an axis: of such a one this process's
            part alone is read and looked at, and the rest is memory that nobody has touched.

    Raises:
        DamagedError: a file is missing or cut short, or a byte is another one.
    """
    import orbax.checkpoint as ocp

    with _reading(folder) as place:
        # As numpy, so that a checkpoint does not ask for the devices that it was written on.
        found = _found(place, meta)
        _check_room(found, axes)
        as_numpy = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in found}
        in_part = {
            path: ocp.ArrayRestoreArgs(sharding=sharding(axis)) for path, axis in axes.items() if path in as_numpy
        }
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(restore_args=nested({**as_numpy, **in_part})))
        arrays = flat(_orbax(together=False).restore(place, args=args)[_STATE])
        parts = {path: part_of(arrays[path]) for path in in_part}
        arrays |= {path: spread(arrays[path]) for path in in_part}
        for path, (_, dtype) in (seals.kinds(meta) or {}).items():
            if path in arrays:
                arrays[path] = arrays[path].view(jax.numpy.dtype(dtype))
        seals.check(arrays, meta, parts)
        return arrays | seals.empty(meta)


def read_meta(folder: Path) -> dict[str, Any]:
    """Reads the meta values of a save alone; a DamagedError as for `read`."""
    with _reading(folder):
        return seals.opened(json.loads((folder / _META / _META_FILE).read_bytes()))


def warm_up() -> None:
    """Loads what writing needs."""
    _orbax(together=False)


def remove_drafts(path: Path) -> None:
    """Deletes what is left of saves that were not finished."""
    for draft in path.glob(_DRAFTS):
        shutil.rmtree(draft, ignore_errors=True)


def reason(error: BaseException) -> str:
    """An error in some words; those of the storage library have a page of its settings."""
    text = re.sub(r" \[tensorstore_spec=.*\]", "", str(error))
    if len(text) > 2 * _LETTERS:
        text = f"{text[:_LETTERS]} ... {text[-_LETTERS:]}"  # the beginning says where, the end says why
    return f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def reading(folder: Path, place: Path | None = None) -> Iterator[None]:
    """What goes wrong inside, with the content of a save, is a DamagedError.

    Args:
        folder: the save.
        place: the path that it is read by.
    """
    try:
        yield
    except (PermissionError, MemoryError, DamagedError):
        raise
    except Exception as error:
        what = reason(error).replace(str(place or folder), str(folder))
        raise DamagedError(f"checkpoint {folder} is damaged: {what}") from error


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[Path]:
    """`reading`, once nothing in the folder can hold it up; gives the path that storage libraries take."""
    with spelled(folder) as place, reading(folder, place):
        look(folder)
        yield place


def _save(folder: Path, arrays: Mapping[str, Any], held: Mapping[str, Any], *, together: bool) -> None:
    import orbax.checkpoint as ocp

    # orbax takes no array without elements.
    tree = nested({path: array for path, array in arrays.items() if array.size})
    args = ocp.args.Composite(state=ocp.args.PyTreeSave(tree), meta=ocp.args.JsonSave(held))
    with spelled(folder) as place:
        _orbax(together=together).save(place, args=args)
    if not together or jax.process_index() == 0:
        _verify(folder)


def _verify(folder: Path) -> None:
    """Looks at a save as a load does, up to the arrays' content; one that cannot be read is taken away."""
    try:
        meta = read_meta(folder)
        with _reading(folder) as place:
            _found(place, meta)
    except Exception as error:
        # Renamed first: a kill in between leaves nothing that looks like a save.
        shutil.rmtree(folder.rename(folder.with_name(_DRAFT.format(folder.name))), ignore_errors=True)
        raise OSError(f"it was written, but cannot be read: {error}") from error


def _found(place: Path, meta: Mapping[str, Any]) -> dict[str, seals.Kind]:
    """Shapes and dtypes of the arrays that are there, by their paths.

    Raises:
        ValueError: others than were written, or of other shapes or dtypes.
    """
    there = flat(_orbax(together=False).metadata(place).item_metadata[_STATE].tree)
    found = {path: (tuple(array.shape), np.dtype(array.dtype).name) for path, array in there.items()}
    known = seals.kinds(meta)
    if known is not None:
        stored = {path: (shape, _stored_as(dtype).name) for path, (shape, dtype) in known.items() if 0 not in shape}
        wrong = [path for path in {**stored, **found} if stored.get(path) != found.get(path)]
        if wrong:
            texts = [f"{path}: {_text(found.get(path))}, not {_text(stored.get(path))}" for path in sorted(wrong)[:5]]
            raise ValueError(f"other arrays than were written ({len(wrong)}): {'; '.join(texts)}")
    for path, (shape, _) in found.items():
        chunk = getattr(there[path].storage, "chunk_shape", None) or shape  # None for what numpy wrote
        if len(chunk) != len(shape) or any(part > max(size, 1) for part, size in zip(chunk, shape, strict=True)):
            raise ValueError(f"{path} is of shape {list(shape)}, but written in parts of {list(chunk)}")
    return found


def _check_room(found: Mapping[str, seals.Kind], axes: Mapping[str, int]) -> None:
    """Compares what arrays say they take with what there is: to ask for more may end the process."""
    nbytes = 0
    for path, (shape, dtype) in found.items():
        shares = jax.process_count() if path in axes else 1
        nbytes += math.prod(shape) * jax.numpy.dtype(dtype).itemsize // shares
    if nbytes > memory():
        raise ValueError(f"its arrays say that they take {nbytes} bytes; this machine has {memory()} in all")


def _text(kind: seals.Kind | None) -> str:
    return "none" if kind is None else f"{kind[1]}{list(kind[0])}"


def _stored(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays with elements, those of dtypes that the storage library does not know as bytes."""
    return {path: array.view(_stored_as(array.dtype.name)) for path, array in arrays.items() if array.size}


@functools.cache
def _stored_as(dtype: str) -> np.dtype:
    import tensorstore

    try:
        tensorstore.dtype(dtype)
    except (TypeError, ValueError):
        return np.dtype(np.uint8)
    return np.dtype(jax.numpy.dtype(dtype))


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
    # Not compressed: parameters hardly get smaller, and it would take twice the processor time.
    state = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False, multiprocessing_options=options)
    handlers = {_STATE: state, _META: ocp.JsonCheckpointHandler(_META_FILE, multiprocessing_options=options)}
    composite = ocp.CompositeOptions(multiprocessing_options=options)
    handler = ocp.CompositeCheckpointHandler(composite_options=composite, **handlers)
    return ocp.Checkpointer(handler, multiprocessing_options=options)
