"""A folder of saves: which there are, what each is, which are kept."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from learnax.checkpoint import files, history, seals
from learnax.checkpoint.files import DamagedError
from learnax.checkpoint.owner import beside, is_fixed

_logger = logging.getLogger("learnax")
_INDEX, _REMOVED, _DRAFT = "index.json", "removed", ".draft"
_TRIES, _PAUSE_S = 20, 0.1
"""How often, and how many seconds apart, what is left of a failed save is looked for."""
SPARE = 2
"""Saves that are kept for being the newest: should one be damaged on disk, there is the one before it."""


class Entry(NamedTuple):
    """One save.

    Attributes:
        step: updates that its state had seen.
        numbered: whether it is one of the numbered checkpoints.
        best: its metric, if it was better than all before; else None.
        best_of: that metric's name; None where a save is from before it was kept.
        minimize: whether smaller was better.
        name: a name that it was given, by which it is found and kept.
    """

    step: int
    numbered: bool = False
    best: float | None = None
    best_of: str | None = None
    minimize: bool | None = None
    name: str | None = None


class Folder:
    """Saves by their numbers, with a file beside them that spares reading all of them to know what they are.

    Args:
        given: the folder, or a link to it; it need not be there.
        guard: called before each rename and each removal; raises where the folder is not this process's to change.

    Attributes:
        path: where it really lies: a link stays where it is, whatever is moved.
    """

    def __init__(self, given: Path, guard: Callable[[], None] = lambda: None):
        self.given = given
        self.path = Path(os.path.realpath(given))
        self.guard = guard
        self._known: dict[int, Entry] = {}

    def numbers(self) -> list[int]:
        """Numbers of the saves that are whole, oldest first; none where there is no folder.

        Raises:
            OSError: it cannot be read, or is no folder.
        """
        try:
            # A save has its plain name only once it is whole.
            with os.scandir(self.path) as there:
                return sorted(int(entry.name) for entry in there if entry.name.isdecimal() and entry.is_dir())
        except FileNotFoundError:
            return []

    def entries(self) -> dict[int, Entry]:
        """What each save is, oldest first; a damaged one that nothing is known of is left out."""
        numbers, entries = self.numbers(), self._known | self._read_index()
        for number in numbers:
            if number not in entries:  # a kill between save and index, a lost index, or a full disk
                with contextlib.suppress(DamagedError, KeyError):  # told of where it is read
                    meta = files.read_meta(self.path / str(number))
                    fields = {field: meta[field] for field in Entry._fields if field in meta}
                    entries[number] = Entry(**{"step": meta["step"], **fields})
        self._known = {number: entries[number] for number in numbers if number in entries}
        return self._known

    def make(self) -> None:
        """Makes the folder where it is not there.

        Raises:
            OSError: it cannot be made, or is a link to where nothing is.
        """
        if self.path.is_dir():
            return
        for link in (self.given, *self.given.parents):
            if link.is_symlink() and not link.exists():
                target = Path(os.path.realpath(link))
                # A disk that is not there must not be mistaken for a folder that is to be made.
                if not target.parent.is_dir():
                    text = f"{link} is a link to {target}, and {target.parent} is not there: is its disk mounted?"
                    raise FileNotFoundError(errno.ENOENT, text, str(self.given))
        self.path.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        """Removes what a kill left."""
        self.guard()
        files.remove_drafts(self.path)
        for draft in self.path.glob(f"*{_DRAFT}"):
            shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(self.path / _REMOVED, ignore_errors=True)

    def draft(self, number: int) -> Path:
        """Where a save is written before it has its number."""
        return self.path / f"{number}{_DRAFT}"

    def commit(self, number: int) -> None:
        """Gives a save that is all on disk its number."""
        self.guard()
        self.draft(number).rename(self.path / str(number))

    def discard(self, number: int) -> None:
        """Removes what there is of a save that failed; on a full disk it would be in the way of the next.

        The storage library gives up the writes of a save's other arrays: they go on for a moment, in the folder that
        is removed meanwhile, and make it again.
        """
        for _ in range(_TRIES):
            self.guard()
            drafts = list(self.path.glob(f"{number}{_DRAFT}*"))
            if not drafts:
                return
            for draft in drafts:
                shutil.rmtree(draft, ignore_errors=True)
            time.sleep(_PAUSE_S)

    def add(self, number: int, entry: Entry) -> None:
        """Keeps what a new save is."""
        with contextlib.suppress(OSError):  # what the index lacks, the saves themselves say
            self._known = self.entries() | {number: entry}
            self._write_index(self.path, self._known)

    def tidy(self, max_numbered: int | None) -> None:
        """Removes the saves that are neither among the newest nor numbered nor named nor the best.

        Args:
            max_numbered: numbered ones that stay, the newest; None for all.
        """
        numbers, entries = self.numbers(), self.entries()
        # Of two at one step, or of one name, the newer.
        numbered = sorted({entry.step: number for number, entry in entries.items() if entry.numbered}.values())
        named = {entry.name: number for number, entry in entries.items() if entry.name is not None}
        kept = {*numbers[-SPARE:], *numbered[-(max_numbered or len(numbered)) :], *named.values(), best(entries)}
        (self.path / _REMOVED).mkdir(exist_ok=True)
        for number in numbers:
            if number not in kept:
                # Renamed, then removed: a kill in between leaves nothing that looks like a whole checkpoint.
                self.guard()
                (self.path / str(number)).rename(self.path / _REMOVED / str(number))
        self.guard()
        shutil.rmtree(self.path / _REMOVED, ignore_errors=True)

    def referred(self) -> set[str] | None:
        """The files of histories that the saves need; None where one does not say."""
        try:
            return self._referred(self.numbers())
        except DamagedError:
            return None

    def set_aside(self, after: int) -> None:
        """Moves saves later than a number into a folder beside; all of them after -1."""
        later = [number for number in self.numbers() if number > after]
        if not later:
            return
        entries = self.entries()
        version = 1
        while (aside := beside(self.path, f".{version}")).exists():
            version += 1
        self.guard()
        if after < 0 and not is_fixed(self.path):
            self.path.rename(aside)  # at once: a kill leaves all of it or nothing
        else:
            aside.mkdir()
            self._share_histories(later, aside)
            self._write_index(aside, {number: entries[number] for number in later if number in entries})
            # Before the numbers are free: a kill must not leave what another save of a number was.
            self._write_index(self.path, {n: entry for n, entry in entries.items() if n <= after})
            for number in reversed(later):
                self.guard()
                (self.path / str(number)).rename(aside / str(number))
        self._known = {}
        _logger.warning("%d checkpoint(s) of an earlier run moved to %s", len(later), aside)

    def _share_histories(self, numbers: list[int], aside: Path) -> None:
        try:
            names = self._referred(numbers)
        except DamagedError:
            names = set(os.listdir(self.path / history.FOLDER)) if (self.path / history.FOLDER).is_dir() else set()
        history.share(self.path, names, aside)

    def _referred(self, numbers: list[int]) -> set[str]:
        metas = [files.read_meta(self.path / str(number)) for number in numbers]
        return {name for meta in metas for name in history.files_of(meta.get("history"))}

    def _read_index(self) -> dict[int, Entry]:
        """The index; one that is lost, cut short or changed is as good as none."""
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError):
            sealed = json.loads((self.path / _INDEX).read_text())
            if sealed["checksum"] == seals.seal(sealed["content"]):
                return {int(number): Entry(*entry) for number, entry in sealed["content"].items()}
        return {}

    def _write_index(self, folder: Path, entries: dict[int, Entry]) -> None:
        content: dict[str, Any] = {str(number): list(entry) for number, entry in entries.items()}
        path = folder / _INDEX
        draft = path.with_suffix(_DRAFT)
        with draft.open("w") as file:
            file.write(json.dumps({"content": content, "checksum": seals.seal(content)}))
            file.flush()
            os.fsync(file.fileno())
        self.guard()
        draft.replace(path)


def best(entries: Mapping[int, Entry]) -> int | None:
    """The number of the best of these saves; each best one was better than those before it."""
    return max((number for number, entry in entries.items() if entry.best is not None), default=None)
