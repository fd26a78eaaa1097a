"""A lock on a file, which the kernel gives back however its process ends.

It is POSIX's: a forked child has no part in it, and it holds on NFS. It is lost when any file descriptor of that file
is closed, so a process opens the file only where it has no lock on it.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_HELD = (errno.EAGAIN, errno.EACCES)
_NONE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_FLOCK = "hhqqi4x"
"""`struct flock` of Linux on 64 bits."""


class BusyError(Exception):
    """Another process has the lock."""


def take(path: Path) -> int | None:
    """A locked file; None where there are no locks."""
    if fcntl is None:
        return None
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            locked = lock(file)
            if locked and is_at(file, path):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        if not locked:
            return None
        # The file was deleted in between: a lock on a file that has no name protects nothing.


def lock(file: int) -> bool:
    """Locks a file, at once or not at all; False where there are no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise BusyError from None
        if error.errno in _NONE:
            return False
        raise
    return True


def is_at(file: int, path: Path) -> bool:
    """Whether a path still leads to an open file."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file), there)


def is_taken(path: Path) -> bool | None:
    """Whether another process has the lock, found out without taking it; None where that cannot be asked."""
    if fcntl is None or sys.platform != "linux" or struct.calcsize("l") != 8:
        return None
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        return bool(struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK)
    except OSError as error:
        if error.errno in _NONE:
            return None
        raise
    finally:
        os.close(file)
