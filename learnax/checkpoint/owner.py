"""Who may write into a folder of saves: one process at a time.

Beside the folder lie two files. One is locked by the process that owns it, where the file system has locks: the kernel
gives it back however that process ends. The other one says who that is, and holds a token that is looked at before
each rename and each deletion: where it is another one's, nothing of the folder is touched any more.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from learnax.checkpoint import locks
from learnax.checkpoint.record import Record, read, write

_logger = logging.getLogger("learnax")


class OwnedError(RuntimeError):
    """Another process writes into this folder of checkpoints: who, since when and what to do are in the text."""


class LostError(OwnedError):
    """This process owned the folder, and another one took it over."""


class _Hold:
    """The lock and the record of a folder that this process owns, and who in it needs them."""

    def __init__(self, lock: int | None, record: Record):
        self.lock = lock
        self.record = record
        self.users: set[Claim] = set()
        self.cleared = False
        self.changing = threading.RLock()
        self.lost: LostError | None = None


# Of this process, whatever saves in it. By the path of the lock: a second file descriptor for that file must never be
# opened while it is locked, for closing any one of them gives the lock up.
_holds: dict[Path, _Hold] = {}
_known: dict[Path, list[Record]] = {}
"""Tokens of the owners of each folder, in their order, as far as this process has seen them."""
_gate = threading.RLock()


class Claim:
    """A checkpointer's right to write into a folder, which it shares with others of this process.

    Args:
        folder: by its real path.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._lock, self._file = beside(folder, ".lock"), beside(folder, ".owner")
        self._seen: str | None = None
        # Who owns the folder, or did last: what its checkpointer reads is of that time or later.
        with contextlib.suppress(OSError):
            record = read(self._file)
            self._seen = record.token if isinstance(record, Record) else None

    def check_free(self) -> None:
        """Looks whether another process owns the folder, and takes nothing.

        Raises:
            OwnedError: one does.
        """
        with _gate, contextlib.suppress(OSError):
            if self._lock in _holds:
                return
            record = read(self._file)
            if not isinstance(record, Record) or record.given_back or record.is_own:
                return
            locked = locks.is_taken(self._lock) if record.locked else None
            if locked or (locked is None and record.is_here and record.lives()):
                raise OwnedError(self._refusal(record))

    def take(self) -> bool:
        """Makes this process the owner; returns whether it is so newly.

        Raises:
            OwnedError: another process is, or was since this claim was made.
            OSError: neither can be found out.
        """
        with _gate:
            hold = _holds.get(self._lock)
            fresh = hold is None
            if hold is None:
                hold = self._acquire()
            elif not self._continues():
                raise OwnedError(self._left_behind())
            if hold.lost is not None:
                raise hold.lost
            hold.users.add(self)
            return fresh

    def check(self) -> None:
        """Makes sure that this process still owns the folder; before each rename and each deletion.

        Raises:
            LostError: another one does.
            OSError: it cannot be found out.
        """
        with _gate:
            hold = self._hold()
            if hold.lost is not None:
                raise hold.lost
            record = read(self._file)
            if isinstance(record, Record) and record.token != hold.record.token:
                self._lose(hold, record)
            self._keep_lock(hold, record)
            # The record was deleted, and nobody took the folder since: the lock shows it, where there are locks.
            if not isinstance(record, Record):
                write(self._file, hold.record)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Inside, no other checkpointer of this process changes the folder."""
        with self._hold().changing:
            yield

    def clear_once(self) -> bool:
        """Whether this is the first call since the process took the folder: nobody else in it writes there yet."""
        with _gate:
            hold = self._hold()
            first, hold.cleared = not hold.cleared, True
            return first

    def give_back(self) -> None:
        """Needs the folder no more; once nobody in this process does, it is free."""
        with _gate:
            hold = _holds.get(self._lock)
            if hold is not None and self in hold.users:
                hold.users.discard(self)
                if not hold.users:
                    _release(self._lock, self._file)

    def _hold(self) -> _Hold:
        hold = _holds.get(self._lock)
        if hold is None or self not in hold.users:
            raise LostError(f"checkpoints in {self._folder} are not this process's to change any more")
        return hold

    def _acquire(self) -> _Hold:
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = locks.take(self._lock)
        except locks.BusyError:
            with contextlib.suppress(OSError):
                record = read(self._file)
                if isinstance(record, Record) and not record.given_back:
                    raise OwnedError(self._refusal(record)) from None
            raise OwnedError(self._refusal(None)) from None
        try:
            before = read(self._file)
            self._judge(before, locked=held is not None)
            record = Record.of_this_process(locked=held is not None)
            write(self._file, record)
        except BaseException:
            if held is not None:
                os.close(held)
            raise
        _known.setdefault(self._lock, []).append(record)
        _holds[self._lock] = hold = _Hold(held, record)
        return hold

    def _judge(self, before: Record | str | None, *, locked: bool) -> None:
        """Whether what the record says leaves the folder free, and this claim is not behind it."""
        if isinstance(before, str):
            # Ours are written at once, never in part: what this is, nobody knows. The lock decides where there is one.
            if not locked:
                raise OwnedError(
                    f"checkpoints in {self._folder} may be another process's: {self._file} {before}, and this file "
                    "system has no locks to ask. If no process trains there, delete that file"
                )
            return
        if before is None:
            return
        known = _known.setdefault(self._lock, [])
        if all(before.token != record.token for record in known):
            known.append(before)
        if not before.given_back and not before.is_own:
            # With both locked the kernel has said that it is gone.
            if not (locked and before.locked):
                self._judge_unlocked(before)
            if not before.is_here:
                _logger.warning("checkpoints in %s were not given back by %s: taken over", self._folder, before)
        if not self._continues():
            raise OwnedError(self._left_behind())

    def _judge_unlocked(self, before: Record) -> None:
        if not before.is_here:
            raise OwnedError(
                f"checkpoints in {self._folder} belong to {before}. This file system has no locks, so whether that "
                f"process still runs is not known here: if it does not, delete {self._file}"
            )
        if before.lives():
            raise OwnedError(self._refusal(before))

    def _continues(self) -> bool:
        """Whether no other process has owned the folder since this claim looked at it."""
        known = _known.get(self._lock, [])
        others = [number for number, record in enumerate(known) if not record.is_own]
        return not others or self._seen in [record.token for record in known[others[-1] :]]

    def _left_behind(self) -> str:
        other = [record for record in _known[self._lock] if not record.is_own][-1]
        return (
            f"another process has trained in {self._folder} since this trainer was built: {other}. Build it again, "
            "with load_checkpoint=True to go on from its saves"
        )

    def _refusal(self, record: Record | None) -> str:
        who = "another process, which has not said who it is" if record is None else str(record)
        return (
            f"checkpoints in {self._folder} belong to {who}. Two processes in one folder would delete each other's "
            "saves: wait for its end, stop it, or give this one another `run` or `registry`"
        )

    def _lose(self, hold: _Hold, record: Record | None) -> None:
        who = "another process" if record is None else str(record)
        hold.lost = LostError(f"checkpoints in {self._folder} were taken over by {who}: this process saves no more")
        raise hold.lost

    def _keep_lock(self, hold: _Hold, record: Record | str | None) -> None:
        """Takes the lock anew where its file was deleted, or where the storage has forgotten it."""
        if hold.lock is None:
            return
        try:
            if locks.is_at(hold.lock, self._lock):
                locks.lock(hold.lock)
                return
            self._lock.parent.mkdir(parents=True, exist_ok=True)
            again = locks.take(self._lock)
        except locks.BusyError:
            ours = isinstance(record, Record) and record.token == hold.record.token
            self._lose(hold, record if isinstance(record, Record) and not ours else None)
        else:
            os.close(hold.lock)
            hold.lock = again


def beside(folder: Path, suffix: str) -> Path:
    """Where something lies that belongs to a folder, but outlives it when it is renamed.

    Beside it; inside where it is the root of a disk, which cannot be renamed, or where nothing can be put beside it.
    """
    with contextlib.suppress(OSError):
        if is_fixed(folder):
            return folder / f"{folder.name}{suffix}"
    return folder.with_name(f"{folder.name}{suffix}")


def is_fixed(folder: Path) -> bool:
    """Whether a folder cannot be renamed: the root of a disk, or in a folder that cannot be written to."""
    return os.path.ismount(folder) or (folder.is_dir() and not os.access(folder.parent, os.W_OK))


# ---- details


def _release(lock: Path, file: Path) -> None:
    hold = _holds.pop(lock)
    with contextlib.suppress(OSError):
        record = read(file)
        if hold.lost is None and isinstance(record, Record) and record.token == hold.record.token:
            write(file, hold.record._replace(given_back=True))
    if hold.lock is not None:
        os.close(hold.lock)


def _release_all() -> None:
    with _gate:
        for hold in list(_holds.values()):
            for claim in list(hold.users):
                claim.give_back()


def _forget() -> None:
    """In a forked child: the locks are its parent's."""
    global _gate
    _gate = threading.RLock()
    for hold in _holds.values():
        if hold.lock is not None:
            os.close(hold.lock)
    _holds.clear()
    _known.clear()


atexit.register(_release_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
