"""The checkpointer: what is saved when, and which one is the best."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from learnax.checkpoint import names
from learnax.checkpoint.folder import Entry, best
from learnax.checkpoint.reading import Reader
from learnax.checkpoint.saving import Saver
from learnax.cluster.processes import OneProcess, Processes
from learnax.step.state import TrainState
from learnax.utils import tree_bytes

_logger = logging.getLogger("learnax")


class Checkpointer:
    """Writes and reads the checkpoints of one run: the latest, numbered ones, and the best.

    They are in `<registry_path>/<run_id>/checkpoints`; each save is a folder with a number of its own, and an entry in
    `index.json` that says what it is. A save copies the state into memory of its own, as large as the state, and
    returns; a thread writes it. An older checkpoint is removed once newer ones are whole on disk, unless it is
    numbered, named or the best. Checkpoints of a past that this run has left (a fresh start, a load of an older one)
    are moved into a folder beside, never overwritten.

    One process at a time owns the folder: from its first save, or from `prepare`, to `close` or its end. Reading needs
    none of that.

    A save that fails is told of, once for each cause, and leaves those before it as they are.

    Args:
        registry_path: the folder of all runs.
        run_id: the run's folder there.
        save_every: steps between saves of the latest; None never saves it.
        checkpoint_every: steps between numbered checkpoints; None makes none.
        max_to_keep: numbered checkpoints kept, the newest; None keeps all.
        keep_best: whether `update_best_checkpoint` does anything.
        metric_name: the metric that "best" is judged by.
        minimize_metric: whether smaller is better.
        prepare_fn: `state -> state`, applied before each save.
        processes: that save together, each its part, on storage that all share; by default this one alone.
        folder: of the checkpoints, in the run's.
    """

    def __init__(
        self,
        registry_path: str | os.PathLike[str],
        run_id: str,
        save_every: int | None = 300,
        checkpoint_every: int | None = 5000,
        max_to_keep: int | None = None,
        keep_best: bool = False,
        metric_name: str = "val/loss",
        minimize_metric: bool = True,
        prepare_fn: Callable[[TrainState], TrainState] | None = None,
        *,
        processes: Processes | None = None,
        folder: str = "checkpoints",
    ):
        self.registry_path = Path(registry_path).absolute()
        self.run_id = run_id
        self.path = self.checkpoint_dir = self.registry_path / run_id / folder
        self.save_every = save_every
        self.checkpoint_every = checkpoint_every
        self.max_to_keep = max_to_keep
        self.keep_best = keep_best
        self.metric_name = metric_name
        self.minimize_metric = minimize_metric
        self.prepare_fn = prepare_fn
        self._processes = processes or OneProcess()
        self._saver = Saver(self.path, max_to_keep, self._processes)
        self._folder = self._saver.folder
        self._reader = Reader(self._processes)
        self._best: float | None = None
        self._learned: int | None = None
        self._skipped = 0

    @classmethod
    def at(cls, path: str | os.PathLike[str], **options: Any) -> Checkpointer:
        """One for a folder of checkpoints, wherever it is and whatever it is called; `options` as for the class."""
        folder = Path(path).absolute()
        return cls(folder.parent.parent, folder.parent.name, folder=folder.name, **options)

    @property
    def writing(self) -> float:
        """Seconds that were spent on writing, beside the caller's work."""
        return self._saver.writer.seconds

    def should_save_latest(self, step: int) -> bool:
        """Whether the latest is saved at this step: every `save_every`."""
        return step > 0 and self.save_every is not None and step % self.save_every == 0

    def should_save_numbered(self, step: int) -> bool:
        """Whether a numbered checkpoint is made at this step: every `checkpoint_every`."""
        return step > 0 and self.checkpoint_every is not None and step % self.checkpoint_every == 0

    def save_checkpoint(
        self,
        train_state: TrainState,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        is_best: bool = False,
        suffix: str | None = None,
        *,
        resume: Mapping[str, Any] | None = None,
    ) -> Path:
        """Saves a checkpoint that is kept: a numbered one, or one with a name.

        Args:
            train_state: the training state.
            step: its number; the state's own by default.
            metrics: kept with it.
            is_best: whether it is the best so far, whatever its metrics are.
            suffix: a name, by which `load_checkpoint` finds it; a later one takes its place.
            resume: what a run needs to go on as if it had not stopped: a dict with `rng` (key data),
                `position` (plain values) and `history` (metric name -> a list of floats that only grows), and of plain
                values, where there are, `script`, `hooks` and `rate_factor`; or None.

        Returns:
            Where it will be once it is written.

        Raises:
            OwnedError: another process saves into this folder.
        """
        step = _step(train_state, step)
        name = None if suffix is None else str(suffix)
        if name is not None and (not name or os.sep in name or name.endswith(".pyd")):
            raise ValueError(f"suffix must be a name without {os.sep!r}, such as 'pretrained', but is {suffix!r}")
        entry = Entry(
            step, numbered=name in (None, str(step)), name=None if name in (None, str(step), *names.RESERVED) else name
        )
        if is_best or name == names.BEST:
            entry = self._as_best(entry, float((metrics or {}).get(self.metric_name, math.nan)))
        return self._save(train_state, entry, metrics, resume)

    def save_latest(
        self,
        train_state: TrainState,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        *,
        resume: Mapping[str, Any] | None = None,
    ) -> Path:
        """Saves the latest checkpoint, in place of the one before; see `save_checkpoint`."""
        return self._save(train_state, Entry(_step(train_state, step)), metrics, resume)

    def update_best_checkpoint(
        self,
        train_state: TrainState,
        metric_value: float,
        step: int | None = None,
        *,
        metrics: Mapping[str, float] | None = None,
        resume: Mapping[str, Any] | None = None,
    ) -> bool:
        """Saves this state as the best if its metric is better than all before; NaN is never best.

        Args:
            train_state: the training state.
            metric_value: what `metric_name` is for it.
            step: its number; the state's own by default.
            metrics: kept with it; by default that one.
            resume: see `save_checkpoint`.

        Returns:
            Whether it is the best now.
        """
        if isinstance(metric_value, Mapping):
            raise TypeError(
                f"update_best_checkpoint takes the value of {self.metric_name!r}, a number, but got a dict of metrics"
            )
        value = float(metric_value)
        if not self.keep_best or not self._is_better(value):
            return False
        entry = self._as_best(Entry(_step(train_state, step)), value)
        self._save(train_state, entry, {self.metric_name: value} if metrics is None else metrics, resume)
        return True

    def maybe_save_checkpoints(
        self,
        train_state: TrainState,
        step: int,
        metrics: Mapping[str, float] | None = None,
        *,
        resume: Mapping[str, Any] | None = None,
    ) -> dict[str, Path]:
        """Saves what is due at this step, once where several coincide.

        Where storage is slower than the cadence, so that no more saves may wait to be written, one of the latest
        is skipped, and a numbered one where another numbered one waits; a line says so.

        Returns:
            What was saved: "latest", "numbered", "best" -> path.
        """
        value = (metrics or {}).get(self.metric_name) if self.keep_best else None
        due = {
            "latest": self.should_save_latest(step),
            "numbered": self.should_save_numbered(step),
            "best": value is not None and self._is_better(float(value)),
        }
        if not any(due.values()):
            return {}
        entry = Entry(int(step), numbered=due["numbered"])
        if value is not None and due["best"]:
            entry = self._as_best(entry, float(value))
        saver = self._saver
        may_be_skipped = not due["best"] and (not entry.numbered or any(other.numbered for other in saver.pending))
        # How fast storage is differs between processes, and they have to save alike: they wait.
        if may_be_skipped and saver.team.decides_alone and not saver.writer.has_room(tree_bytes(train_state)):
            self._skip(entry)
            return {}
        path = self._save(train_state, entry, metrics, resume)
        return {name: path for name, is_due in due.items() if is_due}

    def load_checkpoint(
        self, path_or_index: Any = -1, *, target: TrainState | None = None, resume: bool = True
    ) -> dict[str, Any] | None:
        """Reads a checkpoint; None where it is not there. See `load`, which says what there is then."""
        try:
            return self.load(path_or_index, target=target, resume=resume)
        except names.MissingError:
            return None

    def load_latest(self, *, target: TrainState | None = None, resume: bool = True) -> dict[str, Any] | None:
        """Reads the latest checkpoint; None where there is none."""
        return self.load_checkpoint(-1, target=target, resume=resume)

    def load_best(self, *, target: TrainState | None = None, resume: bool = True) -> dict[str, Any] | None:
        """Reads the best checkpoint; None where there is none."""
        return self.load_checkpoint(names.BEST, target=target, resume=resume)

    def load(self, asked: Any = -1, *, target: TrainState | None = None, resume: bool = True) -> dict[str, Any] | None:
        """Reads a checkpoint that must be there if it is asked for by name.

        Args:
            asked: "best"; a step, as a number or its name; a `suffix`; the path of a save or of a pickle of 0.1.0;
                True, -1, the run's id or any other text that is near none of these for the latest.
            target: a state (or its shapes) that says what the containers of the state are. Without it
                parameters come as nested dicts, and the optimiser's state as that of the default optimiser
                where it fits. A target whose `opt_state` is None reads the parameters alone. Of leaves whose
                sharding divides them over processes, this process's part is read.
            resume: whether what a run needs to go on is wanted.

        Returns:
            A dict with `state` (leaves of numpy, or typed random keys), `step`, `time` (seconds since 1970), `number`
            (the save's own; -1 of one from elsewhere), `resume` as `save_checkpoint` got it, and `metrics` if saved;
            None where the latest is asked for and there is none. In the place of one that is damaged, the one before
            it is taken, and that is told.

        Raises:
            FileNotFoundError: a checkpoint asked for by name is not there, or the name is nearly one; those there are
                are named.
            DamagedError: all that would do are damaged.
            ValueError: the checkpoint does not fit the target; the leaves that differ are named.
        """
        self._saver.writer.wait()
        loaded = self._reader.first_whole(names.find(self._folder, asked), target, resume=resume)
        if loaded is None:
            return None
        if loaded.save.parent.resolve() != self._folder.path:
            return loaded.values | {"number": -1}
        if self._processes.first and loaded.histories is not None and loaded.values["resume"] is not None:
            self._saver.history.loaded(loaded.histories, loaded.values["resume"]["history"])
        return loaded.values

    def list_available_checkpoints(self) -> dict[str | int, Path]:
        """What `load_checkpoint` can load, and where: "latest", "best", names and steps, as there are."""
        self._saver.writer.wait()
        return names.listed(self._folder)

    def leave_behind(self, after: int | None) -> None:
        """Tells that the run goes on from a save, or from none: later ones are of another past.

        At the next save they are moved aside, into a folder of their own; never overwritten.

        Args:
            after: the save's number (`number` of what a load returned), or None for a fresh start.
        """
        self._saver.leave_behind(-1 if after is None else after)

    def check_free(self) -> None:
        """Looks whether another process saves into this folder, before anything else is done.

        Raises:
            OwnedError: one does; who, since when and what to do are in the text.
        """
        self._saver.check_free()

    def prepare(self, state: TrainState) -> None:
        """Takes the folder, and gets ready for saves of such a state, mostly in the background.

        Raises:
            OwnedError: another process saves into this folder.
            OSError: the folder cannot be made or written to.
        """
        self._saver.prepare(state)

    def wait(self) -> None:
        """Waits until everything saved is on disk.

        Raises:
            SaveError: the last save did not succeed.
        """
        self._saver.writer.wait()
        if self._saver.failure is not None:
            raise self._saver.failure

    def close(self) -> None:
        """Waits, without raising, tells what was skipped, and gives the folder back."""
        self._saver.close()
        if self._skipped:
            _logger.warning("%d save(s) in all were skipped: storage is slower than their cadence", self._skipped)
        self._skipped = 0

    def _save(
        self,
        state: TrainState,
        entry: Entry,
        metrics: Mapping[str, float] | None,
        resume: Mapping[str, Any] | None,
    ) -> Path:
        if self.prepare_fn is not None:
            state = self.prepare_fn(state)
        return self._saver.save(state, entry, metrics, resume)

    def _as_best(self, entry: Entry, value: float) -> Entry:
        self._best, self._learned = value, self._saver.failures
        return entry._replace(best=value, best_of=self.metric_name, minimize=self.minimize_metric)

    def _is_better(self, value: float) -> bool:
        """Whether a metric is better than that of the best checkpoint."""
        if math.isnan(value):
            return False
        if not self._saver.team.decides_alone:
            self._saver.writer.wait()  # all processes know the same of what failed
        if self._learned != self._saver.failures:  # the last best save may be the one that failed
            self._saver.writer.wait()
            failures, known = self._saver.failures, json.loads(self._processes.from_first(self._known_best()))
            if "failed" in known:
                return False
            self._best, self._learned = known["best"], failures
        if self._best is None or math.isnan(self._best):
            return True
        return value < self._best if self.minimize_metric else value > self._best

    def _known_best(self) -> str:
        """The best checkpoint's metric, where it is the one that is asked for."""
        if not self._processes.first:
            return ""
        try:
            entries = self._folder.entries()
        except OSError as error:
            self._saver.tell(error, f"which checkpoint is the best cannot be found out, so none is saved: {error}")
            return json.dumps({"failed": True})
        # Those that are moved aside before the next save are of another past.
        number = best({number: entry for number, entry in entries.items() if not self._saver.is_left_behind(number)})
        if number is None:
            return json.dumps({"best": None})
        entry = entries[number]
        asked = (self.metric_name, self.minimize_metric)
        # One from before they were kept counts as of these.
        if entry.best_of is not None and (entry.best_of, entry.minimize) != asked:
            _logger.warning(
                "the best checkpoint so far (step %d) is that by %s: by %s the best is looked for anew",
                entry.step,
                _criterion(entry.best_of, entry.minimize),
                _criterion(*asked),
            )
            return json.dumps({"best": None})
        return json.dumps({"best": entry.best})

    def _skip(self, entry: Entry) -> None:
        self._skipped += 1
        if self._skipped == 1:
            _logger.warning(
                "the save of step %d is skipped: the one before it is still being written; where storage is slower "
                "than save_every or checkpoint_every, save less often",
                entry.step,
            )


def _step(state: TrainState, step: Any) -> int:
    return int(np.asarray(state.step)) if step is None else int(step)


def _criterion(name: str, minimize: bool | None) -> str:
    return f"{name!r} ({'smaller' if minimize else 'larger'} is better)"
