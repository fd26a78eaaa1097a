"""Arrow tables in files as data: a row is a datum, and nothing is read before it is asked for."""

from __future__ import annotations

import bisect
import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from learnax.utils.names import expanded


class ArrowFile:
    """The rows of an Arrow IPC file (Feather), each a dict of its columns.

    The file is mapped, not read, and each worker process maps it by its path. Columns are of numbers, or of lists of
    numbers of one length, without nulls; a row of them is a numpy number, or an array `(length,)`. Compressed files
    cannot be mapped: Arrow decompresses them whole into memory.

    Args:
        path: of the file, as `pyarrow.feather.write_feather(table, path, compression="uncompressed")` writes it.
        columns: names of those that a datum has; all by default.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
        OSError: there is no such file, or it cannot be read.
        ValueError: it is none of Arrow's, or has no such column.
        TypeError: a column of another type, by name.
    """

    def __init__(self, path: str | os.PathLike[str], columns: Sequence[str] | None = None):
        self._path = str(expanded(path, "the path of an Arrow file"))
        self._columns = None if columns is None else list(columns)
        self._size = len(self._opened)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row."""
        if not 0 <= index < self._size:
            raise IndexError(f"datum {index} of {self._size}")
        return self._opened.row(index)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    def __repr__(self) -> str:
        return f"{self._size} rows of {self._path}"

    @functools.cached_property
    def _opened(self) -> _Opened:
        return _Opened(self._path, self._columns)


class _Opened:
    """The columns of a file as numpy arrays that lie in the mapped memory, one for each piece of the file."""

    def __init__(self, path: str, columns: list[str] | None):
        try:
            import pyarrow
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("reading Arrow files needs pyarrow, which is not installed") from error
        try:
            table = pyarrow.ipc.open_file(pyarrow.memory_map(path)).read_all()
        except pyarrow.ArrowInvalid as error:
            raise ValueError(
                f"{path} is no Arrow IPC file ({error}); pyarrow.feather.write_feather(table, path, "
                "compression='uncompressed') writes one, of a Parquet file's table for instance"
            ) from error
        names = table.column_names if columns is None else columns
        for name in names:
            if name not in table.column_names:
                raise ValueError(f"{path} has no column {name!r}; there are {', '.join(table.column_names)}")
        table = table.select(names)
        self._size = len(table)
        self._pieces: list[dict[str, np.ndarray]] = []
        self._starts: list[int] = []
        start = 0
        for batch in table.to_batches():
            self._starts.append(start)
            self._pieces.append({name: _array(path, name, batch.column(name)) for name in names})
            start += len(batch)

    def __len__(self) -> int:
        return self._size

    def row(self, index: int) -> dict[str, Any]:
        """One row."""
        piece = bisect.bisect_right(self._starts, index) - 1
        return {name: array[index - self._starts[piece]] for name, array in self._pieces[piece].items()}


def _array(path: str, name: str, column: Any) -> np.ndarray:
    """A piece of a column as an array, of the file's own memory but for booleans, which take a bit each there."""
    import pyarrow

    kind, length = column.type, None
    if pyarrow.types.is_fixed_size_list(kind):
        kind, length = kind.value_type, kind.list_size
    known = pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) or pyarrow.types.is_boolean(kind)
    values = column if length is None else column.flatten()
    if not known or column.null_count or values.null_count:
        what = f"has {column.null_count or values.null_count} nulls" if known else f"is of type {column.type}"
        raise TypeError(
            f"{path}: column {name!r} {what}, but columns are of numbers, or of lists of them of one length, without "
            "nulls; name others by columns=, or give a dataset of your own, whose __getitem__ decodes a row"
        )
    array: np.ndarray = values.to_numpy(zero_copy_only=not pyarrow.types.is_boolean(kind))
    return array if length is None else array.reshape(len(column), length)
