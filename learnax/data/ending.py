"""Worker processes end with what they read for, and leave nothing in shared memory behind."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import multiprocessing.shared_memory
import os
import secrets
import select
import socket
import sys
import threading
from multiprocessing import resource_tracker
from pathlib import Path

GRACE_S = 1.0
"""How long a worker may take to come to an end by itself, once its reader is closed."""
SHARED = Path("/dev/shm")
"""Where Linux keeps shared memory."""
_FIRST = "learnax"
_numbers = itertools.count()


class Lifeline:
    """What a reader's worker processes hold on to: they end when it is cut, or when this process dies, however.

    A socket that workers connect to, and that nobody ever answers: the kernel closes it with the process. A signal at
    the parent's death (PR_SET_PDEATHSIG) would not do: Linux sends it when the *thread* that started a process ends,
    and grain starts them in threads that come and go.

    Attributes:
        hold: what a worker calls when it begins.
        segments: how the names of its workers' shared memory begin.
    """

    def __init__(self, workers: int):
        clear_segments()
        number = next(_numbers)
        self.segments = ""
        if _has_names():
            owner = _owner(os.getpid())
            self.segments = f"{owner}-{number}-"
            # The semaphores that processes share with this one lie there, too. They go with this process.
            multiprocessing.current_process()._config["semprefix"] = f"/{owner}-s"  # type: ignore[attr-defined]
        self._socket: socket.socket | None = None
        address = ""
        if sys.platform == "linux":
            # An abstract address, without a file. Its random number keeps other processes from connecting.
            address = f"\0{_FIRST}-{os.getpid()}-{number}-{secrets.token_hex(8)}"
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.bind(address)
            self._socket.listen(workers)
        self.hold = Hold(address, os.getpid(), self.segments)

    def cut(self) -> None:
        """Workers end within `GRACE_S`."""
        if self._socket is not None:
            self._socket.close()

    def clear(self) -> None:
        """Removes shared memory that workers which are gone have left."""
        if self.segments:
            for path in SHARED.glob(f"{self.segments}*"):
                _remove_own(path)


class Hold:
    """A worker's end of a lifeline.

    Args:
        address: of the reader's socket; empty where there is none.
        parent: the reader's process.
        segments: how the names of this worker's shared memory are to begin; empty for Python's own names.
    """

    def __init__(self, address: str, parent: int, segments: str):
        self._address = address
        self._parent = parent
        self._segments = segments

    def __call__(self) -> None:
        """Names this process's shared memory, and watches for the end."""
        if self._segments:
            names = multiprocessing.shared_memory
            names._SHM_NAME_PREFIX = f"/{self._segments}"  # type: ignore[attr-defined]
            names._SHM_SAFE_NAME_LENGTH = len(self._segments) + 17  # type: ignore[attr-defined]
        threading.Thread(target=self._watch, name="learnax-lifeline", daemon=True).start()

    def _watch(self) -> None:
        sockets = []
        if self._address:
            line = socket.socket(socket.AF_UNIX)
            try:
                line.connect(self._address)
                sockets.append(line)
            except ConnectionRefusedError:  # it is closed by now
                self._leave()
            except OSError:  # somewhere that processes must not talk: then the parent's death is all there is to see
                pass
        # A fork of the parent may keep the socket open, so the parent's death is looked for as well.
        while not select.select(sockets, [], [], 1.0)[0]:
            if os.getppid() != self._parent:
                break
        self._leave()

    def _leave(self) -> None:
        if os.getppid() == self._parent:
            threading.Event().wait(GRACE_S)
        os._exit(1)


def clear_segments() -> None:
    """Removes shared memory and semaphores of runs on this machine that are dead."""
    if not _has_names():
        return
    alive = {}
    for path in [*SHARED.glob(f"{_namespace()}-*"), *SHARED.glob(f"sem.{_namespace()}-*")]:
        with contextlib.suppress(ValueError, OSError):  # it may belong to another user, or be gone by now
            _, _, pid, began, _, _ = path.name.split("-")
            if pid not in alive:
                alive[pid] = _began(int(pid))
            if alive[pid] != began:
                path.unlink()


def room_text() -> str:
    """What shared memory has, and what to do where it is too little."""
    try:
        status = os.statvfs(SHARED)
    except OSError:
        return ""
    size, free = (status.f_frsize * blocks >> 20 for blocks in (status.f_blocks, status.f_bavail))
    return (
        f": a bus error, as where shared memory is full; batches travel through {SHARED}, of whose {size} MB {free} MB "
        "are free now: give it more (docker run --shm-size=8g), or use fewer workers or smaller batches"
    )


def _remove_own(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:  # whoever used it was first
        return
    # Python's tracker of what this program left behind is told, or it would warn of it at the end.
    name = f"/{path.name}"
    resource_tracker.register(name, "shared_memory")
    resource_tracker.unregister(name, "shared_memory")


def _has_names() -> bool:
    return sys.platform == "linux" and SHARED.is_dir() and os.access("/proc/self/stat", os.R_OK)


def _namespace() -> str:
    """What process numbers are good for: containers may share memory, and count processes each for itself."""
    return f"{_FIRST}-{os.stat('/proc/self/ns/pid').st_ino}"


def _owner(pid: int) -> str:
    return f"{_namespace()}-{pid}-{_began(pid)}"


def _began(pid: int) -> str:
    """When a process began, in the kernel's ticks: a number may be used again. Empty for one that is dead."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()  # the name before may have anything in it
    return "" if fields[0] in "ZX" else fields[19]
