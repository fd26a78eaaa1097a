"""What a run is and how it stands, as plain data: for a page that shows it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import platform
import re
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from learnax.checkpoint.folder import Folder, best
from learnax.checks.texts import name_of
from learnax.log import named_run
from learnax.loss import LossPipe
from learnax.profiling.ledger import START, TITLES
from learnax.registry import Registry

if TYPE_CHECKING:
    from learnax.parts.parts import Parts

_PACKAGES = ("learnax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_ADDRESS = re.compile(r"( object)? at 0x[0-9a-f]+")
_LONGEST = 400
"""Letters of an argument."""


class Facts:
    """Plain data of a run; calling it gives them as they are now.

    It may be called in any thread: what it reads of a run under way may be a moment old.

    Args:
        parts: of the run.
    """

    def __init__(self, parts: Parts):
        self._parts = parts
        self._began = time.time()

    def __call__(self) -> dict[str, Any]:
        """The facts: JSON has all of them."""
        parts = self._parts
        return {
            **self._still,
            "step": parts.log.step,
            "epoch": parts.progress.position.epoch,
            "ledger": self._ledger(),
            "programs": [
                {
                    "kind": program.kind,
                    "calls": program.calls,
                    "seconds": dict(program.seconds),
                    **dataclasses.asdict(program.costs),
                }
                for program in list(parts.engine.programs.values())
                if program.calls
            ],
            "saves": self._saves(),
        }

    @functools.cached_property
    def _still(self) -> dict[str, Any]:
        """Those that stay as they are."""
        parts, settings = self._parts, self._parts.settings
        run = named_run(settings.run)
        name = str(getattr(run, "name", None) or getattr(run, "id", None) or os.path.basename(sys.argv[0]) or "a run")
        params = parts.progress.shapes.params
        devices = [device.device_kind for device in parts.engine.devices]
        return {
            "title": name,
            "run": str(getattr(run, "id", "")),
            "began": self._began,
            "num_epochs": settings.num_epochs,
            "epoch_steps": settings.epoch_steps,
            "val_every": settings.val_every or 1,
            "best_metric": settings.best_metric_name if settings.keep_best_checkpoint else None,
            "minimize": settings.minimize_metric,
            "batch_size": settings.batch_size * settings.accumulate_steps,
            "parameters": sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)),
            "parameter_bytes": sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)),
            "plan": str(parts.plan),
            "arguments": _arguments(settings.given),
            "versions": {"Python": platform.python_version(), **_versions()},
            "devices": [f"{devices.count(kind)} x {kind}" for kind in dict.fromkeys(devices)],
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "processes": parts.processes.count,
            "checkpoints": None if parts.checkpointer is None else str(parts.checkpointer.path),
        }

    def _ledger(self) -> dict[str, Any]:
        ledger = self._parts.ledger()
        return {
            "rows": [
                {"name": TITLES[name], "seconds": ledger.seconds[name], "start": name in START}
                for name in TITLES
                if ledger.seconds.get(name, 0.0) > 0
            ],
            "wall": ledger.wall,
            "training": ledger.training,
            "steps": ledger.steps,
            "verdict": ledger.verdict,
            "flops_per_second": ledger.flops_per_second,
            "utilisation": ledger.utilisation,
        }

    def _saves(self) -> list[dict[str, Any]]:
        """The checkpoints that are there, oldest first."""
        if self._parts.checkpointer is None:
            return []
        folder, saves = Folder(self._parts.checkpointer.path), []
        with contextlib.suppress(OSError):
            entries = folder.entries()
            for number, entry in entries.items():
                with contextlib.suppress(OSError):  # one that is just being removed
                    when = (folder.path / str(number)).stat().st_mtime
                    is_best = number == best(entries)
                    value = None if entry.best is None or not np.isfinite(entry.best) else float(entry.best)
                    saves.append(
                        {
                            "number": number,
                            "step": entry.step,
                            "time": when,
                            "numbered": entry.numbered,
                            "name": entry.name,
                            "best": is_best,
                            "value": value,
                            "metric": entry.best_of,
                        }
                    )
        return saves


def _arguments(given: Mapping[str, Any]) -> dict[str, str]:
    """Arguments of the trainer as a person reads them; those that are None or False are left out."""
    left_out = ("run", "compile", "devices")
    return {
        name: _in_words(value)
        for name, value in given.items()
        if name not in left_out and value is not None and value is not False
    }


def _in_words(value: Any) -> str:
    if isinstance(value, (bool, int, float, str)):
        return str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_in_words(held)}" for name, held in value.items())[:_LONGEST]
    if isinstance(value, optax.GradientTransformation):
        return f"optax.{getattr(value.init, '__qualname__', 'transformation').partition('.')[0]}"
    if inspect.isroutine(value):
        # Of a function that another one made, the other's name says more: `cosine_decay_schedule`.
        return value.__qualname__.partition(".<locals>")[0]
    if isinstance(value, LossPipe):
        return f"LossPipe of {', '.join(name_of(loss) for loss in value.loss_list)}"
    if isinstance(value, Registry):
        return str(value.path)
    if hasattr(value, "__len__") and hasattr(value, "__getitem__") and not hasattr(value, "apply"):
        return f"{type(value).__name__} of {len(value):,}"
    text = _ADDRESS.sub("", " ".join(repr(value).split()))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
