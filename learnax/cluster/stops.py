"""What ends a run before its last step: a signal, or the end of the time that it was given."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from learnax.cluster.processes import Processes

_TIME_UP = 1000
"""Stands for the end of the time where a signal's number is told; no signal has it."""


class EndError(Exception):
    """A run is to end before its last step, as it was asked to: that is no failure."""


class TimeUpError(EndError):
    """The time that a run was given is over."""


class StopAskedError(EndError):
    """A hook has asked for the end of the run."""


class Stops:
    """Asks a run to stop where it stands well.

    The first SIGINT or SIGTERM is kept until `check` is called. A second one acts at once, as it would have
    without this.

    Args:
        max_seconds: after which `check` raises; None for never.
        processes: of the run: all of them stop after the same dispatch, for what came to any of them.

    Attributes:
        at_once: whether a second signal came.
        agreed: whether `check` has raised.
    """

    def __init__(self, max_seconds: float | None, processes: Processes):
        self.at_once = self.agreed = False
        self._processes = processes
        # JAX's service listens to SIGTERM, and tells the other processes.
        self._numbers = (signal.SIGINT,) if processes.count > 1 else (signal.SIGINT, signal.SIGTERM)
        self._max_seconds = max_seconds
        self._until: float | None = None
        self._signal: int | None = None
        self._asked: str | None = None
        self._handlers: dict[int, Any] = {}
        self._owner = os.getpid()
        self._watching = False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Keeps signals inside, and leaves as they ask; time counts from here.

        Only the main thread can take signals over; in another one, they act as ever. A handler of the user's own
        is called at the end; a signal that is ignored stays so. A process that is forked inside has the handlers,
        but for it they do what was done before.
        """
        self._signal, self._asked, self.at_once, self.agreed = None, None, False, False
        self._until = None if self._max_seconds is None else time.monotonic() + self._max_seconds
        handlers: dict[int, Any] = {}
        self._owner = os.getpid()
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in self._numbers}
            handlers = {number: old for number, old in handlers.items() if old not in (None, signal.SIG_IGN)}
        self._handlers = handlers
        for number in handlers:
            signal.signal(number, self._keep)
        self._watching = True
        try:
            yield
        except Exception as error:
            # An error while a signal is pending comes from the signal: workers, for one, get it as well.
            if self._signal is None:
                raise
            raise _leave(self._signal) from error
        finally:
            self._watching = False
            for number, old in handlers.items():
                signal.signal(number, old)
            if self._signal is not None and not self.at_once:
                _call_own(handlers.get(self._signal), self._signal)
        if self._signal is not None:
            raise _leave(self._signal)

    @property
    def reason(self) -> str | None:
        """The name of the signal that is kept, or that another process was sent; or what `ask` was told."""
        return self._asked if self._signal is None else signal.Signals(self._signal).name

    def ask(self, reason: str) -> None:
        """Has the next `check` end the run; of several processes, all are asked at the same step."""
        self._asked = reason

    def check(self) -> None:
        """Returns where nothing asks for a stop.

        Raises:
            KeyboardInterrupt: SIGINT came.
            SystemExit: SIGTERM came; its status is 143, as the shell has it for that signal.
            TimeUpError: the time is over.
            StopAskedError: `ask` was called.
        """
        self.check_asked()
        mine = self._signal or 0
        if not mine and self._until is not None and time.monotonic() >= self._until:
            mine = _TIME_UP
        wanted = self._processes.stop_wanted(mine)
        if not wanted:
            return
        self.agreed = True
        if wanted == _TIME_UP:
            raise TimeUpError(f"max_seconds={self._max_seconds:g} are over")
        self._signal = wanted
        raise _leave(wanted)

    def check_asked(self) -> None:
        """Raises StopAskedError where `ask` was called; looks for nothing else."""
        if self._asked is not None:
            self.agreed = True
            raise StopAskedError(self._asked)

    def heed(self) -> None:
        """`check` while data are waited for; several processes agree on a dispatch to stop after, and go on here."""
        asked = self._signal is not None or self._until is not None  # first: this is called for each datum
        if asked and self._watching and self._processes.count == 1:
            self.check()

    def _keep(self, number: int, frame: FrameType | None) -> None:
        # Nothing is logged here: a handler runs in the midst of anything, a write to the terminal for one.
        if os.getpid() != self._owner:  # a fork, made by a plot for one: its signals do not concern the run
            before = self._handlers[number]
            signal.signal(number, before)
            signal.raise_signal(number)
            return
        if self._signal is None:
            self._signal = number
            return
        self.at_once = True
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _leave(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def _call_own(handler: Any, number: int) -> None:
    own: Callable[[int, Any], Any] | None = handler if callable(handler) else None
    if own is not None and own is not signal.default_int_handler:
        own(number, None)
