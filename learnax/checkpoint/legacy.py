"""Checkpoints of learnax 0.1.0, which were pickles: found, and read as today's code takes them."""

from __future__ import annotations

import operator
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from learnax.checkpoint import thaw
from learnax.checkpoint.files import DamagedError
from learnax.step.state import TrainState
from learnax.utils import PyTree, leaves_by_path

_FILE = re.compile(r"state_(latest|best|[0-9]+)\.pyd")
_KEYS = ("state", "step", "time")
_NUMBERS = {bool: np.bool_, int: np.int32, float: np.float32}


def find(folder: Path) -> dict[str | int, Path]:
    """The 0.1.0 checkpoints in a folder, by "latest", "best" or their step; empty where there is no folder."""
    if not folder.is_dir():
        return {}
    matches = ((_FILE.fullmatch(path.name), path) for path in sorted(folder.iterdir()) if path.is_file())
    return {int(match[1]) if match[1].isdecimal() else match[1]: path for match, path in matches if match}


def read(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of 0.1.0: a dict, or, as its first version wrote them, a training state alone.

    Returns:
        A dict with `state`, `step` (an int), `time` (seconds since 1970), and `metrics` if saved. The state is
        today's `TrainState`: plain dicts in place of flax's frozen ones, optimiser states of the class of that name
        in today's optax, numpy leaves that cannot be written to (typed random keys stay jax arrays), an int `step`.
        A step and a time that the file does not have are those in its name (else 0) and of its last change.

    Raises:
        ValueError: the file names something that no training state needs.
        DamagedError: the file is torn, or is something else.
        OSError: the file cannot be opened.
    """
    try:
        return _checkpoint(thaw.read(path, plain=False), path)
    except (thaw.RefusedError, DamagedError, OSError):
        raise
    except Exception as error:  # of a torn pickle nearly any kind
        raise thaw.damaged(path, error, "a checkpoint of learnax 0.1.0", "load another one of the run") from error


def leaves(state: TrainState, target: TrainState | None = None) -> dict[str, Any]:
    """The leaves of a state that `read` gave, under the names that today's optimisers use.

    An older optax kept no count of its own for a scheduled hyperparameter: `InjectHyperparamsState` went by the
    count of updates. Where the target has such counts, they are that count. Nothing in such a state tells whether
    it had a schedule, so without a target it is taken to have none.

    Args:
        state: a state, as `read` gives it.
        target: the state (or its shapes) that it is to fit.
    """
    tree: dict[str, Any] = state.trees()
    if isinstance(state.opt_state, optax.InjectHyperparamsState):
        scheduled = getattr(target and target.opt_state, "hyperparams_states", {})
        counts = {"hyperparams_states": {name: {"count": state.opt_state.count} for name in scheduled}}
        tree["opt_state"] = {**state.opt_state._asdict(), **counts}
    return leaves_by_path({**tree, "step": np.asarray(state.step, np.int32)})


def _checkpoint(held: Any, path: Path) -> dict[str, Any]:
    """The parts of a checkpoint, as today's code takes them."""
    match = _FILE.fullmatch(path.name)
    named = int(match[1]) if match and match[1].isdecimal() else 0
    if type(held) is TrainState:
        held = {"state": held, "step": named if held.step is None else held.step, "time": path.stat().st_mtime}
    if type(held) is not dict:
        raise ValueError(f"expected a dict with {', '.join(_KEYS)}, found a {type(held).__name__}")
    if missing := [key for key in _KEYS if key not in held]:
        raise ValueError(f"it has no {', '.join(missing)}")
    state = held["state"]
    if type(state) is not TrainState:
        raise ValueError(f"expected its state to be a TrainState, found a {type(state).__name__}")
    parts = jax.tree_util.tree_map_with_path(_leaf, state.trees())
    step = operator.index(held["step"] if state.step is None else state.step)
    np.int32(step)  # raises on a step that none can have
    checkpoint = {
        "state": TrainState(**{"opt_state": None, **parts, "step": step}),
        "step": operator.index(held["step"]),
        "time": float(held["time"]),
    }
    return checkpoint | ({"metrics": jax.tree.map(_number, held["metrics"])} if held.get("metrics") else {})


def _leaf(path: Any, leaf: Any) -> PyTree:
    if type(leaf) in _NUMBERS:
        return np.asarray(leaf, _NUMBERS[type(leaf)])
    if not isinstance(leaf, (np.ndarray, jax.Array)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise ValueError(f"{name} of its state is a {type(leaf).__name__}, not an array")
    return leaf


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
