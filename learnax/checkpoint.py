"""Checkpoints on disk, through orbax: written while training goes on, read back exactly."""

from __future__ import annotations

import json
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
import jax.numpy as jnp
import numpy as np

from learnax.state import PyTree, TrainState, adam
from learnax.utils import leaves_by_path

_logger = logging.getLogger("learnax")
_STATE, _META = "state", "meta"
_REMOVED = "removed"


class Checkpointer:
    """Writes and reads the checkpoints of one run: the latest, numbered ones, and the best.

    Each is a folder named by its step. A save copies the state and returns; the writing goes on in
    the background. An older checkpoint is removed once a newer one is whole on disk, unless it is
    numbered or the best. Checkpoints of a past that this run has left (a fresh start, a load of an
    older step) are moved into a folder beside, never overwritten.

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
        self._index = _Index(self.path / "index.json")
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
            resume: what a run needs to go on, see `resume_point`.
        """
        # Written first: what the index names and the disk lacks is passed over, the reverse would be deleted.
        self._open().load()
        self._index.add_numbered(step)
        self.save_latest(state, step, metrics, resume)

    def save_latest(
        self, state: TrainState, step: int, metrics: Mapping[str, float] | None = None, resume: Any = None
    ) -> None:
        """Saves the latest checkpoint, in place of the one before; see `save_checkpoint`."""
        import orbax.checkpoint as ocp

        self._open()
        if step in self._steps():
            return
        resume = resume or {}
        history = resume.get("history", {})
        tree = {
            "params": _as_dicts(state.params),
            "opt_state": _as_dicts(state.opt_state),
            "step": jnp.asarray(state.step),
            "rng": resume.get("rng", np.zeros(0, np.uint32)),
            **{f"history_{i}": np.asarray(values) for i, values in enumerate(history.values())},
        }
        meta = {
            "step": step,
            "time": time.time(),
            "metrics": dict(metrics) if metrics else None,
            "history": list(history),
            "position": resume.get("position"),
        }
        self._sweeper.submit(self._sweep)
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree), meta=ocp.args.JsonSave(meta)),
            force=True,
        )

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
        best = self._index.best_value(self._steps())
        if best is not None and not (value < best if self.minimize_metric else value > best):
            return False
        self._index.add_best(step, float(value))
        self.save_latest(state, step, metrics, resume)
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

    def due(self, step: int) -> bool:
        """Whether `maybe_save_checkpoints` would save at this step."""
        return self.should_save_latest(step) or self.should_save_numbered(step)

    def load_checkpoint(self, checkpoint: Any = -1, target: TrainState | None = None) -> dict[str, Any] | None:
        """Reads a checkpoint.

        Args:
            checkpoint: "best"; a step, as a number or its name; True, -1 or any other string for the latest.
            target: a state (or its shapes) that says what the containers of the state are. Without it
                parameters come as nested dicts, and the optimiser's state as that of the default optimiser
                where it fits. A target whose `opt_state` is None reads the parameters alone.

        Returns:
            A dict with `state` (numpy leaves), `step`, `time` (seconds since 1970), `metrics` if saved, and
            what `save_checkpoint` got as `resume`; None where the latest is asked for and there is none.

        Raises:
            FileNotFoundError: a checkpoint asked for by name is not there; those there are are named.
            ValueError: the checkpoint does not fit the target; the leaves that differ are named.
        """
        step = self._resolve(checkpoint)
        return None if step is None else self._read(step, target)

    def load_latest(self, target: TrainState | None = None) -> dict[str, Any] | None:
        """Reads the latest checkpoint; None where there is none."""
        return self.load_checkpoint(-1, target)

    def load_best(self, target: TrainState | None = None) -> dict[str, Any] | None:
        """Reads the best checkpoint."""
        return self.load_checkpoint("best", target)

    def list_available_checkpoints(self) -> list[str | int]:
        """What `load_checkpoint` can load: "latest" and "best" where there are such, and each step."""
        steps = self._steps()
        names: list[str | int] = ["latest"] if steps else []
        if self._index.load().best_step(steps) is not None:
            names.append("best")
        return [*names, *steps]

    def leave_behind(self, after: int) -> None:
        """At the next save, checkpoints of steps after this one are moved aside: they are of another past."""
        self._leaves_behind = after

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

    def _open(self) -> _Index:
        """The orbax manager for writing, made at the first save; returns the index, read."""
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
                preservation_policy=_Keep(self),
            )
            self._manager = ocp.CheckpointManager(self.path, options=options, item_handlers=_handlers(ocp))
            self._sweep()
        return self._index.load()

    def _sweep(self) -> None:
        """Deletes what orbax only moved out of the way."""
        for entry in (self.path / _REMOVED).glob("*"):
            shutil.rmtree(entry, ignore_errors=True)

    def _set_aside(self, after: int) -> None:
        steps = [step for step in self._steps() if step > after]
        if not steps:
            return
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        aside.mkdir()
        for step in steps:
            (self.path / str(step)).rename(aside / str(step))
        self._index.load().copy_to(aside / "index.json")
        self._index.forget_after(after)
        _logger.warning("%d checkpoints of an earlier run were moved to %s", len(steps), aside)

    def _steps(self) -> list[int]:
        """Steps with a checkpoint that is whole, or that is being written."""
        if self._manager is not None:
            return sorted(self._manager.all_steps())
        if not self.path.is_dir():
            return []
        # A checkpoint has its plain name only once it is whole: orbax writes under another and renames.
        return sorted(int(entry.name) for entry in self.path.iterdir() if entry.name.isdigit() and entry.is_dir())

    def _resolve(self, checkpoint: Any) -> int | None:
        self.wait()
        steps = self._steps()
        if isinstance(checkpoint, str) and checkpoint.isdigit() and int(checkpoint) in steps:
            return int(checkpoint)
        if checkpoint == "best":
            step = self._index.load().best_step(steps)
            if step is None:
                raise FileNotFoundError(self._missing("best"))
            return step
        if isinstance(checkpoint, str) or checkpoint is True or checkpoint == -1:
            return steps[-1] if steps else None
        if isinstance(checkpoint, bool) or not hasattr(checkpoint, "__index__"):
            raise TypeError(f"load_checkpoint must be True, -1, 'best', a step or a run's id, but is {checkpoint!r}")
        if int(checkpoint) not in steps:
            raise FileNotFoundError(self._missing(str(checkpoint)))
        return int(checkpoint)

    def _missing(self, name: str) -> str:
        there = ", ".join(str(name) for name in self.list_available_checkpoints()) or "none"
        return f"no checkpoint {name!r} in {self.path}; there are: {there}"

    def _read(self, step: int, target: TrainState | None) -> dict[str, Any]:
        import orbax.checkpoint as ocp

        folder = self.path / str(step)
        handler = ocp.CompositeCheckpointHandler(**_handlers(ocp))
        with ocp.Checkpointer(handler) as reader:
            shapes = reader.metadata(folder).item_metadata[_STATE].tree
            # As numpy, so that a checkpoint does not ask for the devices that it was written on.
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
            state_args, meta_args = ocp.args.PyTreeRestore(restore_args=as_numpy), ocp.args.JsonRestore()
            read = reader.restore(folder, args=ocp.args.Composite(state=state_args, meta=meta_args))
        tree, meta = read[_STATE], read[_META]
        loaded = {
            "state": _as_state(tree, target, folder),
            "step": meta["step"],
            "time": meta["time"],
            "rng": tree["rng"],
            "position": meta["position"],
            "history": {name: tree[f"history_{i}"] for i, name in enumerate(meta["history"])},
        }
        return loaded | ({"metrics": meta["metrics"]} if meta["metrics"] else {})


