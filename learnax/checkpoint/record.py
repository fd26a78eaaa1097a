"""What the owner of a folder leaves there: which process it is, told apart from all others there were."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import stat
import time
from pathlib import Path
from typing import NamedTuple

_TYPES = (str, str, str, int, str, float, bool, bool)
_MOST_BYTES = 1 << 16
_GARBAGE = "does not say whose they are"


class Record(NamedTuple):
    """What the file beside a folder says of its owner.

    Attributes:
        token: its name, of this one time that it took the folder.
        host: where it runs.
        place: what tells one set of process numbers from another: the host, its start, and the container.
        pid: the process.
        started: tells it from another process that gets the same number later.
        since: seconds since 1970.
        locked: whether it holds a lock as well.
        given_back: whether it is the owner no more.
    """

    token: str
    host: str
    place: str
    pid: int
    started: str
    since: float
    locked: bool
    given_back: bool = False

    @classmethod
    def of_this_process(cls, *, locked: bool) -> Record:
        """A new one, with a token of its own."""
        pid = os.getpid()
        host, token = socket.gethostname(), secrets.token_hex(8)
        return cls(token, host, place(), pid, _started(pid), time.time(), locked)

    @property
    def is_own(self) -> bool:
        """Whether it is of this process, at whatever time."""
        return (self.place, self.pid, self.started) == (place(), os.getpid(), _started(os.getpid()))

    @property
    def is_here(self) -> bool:
        """Whether its process, if it runs, is among those that can be asked for here."""
        return self.place == place()

    def lives(self) -> bool:
        """Whether its process, one of here, still runs; where that cannot be told, it does."""
        if os.name == "nt":
            return True  # there, the signal 0 is none that only asks
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except OSError:
            pass  # another user's
        if _fields(self.pid)[:1] == ["Z"]:
            return False  # dead, and nobody has asked for its status yet
        started = _started(self.pid)
        return not started or not self.started or started == self.started

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on host {self.host} (since {since})"


def read(path: Path) -> Record | str | None:
    """The record in a file; what is wrong with it; or None where there is none."""
    try:
        # Not to wait where somebody has put a pipe there.
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            return "is no regular file"
        content = os.read(file, _MOST_BYTES)
    finally:
        os.close(file)
    try:
        record = Record(**json.loads(content))
    except (ValueError, TypeError, RecursionError):
        return _GARBAGE
    right = [type(value) is kind for value, kind in zip(record, _TYPES, strict=True)]
    return record if all(right) and record.pid > 0 and 0 <= record.since < 1e11 else _GARBAGE


def write(path: Path, record: Record) -> None:
    """Writes a record, all of it at once."""
    draft = path.with_name(f"{path.name}.{record.token}")
    try:
        with draft.open("w") as file:
            json.dump(record._asdict(), file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def place() -> str:
    """What tells this set of process numbers from others: a host by its name and its start, a container by its own."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> str:
    """When a process was started, by a clock of the kernel's; empty where that is not told."""
    fields = _fields(pid)
    return fields[19] if len(fields) > 19 else ""


def _fields(pid: int) -> list[str]:
    """What Linux says of a process, behind its name, which may hold anything; its state comes first."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []
