"""Progress for a person: a bar in a terminal or a notebook, a line now and then in a file."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

_logger = logging.getLogger("learnax")
_LINE_S = 60.0
"""Seconds between two lines in a file."""
_LEAST_BAR = 8
"""Columns that are kept for the bar itself."""
_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
_ENDLESS = "{desc}{n_fmt}{postfix}"


class Bar(Protocol):
    """What shows how far something is.

    Attributes:
        shown: whether anybody sees it.
    """

    shown: bool

    def describe(self, text: str) -> None:
        """Names what goes on."""

    def advance(self, count: int) -> None:
        """Counts on."""

    def tell(self, facts: Sequence[str]) -> None:
        """Shows facts, the most important first: as many as there is room for. The time that is left is one more."""

    def close(self) -> None:
        """Ends it."""


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel, and not in a terminal or a script."""
    if "IPython" not in sys.modules:  # a kernel has it; importing it for the question would take a start 0.1 s
        return False
    from IPython import get_ipython

    shell = get_ipython()
    return shell is not None and shell.__class__.__name__ == "ZMQInteractiveShell"


def progress_bar(total: int | None, done: int = 0, *, shown: bool, what: str, passing: bool = False) -> Bar:
    """A bar where there is a terminal or a notebook, lines where there is neither.

    Args:
        total: of what is counted; None where nobody knows.
        done: how many of them are done.
        shown: whether anything is drawn.
        what: what is done.
        passing: whether it is gone when it is over, and comes only where that takes more than a second.
    """
    if os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false"):
        shown = False  # tqdm's own bars for notebooks do not ask
    options: dict[str, Any] = {"total": total, "initial": done, "desc": f"{what}: ", "dynamic_ncols": True}
    if not shown:
        return _Drawn(tqdm(**options, disable=True))
    options |= {"leave": not passing, "delay": 1.0 if passing else 0.0}
    if in_notebook():
        from tqdm.notebook import tqdm as notebook_tqdm

        try:
            return _Drawn(notebook_tqdm(**options), passing=passing)
        except ImportError:
            _logger.warning("no ipywidgets in this notebook's environment: the progress bar is plain text")
    elif not sys.stderr.isatty():
        return _Lines(total, done, what, passing=passing)
    return _Drawn(tqdm(**options, bar_format=_ENDLESS if total is None else _FORMAT), passing=passing)


@contextlib.contextmanager
def unbroken(bar: Bar) -> Iterator[None]:
    """What is logged inside stands above the bar, and not amid it."""
    if not bar.shown or isinstance(bar, _Lines):
        yield
        return
    last, logging.lastResort = logging.lastResort, _Above(logging.WARNING)
    try:
        with logging_redirect_tqdm():
            yield
    finally:
        logging.lastResort = last


class _Above(logging.Handler):
    """Writes records above all bars: what `logging` does where nobody has set it up."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _Drawn:
    """A bar of tqdm's.

    Args:
        bar: it.
        passing: see `progress_bar`.
    """

    def __init__(self, bar: Any, *, passing: bool = False):
        self._bar, self._passing = bar, passing
        self.shown = not bar.disable

    def describe(self, text: str) -> None:
        self._bar.set_description(text, refresh=False)

    def advance(self, count: int) -> None:
        self._bar.update(count)

    def tell(self, facts: Sequence[str]) -> None:
        if not self.shown:
            return
        left = _left(self._bar.n - self._bar.initial, self._bar.total, self._bar.n, time.time() - self._bar.start_t)
        facts = [*facts[:1], *left, *facts[1:]]
        room = self._room()
        shown = [fact for number, fact in enumerate(facts) if len(", ".join(facts[: number + 1])) <= room]
        # A bar that is drawn for this would come before its time.
        self._bar.set_postfix_str(", ".join(shown), refresh=not self._passing)

    def close(self) -> None:
        self._bar.close()

    def _room(self) -> float:
        """Columns for facts; without end in a notebook, which breaks lines itself."""
        try:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
        except (OSError, ValueError):
            return float("inf")
        counts = 2 * len(str(self._bar.total or self._bar.n)) + len("  100%||  /, ")
        return float(columns - counts - len(self._bar.desc or "") - (_LEAST_BAR if self._bar.total else 0))


class _Lines:
    """A line every minute, and one at the end: thousands of them in a file are nothing that anybody reads.

    Args:
        total: of what is counted; None where nobody knows.
        done: how many of them are done.
        what: what is done.
        passing: whether the last line is not worth writing.
    """

    def __init__(self, total: int | None, done: int, what: str, *, passing: bool):
        self._total, self._begun, self._done, self._what = total, done, done, what
        self._passing = passing
        self._began = self._written = time.monotonic()
        self._facts: Sequence[str] = ()
        self.shown = True

    def describe(self, text: str) -> None:
        self._what = text

    def advance(self, count: int) -> None:
        self._done += count

    def tell(self, facts: Sequence[str]) -> None:
        self._facts = facts
        if time.monotonic() - self._written >= _LINE_S:
            self._write()

    def close(self) -> None:
        if not self._passing:
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        share = f"/{self._total} ({self._done / self._total:.0%})" if self._total else ""
        left = _left(self._done - self._begun, self._total, self._done, self._written - self._began)
        print(", ".join([f"{self._what}: {self._done}{share}", *self._facts, *left]), file=sys.stderr, flush=True)


def _left(made: int, total: int | None, done: int, seconds: float) -> list[str]:
    """The time that is left, by what was made in so many seconds; nothing where that cannot be said."""
    if not total or not made or done >= total:
        return []
    return [f"{tqdm.format_interval(seconds * (total - done) / made)} left"]
