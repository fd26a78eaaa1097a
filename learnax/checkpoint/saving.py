"""Saving: a copy of the state at once, the writing behind the training, by all processes of a run together."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from learnax.checkpoint import files
from learnax.checkpoint.folder import Entry, Folder
from learnax.checkpoint.history import Grown, History
from learnax.checkpoint.owner import Claim, LostError, OwnedError
from learnax.checkpoint.pieces import Piece
from learnax.checkpoint.snapshot import Camera
from learnax.checkpoint.together import NotTakenError, Save, team_of, why
from learnax.checkpoint.trees import without_keys
from learnax.checkpoint.writer import Writer
from learnax.cluster.processes import Processes
from learnax.step.state import TrainState
from learnax.utils import leaves_by_path, tree_bytes

_logger = logging.getLogger("learnax")


class SaveError(RuntimeError):
    """The last save did not succeed: its step, what happened, and the newest save there is are in the text."""


class Saver:
    """Writes saves into a folder, of which this process (the first of several) is then the owner.

    Args:
        given: the folder, or a link to it.
        max_numbered: numbered saves that are kept; None for all.
        processes: of the run, which save together.

    Attributes:
        folder: the saves.
        team: how the processes of the run save together.
        writer: the thread that writes.
        history: the metrics' histories.
        pending: what is on its way.
        failure: what was wrong with the last save; None where nothing.
        failures: saves that failed so far.
    """

    # Of this process, whatever saves in it: two checkpointers on one folder give no number twice.
    _numbers: ClassVar[dict[Path, int]] = {}

    def __init__(self, given: Path, max_numbered: int | None, processes: Processes):
        self.folder = Folder(given)
        self.claim = Claim(self.folder.path)
        self.folder.guard = self.claim.check
        self.writer = Writer()
        self.history = History(self.folder.path)
        self.pending: list[Entry] = []
        self.failure: SaveError | None = None
        self.failures = 0
        self._max_numbered = max_numbered
        self.team = team_of(processes)
        self._saves = self._takes = 0
        self._camera = Camera()
        self._restart: int | None = None
        self._leaves_behind: int | None = None
        self._owns = self._prepared = self._swept = False
        self._lost: LostError | None = None
        self._told: set[str] = set()

    def leave_behind(self, after: int) -> None:
        """Saves later than a number are moved aside before the next one is written."""
        self._leaves_behind = self._restart = after

    def is_left_behind(self, number: int) -> bool:
        """Whether a save is to be moved aside."""
        return self._leaves_behind is not None and number > self._leaves_behind

    def check_free(self) -> None:
        """Looks whether another process owns the folder; OwnedError where one does."""

        def look(_: list[str]) -> str:
            try:
                self.claim.check_free()
            except OwnedError as error:
                return str(error)
            return ""

        refusal = self.team.settle("whether it is free", "", look)
        if refusal:
            raise OwnedError(refusal)

    def prepare(self, state: TrainState) -> None:
        """Takes the folder, and gets ready for saves of such a state, for the most part in the background.

        Raises:
            OwnedError: the folder is another process's.
            OSError: it cannot be made or written to. Once it could, that is told of, and ends nothing.
        """
        try:
            self.folder.make()
            if not os.access(self.folder.path, os.W_OK):
                text = "checkpoints cannot be saved to this folder"
                raise PermissionError(errno.EACCES, text, str(self.folder.given))
        except OSError as error:
            if not self._prepared:
                raise
            self.tell(error, f"checkpoints cannot be saved now: {files.reason(error)}; the next save tries again")
        self._prepared = True
        refusal = self._take()
        if refusal:
            self.tell(NotTakenError(refusal), f"checkpoints cannot be saved now: {refusal}; the next save tries again")
        wanted = self._camera.wanted(self._own(state)[0][0])  # copied now: the next step may reuse the arrays' buffers

        def job() -> None:
            self._camera.prepare(wanted)
            with contextlib.suppress(ImportError):  # told of by the save that needs it
                files.warm_up()

        self.writer.submit(job, tree_bytes(state))

    def save(
        self, state: TrainState, entry: Entry, metrics: Mapping[str, Any] | None, resume: Mapping[str, Any] | None
    ) -> Path:
        """Copies a state and hands it to the thread that writes; returns where it will be.

        Raises:
            OwnedError: the folder is another process's.
        """
        refusal = "" if self._owns else self._take()
        number = self._next_number()
        path = self._path(number)
        if refusal:
            self._fail(entry, NotTakenError(refusal))
            return path
        self.writer.wait_for_room(tree_bytes(state))
        resume = resume or {}
        (leaves, pieces), kinds = self._own(state)
        histories = {name: Grown(values, len(values)) for name, values in resume.get("history", {}).items()}
        meta = {
            **entry._asdict(),
            "time": time.time(),
            "metrics": {name: float(value) for name, value in metrics.items()} if metrics else None,
            "position": resume.get("position"),
            "script": resume.get("script"),
            "hooks": resume.get("hooks"),
            "rate_factor": resume.get("rate_factor"),
            "keys": kinds,
        }
        more = {"rng": np.array(resume["rng"])} if "rng" in resume else {}
        self._saves += 1
        save = Save(self._saves, number, entry, self._camera.take(leaves), pieces, more, histories, meta)
        self.pending.append(entry)
        self.writer.submit(lambda: self._write(save), save.snapshot.nbytes)
        return path

    def close(self) -> None:
        """Waits, and gives the folder back."""
        self.writer.wait()
        self.history.close()
        self.claim.give_back()
        self._owns = False

    def tell(self, error: Exception, text: str) -> None:
        """Says what went wrong, once for each cause."""
        cause = f"{type(error).__name__} {getattr(error, 'errno', None) or _first_words(error)}"
        if cause not in self._told:
            self._told.add(cause)
            _logger.warning("%s", text)

    # ---- who may write, and under which number

    def _take(self) -> str:
        """Makes this process the owner, all processes alike; says why that could not be tried, or nothing.

        Raises:
            OwnedError: another process is.
        """
        if self._owns:
            return ""

        def take(_: list[str]) -> str:
            try:
                self.folder.make()
                fresh = self.claim.take()
                last = max(self.folder.numbers(), default=-1) if fresh else None
            except OwnedError as error:
                return json.dumps({"owned": str(error)})
            except OSError as error:
                self.claim.give_back()
                return json.dumps({"failed": files.reason(error)})
            return json.dumps({"last": last})

        self._takes += 1
        told = json.loads(self.team.settle(f"taking {self._takes}", "", take))
        if "owned" in told:
            raise OwnedError(told["owned"])
        if "failed" in told:
            return told["failed"]
        if told["last"] is not None:
            Saver._numbers[self.folder.path] = told["last"]
        self._owns, self._lost = True, None
        return ""

    def _next_number(self) -> int:
        # Numbered by themselves, not by their steps: a step may be saved twice, before and after a validation.
        last = Saver._numbers.get(self.folder.path, -1) if self._restart is None else self._restart
        self._restart = None
        Saver._numbers[self.folder.path] = last + 1
        return last + 1

    # ---- in the thread that writes

    def _write(self, save: Save) -> None:
        """One save, and what is no longer wanted after it."""
        try:
            if self._lost is not None:
                raise self._lost
            draft = self.folder.draft(save.number)
            self.team.write(save, draft, lambda: self._begin(save), lambda: self.folder.commit(save.number))
        except Exception as error:
            self._fail(save.entry, error)
            with contextlib.suppress(OSError, LostError):
                if self.team.first:
                    self.folder.discard(save.number)
            return
        finally:
            self.pending.remove(save.entry)
            self._camera.give_back(save.snapshot)
        self.failure = None
        if not self.team.first:
            return
        try:
            with self.claim.changing():
                self._tidy(save)
        except LostError as error:
            self._lose(error)
        except OSError as error:
            self.tell(error, f"old checkpoints could not be removed: {error}")

    def _tidy(self, save: Save) -> None:
        self.folder.add(save.number, save.entry)
        self.folder.tidy(self._max_numbered)
        if not self._swept:
            self.history.sweep(self.folder.referred, self.claim.check)
            self._swept = True

    def _begin(self, save: Save) -> dict[str, Any]:
        """Makes the folder ready for one more save, and brings its histories to disk; returns its plain values."""
        with self.claim.changing():
            self.folder.make()  # before anything else is: a disk that is gone is not to be taken for an empty folder
            self.claim.check()
            if self._leaves_behind is not None:
                self.folder.set_aside(self._leaves_behind)
                self._leaves_behind = None
                self.folder.make()
            if self.claim.clear_once():
                self.folder.clear()
        return {**save.meta, "history": self.history.write(save.histories)}

    def _fail(self, entry: Entry, error: Exception) -> None:
        try:
            whole = max(self.folder.numbers(), default=None)
            newest = "there is no whole one yet" if whole is None else f"the newest whole one is {self._path(whole)}"
        except OSError as unreadable:
            newest = f"which ones there are cannot be seen: {files.reason(unreadable)}"
        text = f"the checkpoint of step {entry.step} could not be saved: {why(error)}; {newest}"
        self.failures += 1
        self.failure = SaveError(text)
        self.failure.__cause__ = error
        if isinstance(error, LostError):
            self._lose(error)
        else:
            self.tell(error, f"{text}; training goes on, and the next save tries again")

    def _lose(self, error: LostError) -> None:
        if self._lost is None:
            _logger.error("%s; training goes on, and nothing there is renamed or removed", error)
        self._lost = error

    def _path(self, number: int) -> Path:
        return self.folder.given / str(number)

    def _own(self, state: TrainState) -> tuple[tuple[dict[str, Any], dict[str, Piece]], dict[str, str]]:
        """What this process has of a state, and which of that are pieces of arrays; of which leaves are random keys."""
        named = leaves_by_path(state._asdict())
        leaves, kinds = without_keys(named)
        return self.team.own(leaves), kinds


def _first_words(error: Exception) -> str:
    """What of an error's text says its cause, without the names and numbers that differ from time to time."""
    return " ".join(word for word in str(error).split()[:12] if word.isalpha())
