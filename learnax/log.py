"""Scalars off the device, late and in bulk: to `trainer.metrics`, to the run, to the progress bar."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from tqdm import tqdm

T = TypeVar("T")

_logger = logging.getLogger("learnax")
_REFRESH_S = 0.2
"""Seconds between two looks of the progress bar at the metrics."""
_NAN_LINES = 10
"""Dropped updates that are told one by one; after them, every hundredth."""


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel, and not in a terminal or a script."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and shell.__class__.__name__ == "ZMQInteractiveShell"


class _Row(NamedTuple):
    names: tuple[str, ...]
    scalars: jax.Array
    epoch: int
    seconds: float


class Log:
    """Keeps a run's metrics.

    A step's scalars are read when `in_flight` later steps have been dispatched: by then they are there.

    Args:
        run: where metrics go: anything with `log(dict)`, or None.
        in_flight: steps whose scalars may be unread when another one is dispatched.
        steps: training steps of the whole run, for the progress bar.
    """

    def __init__(self, run: Any, in_flight: int, steps: int):
        self.metrics: dict[str, list[float]] = {}
        self.step = 0
        self._run = run
        self._in_flight = in_flight
        self._steps = steps
        self._pending: deque[_Row] = deque()
        self._bar: Any = None
        self._waited = self._began = self._last_push = self._last_look = 0.0
        self._dropped = self._written = 0
        self._deaf = False
        self._sent: set[str] = set()

    @property
    def step_at_most(self) -> int:
        """The step, if no update whose metrics are still on their way was dropped."""
        return self.step + len(self._pending)

    @contextlib.contextmanager
    def session(self, done: int) -> Iterator[None]:
        """Shows a progress bar inside, and leaves with everything written; `done` steps were made before."""
        self._bar = _bar(self._steps, done)
        self._waited, self._began, self._written = 0.0, time.perf_counter(), 0
        try:
            yield
        finally:
            try:
                self.drain()
            finally:
                self._look()
                self._bar.close()
                self._bar = None

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; the time until each is there counts as waiting for data."""
        iterator = iter(items)
        self._last_push = time.perf_counter()
        while True:
            began = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - began
            yield item

    def wait_for_room(self) -> None:
        """Waits until no more than `in_flight` steps are on their way, and writes the metrics of the others."""
        while len(self._pending) > self._in_flight:
            self._write(*self._read())

    def push(self, names: tuple[str, ...], scalars: jax.Array, epoch: int) -> None:
        """Takes the scalars of a dispatched training step."""
        scalars.copy_to_host_async()
        now = time.perf_counter()
        self._pending.append(_Row(names, scalars, epoch, now - self._last_push))
        self._last_push = now

    def drain(self) -> None:
        """Waits for the steps in flight and writes their metrics."""
        while self._pending:
            self._write(*self._read())

    @contextlib.contextmanager
    def newest(self) -> Iterator[dict[str, float]]:
        """Waits for the steps in flight, and holds the newest one's metrics open to be added to."""
        while len(self._pending) > 1:
            self._write(*self._read())
        values, epoch = self._read()
        try:
            yield values
        finally:
            self._write(values, epoch)

    def keep_epoch(self, means: Mapping[str, Mapping[str, float]]) -> list[dict[str, float]]:
        """Keeps each split's means over an epoch; returns them under their full names, a dict for each split."""
        rows = []
        for split, values in means.items():
            named = {f"{split}_epoch/{name}": value for name, value in values.items()}
            if split != "train":
                named |= {f"{split}/{name}": value for name, value in values.items()}
            self._keep(named)
            rows.append(named)
        return rows

    def training_means(self, marks: Mapping[str, int]) -> dict[str, float]:
        """Means of the training metrics since each had the length that `marks` says."""
        return {
            name.removeprefix("train/"): float(np.mean(values[marks.get(name, 0) :]))
            for name, values in self.metrics.items()
            if name.startswith("train/") and len(values) > marks.get(name, 0)
        }

    def lengths(self) -> dict[str, int]:
        """How much there is of each metric."""
        return {name: len(values) for name, values in self.metrics.items()}

    def send(self, values: Mapping[str, Any]) -> None:
        """Hands values to the run; a run that raises is told of once, and never ends the training."""
        if self._run is None:
            return
        try:
            self._run.log(dict(values))
        except Exception as error:
            if not self._deaf:
                _logger.warning("run.log raised %s: %s; training goes on", type(error).__name__, error)
            self._deaf = True

    def send_once(self, values: Mapping[str, Any]) -> None:
        """`send`, the first time it is called for these names."""
        fresh = {name: value for name, value in values.items() if name not in self._sent}
        if fresh:
            self._sent.update(fresh)
            self.send(fresh)

    def resume(self, step: int, history: Mapping[str, Iterable[float]]) -> None:
        """Takes over the step and the metrics of the run that goes on."""
        self.step = step
        self.metrics.update({name: np.asarray(values).tolist() for name, values in history.items()})

    def show_epoch(self, epoch: int, epochs: int) -> None:
        """Names the epoch on the progress bar."""
        if self._bar is not None:
            self._bar.set_description(f"epoch {epoch + 1}/{epochs}", refresh=False)

    def _read(self) -> tuple[dict[str, float], int]:
        row = self._pending.popleft()
        values = dict(zip(row.names, np.asarray(row.scalars).tolist(), strict=True))
        values["update_time"] = row.seconds
        if values["has_nan"]:
            self._tell_dropped(values)
        else:
            self.step += 1
        return values, row.epoch

    def _write(self, values: Mapping[str, float], epoch: int) -> None:
        named = {name if name.startswith("grads/") else f"train/{name}": value for name, value in values.items()}
        self._keep({name: value for name, value in named.items() if not name.startswith("grads/")})
        self.send({**named, "step": self.step, "epoch": epoch})
        self._written += 1
        if self._bar is not None:
            self._bar.update(1)
            if time.perf_counter() - self._last_look > _REFRESH_S:
                self._look()

    def _keep(self, named: Mapping[str, float]) -> None:
        for name, value in named.items():
            self.metrics.setdefault(name, []).append(float(value))

    def _look(self) -> None:
        """Puts loss, speed and the share of time spent waiting for data on the bar."""
        self._last_look = time.perf_counter()
        elapsed = max(self._last_look - self._began, 1e-9)
        losses = self.metrics.get("train/loss")
        shown = {"loss": f"{losses[-1]:.4g}"} if losses else {}
        shown["steps/s"] = f"{self._written / elapsed:.4g}"
        shown["data"] = f"{self._waited / elapsed:.0%}"
        self._bar.set_postfix(shown)

    def _tell_dropped(self, values: Mapping[str, float]) -> None:
        self._dropped += 1
        if self._dropped > _NAN_LINES and self._dropped % 100:
            return
        paths = [name.removeprefix("grads/") for name, norm in values.items() if name.startswith("grads/")]
        bad = [path for path in paths if not np.isfinite(values[f"grads/{path}"])]
        why = f"the gradient is not finite in {', '.join(bad)}" if bad else f"the rate is {values['learning_rate']}"
        _logger.warning(
            "step %d: the update would put NaN into the parameters and was dropped (%d so far): %s",
            self.step + 1,
            self._dropped,
            why,
        )


