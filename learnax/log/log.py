"""Scalars off the device, late and in bulk: to `trainer.metrics`, to the run, to the progress bar."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from learnax.cluster.processes import Processes
from learnax.log.bar import Bar, in_notebook, progress_bar, unbroken
from learnax.log.norms import Norms
from learnax.log.pace import Pace
from learnax.log.rows import Rows, Steps, full_name, joined_of
from learnax.log.runs import voice_of
from learnax.log.sender import sender
from learnax.profiling.ledger import Ledger
from learnax.profiling.phases import Phases
from learnax.sinks import Start
from learnax.step import NAN_DATA, Part, Scalars

_logger = logging.getLogger("learnax")
_BULK = 64
"""Dispatches whose scalars are read together: reading costs as much for one as for all of them."""
_BULK_S = 0.1
"""Seconds after which they are read, however few there are: a slow step's metrics do not wait for another's."""
_REFRESH_S = 0.2
"""Seconds between two looks of the progress bar at the metrics."""
_NAN_LINES = 10
"""Dropped updates that are told one by one; after them, every hundredth."""
_NAMED = 5
"""Parameters that such a line names; of the others it gives the number."""


class NoProgressError(RuntimeError):
    """So many updates in a row were dropped that the run comes to nothing: why is in the text."""


class Log:
    """Keeps a run's metrics.

    A dispatch's scalars are read when later ones have been made, so that they are there by then. Where dispatches are
    quick, several are read at once.

    Args:
        run: where metrics go: anything with `log(dict)`, a sink, several of these, or None.
        in_flight: dispatches that may be unfinished in any case when another one is made.
        steps: training steps of the whole run, for the progress bar; None where nobody knows.
        phases: the run's clock.
        processes: of the run: the first one logs and draws.
        batch_data: data in a step, to say how many of them are NaN.
        max_dropped: updates dropped in a row that end the run; None never does.
        on_host: whether scalars are in the host's memory as they come, as a CPU's are.

    Attributes:
        metrics: of the run, lists by name.
        step: updates made, as far as metrics are kept.
        made_at: for metrics that are not there for each step, the training steps that were made when each was kept.
        facts: what else the run knows of itself, as plain data, for a page.
        voice: the run that a user's plots are handed.
    """

    def __init__(
        self,
        run: Any,
        in_flight: int,
        steps: int | None,
        phases: Phases,
        processes: Processes,
        batch_data: int,
        max_dropped: int | None,
        *,
        on_host: bool = False,
    ):
        self.metrics: dict[str, list[float]] = {}
        self.step = 0
        self.made_at: dict[str, list[int]] = {}
        self.facts: Callable[[], dict[str, Any]] = dict
        self.voice = voice_of(run, self._send_own, lambda: self.step)
        self._norms = Norms()
        self._rows_of_old = 0
        self._sender = sender(run if processes.first else None)
        self._processes = processes
        self._pace = Pace(in_flight, fixed=processes.count > 1)
        self._steps = steps
        self._phases = phases
        self._pending: deque[Steps] = deque()
        self._done = 0
        self._on_their_way = 0
        self._bar: Bar | None = None
        self._waited_before = self._began = self._last_push = self._last_read = self._last_look = 0.0
        self.rows = self._rows_before = self._dropped = self._dropped_before = self._in_a_row = 0
        self._batch_data = batch_data
        self._max_dropped = max_dropped
        self._on_host = on_host
        self._nan_told, self._why, self._wrong = False, "", ""
        self._weightless: set[str] = set()
        self._shown = False
        self._sent: set[str] = set()

    @property
    def step_at_most(self) -> int:
        """The step, if no update whose metrics are still on their way was dropped."""
        return self.step + self._on_their_way

    @property
    def norms(self) -> tuple[tuple[str, ...], list[tuple[int, np.ndarray]]]:
        """The gradients' norms by parameter at some steps: names, and `(step, values)` for each."""
        return self._norms.kept

    @contextlib.contextmanager
    def session(self, done: int, epoch: int) -> Iterator[None]:
        """Shows a progress bar inside, and leaves with everything written.

        Args:
            done: steps that were made before.
            epoch: epochs that were ended before.

        Raises:
            OSError: a sink cannot be written to.
        """
        self._sender.begin(self._start(epoch))
        how = ""
        self._bar = bar = progress_bar(self._steps, done, shown=self._processes.first, what="training")
        self._began = self._last_read = time.perf_counter()
        self._waited_before, self._rows_before = self._phases.data.seconds, self.rows
        self._dropped_before = self._dropped
        self._shown = bar.shown
        try:
            with unbroken(bar):
                yield
        except BaseException as error:
            how = _what_ended(error)
            raise
        finally:
            with self._phases.log:
                try:
                    self.drain()
                finally:
                    self._tell_session()
                    self._look()
                    bar.close()
                    self._bar = None
                    self._sender.close(how)

    def wait_for_room(self) -> None:
        """Waits until another dispatch may be made, see `Pace`; keeps the metrics of those that are done, in bulk.

        Raises:
            NoProgressError: the last `max_dropped` updates were all dropped.
        """
        if len(self._pending) - self._done > self._pace.room:
            before, self._done = self._done, len(self._pending) - self._pace.left
            with self._phases.drain:
                self._pending[self._done - 1].scalars.values.block_until_ready()
            self._pace.waited(self._done - before)
        # Where a dispatch is cut depends on what is known of the steps before, which several processes must know alike:
        # they ask no clock.
        late = self._processes.count > 1 or time.perf_counter() - self._last_read > _BULK_S
        if self._done >= _BULK or (self._done and late):
            self._keep_first(self._done)
            self._check_progress()

    def push(
        self, scalars: Scalars, count: int, epoch: int, seen: Callable[[], Mapping[str, float]] | None = None
    ) -> None:
        """Takes the scalars of `count` dispatched training steps.

        Args:
            scalars: of the dispatch.
            count: steps.
            epoch: that they lie in.
            seen: gives what else joins the metrics of the first of them. It is asked when those are there, and not
                where the update turns out to have been dropped.
        """
        if not self._on_host:
            scalars.values.copy_to_host_async()
        now = time.perf_counter()
        self._pending.append(Steps(scalars, count, epoch, now - self._last_push, seen))
        self._on_their_way += count
        self._last_push = now

    def drain(self) -> None:
        """Waits for the steps in flight and keeps their metrics; raises as `wait_for_room` does."""
        self._keep_first(len(self._pending))
        self._check_progress()

    @contextlib.contextmanager
    def newest(self) -> Iterator[dict[str, float]]:
        """Waits for the steps in flight, and holds the newest one's metrics open to be added to."""
        with self._phases.log:
            self._keep_first(len(self._pending) - 1)
            rows = self._read(1)
            earlier, last = rows.but_last()
            values = {**dict(zip(last.names, last.values[0].tolist(), strict=True)), **last.joined[0]}
        try:
            if earlier.steps:  # of the same dispatch; they are not to wait for what is added to the last one
                with self._phases.log:
                    self._keep_rows(earlier)
            yield values
        finally:
            with self._phases.log:
                last.values[0] = [values.pop(name) for name in last.names]
                self._keep_rows(last._replace(joined={0: values}))

    def forget(self) -> None:
        """Forgets the steps on their way: the devices are not waited for any more."""
        self._pending.clear()
        self._done = self._on_their_way = 0

    def abandon(self) -> None:
        """Forgets all that is on its way: nothing is waited for any more."""
        self.forget()
        self._sender.abandon()

    def flush(self) -> None:
        """Waits until the run has every row that was kept so far."""
        with self._phases.log:
            self._sender.flush()

    def settle(self) -> None:
        """Waits until sinks have written every row that was kept so far: a checkpoint counts on it."""
        with self._phases.log:
            self._sender.settle()

    def keep_epoch(self, means: Mapping[str, Mapping[str, float]]) -> list[dict[str, float]]:
        """Keeps each split's means over an epoch; returns them under their full names, a dict for each split."""
        rows = []
        for split, values in means.items():
            named = {f"{split}_epoch/{name}": value for name, value in values.items()}
            if split != "train":
                named |= {f"{split}/{name}": value for name, value in values.items()}
            rows.append(self.keep(named))
        return rows

    def keep(self, named: dict[str, float]) -> dict[str, float]:
        """Keeps values under their full names, and returns them."""
        self._keep(named, self.rows)
        return named

    def training_means(self, marks: Mapping[str, int]) -> dict[str, float]:
        """Means of the training metrics since each had the length that `marks` says."""
        return {
            name.removeprefix("train/"): float(np.mean(values[marks.get(name, 0) :]))
            for name, values in self.metrics.items()
            if name.startswith("train/") and len(values) > marks.get(name, 0)
        }

    def grown(self, marks: Mapping[str, int]) -> dict[str, float]:
        """The last values of the metrics that have more than `marks` says."""
        return {name: values[-1] for name, values in self.metrics.items() if len(values) > marks.get(name, 0)}

    def lengths(self) -> dict[str, int]:
        """How much there is of each metric."""
        return {name: len(values) for name, values in self.metrics.items()}

    def send(self, values: Mapping[str, Any]) -> None:
        """Hands values to the run, after all that came before."""
        self._sender.send([values], 1)

    def _send_own(self, values: Mapping[str, Any]) -> None:
        """Hands a user's own values to the sinks."""
        self._sender.send_own([values], 1)

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
        self._rows_of_old = len(self.metrics.get("train/has_nan", ()))

    def conclude(self, ledger: Ledger) -> None:
        """Writes the ledger where the progress bar was, and its values to the run's summary, where it has one."""
        if self._shown:
            # In a notebook, what is on stderr looks like an error.
            tqdm.write(str(ledger), file=sys.stdout if in_notebook() else sys.stderr)
        self._sender.summarise(ledger.summary())

    def begin_epoch(self, epoch: int, epochs: float) -> None:
        """Names the epoch on the progress bar; the time of its first step counts from here."""
        self._last_push = time.perf_counter()
        if self._bar is not None:
            of = "" if epochs == math.inf else f"/{epochs}"
            self._bar.describe(f"epoch {epoch + 1}{of}")

    def _keep_first(self, dispatches: int) -> None:
        while dispatches > 0:
            with self._phases.log:
                # Of one program, most often, and so with one tuple of names.
                names, some = self._pending[0].scalars.names, 1
                for dispatch in itertools.islice(self._pending, 1, dispatches):
                    if dispatch.scalars.names is not names and dispatch.scalars.names != names:
                        break
                    some += 1
                self._keep_rows(self._read(some))
                dispatches -= some

    def _read(self, count: int) -> Rows:
        """Takes the first dispatches, of the same names, off the device."""
        dispatches = [self._pending.popleft() for _ in range(count)]
        self._done = max(self._done - count, 0)
        self._last_read = time.perf_counter()
        with self._phases.drain:
            dispatches[-1].scalars.values.block_until_ready()
        if not self._pending:
            # The devices were waited for, with nothing behind: that time is the last dispatch's, and no later one's.
            now = time.perf_counter()
            dispatches[-1] = dispatches[-1]._replace(seconds=dispatches[-1].seconds + now - self._last_push)
            self._last_push = now
        names, epoch = dispatches[0].scalars.names, dispatches[0].epoch
        values = np.concatenate([np.asarray(dispatch.scalars.values)[: dispatch.steps] for dispatch in dispatches])
        self._on_their_way -= len(values)
        dropped = values[:, names.index("has_nan")]
        if "overflow" in names:  # an update that the scale of the loss was too large for is made by no step, either
            dropped = dropped + values[:, names.index("overflow")]
        steps = (self.step + np.cumsum(dropped == 0)).tolist()
        names, values = self._without_weights(names, values, steps)
        for row in np.flatnonzero(values[:, names.index(NAN_DATA)])[: not self._nan_told]:
            self._tell_nan(steps[row], int(values[row, names.index(NAN_DATA)]))
        for row in np.flatnonzero(values[:, names.index("has_nan")]):
            self._why = _why_dropped(dict(zip(names, values[row].tolist(), strict=True)))
            self._tell_dropped(steps[row] + 1)
        self._in_a_row = _trailing(values[:, names.index("has_nan")], self._in_a_row)
        self.step = steps[-1]
        seconds = [dispatch.seconds / dispatch.steps for dispatch in dispatches for _ in range(dispatch.steps)]
        values = np.column_stack([values, np.asarray(seconds, values.dtype)])
        return Rows((*names, "update_time"), values, steps, epoch, joined_of(dispatches, dropped))

    def _without_weights(
        self, names: tuple[Any, ...], values: np.ndarray, steps: list[int]
    ) -> tuple[tuple[str, ...], np.ndarray]:
        """Metrics without the weights that they were divided by; tells of weights that are 0, NaN or negative."""
        for place, name in enumerate(names):
            if isinstance(name, str):
                continue
            column, (_, metric) = values[:, place], name
            if np.isnan(column).any():
                self._wrong = _weight_text(f"step {steps[int(np.isnan(column).argmax())] + 1}", metric)
            elif (column == 0).any() and metric not in self._weightless:
                self._weightless.add(metric)
                step = steps[int((column == 0).argmax())]
                _logger.warning("step %d: %s, which is told once", step, _weightless(metric))
        kept = [place for place, name in enumerate(names) if isinstance(name, str)]
        return tuple(names[place] for place in kept), values[:, kept]

    def _keep_rows(self, rows: Rows) -> None:
        for name, column in zip(rows.names, rows.values.T.tolist(), strict=True):
            if not name.startswith("grads/"):
                self.metrics.setdefault(full_name(name), []).extend(column)
        self._norms.take(rows.names, rows.values, rows.steps)
        before, self.rows = self.rows, self.rows + len(rows.steps)
        for row, more in rows.joined.items():
            self._keep({full_name(name): value for name, value in more.items()}, before + row + 1)
        self._sender.send(rows.named(), len(rows.steps))
        if self._bar is not None:
            self._bar.advance(len(rows.steps))
            if time.perf_counter() - self._last_look > _REFRESH_S:
                self._look()

    def _keep(self, named: Mapping[str, float], rows: int) -> None:
        for name, value in named.items():
            self.made_at.setdefault(name, []).append(self._rows_of_old + rows)
            self.metrics.setdefault(name, []).append(float(value))

    def _start(self, epoch: int) -> Start:
        """Where the run stands, for sinks that have logged before."""
        flags = [self.metrics[name] for name in ("train/has_nan", "train/overflow") if self.metrics.get(name)]
        rows = 0  # of the newest step: an update that was dropped has a row, and is of the step before
        for marks in zip(*map(reversed, flags), strict=False):
            rows += 1
            if not any(marks):
                break
        fresh = not any(self.metrics.values())
        return Start(self.step, rows, epoch, fresh, self)

    def _look(self) -> None:
        """Shows loss, speed, the share of time spent waiting for data, and the rate."""
        self._last_look = time.perf_counter()
        if self._bar is None:
            return
        elapsed = max(self._last_look - self._began, 1e-9)
        steps = (self.rows - self._rows_before) / elapsed
        waited = (self._phases.data.seconds - self._waited_before) / elapsed
        facts = [f"{steps:.4g} steps/s", f"data {waited:.0%}", f"{_short(steps * self._batch_data)} items/s"]
        losses, rates = (self.metrics.get(f"train/{name}") for name in ("loss", "learning_rate"))
        facts[:0] = [f"loss {losses[-1]:.4g}"] if losses else []
        facts += [f"rate {rates[-1]:.3g}"] if rates else []
        self._bar.tell(facts)

    def _check_progress(self) -> None:
        """Raises where so many updates in a row were dropped that more of the same would be a waste.

        And where a loss or metric has a weight that makes no mean.
        """
        if self._wrong:
            text, self._wrong = self._wrong, ""  # raised once: what saves the run reads on
            raise ValueError(text)
        if self._max_dropped is None or self._in_a_row < self._max_dropped:
            return
        in_a_row, self._in_a_row = self._in_a_row, 0  # raised once: what saves the run reads on
        raise NoProgressError(
            f"the last {in_a_row} updates were all dropped, after step {self.step}: {self._why}. The parameters are "
            f"those of step {self.step}, and finite. Look at the data (train/nan_data counts those whose loss is NaN), "
            "at the learning rate and at the losses; max_dropped=None goes on all the same"
        )

    def _tell_nan(self, step: int, count: int) -> None:
        self._nan_told = True
        _logger.warning(
            "step %d: the loss of %d of %d data is NaN and counts as 0 in the mean; train/nan_data has their number "
            "for each step, and this is told once",
            step,
            count,
            self._batch_data,
        )

    def _tell_dropped(self, step: int) -> None:
        self._dropped += 1
        if self._dropped > _NAN_LINES and self._dropped % 100:
            return
        _logger.warning(
            "step %d: the update would put NaN into the parameters and was dropped (%d so far): %s",
            step,
            self._dropped,
            self._why,
        )

    def _tell_session(self) -> None:
        """Says so where all was in vain."""
        rows, dropped = self.rows - self._rows_before, self._dropped - self._dropped_before
        if rows and dropped >= rows:
            _logger.warning("all %d updates were dropped: nothing was trained, the step is still %d", rows, self.step)


