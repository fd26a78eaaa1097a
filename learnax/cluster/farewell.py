"""How a process of several leaves: with word for the others, and at once, for they wait in a collective with it.

JAX makes all processes wait for one another at their end. One that fails cannot: the others are in the midst of a
step that needs it. It writes why where they look, in the store of keys that JAX's runtime shares between them, and
ends as soon as its script has.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import jax

_BROKEN = re.compile(r"gloo|nccl|connection (closed|reset)|unavailable|deadline_exceeded|socket", re.IGNORECASE)
"""What the collectives of JAX's back ends say when a peer is gone."""
NOTICE_S = 2.0
"""How long the first process stays for its word to be read; the others look each second."""


class PeerError(RuntimeError):
    """Another process of the run has failed or is gone; which, and what to do, is in the text."""


@dataclasses.dataclass
class Farewell:
    """What is known of this process's end.

    Attributes:
        together: whether all processes have agreed to end: then it is an orderly end.
        status: the exit status that it leaves with, at once; None as long as it does not.
        since: when that was known, in seconds of `time.monotonic`.
    """

    together: bool = False
    status: int | None = None
    since: float = 0.0

    def arm(self) -> None:
        """From here on, an error that ends the script is told to the others, where there are any, and this leaves."""
        hook = sys.excepthook

        def told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            alone = self.together or not _connected()
            if not alone:
                print(f"learnax: {name_of(jax.process_index())} ends by an error", file=sys.stderr)
            hook(kind, error, trace)
            if not alone:
                self.tell(error)

        sys.excepthook = told
        # Python's end waits for the threads of pools first, and one of them for a peer: a save that is not finished.
        threading._register_atexit(self._run_exit_functions)  # type: ignore[attr-defined]
        # Before those of scripts and runs, and so called after them; and before JAX's, which waits for all.
        atexit.register(self.leave_at_once)

    def tell(self, error: BaseException) -> None:
        """Leaves word for the others, and sees to it that the script's end is this process's."""
        if self.status is not None:
            return
        self.leave_with(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
        if not isinstance(error, PeerError) and not is_of_peers(error):
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                store().key_value_set(f"learnax/failed/{jax.process_index()}", f"{type(error).__name__}: {error}")

    def leave_with(self, status: int) -> None:
        """The script's end is to be this process's, with this exit status."""
        self.status, self.since = status, time.monotonic()

    def leave_at_once(self) -> None:
        """Ends this process, if it is to."""
        if self.status is not None:
            if jax.process_index() == 0:
                time.sleep(NOTICE_S)  # this process serves the store, and the others are to read it before it goes
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(self.status)

    def _run_exit_functions(self) -> None:
        if self.status is not None:
            atexit._run_exitfuncs()  # those of scripts and runs, then `leave_at_once`


farewell = Farewell()
farewell.arm()


def _connected() -> bool:
    return jax.distributed.is_initialized() and jax.process_count() > 1


def store() -> Any:
    """The keys that all processes see: JAX's own, which has no public name."""
    from jax._src import distributed

    return distributed.global_state.client


def reports(kind: str) -> Iterator[tuple[int, str]]:
    """What processes have left word of: their numbers and texts."""
    for key, text in store().key_value_dir_get(f"learnax/{kind}/"):
        yield int(key.rsplit("/", 1)[-1]), text


def is_of_peers(error: BaseException) -> bool:
    """Whether an error is what a collective raises when a peer is gone."""
    return isinstance(error, (RuntimeError, ValueError)) and bool(_BROKEN.search(str(error)))


def name_of(index: int) -> str:
    """A process for a person; this one with its machine and number there."""
    where = f" ({socket.gethostname()}, pid {os.getpid()})" if index == jax.process_index() else ""
    return f"process {index} of {jax.process_count()}{where}"
