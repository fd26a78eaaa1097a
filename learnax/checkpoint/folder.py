"""A folder of saves: which there are, what each is, which are kept."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from learnax.checkpoint import files, seals
from learnax.checkpoint.files import DamagedError

_logger = logging.getLogger("learnax")
_INDEX, _REMOVED = "index.json", "removed"
SPARE = 2
"""Saves that are kept for being the newest: should one be damaged on disk, there is the one before it."""


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


class Folder:
    """Saves by their numbers, with a file beside them that spares reading all of them to know what they are.

    Args:
        path: the folder; it need not be there.
    """

    def __init__(self, path: Path):
        self.path = path
        self._known: dict[int, Entry] = {}
        self._cleared = False

    def numbers(self) -> list[int]:
        """Numbers of the saves that are whole, oldest first."""
        if not self.path.is_dir():
            return []
        # A save has its plain name only once it is whole: orbax writes under another and renames.
        return sorted(int(entry.name) for entry in self.path.iterdir() if entry.name.isdecimal() and entry.is_dir())

    def entries(self) -> dict[int, Entry]:
        """What each save is, oldest first; a damaged one that nothing is known of is left out."""
        numbers, entries = self.numbers(), self._known | self._read_index()
        for number in numbers:
            if number not in entries:  # a kill came in between, or the index was lost, or the disk was full
                with contextlib.suppress(DamagedError, KeyError):  # told of where it is read
                    meta = files.read_meta(self.path / str(number))
                    entries[number] = Entry(*(meta[field] for field in Entry._fields))
        self._known = {number: entries[number] for number in numbers if number in entries}
        return self._known

    def make(self) -> None:
        """Makes the folder where it is not there, and clears away what a kill left."""
        if self._cleared and self.path.is_dir():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        files.remove_drafts(self.path)
        shutil.rmtree(self.path / _REMOVED, ignore_errors=True)
        self._cleared = True

    def add(self, number: int, entry: Entry) -> None:
        """Keeps what a new save is."""
        self._known = self.entries() | {number: entry}
        with contextlib.suppress(OSError):  # what the index lacks, the saves themselves say
            _write_index(self.path / _INDEX, self._known)

    def tidy(self, max_numbered: int | None) -> None:
        """Removes the saves that are neither among the newest nor numbered nor the best.

        Args:
            max_numbered: numbered ones that stay, the newest; None for all.
        """
        numbers, entries = self.numbers(), self.entries()
        # Of two at one step, the newer.
        numbered = sorted({entry.step: number for number, entry in entries.items() if entry.numbered}.values())
        kept = {*numbers[-SPARE:], *numbered[-(max_numbered or len(numbered)) :], best(entries)}
        (self.path / _REMOVED).mkdir(exist_ok=True)
        for number in numbers:
            if number not in kept:
                # Renamed, then removed: a kill in between leaves nothing that looks like a whole checkpoint.
                (self.path / str(number)).rename(self.path / _REMOVED / str(number))
        shutil.rmtree(self.path / _REMOVED, ignore_errors=True)

    def set_aside(self, after: int) -> None:
        """Moves saves later than a number into a folder beside; all of them after -1."""
        later = [number for number in self.numbers() if number > after]
        if not later:
            return
        entries = self.entries()
        version = 1
        while (aside := self.path.with_name(f"{self.path.name}.{version}")).exists():
            version += 1
        if after < 0:
            self.path.rename(aside)  # at once: a kill leaves all of it or nothing
        else:
            aside.mkdir()
            _write_index(aside / _INDEX, {number: entries[number] for number in later if number in entries})
            # Before the numbers are free: a kill must not leave what another save of a number was.
            _write_index(self.path / _INDEX, {n: entry for n, entry in entries.items() if n <= after})
            for number in reversed(later):
                (self.path / str(number)).rename(aside / str(number))
        self._known = {}
        _logger.warning("%d checkpoint(s) of an earlier run moved to %s", len(later), aside)

    def _read_index(self) -> dict[int, Entry]:
        """The index; one that is lost, cut short or changed is as good as none."""
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError):
            sealed = json.loads((self.path / _INDEX).read_text())
            if sealed["checksum"] == seals.seal(sealed["content"]):
                return {int(number): Entry(*entry) for number, entry in sealed["content"].items()}
        return {}


def best(entries: Mapping[int, Entry]) -> int | None:
    """The number of the best of these saves; each best one was better than those before it."""
    return max((number for number, entry in entries.items() if entry.best is not None), default=None)


def _write_index(path: Path, entries: dict[int, Entry]) -> None:
    content = {str(number): list(entry) for number, entry in entries.items()}
    draft = path.with_suffix(".draft")
    with draft.open("w") as file:
        file.write(json.dumps({"content": content, "checksum": seals.seal(content)}))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
