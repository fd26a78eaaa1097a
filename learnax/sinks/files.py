"""Rows in text files: a JSON object a line, or a table."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from learnax.sinks.appended import Appended, beside, check_file
from learnax.sinks.sink import InPath, Row, Start, kept, number

_logger = logging.getLogger("learnax")
_BLOCK = 1 << 20
_encoded = json.JSONEncoder(allow_nan=False).encode


class _Lines(InPath):
    """A file of lines, a row each."""

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        self._file: Appended | None = None
        self._resumed = False

    def check(self) -> None:
        """Raises OSError where the file cannot be written, or another run writes it."""
        check_file(self.path, repr(self))

    def begin(self, start: Start) -> None:
        """Opens the file, and cuts it back to the place; a file of another run is moved aside."""
        if self._file is not None:  # left by a second signal, which acts at once
            self._file.close()
        self._file = file = Appended(self.path, repr(self))
        head = self._head(file)
        end = 0 if start.fresh else kept(self._rows(file), start)
        if not end and file.size > head:
            aside = beside(self.path)
            file.close()
            self.path.rename(aside)
            _logger.warning("%r: the rows of another run are moved to %s", self, aside)
            self._file = Appended(self.path, repr(self))
            self._head(self._file)
        elif file.size > max(end, head):
            file.cut(max(end, head))
        self._resumed = not start.fresh

    def log(self, row: Row) -> None:
        """Takes a row."""
        # What belongs to no step, the number of parameters for one, is a start's: the file has it already.
        if self._file is not None and not (self._resumed and "step" not in row):
            self._file.add(self._line(row))

    def flush(self) -> None:
        """Hands all rows to the system: they outlive a kill of this process."""
        if self._file is not None:
            self._file.flush()

    def close(self, how: str) -> None:
        """Writes all, and gives the file back."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _head(self, file: Appended) -> int:
        """Reads what stands before the rows; returns where it ends."""
        return 0

    def _rows(self, file: Appended) -> Iterator[tuple[int, Row]]:
        for end, line in file.lines_backwards():
            row = self._parsed(line)
            if row is not None:
                yield end, row

    def _line(self, row: Row) -> bytes:
        raise NotImplementedError

    def _parsed(self, line: bytes) -> Row | None:
        raise NotImplementedError


class JsonLines(_Lines):
    """Rows in a file, a JSON object a line: `{"train/loss": 0.5, ..., "step": 1, "epoch": 0}`.

    Numbers are exact; what JSON has no number for is text: "NaN", "Infinity", "-Infinity", which `float` reads. Text,
    and lists and dicts of all these, are kept as they are; anything else (an `Image`, say) is left out.

    After a resume the file has each step once: what was logged behind the checkpoint is cut off, as it is logged again.
    A fresh run moves a file that has rows aside, to a name with a number.

    Args:
        path: of the file.

    Raises:
        OSError: when the trainer is built: the file cannot be written, or another run writes it.
    """

    def _line(self, row: Row) -> bytes:
        try:
            return _encoded(row).encode() + b"\n"
        except (ValueError, TypeError):
            plain = {str(name): _plain(value) for name, value in row.items()}
            told = {name: value for name, value in plain.items() if value is not _LEFT_OUT}
            return json.dumps(told).encode() + b"\n" if told.keys() - {"step", "epoch"} else b""

    def _parsed(self, line: bytes) -> Row | None:
        try:
            row = json.loads(line)
        except ValueError:
            return None
        return row if isinstance(row, dict) else None


class Csv(_Lines):
    """Rows in a table: a line for each step, and one for the means of each epoch; a column for each metric.

    A name that comes up later gets a column behind the others; the file is then written anew, once. Values are exact;
    what is no number is left empty, and so is what a row does not have. Rows that belong to no step are left out.

    After a resume the file has each step once, as `JsonLines`.

    Args:
        path: of the file.

    Raises:
        OSError: when the trainer is built: the file cannot be written, or another run writes it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        self._columns: list[str] = []

    def _head(self, file: Appended) -> int:
        head = file.read(0, _BLOCK)
        end = head.find(b"\n") + 1
        self._columns = next(csv.reader([head[: end - 1].decode(errors="replace")]), []) if end else []
        return end

    def log(self, row: Row) -> None:
        """Takes a row."""
        if self._file is None or "step" not in row:
            return
        plain = {name: value for name, value in row.items() if number(value) is not None}
        if plain.keys() <= {"step", "epoch"}:
            return
        if not plain.keys() <= set(self._columns):
            first = [name for name in ("step", "epoch") if name not in self._columns]
            names = dict.fromkeys([*first, *plain])
            self._widen([name for name in names if name not in self._columns])
        self._file.add(self._line(plain))

    def _widen(self, names: list[str]) -> None:
        """Gives the table more columns: the file is written anew beside, and takes the old one's place."""
        assert self._file is not None
        self._file.flush()
        old, draft = self._file, self.path.with_name(f".{self.path.name}.draft")
        columns = [*self._columns, *names]
        draft.unlink(missing_ok=True)
        new = Appended(draft, repr(self))
        try:
            new.add(_csv_line(columns))
            start = self._head(old)
            while start < old.size:
                part = old.read(start, min(start + _BLOCK, old.size))
                new.add(part.replace(b"\n", b"," * len(names) + b"\n"))
                new.flush()
                start += len(part)
            new.flush()
            draft.replace(self.path)
        except BaseException:
            new.drop()
            draft.unlink(missing_ok=True)
            raise
        self._file, self._columns = new, columns
        old.close()

    def _line(self, row: Row) -> bytes:
        return _csv_line([_exact(row.get(name)) for name in self._columns])

    def _parsed(self, line: bytes) -> Row | None:
        try:
            values = next(csv.reader([line.decode()]))
            row = {name: float(value) for name, value in zip(self._columns, values, strict=True) if value}
        except (ValueError, StopIteration):
            return None
        return row


_LEFT_OUT = object()


def _plain(value: Any) -> Any:
    """A value as JSON has it, or `_LEFT_OUT`."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, dict):
        return {str(name): plain for name, held in value.items() if (plain := _plain(held)) is not _LEFT_OUT}
    if isinstance(value, (list, tuple)):
        return [plain for held in value if (plain := _plain(held)) is not _LEFT_OUT]
    if isinstance(value, Path):
        return str(value)
    plain = number(value)
    if isinstance(plain, float) and not math.isfinite(plain):
        return "NaN" if math.isnan(plain) else "Infinity" if plain > 0 else "-Infinity"
    return _LEFT_OUT if plain is None else plain


def _exact(value: Any) -> str:
    plain = number(value)
    return "" if plain is None else repr(int(plain) if isinstance(plain, bool) else plain)


def _csv_line(values: list[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([value.replace("\n", " ") for value in values])
    return text.getvalue().encode()