def _why_dropped(values: Mapping[str, float]) -> str:
    """Why an update was dropped, by the scalars of its step."""
    norms = {name.removeprefix("grads/"): norm for name, norm in values.items() if name.startswith("grads/")}
    bad = [path for path, norm in norms.items() if not np.isfinite(norm)]
    if bad:
        named = ", ".join(bad[:_NAMED])
        if len(bad) == len(norms) > _NAMED:
            return f"the gradient is not finite in any of the {len(norms)} parameters, {named} and so on"
        more = f" and {len(bad) - _NAMED} others of {len(norms)}" if len(bad) > _NAMED else ""
        return f"the gradient is not finite in {named}{more}"
    rate = values.get("learning_rate", 0.0)
    if not np.isfinite(rate):
        return f"the rate is {rate}"
    return "the optimizer's update is not finite, though the gradient is"


def _weight_text(where: str, metric: str) -> str:
    """What is wrong with weights that make no mean."""
    return (
        f"{where}: {metric} has a weight that is negative or NaN; learnax.metrics.Mean(total, weight) takes the sum of "
        "the weights, 0 or more: where a label may be NaN, jnp.where(jnp.isnan(label), 0, weight) leaves it out"
    )


def _weightless(metric: str) -> str:
    return f"all weights of {metric} are 0: it counts as 0"


