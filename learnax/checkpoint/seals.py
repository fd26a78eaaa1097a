"""What a save says of itself: the shape, type and checksum of each array, under one more checksum."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from learnax.checkpoint.pieces import Piece

Kind = tuple[tuple[int, ...], str]
"""An array's shape, and the name of its dtype."""


def sealed(
    arrays: Mapping[str, np.ndarray],
    pieces: Mapping[str, Piece],
    seals: Iterable[Mapping[str, int]],
    meta: Mapping[str, Any],
) -> dict[str, Any]:
    """The meta values of a save, with what there is to know of its arrays, as it is written.

    Args:
        arrays: by their paths, or pieces of them by a name.
        pieces: which are pieces.
        seals: `piece_seals` of each process.
        meta: plain values.
    """
    own = {path: array for path, array in arrays.items() if path not in pieces}
    shapes = {path: array.shape for path, array in own.items()}
    shapes |= {piece.path: piece.shape for piece in pieces.values()}
    dtypes = {pieces[name].path if name in pieces else name: array.dtype for name, array in arrays.items()}
    content = {
        **meta,
        "arrays": {path: [list(shape), dtypes[path].name] for path, shape in shapes.items()},
        "checksums": {path: checksum(array) for path, array in own.items() if array.size},
    }
    if pieces:
        # A divided array has a checksum for each piece, by the piece's beginning along its axis.
        axes = {piece.path: piece.axis for piece in pieces.values()}
        starts: dict[str, dict[str, int]] = {path: {} for path in axes}
        for name, value in itertools.chain.from_iterable(process.items() for process in seals):
            path, start = name.rsplit("@", 1)
            starts[path][start] = value
        content["pieces"] = {path: [axes[path], sums] for path, sums in starts.items()}
    return {"content": content, "checksum": seal(content)}


def opened(held: Any) -> dict[str, Any]:
    """What is under a seal.

    Raises:
        ValueError: it is other content than was sealed, or was never of a save.
    """
    if not isinstance(held, dict) or not isinstance(content := held.get("content"), dict):
        raise ValueError("its meta values are not those of a save")
    if held.get("checksum") != seal(content):
        raise ValueError("other content than was written in its meta values")
    wrong = [name for name, holds in _HOLDS.items() if name in content and not holds(content[name])]
    if wrong or "checksums" not in content:
        raise ValueError(f"its meta values have no {(wrong or ['checksums'])[0]} as a save has it")
    return content


def kinds(content: Mapping[str, Any]) -> dict[str, Kind] | None:
    """The arrays' shapes and dtypes by their paths; None in a save of before they were kept."""
    if "arrays" not in content:
        return None
    return {path: (tuple(shape), dtype) for path, (shape, dtype) in content["arrays"].items()}


def empty(content: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays that have no elements."""
    found = content.get("empty") or content.get("arrays", {})
    return {path: np.zeros(shape, jax.numpy.dtype(name)) for path, (shape, name) in found.items() if 0 in shape}


def check(arrays: Mapping[str, Any], content: Mapping[str, Any], parts: Mapping[str, tuple[slice, ...]]) -> None:
    """Compares the content of arrays with their checksums.

    Args:
        arrays: by their paths.
        content: what was under the seal.
        parts: of arrays of which only a part was read: where it lies.

    Raises:
        ValueError: other content than was written; the arrays are named.
    """
    divided = content.get("pieces", {})
    written: dict[str, Any] = {path: value for path, value in content["checksums"].items() if path not in parts}
    found: dict[str, Any] = {
        path: checksum(array) for path, array in arrays.items() if path not in divided and path not in parts
    }
    for path, (axis, sums) in divided.items():
        # Of a part, the pieces that lie in it whole.
        place = parts[path][axis] if path in parts and path in arrays else slice(None)
        written[path], found[path] = _piece_sums(arrays.get(path), axis, sums, place)
    if found != written:
        wrong = [path for path in {**found, **written} if found.get(path) != written.get(path)]
        raise ValueError(f"other content than was written in {', '.join(sorted(wrong)[:5])}")


def piece_seals(arrays: Mapping[str, np.ndarray], pieces: Mapping[str, Piece]) -> dict[str, int]:
    """Checksums of a process's pieces, by their names."""
    return {name: checksum(arrays[name]) for name in pieces}


def checksum(array: np.ndarray) -> int:
    """A checksum of an array's bytes."""
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
    found = {str(start): checksum(np.moveaxis(along[start:end], 0, axis)) for start, end in seen}
    return {start: written[start] for start in found}, found


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_kind(value: Any) -> bool:
    if not (
        isinstance(value, list) and [type(part) for part in value] == [list, str] and all(map(_is_count, value[0]))
    ):
        return False
    try:
        return jax.numpy.dtype(value[1]).kind in "biufcV" and value[1].isidentifier()
    except (TypeError, ValueError, SyntaxError):
        return False


def _by_name(holds: Any) -> Any:
    return lambda value: isinstance(value, dict) and all(map(holds, value.values()))


def _is_divided(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and _is_count(value[0])
        and isinstance(value[1], dict)
        and all(start.isdecimal() and _is_count(count) for start, count in value[1].items())
    )


# A checksum keeps no one from writing something else under it.
_HOLDS: dict[str, Any] = {
    "step": _is_count,
    "numbered": lambda value: type(value) is bool,
    "best": lambda value: value is None or _is_number(value),
    "best_of": _is_text_or_none,
    "name": _is_text_or_none,
    "minimize": lambda value: value is None or isinstance(value, bool),
    "time": _is_number,
    "hooks": lambda value: value is None or isinstance(value, dict),
    "rate_factor": lambda value: value is None or _is_number(value),
    "checksums": _by_name(_is_count),
    "arrays": _by_name(_is_kind),
    "empty": _by_name(_is_kind),
    "keys": _by_name(lambda value: value in ("threefry2x32", "rbg", "unsafe_rbg")),
    "pieces": _by_name(_is_divided),
}
