"""The checkpointer: what is saved when, what is kept, and what a name stands for."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from learnax.checkpoint import files, legacy, seals
from learnax.checkpoint.files import DamagedError
from learnax.checkpoint.folder import Entry, Folder, best
from learnax.checkpoint.history import History
from learnax.checkpoint.pieces import Piece, divided_axes, own
from learnax.checkpoint.snapshot import Camera, Snapshot
from learnax.checkpoint.trees import as_state, nested, old_names, with_keys, without_keys
from learnax.checkpoint.writer import Writer
from learnax.processes import OneProcess, Processes
from learnax.state import TrainState
from learnax.utils import leaves_by_path, tree_bytes

_logger = logging.getLogger("learnax")


class SaveError(RuntimeError):
    """The last save did not succeed: its step, what happened, and the newest save there is are in the text."""


class Checkpointer:
    """Writes and reads the checkpoints of one run: the latest, numbered ones, and the best.

    Each save is a folder with a number of its own, and an entry in `index.json` that says what it is.
    A save copies the state into memory of its own, as large as the state, and returns; a thread writes it. An
    older checkpoint is removed once newer ones are whole on disk, unless it is numbered or the best.
    Checkpoints of a past that this run has left (a fresh start, a load of an older one) are moved into a
    folder beside, never overwritten.

    A save that fails is told of, once for each cause, and leaves those before it as they are.

    Args:
        path: the folder; made at the first save.
        save_every: steps between saves of the latest; None never saves it.
        checkpoint_every: steps between numbered checkpoints; None makes none.
        max_checkpoints: numbered checkpoints kept, the newest; None keeps all.
        keep_best_checkpoint: whether `update_best_checkpoint` does anything.
        best_metric_name: the metric that "best" is judged by.
        minimize_metric: whether smaller is better.
        processes: that save together, each its part, on storage that all share; by default this one alone.
    """

    _ids = itertools.count()

    def __init__(
        self,
        path: str | os.PathLike[str],
        save_every: int | None = 300,
        checkpoint_every: int | None = 5000,
        max_checkpoints: int | None = None,
        keep_best_checkpoint: bool = False,
        best_metric_name: str = "val/loss",
        minimize_metric: bool = True,
        *,
        processes: Processes | None = None,
    ):
        self._processes = processes or OneProcess()
        self._id, self._saves, self._loads = next(Checkpointer._ids), 0, 0
        self.path = Path(path).absolute()
        self.save_every = save_every
        self.checkpoint_every = checkpoint_every
        self.max_checkpoints = max_checkpoints
        self.keep_best_checkpoint = keep_best_checkpoint
        self.best_metric_name = best_metric_name
        self.minimize_metric = minimize_metric
        self._folder = Folder(self.path)
        self._leaves_behind: int | None = None
        self._writer = Writer()
        self._camera = Camera()
        self._history = History()
        self._pending: list[Entry] = []
        self._number = -1
        self._best: float | None = None
        self._knows_best = False
        self._skipped = 0
        self._failure: SaveError | None = None
        self._told: set[str] = set()

    @property
    def writing(self) -> float:
        """Seconds that were spent on writing, beside the caller's work."""
        return self._writer.seconds

    def should_save_latest(self, step: int) -> bool:
        """Whether the latest is saved at this step: every `save_every`."""
        return step > 0 and self.save_every is not None and step % self.save_every == 0

    def should_save_numbered(self, step: int) -> bool:
        """Whether a numbered checkpoint is made at this step: every `checkpoint_every`."""
        return step > 0 and self.checkpoint_every is not None and step % self.checkpoint_every == 0

    def save_checkpoint(
        self, state: TrainState, step: int, metrics: Mapping[str, float] | None = None, resume: Any = None
    ) -> None:
        """Saves a numbered checkpoint.

        Args:
            state: the training state.
            step: its number.
            metrics: kept with it.
            resume: what a run needs to go on as if it had not stopped: a dict with `rng` (key data),
                `position` (plain values) and `history` (metric name -> floats), or None.
        """
        self._save(state, Entry(int(step), numbered=True), metrics, resume)

    def save_latest(
        self, state: TrainState, step: int, metrics: Mapping[str, float] | None = None, resume: Any = None
    ) -> None:
        """Saves the latest checkpoint, in place of the one before; see `save_checkpoint`."""
        self._save(state, Entry(int(step)), metrics, resume)

    def update_best_checkpoint(
        self, state: TrainState, step: int, metrics: Mapping[str, float], resume: Any = None
    ) -> bool:
        """Saves this state as the best if its metric is better than all before; NaN is never best.

        Returns:
            Whether it is the best now.
        """
        value = metrics.get(self.best_metric_name) if self.keep_best_checkpoint else None
        if value is None or math.isnan(value):
            return False
        if not self._knows_best:
            self._writer.wait()
            entries = self._folder.entries()
            number = best(entries)
            known = None if number is None else entries[number].best
            self._best = json.loads(self._processes.from_first(json.dumps(known)))
            self._knows_best = True
        if self._best is not None and not (value < self._best if self.minimize_metric else value > self._best):
            return False
        self._best = float(value)
        self._save(state, Entry(int(step), best=float(value)), metrics, resume)
        return True

    def maybe_save_checkpoints(
        self, state: TrainState, step: int, metrics: Mapping[str, float] | None = None, resume: Any = None
    ) -> bool:
        """Saves what is due at this step, once where latest and numbered coincide; returns whether it saved.

        Where storage is slower than the cadence, so that no more saves may wait to be written, one of the latest
        is skipped, and a numbered one where another numbered one waits; a line says so.
        """
        if self.should_save_numbered(step):
            entry = Entry(int(step), numbered=True)
        elif self.should_save_latest(step):
            entry = Entry(int(step))
        else:
            return False
        may_be_skipped = not entry.numbered or any(other.numbered for other in self._pending)
        # How fast storage is differs between processes, and they have to save alike: they wait.
        if may_be_skipped and self._processes.count == 1 and not self._writer.has_room(tree_bytes(state)):
            self._skip(entry)
            return False
        self._save(state, entry, metrics, resume)
        return True

    def load_checkpoint(self, checkpoint: Any = -1, target: TrainState | None = None) -> dict[str, Any] | None:
        """Reads a checkpoint.

        Args:
            checkpoint: "best"; a step, as a number or its name; True, -1 or any other string for the latest.
            target: a state (or its shapes) that says what the containers of the state are. Without it
                parameters come as nested dicts, and the optimiser's state as that of the default optimiser
                where it fits. A target whose `opt_state` is None reads the parameters alone. Of leaves whose
                sharding divides them over processes, this process's part is read.

        Returns:
            A dict with `state` (leaves of numpy, or typed random keys), `step`, `time` (seconds since 1970), `number`
            (the save's own; -1 of a pickle of 0.1.0), `resume` as `save_checkpoint` got it, and `metrics` if saved;
            None where the latest is asked for and there is none. In the place of one that is damaged, the one before
            it is taken, and that is told.

        Raises:
            FileNotFoundError: a checkpoint asked for by name is not there; those there are are named.
            DamagedError: all that would do are damaged.
            ValueError: the checkpoint does not fit the target; the leaves that differ are named.
        """
        damage: DamagedError | None = None
        for save in self._resolve(checkpoint):
            failure = ""
            try:
                loaded = self._read_old(save, target) if isinstance(save, Path) else self._read(save, target)
            except DamagedError as error:
                failure, damage = str(error), error
            # What one process cannot read, none goes on from.
            self._loads += 1
            matter = f"checkpointer {self._id}, load {self._loads}"
            failure = self._processes.settle(matter, failure, lambda told: next(filter(None, told), ""))
            if failure:
                damage = damage or DamagedError(failure)
                _logger.warning("%s", failure)
                continue
            if damage is not None:
                _logger.warning("the checkpoint before it is taken in its place: that of step %d", loaded["step"])
            return loaded
        if damage is not None:
            raise DamagedError(f"{damage}; there is no other one that would do") from damage
        return None

    def load_latest(self, target: TrainState | None = None) -> dict[str, Any] | None:
        """Reads the latest checkpoint; None where there is none."""
        return self.load_checkpoint(-1, target)

    def load_best(self, target: TrainState | None = None) -> dict[str, Any] | None:
        """Reads the best checkpoint."""
        return self.load_checkpoint("best", target)

    def list_available_checkpoints(self) -> list[str | int]:
        """What `load_checkpoint` can load: "latest" and "best" where there are such, and each step."""
        self._writer.wait()
        entries, old = self._folder.entries(), legacy.find(self.path)
        names: list[str | int] = ["latest"] if self._folder.numbers() or old else []
        if best(entries) is not None or "best" in old:
            names.append("best")
        steps = {entry.step for entry in entries.values()} | {step for step in old if isinstance(step, int)}
        return [*names, *sorted(steps)]

    def leave_behind(self, after: int | None) -> None:
        """Tells that the run goes on from a save, or from none: later ones are of another past.

        At the next save they are moved aside, into a folder of their own; never overwritten.

        Args:
            after: the save's number (`number` of what a load returned), or None for a fresh start.
        """
        self._leaves_behind = -1 if after is None else after

    def prepare(self, state: TrainState) -> None:
        """Gets ready for saves of such a state, for the most part in the background: the first one then is quick.

        Raises:
            OSError: the folder cannot be made or written to.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if not os.access(self.path, os.W_OK):
            raise PermissionError(errno.EACCES, "checkpoints cannot be saved to this folder", str(self.path))
        wanted = self._camera.wanted(self._own(state)[0][0])  # now: a step may take the arrays over

        def job() -> None:
            self._camera.prepare(wanted)
            with contextlib.suppress(ImportError):  # told of by the save that needs it
                files.warm_up()

        self._writer.submit(job, tree_bytes(state))

    def wait(self) -> None:
        """Waits until everything saved is on disk.

        Raises:
            SaveError: the last save did not succeed.
        """
        self._writer.wait()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Waits, without raising, and tells what was skipped."""
        self._writer.wait()
        if self._skipped:
            _logger.warning("%d save(s) in all were skipped: storage is slower than their cadence", self._skipped)
        self._skipped = 0

    def _save(
        self, state: TrainState, entry: Entry, metrics: Mapping[str, float] | None, resume: Mapping[str, Any] | None
    ) -> None:
        self._writer.wait_for_room(tree_bytes(state))
        resume = resume or {}
        history = self._history.arrays(resume.get("history", {}))
        (leaves, pieces), kinds = self._own(state)
        snapshot = self._camera.take(leaves)
        parts = {"rng": [np.array(resume["rng"])] if "rng" in resume else [], "history": list(history.values())}
        meta = {
            **entry._asdict(),
            "time": time.time(),
            "metrics": {name: float(value) for name, value in metrics.items()} if metrics else None,
            "history": [[name, len(values)] for name, values in history.items()],
            "position": resume.get("position"),
            "script": resume.get("script"),
            "keys": kinds,
        }
        self._pending.append(entry)
        self._saves += 1
        job = functools.partial(self._write, self._saves, entry, snapshot, pieces, parts, meta)
        self._writer.submit(job, snapshot.nbytes)

    def _own(self, state: TrainState) -> tuple[tuple[dict[str, Any], dict[str, Piece]], dict[str, str]]:
        """What this process has of a state, and which of that are pieces of arrays; of which leaves are random keys."""
        leaves, kinds = without_keys(_leaves(state))
        return (leaves, {}) if self._processes.count == 1 else own(leaves), kinds

    def _write(
        self,
        count: int,
        entry: Entry,
        snapshot: Snapshot,
        pieces: Mapping[str, Piece],
        parts: Mapping[str, list[np.ndarray]],
        meta: Mapping[str, Any],
    ) -> None:
        """In the writer's thread: one save, and what is no longer wanted after it."""
        try:
            # Joined: one more array takes longer to write than what is in it.
            joined = {name: np.concatenate(arrays) for name, arrays in parts.items() if arrays}
            if self._processes.count == 1:
                self._begin()
                files.write(self.path / str(self._number), {**snapshot.arrays, **joined}, meta)
            else:
                self._write_together(count, snapshot.arrays, pieces, joined, meta)
        except Exception as error:
            if self._processes.first:
                files.remove_drafts(self.path)  # on a full disk, what is left of it would be in the way of the next
            self._fail(entry, error)
            return
        finally:
            self._pending.remove(entry)
            self._camera.give_back(snapshot)
        self._failure = None
        if not self._processes.first:
            return
        self._folder.add(self._number, entry)
        try:
            self._folder.tidy(self.max_checkpoints)
        except OSError as error:
            self._tell(error, f"old checkpoints could not be removed: {error}")

    def _begin(self) -> None:
        """Makes the folder ready for one more save, and gives it its number."""
        if self._leaves_behind is not None:
            self._folder.set_aside(self._leaves_behind)
            self._leaves_behind = None
        self._folder.make()
        # Numbered by themselves, not by their steps: a step may be saved twice, before and after a validation.
        self._number = 1 + max([self._number, *self._folder.numbers()])

    def _write_together(
        self,
        count: int,
        arrays: Mapping[str, np.ndarray],
        pieces: Mapping[str, Piece],
        rest: Mapping[str, np.ndarray],
        meta: Mapping[str, Any],
    ) -> None:
        """One save by all processes: the first one makes room and names it, then all write."""
        sums: list[dict[str, int]] = []

        def begin(told: list[str]) -> str:
            sums.extend(map(json.loads, told))
            try:
                self._begin()
            except OSError as error:
                return json.dumps([-1, files.reason(error)])
            return json.dumps([self._number, ""])

        matter = f"checkpointer {self._id}, save {count}"
        own = json.dumps(seals.piece_seals(arrays, pieces))
        self._number, refusal = json.loads(self._processes.settle(matter, own, begin))
        if refusal:
            raise OSError(f"on process 0: {refusal}")
        files.write_together(self.path / str(self._number), arrays, pieces, sums, rest, meta)

    def _fail(self, entry: Entry, error: Exception) -> None:
        self._knows_best = False  # it may have been this one
        whole = max(self._folder.numbers(), default=None)
        left = "there is no whole one yet" if whole is None else f"the newest whole one is {self.path / str(whole)}"
        text = f"the checkpoint of step {entry.step} could not be saved: {files.reason(error)}; {left}"
        self._failure = SaveError(text)
        self._failure.__cause__ = error
        self._tell(error, f"{self._failure}; training goes on, and the next save tries again")

    def _tell(self, error: Exception, text: str) -> None:
        """Says what went wrong, once for each cause."""
        cause = f"{type(error).__name__} {getattr(error, 'errno', None) or _first_words(error)}"
        if cause not in self._told:
            self._told.add(cause)
            _logger.warning("%s", text)

    def _skip(self, entry: Entry) -> None:
        self._skipped += 1
        if self._skipped == 1:
            _logger.warning(
                "the save of step %d is skipped: the one before it is still being written; where storage is slower "
                "than save_every or checkpoint_every, save less often",
                entry.step,
            )

    def _resolve(self, checkpoint: Any) -> list[int | Path]:
        """The saves that are meant, by number or by 0.1.0's file, the one to be taken first; none if none is there."""
        self._writer.wait()
        entries = dict(reversed(self._folder.entries().items()))
        old = legacy.find(self.path)
        old_steps = sorted((step for step in old if isinstance(step, int)), reverse=True)
        old_names = [name for name in ("latest", *old_steps) if name in old]
        newest: list[int | Path] = [*self._folder.numbers()[::-1], *(old[name] for name in old_names)]
        if checkpoint is True or (not isinstance(checkpoint, str) and checkpoint == -1):
            return newest
        if isinstance(checkpoint, bool) or not (isinstance(checkpoint, str) or hasattr(checkpoint, "__index__")):
            raise TypeError(f"load_checkpoint must be True, -1, 'best', a step or a run's id, but is {checkpoint!r}")
        found: list[int | Path]
        if checkpoint == "best":
            found = [number for number, entry in entries.items() if entry.best is not None]
            found += [old["best"]] if "best" in old else []
        elif isinstance(checkpoint, str) and not checkpoint.isdecimal():
            return newest  # a run's id
        else:
            step = int(checkpoint)
            found = [number for number, entry in entries.items() if entry.step == step]
            found += [old[step]] if step in old else []
            if not found and isinstance(checkpoint, str):
                return newest  # a run's id, of digits
        if not found:
            there = ", ".join(str(name) for name in self.list_available_checkpoints()) or "none"
            raise FileNotFoundError(f"no checkpoint {str(checkpoint)!r} in {self.path}; there are: {there}")
        return found

    def _read(self, number: int, target: TrainState | None) -> dict[str, Any]:
        folder = self.path / str(number)
        meta = files.read_meta(folder)
        old = seals.kinds(meta) is None
        wanted = {} if target is None else {"params": target.params, "opt_state": target.opt_state}
        arrays = files.read(folder, meta, divided_axes(old_names(wanted) if old else leaves_by_path(wanted)))
        with files.reading(folder):
            arrays = with_keys(arrays, meta.get("keys", {}))
            loaded = {"step": meta["step"], "time": meta["time"], "number": number, "resume": None}
            if "rng" in arrays:
                names, lengths = zip(*meta["history"], strict=True) if meta["history"] else ((), ())
                values = np.split(arrays["history"], np.cumsum(lengths)[:-1]) if names else []
                history = dict(zip(names, values, strict=True))
                rest = {"position": meta["position"], **({"script": meta["script"]} if meta["script"] else {})}
                loaded["resume"] = {"rng": arrays["rng"], **rest, "history": history}
            if meta["metrics"]:
                loaded["metrics"] = dict(meta["metrics"])
            np.int32(arrays["step"])
            nested(arrays)  # raises where a leaf is said to be in another one
        return {"state": as_state(arrays, target, folder, old=old), **loaded}

    @staticmethod
    def _read_old(path: Path, target: TrainState | None) -> dict[str, Any]:
        loaded = legacy.read(path)
        if target is not None:
            loaded["state"] = as_state(legacy.leaves(loaded["state"], target), target, path)
        return {**loaded, "number": -1, "resume": None}


def _leaves(state: TrainState) -> dict[str, Any]:
    return leaves_by_path({"params": state.params, "opt_state": state.opt_state, "step": state.step})


def _first_words(error: Exception) -> str:
    """What of an error's text says its cause, without the names and numbers that differ from time to time."""
    return " ".join(word for word in str(error).split()[:12] if word.isalpha())