class Means:
    """A split's means from its batches' sums, read `in_flight` batches late."""

    def __init__(self, in_flight: int):
        self._in_flight = in_flight
        self._pending: deque[tuple[tuple[str, ...], jax.Array]] = deque()
        self._sums: dict[str, float] = {}
        self._count = 0

    def push(self, names: tuple[str, ...], sums: jax.Array, count: int) -> None:
        """Takes the sums over `count` data of a dispatched evaluation."""
        sums.copy_to_host_async()
        self._pending.append((names, sums))
        self._count += count
        self._read(self._in_flight)

    def result(self) -> dict[str, float]:
        """Waits for the batches in flight; the mean of each metric over all data."""
        self._read(0)
        return {name: total / self._count for name, total in self._sums.items()}

    def _read(self, left: int) -> None:
        while len(self._pending) > left:
            names, sums = self._pending.popleft()
            for name, value in zip(names, np.asarray(sums).tolist(), strict=True):
                self._sums[name] = self._sums.get(name, 0.0) + value


def _bar(total: int, done: int) -> Any:
    options: dict[str, Any] = {"total": total, "initial": done, "unit": "step", "dynamic_ncols": True}
    if in_notebook():
        from tqdm.notebook import tqdm as notebook_tqdm

        try:
            return notebook_tqdm(**options)
        except ImportError:
            _logger.warning("no ipywidgets in this notebook's environment: the progress bar is plain text")
    return tqdm(**options)
