"""The checkpointer: what is saved when, what is kept, and what a name stands for."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from learnax.checkpoint.index import Entry, Index
from learnax.checkpoint.trees import as_dicts, as_state
from learnax.state import TrainState

_logger = logging.getLogger("learnax")
_STATE, _META = "state", "meta"
_INDEX, _REMOVED = "index.json", "removed"


class Checkpointer:
    """Writes and reads the checkpoints of one run: the latest, numbered ones, and the best.

    Each save is a folder with a number of its own, and an entry in `index.json` that says what it is.
    A save copies the state and returns; the writing goes on in the background. An older checkpoint is
    removed once a newer one is whole on disk, unless it is numbered or the best. Checkpoints of a past
    that this run has left (a fresh start, a load of an older one) are moved into a folder beside, never
    overwritten.

    Args:
        path: the folder; made at the first save.
        save_every: steps between saves of the latest; None never saves it.
        checkpoint_every: steps between numbered checkpoints; None makes none.
        max_checkpoints: numbered checkpoints kept, the newest; None keeps all.
        keep_best_checkpoint: whether `update_best_checkpoint` does anything.
        best_metric_name: the metric that "best" is judged by.
        minimize_metric: whether smaller is better.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        save_every: int | None = 300,
        checkpoint_every: int | None = 5000,
        max_checkpoints: int | None = None,
        keep_best_checkpoint: bool = False,
        best_metric_name: str = "val/loss",
        minimize_metric: bool = True,
    ):
        self.path = Path(path).absolute()
        self.save_every = save_every
        self.checkpoint_every = checkpoint_every
        self.max_checkpoints = max_checkpoints
        self.keep_best_checkpoint = keep_best_checkpoint
        self.best_metric_name = best_metric_name
        self.minimize_metric = minimize_metric
        self._manager: Any = None
        self._index = Index(self.path / _INDEX)
        self._leaves_behind: int | None = None
        self._sweeper = ThreadPoolExecutor(1, thread_name_prefix="learnax-sweeper")

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
        self._open()
        best = self._index.best(self._numbers())
        old = None if best is None else self._index.entries[best].best
        if old is not None and not (value < old if self.minimize_metric else value > old):
            return False
        self._save(state, Entry(int(step), best=float(value)), metrics, resume)
        return True

    def maybe_save_checkpoints(
        self, state: TrainState, step: int, metrics: Mapping[str, float] | None = None, resume: Any = None
    ) -> bool:
        """Saves what is due at this step, once where latest and numbered coincide; returns whether it saved."""
        if self.should_save_numbered(step):
            self.save_checkpoint(state, step, metrics, resume)
        elif self.should_save_latest(step):
            self.save_latest(state, step, metrics, resume)
        else:
            return False
        return True

    def load_checkpoint(self, checkpoint: Any = -1, target: TrainState | None = None) -> dict[str, Any] | None:
        """Reads a checkpoint.

        Args:
            checkpoint: "best"; a step, as a number or its name; True, -1 or any other string for the latest.
            target: a state (or its shapes) that says what the containers of the state are. Without it
                parameters come as nested dicts, and the optimiser's state as that of the default optimiser
                where it fits. A target whose `opt_state` is None reads the parameters alone.

        Returns:
            A dict with `state` (numpy leaves), `step`, `time` (seconds since 1970), `number` (the save's own),
            `resume` as `save_checkpoint` got it, and `metrics` if saved; None where the latest is asked for
            and there is none.

        Raises:
            FileNotFoundError: a checkpoint asked for by name is not there; those there are are named.
            ValueError: the checkpoint does not fit the target; the leaves that differ are named.
        """
        number = self._resolve(checkpoint)
        return None if number is None else self._read(number, target)

    def load_latest(self, target: TrainState | None = None) -> dict[str, Any] | None:
        """Reads the latest checkpoint; None where there is none."""
        return self.load_checkpoint(-1, target)

    def load_best(self, target: TrainState | None = None) -> dict[str, Any] | None:
        """Reads the best checkpoint."""
        return self.load_checkpoint("best", target)

    def list_available_checkpoints(self) -> list[str | int]:
        """What `load_checkpoint` can load: "latest" and "best" where there are such, and each step."""
        numbers = self._numbers()
        index = self._load_index()
        names: list[str | int] = ["latest"] if numbers else []
        if index.best(numbers) is not None:
            names.append("best")
        return [*names, *sorted({index.entries[number].step for number in numbers})]

    def leave_behind(self, after: int | None) -> None:
        """Tells that the run goes on from a save, or from none: later ones are of another past.

        At the next save they are moved aside, into a folder of their own; never overwritten.

        Args:
            after: the save's number (`number` of what a load returned), or None for a fresh start.
        """
        self._leaves_behind = -1 if after is None else after

    def wait(self) -> None:
        """Waits until everything saved is on disk.

        Raises:
            Exception: what a save in the background raised.
        """
        if self._manager is not None:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of orbax's threads."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None
            self._sweeper.submit(self._sweep).result()

    def _save(
        self, state: TrainState, entry: Entry, metrics: Mapping[str, float] | None, resume: Mapping[str, Any] | None
    ) -> None:
        import orbax.checkpoint as ocp

        self._open()
        resume = resume or {}
        history = resume.get("history", {})
        tree = {
            "params": as_dicts(state.params),
            "opt_state": as_dicts(state.opt_state),
            "step": np.asarray(state.step),
            "history": {str(i): np.asarray(values) for i, values in enumerate(history.values())},
            **({"rng": resume["rng"]} if "rng" in resume else {}),
        }
        meta = {
            **entry._asdict(),
            "time": time.time(),
            "metrics": {name: float(value) for name, value in metrics.items()} if metrics else None,
            "history": list(history),
            "position": resume.get("position"),
        }
        # Numbered by themselves, not by their steps: a step may be saved twice, before and after a validation.
        number = 1 + max(self._numbers(), default=-1)
        self._index.add(number, entry)
        self._sweeper.submit(self._sweep)
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(tree), meta=ocp.args.JsonSave(meta))
        self._manager.save(number, args=args, force=True)

    def _open(self) -> None:
        """Makes what writing needs, at the first save."""
        if self._leaves_behind is not None:
            self.close()
            self._set_aside(self._leaves_behind)
            self._leaves_behind = None
        if self._manager is None:
            import orbax.checkpoint as ocp

            options = ocp.CheckpointManagerOptions(
                create=True,
                cleanup_tmp_directories=True,
                # Renamed, then removed: a kill in between leaves nothing that looks like a whole checkpoint.
                todelete_subdir=_REMOVED,
                preservation_policy=_Keep(self._index, self.max_checkpoints),
            )
            self._manager = ocp.CheckpointManager(self.path, options=options, item_handlers=_handlers(ocp))
            self._sweep()
            self._load_index()

    def _sweep(self) -> None:
        """Deletes what orbax only moved out of the way."""
        for entry in (self.path / _REMOVED).glob("*"):
            shutil.rmtree(entry, ignore_errors=True)

    def _set_aside(self, after: int) -> None:
        numbers = [number for number in self._numbers() if number > after]
        if not numbers:
            return
        index = self._load_index()
        version = 1
        while (aside := self.path.with_name(f"{self.path.name}.{version}")).exists():
            version += 1
        aside.mkdir()
        for number in numbers:
            (self.path / str(number)).rename(aside / str(number))
        index.move_after(after, aside / _INDEX)
        _logger.warning("%d checkpoint(s) of an earlier run moved to %s", len(numbers), aside)

    def _numbers(self) -> list[int]:
        """Numbers of the saves that are whole, or that are being written, oldest first."""
        if self._manager is not None:
            return sorted(self._manager.all_steps())
        if not self.path.is_dir():
            return []
        # A save has its plain name only once it is whole: orbax writes under another and renames.
        return sorted(int(entry.name) for entry in self.path.iterdir() if entry.name.isdecimal() and entry.is_dir())

    def _load_index(self) -> Index:
        """The index as it is on disk; what it lacks, should the file be lost, is read from the saves themselves."""
        index = self._index.load()
        for number in self._numbers():
            if number not in index.entries:
                index.entries[number] = self._read_entry(number)
        return index

    def _resolve(self, checkpoint: Any) -> int | None:
        """The number of the save that is meant; None for the latest of none."""
        self.wait()
        numbers = self._numbers()
        index = self._load_index()
        if checkpoint == "best":
            number = index.best(numbers)
        elif isinstance(checkpoint, str) and (
            not checkpoint.isdecimal() or index.at_step(int(checkpoint), numbers) is None
        ):
            return max(numbers, default=None)  # a run's id
        elif checkpoint is True or checkpoint == -1:
            return max(numbers, default=None)
        elif isinstance(checkpoint, bool) or not (isinstance(checkpoint, str) or hasattr(checkpoint, "__index__")):
            raise TypeError(f"load_checkpoint must be True, -1, 'best', a step or a run's id, but is {checkpoint!r}")
        else:
            number = index.at_step(int(checkpoint), numbers)
        if number is None:
            there = ", ".join(str(name) for name in self.list_available_checkpoints()) or "none"
            raise FileNotFoundError(f"no checkpoint {str(checkpoint)!r} in {self.path}; there are: {there}")
        return number

    def _read_entry(self, number: int) -> Entry:
        import orbax.checkpoint as ocp

        with _reader(ocp) as reader:
            args = ocp.args.Composite(meta=ocp.args.JsonRestore())
            meta = reader.restore(self.path / str(number), args=args)[_META]
        return Entry(*(meta[field] for field in Entry._fields))

    def _read(self, number: int, target: TrainState | None) -> dict[str, Any]:
        import orbax.checkpoint as ocp

        folder = self.path / str(number)
        with _reader(ocp) as reader:
            shapes = reader.metadata(folder).item_metadata[_STATE].tree
            # As numpy, so that a checkpoint does not ask for the devices that it was written on.
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
            state_args, meta_args = ocp.args.PyTreeRestore(restore_args=as_numpy), ocp.args.JsonRestore()
            read = reader.restore(folder, args=ocp.args.Composite(state=state_args, meta=meta_args))
        tree, meta = read[_STATE], read[_META]
        loaded = {
            "state": as_state(tree, target, folder),
            "step": meta["step"],
            "time": meta["time"],
            "number": number,
            "resume": None,
        }
        if "rng" in tree:
            history = {name: tree["history"][str(i)] for i, name in enumerate(meta["history"])}
            loaded["resume"] = {"rng": tree["rng"], "position": meta["position"], "history": history}
        return loaded | ({"metrics": meta["metrics"]} if meta["metrics"] else {})


class _Keep:
    """orbax's question "which of these stay?", answered: the newest, the numbered, the best."""

    def __init__(self, index: Index, max_checkpoints: int | None):
        self._index = index
        self._max_checkpoints = max_checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        numbered = self._index.numbered(steps)
        if self._max_checkpoints is not None:
            numbered = numbered[-self._max_checkpoints :]
        kept = {*steps[-1:], *numbered, self._index.best(steps)}
        return [step in kept for step in steps]


def _reader(ocp: Any) -> Any:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**_handlers(ocp)))


def _handlers(ocp: Any) -> dict[str, Any]:
    return {_STATE: ocp.PyTreeCheckpointHandler(), _META: ocp.JsonCheckpointHandler()}