def _trailing(dropped: np.ndarray, before: int) -> int:
    """How many updates in a row were dropped at the end, with those before where these were all dropped."""
    made = np.flatnonzero(dropped == 0)
    return len(dropped) - 1 - int(made[-1]) if made.size else before + len(dropped)


class Means:
    """A split's metrics from the parts that its batches come to, read `in_flight` dispatches late.

    Args:
        name: the split.
        in_flight: dispatches that may be unfinished when another one is made.
    """

    def __init__(self, name: str, in_flight: int):
        self._name = name
        self._in_flight = in_flight
        self._pending: deque[tuple[Scalars, int]] = deque()
        self._parts: dict[Part, float] = {}
        self._size = 0

    def push(self, sums: Scalars, count: int, size: int) -> None:
        """Takes the sums of `count` batches, of `size` data."""
        sums.values.copy_to_host_async()
        self._pending.append((sums, count))
        self._size += size
        self._read(self._in_flight)

    def result(self) -> dict[str, float]:
        """Waits for the batches in flight; each metric over all data.

        Raises:
            ValueError: a weight was negative or NaN.
        """
        self._read(0)
        values: dict[str, float] = {}
        for part, number in self._parts.items():
            if part.how == "weight":
                continue
            if part.how == "data":
                number /= self._size
            if part.how == "total":
                weight = self._parts[part._replace(how="weight")]
                if weight != weight:
                    raise ValueError(_weight_text(f"validation {self._name!r}", part.name))
                if weight == 0:
                    _logger.warning("validation %r: %s", self._name, _weightless(part.name))
                number = number / weight if weight else 0.0
            values[part.name] = values.get(part.name, 0.0) + number
        return values

    def _read(self, left: int) -> None:
        while len(self._pending) > left:
            sums, count = self._pending.popleft()
            for row in np.asarray(sums.values)[:count].tolist():
                for part, value in zip(sums.names, row, strict=True):
                    whole = part._replace(unit=1)
                    known = self._parts.get(whole)
                    own = part.unit * value
                    if known is not None:
                        own = float({"max": np.maximum, "min": np.minimum}.get(part.how, np.add)(known, own))
                    self._parts[whole] = own


def _what_ended(error: BaseException) -> str:
    """What has ended a session before its time, in words."""
    if isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:
        return "SIGTERM"
    if isinstance(error, KeyboardInterrupt):
        return "SIGINT"
    return f"{type(error).__name__}: {error}".removesuffix(": ").partition("\n")[0][:300]


def _short(number: float) -> str:
    """A number in few characters: 980, 52.3k, 1.2M."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"