class _Keep:
    """orbax's question "which of these stay?", answered: the newest, the numbered, the best."""

    def __init__(self, checkpointer: Checkpointer):
        self._checkpointer = checkpointer

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        index, limit = self._checkpointer._index, self._checkpointer.max_checkpoints
        numbered = [step for step in steps if step in index.numbered]
        kept = {*steps[-1:], *(numbered if limit is None else numbered[-limit:]), index.best_step(steps)}
        return [step in kept for step in steps]


class _Index:
    """Which steps are numbered, and which were the best when they were made; a small file beside them.

    It may name steps that are not on disk (a kill before they were whole): readers pass over them.
    """

    def __init__(self, path: Path):
        self._path = path
        self.numbered: list[int] = []
        self._best: list[tuple[int, float]] = []

    def load(self) -> _Index:
        if self._path.exists():
            content = json.loads(self._path.read_text())
            self.numbered = content["numbered"]
            self._best = [(step, value) for step, value in content["best"]]
        return self

    def best_step(self, steps: Sequence[int]) -> int | None:
        return next((step for step, _ in reversed(self._best) if step in steps), None)

    def best_value(self, steps: Sequence[int]) -> float | None:
        return next((value for step, value in reversed(self._best) if step in steps), None)

    def add_numbered(self, step: int) -> None:
        self.numbered = [*(s for s in self.numbered if s != step), step]
        self._write(self._path)

    def add_best(self, step: int, value: float) -> None:
        self._best.append((step, value))
        self._write(self._path)

    def forget_after(self, after: int) -> None:
        self.numbered = [step for step in self.numbered if step <= after]
        self._best = [(step, value) for step, value in self._best if step <= after]
        self._write(self._path)

    def copy_to(self, path: Path) -> None:
        self._write(path)

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps({"numbered": self.numbered, "best": self._best}))
        draft.replace(path)


