"""Says where a run hangs, and leaves it alone."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

_logger = logging.getLogger("learnax")
TIMES = 20
"""A silence this many times as long as a dispatch takes on average is worth a line..."""
FLOOR_S = 120.0
"""...but not before so many seconds, ..."""
FIRST_S = 600.0
"""...and before the first dispatch, whose time is not known yet, not before these."""


@contextlib.contextmanager
def looking_on(watch: Callable[[threading.Event], None], name: str) -> Iterator[None]:
    """Runs a function in a thread beside the block, with an event that is set when the block is over."""
    over = threading.Event()
    thread = threading.Thread(target=watch, args=(over,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Watchdog:
    """Looks on from a thread, and logs the phase and all Python stacks when nothing was dispatched for long.

    A loop that waits for its devices dispatches no more. One line for each standstill; a run that goes on after it is
    watched on. A hang inside C code that keeps Python's lock stops this thread, too: look from outside then, with
    `py-spy dump --pid`.

    Args:
        progress: counts dispatches.
        where: the phase that the run is in.
        floor_s: seconds of silence that are never news.
        first_s: the same, before the first dispatch.
    """

    def __init__(
        self, progress: Callable[[], int], where: Callable[[], str], floor_s: float = FLOOR_S, first_s: float = FIRST_S
    ):
        self._progress = progress
        self._where = where
        self._floor_s = floor_s
        self._first_s = first_s

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the block."""
        trained_by = threading.current_thread()
        with looking_on(lambda over: self._watch(over, trained_by), "learnax-watchdog"):
            yield

    def _watch(self, over: threading.Event, trained_by: threading.Thread) -> None:
        count = first = self._progress()
        began = moved = time.monotonic()
        told = False
        while not over.wait(self._floor_s / 60):
            now, before, count = time.monotonic(), count, self._progress()
            if count != before:
                moved, told = now, False
                continue
            made = count - first
            limit = max(self._floor_s, TIMES * (moved - began) / made) if made else self._first_s
            if not told and now - moved > limit:
                told = True
                self._tell(now - moved, made, trained_by)

    def _tell(self, seconds: float, made: int, trained_by: threading.Thread) -> None:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = []
        # The thread that trains comes first.
        for ident, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] != trained_by.ident):
            if ident != threading.get_ident():
                stack = "".join(traceback.format_stack(frame))
                stacks.append(f"thread {names.get(ident, ident)}:\n{stack}")
        _logger.warning(
            "nothing was dispatched for %.0f s, after %d dispatches: the run is in %r. It is left alone; what each "
            "thread does:\n%s",
            seconds,
            made,
            self._where(),
            "\n".join(stacks),
        )
