"""How a save is written: by one process, or by all processes of a run together."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from learnax.checkpoint import files, seals
from learnax.checkpoint.folder import Entry
from learnax.checkpoint.history import Grown
from learnax.checkpoint.owner import LostError, OwnedError
from learnax.checkpoint.pieces import Piece, own
from learnax.checkpoint.snapshot import Snapshot
from learnax.cluster.processes import Processes

_writing = threading.Lock()
"""Orbax writes one save of a process at a time: of two, each takes the other's files for left-overs."""


class NotTakenError(OSError):
    """Whether the folder is free could not be found out."""


@dataclasses.dataclass(frozen=True)
class Save:
    """One save, on its way to the disk.

    Attributes:
        count: which of this saver's it is.
        number: its name.
        entry: what it is.
        snapshot: the state.
        pieces: which arrays of that are pieces of others.
        more: further arrays.
        histories: as long as they were.
        meta: plain values.
    """

    count: int
    number: int
    entry: Entry
    snapshot: Snapshot
    pieces: Mapping[str, Piece]
    more: Mapping[str, np.ndarray]
    histories: Mapping[str, Grown]
    meta: Mapping[str, Any]


class Alone:
    """One process: what it finds is what counts.

    Attributes:
        first: whether this is the process that owns the folder.
        decides_alone: whether it may do what others do not do at the same time.
    """

    first = decides_alone = True

    def settle(self, what: str, text: str, judge: Callable[[list[str]], str]) -> str:
        """What the first process makes of what each one says."""
        return judge([text])

    def own(self, leaves: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Piece]]:
        """What this process has of a state, and which of that are pieces of arrays."""
        return dict(leaves), {}

    def write(self, save: Save, draft: Path, begin: Callable[[], dict[str, Any]], commit: Callable[[], object]) -> None:
        """Writes one save.

        Args:
            save: what is written.
            draft: where.
            begin: makes room for it; returns its plain values.
            commit: gives it its name.
        """
        meta = begin()
        with _writing:
            files.write(draft, {**save.snapshot.arrays, **save.more}, meta)
        commit()


class Together:
    """Several processes: the first one makes room, all write, and the first one gives the save its name.

    Args:
        processes: of the run.
    """

    _ids = itertools.count()

    def __init__(self, processes: Processes):
        self.first, self.decides_alone = processes.first, False
        self._processes = processes
        # All processes of a run build those that save together in the same order; others do not count.
        self._id = next(Together._ids)

    def settle(self, what: str, text: str, judge: Callable[[list[str]], str]) -> str:
        """What the first process makes of what each one says."""
        return self._processes.settle(f"saver {self._id}, {what}", text, judge)

    def own(self, leaves: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Piece]]:
        """What this process has of a state, and which of that are pieces of arrays."""
        return own(leaves)

    def write(self, save: Save, draft: Path, begin: Callable[[], dict[str, Any]], commit: Callable[[], object]) -> None:
        """Writes one save; see `Alone.write`. `begin` and `commit` are called by the first process alone."""
        arrays, meta, failure = save.snapshot.arrays, dict(save.meta), ""
        sums: list[dict[str, int]] = []

        def make_room(told: list[str]) -> str:
            sums.extend(map(json.loads, told))
            return _tried(lambda: meta.update(begin()))

        def name(told: list[str]) -> str:
            failed = [f"on process {number}: {text}" for number, text in enumerate(told) if text]
            return json.dumps(["failed", failed[0]]) if failed else _tried(commit)

        self._agree(save, "beginning", json.dumps(seals.piece_seals(arrays, save.pieces)), make_room)
        try:
            files.write_together(draft, arrays, save.pieces, sums, save.more, meta)
        except Exception as error:
            failure = files.reason(error)  # told to the others, who would wait for this one
        self._agree(save, "end", failure, name)

    def _agree(self, save: Save, what: str, text: str, judge: Callable[[list[str]], str]) -> None:
        kind, why = json.loads(self.settle(f"save {save.count}, {what}", text, judge))
        if kind == "lost":
            raise LostError(why)
        if kind:
            raise OSError(why)


def team_of(processes: Processes) -> Alone | Together:
    """How these processes save."""
    return Alone() if processes.count == 1 else Together(processes)


def _tried(work: Callable[[], Any]) -> str:
    """What comes of it, as the other processes are told."""
    try:
        work()
    except Exception as error:
        return json.dumps(["lost" if isinstance(error, LostError) else "failed", f"on process 0: {why(error)}"])
    return json.dumps(["", ""])


def why(error: Exception) -> str:
    """What went wrong, for the text of a save that failed."""
    return str(error) if isinstance(error, (OwnedError, NotTakenError)) else files.reason(error)