def _handlers(ocp: Any) -> dict[str, Any]:
    return {_STATE: ocp.PyTreeCheckpointHandler(), _META: ocp.JsonCheckpointHandler()}


def _as_dicts(tree: PyTree) -> dict[str, Any]:
    """Any containers as nested dicts: what is on disk does not depend on a library's classes."""
    nested: dict[str, Any] = {}
    for path, leaf in leaves_by_path(tree).items():
        *parents, last = path.split("/")
        place = nested
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = leaf
    return nested


def _as_state(tree: dict[str, Any], target: TrainState | None, path: Path) -> TrainState:
    params, opt_state = tree["params"], tree.get("opt_state", {})
    if target is None:
        return TrainState(params, _default_opt_state(params, opt_state), int(tree["step"]))
    saved, wanted = {"params": params}, {"params": target.params}
    if target.opt_state is not None:
        saved["opt_state"], wanted["opt_state"] = opt_state, target.opt_state
    differences = _differences(leaves_by_path(saved), leaves_by_path(wanted))
    if differences:
        raise ValueError(
            f"checkpoint {path} does not match this model and optimiser; {len(differences)} leaves differ:\n"
            + "\n".join(f"  {line}" for line in differences[:20])
        )
    leaves = leaves_by_path(saved)
    filled = jax.tree.unflatten(jax.tree.structure(wanted), [leaves[name] for name in leaves_by_path(wanted)])
    return TrainState(filled["params"], filled.get("opt_state"), tree["step"])


def _default_opt_state(params: PyTree, saved: PyTree) -> PyTree:
    """The saved optimiser state in the default optimiser's containers, with a fixed rate or a schedule."""
    for rate in (0.0, lambda count: 0.0):
        shapes = jax.eval_shape(adam(rate).init, params)
        if not _differences(leaves_by_path(saved), leaves_by_path(shapes)):
            leaves = leaves_by_path(saved)
            return jax.tree.unflatten(jax.tree.structure(shapes), [leaves[name] for name in leaves_by_path(shapes)])
    return saved


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Leaves that are on one side only, or differ in shape or dtype."""

    def text(leaf: Any) -> str:
        return f"{leaf.dtype}{list(leaf.shape)}"

    lines = []
    for name in sorted({*saved, *wanted}):
        if name not in wanted:
            lines.append(f"{name}: in the checkpoint only, {text(saved[name])}")
        elif name not in saved:
            lines.append(f"{name}: in the model only, {text(wanted[name])}")
        elif text(saved[name]) != text(wanted[name]):
            lines.append(f"{name}: {text(saved[name])} in the checkpoint, {text(wanted[name])} in the model")
    return lines
