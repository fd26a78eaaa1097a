"""Rows of metrics to the run, from a thread of their own: training never waits for a slow `run.log`."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from learnax.log.axis import plot_over_steps
from learnax.log.runs import runs_of
from learnax.sinks import Sink, Start

_logger = logging.getLogger("learnax")
BEHIND = 10_000
"""Rows that may wait for the run; at half of them a line says so, beyond them the loop waits."""
PATIENCE_S = 60.0
"""How long one call of `run.log` may take while somebody waits for it; after that it is given up."""


class NoRun:
    """Where there is no run: takes rows and forgets them."""

    def begin(self, start: Start) -> None:
        """Nothing to get ready."""

    def send(self, rows: Iterable[Mapping[str, Any]], count: int) -> None:
        """Nothing to send; the rows are not even made."""

    def send_own(self, rows: Iterable[Mapping[str, Any]], count: int) -> None:
        """No sink to send to."""

    def flush(self) -> None:
        """Nothing to wait for."""

    def settle(self) -> None:
        """Nothing to wait for."""

    def summarise(self, values: Mapping[str, float]) -> None:
        """Nothing to write to."""

    def abandon(self) -> None:
        """Nothing to forget."""

    def close(self, how: str = "") -> None:
        """Nothing to end."""


class Sender:
    """Hands rows to `run.log`, in order, each once.

    A run that raises is told of at once, and how often it did at the end; it never ends the training. One that hangs
    is given up once: no row is sent, and nothing is waited for, until the call that hangs has returned.

    Args:
        run: anything with `log(dict)`, or a sink.
    """

    def __init__(self, run: Any):
        self._run = run
        self._sink = run if isinstance(run, Sink) else None
        self._name = "run.log" if self._sink is None else repr(run)
        self._waiting: deque[Iterable[Mapping[str, Any]]] = deque()
        self._behind = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._hung: threading.Thread | None = None
        self._told = False
        self._stop: BaseException | None = None
        self._beats = 0
        self._sent = self._failed = 0
        self._flushed_badly = self._abandoned = False

    def begin(self, start: Start) -> None:
        """Gets a sink ready for a session.

        Raises:
            OSError: it cannot be written to, or another run writes there.
        """
        self._flushed_badly = self._abandoned = False
        if self._sink is not None and not self._hangs():
            self._sink.begin(start)

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
                "%s is %d rows behind the training; past %d the training will wait for it",
                self._name,
                self._behind,
                BEHIND,
            )
        if self._behind > BEHIND:
            self._wait(BEHIND)

    def send_own(self, rows: Iterable[Mapping[str, Any]], count: int) -> None:
        """`send` to a sink; a run gets what users log from them, at once."""
        if self._sink is not None:
            self.send(rows, count)

    def flush(self) -> None:
        """Waits until the run has every row; raises as `send` does."""
        self._wait(0)
        self._raise_stop()

    def settle(self) -> None:
        """Waits until a sink has written every row, before a checkpoint that counts on it. A run is not waited for."""
        if self._sink is not None:
            self._wait(0)

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
        self._abandoned = True

    def close(self, how: str = "") -> None:
        """`flush`, and ends the thread; says what was not taken. A sink is told `how` the session ended."""
        self._wait(0)
        with self._changed:
            thread, self._thread = self._thread, None
            self._changed.notify_all()
        if thread is not None:
            thread.join()
        if self._failed:
            _logger.warning("%s raised for %d of %d rows", self._name, self._failed, self._sent)
        if self._sink is not None and not (self._hangs() or self._abandoned):
            try:
                self._sink.close(how)
            except Exception as error:
                _logger.warning("%s: %s: %s", self._name, type(error).__name__, error)
        self._failed = self._sent = 0
        self._raise_stop()

    def _wait(self, most: int) -> None:
        with self._changed:
            while self._behind > most:
                beats = self._beats
                if not self._changed.wait_for(lambda: self._beats != beats, PATIENCE_S):  # noqa: B023
                    _logger.warning(
                        "%s has not returned for %g s: %d rows are given up, and all that follow until it has; "
                        "trainer.metrics has them",
                        self._name,
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
                    if self._sink is not None and self._behind == 1:  # nothing more has come so far
                        self._flush_sink(self._sink)
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
                _logger.warning("%s raised %s: %s; training goes on", self._name, type(error).__name__, error)
            self._failed += 1

    def _flush_sink(self, sink: Sink) -> None:
        try:
            sink.flush()
        except Exception as error:  # a full disk for one: what waits is written once there is room
            if not self._flushed_badly:
                _logger.warning("%s raised %s: %s; training goes on", self._name, type(error).__name__, error)
            self._flushed_badly = True


class Senders:
    """Several of them, each with a thread of its own: one that hangs or raises is in no other's way.

    Args:
        each: those that rows go to.
    """

    def __init__(self, each: list[Sender]):
        self._each = each

    def begin(self, start: Start) -> None:
        """`begin` of each; where one cannot, those before it are given back."""
        for place, sender in enumerate(self._each):
            try:
                sender.begin(start)
            except BaseException:
                for begun in self._each[:place]:
                    begun.close()
                raise

    def send(self, rows: Iterable[Mapping[str, Any]], count: int) -> None:
        """`send` to each; what one raises is raised when all have the rows."""
        shared = _Shared(rows)
        self._all(lambda sender: sender.send(shared, count))

    def send_own(self, rows: Iterable[Mapping[str, Any]], count: int) -> None:
        """`send` to the sinks among them."""
        shared = _Shared(rows)
        self._all(lambda sender: sender.send_own(shared, count))

    def flush(self) -> None:
        """`flush` of each."""
        self._all(Sender.flush)

    def settle(self) -> None:
        """`settle` of each."""
        self._all(Sender.settle)

    def summarise(self, values: Mapping[str, float]) -> None:
        """`summarise` of each."""
        self._all(lambda sender: sender.summarise(values))

    def abandon(self) -> None:
        """`abandon` of each."""
        self._all(Sender.abandon)

    def close(self, how: str = "") -> None:
        """`close` of each."""
        self._all(lambda sender: sender.close(how))

    def _all(self, do: Callable[[Sender], None]) -> None:
        stop = None
        for sender in self._each:
            try:
                do(sender)
            except BaseException as raised:
                stop = stop or raised
        if stop is not None:
            raise stop


class _Shared:
    """Rows that several threads take: made once, by the first that comes to them."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]):
        self._rows = rows
        self._made: list[Mapping[str, Any]] | None = None
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        with self._lock:
            if self._made is None:
                self._made = list(self._rows)
        return iter(self._made)


def sender(given: Any) -> Sender | Senders | NoRun:
    """A sender for what `run=` was given: a run, several, or None."""
    runs = runs_of(given)
    for run in runs:
        plot_over_steps(run)
    return Senders([Sender(run) for run in runs]) if len(runs) > 1 else Sender(runs[0]) if runs else NoRun()
