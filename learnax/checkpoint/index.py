"""What each save is: its step, whether it is numbered, whether it was the best when it was made."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Entry(NamedTuple):
    """One save.

    Attributes:
        step: updates that its state had seen.
        numbered: whether it is one of the numbered checkpoints.
        best: its metric, if it was better than all before; else None.
    """

    step: int
    numbered: bool = False
    best: float | None = None


class Index:
    """The entries of a folder's saves, by their numbers; a small file beside them.

    An entry is written after its save. The file spares reading all saves to know what they are; what it
    lacks (a kill came in between, or the disk was full) they say themselves.
    """

    def __init__(self, path: Path):
        self._path = path
        self.entries: dict[int, Entry] = {}

    def load(self) -> Index:
        """Reads the file, where there is one; one cut short by a power loss is as good as none."""
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            entries = json.loads(self._path.read_text())
            self.entries = {int(number): Entry(*entry) for number, entry in entries.items()}
        return self

    def add(self, number: int, entry: Entry) -> None:
        """Tells of a save."""
        self.entries[number] = entry
        with contextlib.suppress(OSError):
            self._write(self._path)

    def best(self, numbers: Iterable[int]) -> int | None:
        """The best of these saves; each best one was better than those before it."""
        return max((n for n in numbers if n in self.entries and self.entries[n].best is not None), default=None)

    def numbered(self, numbers: Iterable[int]) -> list[int]:
        """Those of these saves that are numbered checkpoints, oldest first; of two at one step, the newer."""
        newest = {self.entries[n].step: n for n in sorted(numbers) if n in self.entries and self.entries[n].numbered}
        return sorted(newest.values())

    def move_after(self, number: int, path: Path) -> None:
        """Copies everything to another folder's index, and forgets what came after a save."""
        self._write(path)
        self.entries = {n: entry for n, entry in self.entries.items() if n <= number}
        self._write(self._path)

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        with draft.open("w") as file:
            file.write(json.dumps(self.entries))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
