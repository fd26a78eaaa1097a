"""Rows of metrics to the run, from a thread of their own: training never waits for a slow `run.log`."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from learnax.log.axis import plot_over_steps

_logger = logging.getLogger("learnax")
BEHIND = 10_000
"""Rows that may wait for the run; at half of them a line says so, beyond them the loop waits."""
PATIENCE_S = 60.0
"""How long one call of `run.log` may take while somebody waits for it; after that it is given up."""


class NoRun:
    """Where there is no run: takes rows and forgets them."""

    def send(self, rows: Iterable[Mapping[str, Any]], count: int) -> None:
        """Nothing to send; the rows are not even made."""

    def flush(self) -> None:
        """Nothing to wait for."""

    def summarise(self, values: Mapping[str, float]) -> None:
        """Nothing to write to."""

    def abandon(self) -> None:
        """Nothing to forget."""

    def close(self) -> None:
        """Nothing to end."""


class Sender:
    """Hands rows to `run.log`, in order, each once.

    A run that raises is told of at once, and how often it did at the end; it never ends the training. One that hangs
    is given up once: no row is sent, and nothing is waited for, until the call that hangs has returned.

    Args:
        run: anything with `log(dict)`.
    """

    def __init__(self, run: Any):
        self._run = run
        self._waiting: deque[Iterable[Mapping[str, Any]]] = deque()
        self._behind = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._hung: threading.Thread | None = None
        self._told = False
        self._stop: BaseException | None = None
        self._beats = 0
        self._sent = self._failed = 0

    def send(self, rows: Iterable[Mapping[str, Any]], count: int) -> None:
        """Takes `count` rows; an iterable that makes them late is run in the thread.

        Raises:
            BaseException: a stop (KeyboardInterrupt, SystemExit) that `run.log` has raised since.
        """
        if self._hangs():
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="learnax-sender", daemon=True)
            self._thread.start()
        with self._changed:
            self._waiting.append(rows)
            self._behind += count
            self._changed.notify_all()
        self._raise_stop()
        if self._behind > BEHIND // 2 and not self._told:
            self._told = True
            _logger.warning(
                "run.log is %d rows behind the training; past %d the training will wait for it", self._behind, BEHIND
            )
        if self._behind > BEHIND:
            self._wait(BEHIND)

    def flush(self) -> None:
        """Waits until the run has every row; raises as `send` does."""
        self._wait(0)
        self._raise_stop()

    def summarise(self, values: Mapping[str, float]) -> None:
        """Writes values to the run's summary (`run.summary.update`), where it has one."""
        update = getattr(getattr(self._run, "summary", None), "update", None)
        if not callable(update) or self._hangs():
            return
        try:
            update(dict(values))
        except Exception as error:
            _logger.warning("run.summary.update raised %s: %s", type(error).__name__, error)

    def abandon(self) -> None:
        """Forgets the rows that wait, and leaves the thread to itself."""
        with self._changed:
            self._give_up()

    def close(self) -> None:
        """`flush`, and ends the thread; says what was not taken."""
        self._wait(0)
        with self._changed:
            thread, self._thread = self._thread, None
            self._changed.notify_all()
        if thread is not None:
            thread.join()
        if self._failed:
            _logger.warning("run.log raised for %d of %d rows", self._failed, self._sent)
        self._failed = self._sent = 0
        self._raise_stop()

    def _wait(self, most: int) -> None:
        with self._changed:
            while self._behind > most:
                beats = self._beats
                if not self._changed.wait_for(lambda: self._beats != beats, PATIENCE_S):  # noqa: B023
                    _logger.warning(
                        "run.log has not returned for %g s: %d rows are given up, and all that follow until it has; "
                        "trainer.metrics has them",
                        PATIENCE_S,
                        self._behind,
                    )
                    self._hung = self._thread
                    self._give_up()

    def _give_up(self) -> None:
        self._waiting.clear()
        self._behind = 0
        self._thread = None  # it ends when its call has returned; a later row starts another one
        self._changed.notify_all()

    def _hangs(self) -> bool:
        """Whether the call that was given up has not returned yet."""
        return self._hung is not None and self._hung.is_alive()

    def _work(self) -> None:
        me = threading.current_thread()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._thread is not me)
                if self._thread is not me:
                    return
                rows = self._waiting.popleft()
            for row in rows:
                try:
                    self._log(row)
                except BaseException as stop:  # not an error of the run, but a wish to end
                    self._stop = stop
                with self._changed:
                    if self._thread is not me:
                        return  # given up: what it took is not counted any more
                    self._beats += 1
                    self._behind -= 1
                    self._changed.notify_all()

    def _raise_stop(self) -> None:
        stop, self._stop = self._stop, None
        if stop is not None:
            raise stop

    def _log(self, row: Mapping[str, Any]) -> None:
        self._sent += 1
        try:
            self._run.log(dict(row))
        except Exception as error:
            if not self._failed:
                _logger.warning("run.log raised %s: %s; training goes on", type(error).__name__, error)
            self._failed += 1


def sender(run: Any) -> Sender | NoRun:
    """A sender for a run, or for None."""
    plot_over_steps(run)
    return NoRun() if run is None else Sender(run)
