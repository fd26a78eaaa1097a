"""One save on disk: a folder that orbax writes, sealed so that a damaged one is known for what it is."""

from __future__ import annotations

import functools
import json
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

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
    content = {
        **meta,
        "checksums": {path: _checksum(array) for path, array in arrays.items() if array.size},
        "empty": {path: [list(array.shape), array.dtype.name] for path, array in arrays.items() if not array.size},
    }
    sealed = {"content": content, "checksum": seal(content)}
    tree = as_dicts({path: array for path, array in arrays.items() if array.size})
    args = ocp.args.Composite(state=ocp.args.PyTreeSave(tree), meta=ocp.args.JsonSave(sealed))
    _orbax().save(folder, args=args)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a save: nested dicts of numpy arrays, and the meta values.

    Raises:
        DamagedError: a file is missing or cut short, or a byte is another one.
    """
    import orbax.checkpoint as ocp

    meta = read_meta(folder)
    try:
        shapes = _orbax().metadata(folder).item_metadata[_STATE].tree
        # As numpy, so that a checkpoint does not ask for the devices that it was written on.
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(restore_args=as_numpy))
        arrays = leaves_by_path(_orbax().restore(folder, args=args)[_STATE])
    except (PermissionError, MemoryError):
        raise
    except Exception as error:
        raise _damaged(folder, reason(error)) from error
    found = {path: _checksum(array) for path, array in arrays.items()}
    if found != meta["checksums"]:
        wrong = [path for path in {**found, **meta["checksums"]} if found.get(path) != meta["checksums"].get(path)]
        raise _damaged(folder, f"other content than was written in {', '.join(sorted(wrong)[:5])}")
    for path, (shape, dtype) in meta["empty"].items():
        arrays[path] = np.zeros(shape, jax.numpy.dtype(dtype))
    return as_dicts(arrays), meta


def read_meta(folder: Path) -> dict[str, Any]:
    """Reads the meta values of a save alone; a DamagedError as for `read`."""
    import orbax.checkpoint as ocp

    try:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        sealed = _orbax().restore(folder, args=args)[_META]
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
    _orbax()


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


@functools.cache
def _orbax() -> Any:
    import orbax.checkpoint as ocp

    # Not compressed: parameters hardly are smaller for it, and it takes twice the time of a core that trains.
    state = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
    handlers = {_STATE: state, _META: ocp.JsonCheckpointHandler()}
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))
