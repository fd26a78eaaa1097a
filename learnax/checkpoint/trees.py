"""A training state as the plain nested dicts that are on disk, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from learnax.state import PyTree, TrainState, adam
from learnax.utils import leaves_by_path


def as_dicts(tree: PyTree) -> dict[str, Any]:
    """Any containers as nested dicts: what is on disk does not depend on a library's classes."""
    nested: dict[str, Any] = {}
    for path, leaf in leaves_by_path(tree).items():
        *parents, last = path.split("/")
        place = nested
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = leaf
    return nested


def as_state(tree: dict[str, Any], target: TrainState | None, path: Path) -> TrainState:
    """A state from nested dicts, in the target's containers, or in those of the default optimiser.

    Raises:
        ValueError: the checkpoint does not fit the target; the leaves that differ are named.
    """
    params, opt_state = tree["params"], tree.get("opt_state", {})
    if target is None:
        return TrainState(params, _default_opt_state(params, opt_state), int(tree["step"]))
    saved, wanted = {"params": params}, {"params": target.params}
    if target.opt_state is not None:
        saved["opt_state"], wanted["opt_state"] = opt_state, target.opt_state
    differences = _differences(leaves_by_path(saved), leaves_by_path(wanted))
    if differences:
        raise ValueError(
            f"checkpoint {path} does not match this model and optimiser; leaves that differ ({len(differences)}):\n"
            + "\n".join(f"  {line}" for line in differences[:20])
        )
    leaves = leaves_by_path(saved)
    filled = jax.tree.unflatten(jax.tree.structure(wanted), [leaves[name] for name in leaves_by_path(wanted)])
    return TrainState(filled["params"], filled.get("opt_state"), tree["step"])


def _default_opt_state(params: PyTree, saved: PyTree) -> PyTree:
    """The saved optimiser state in the default optimiser's containers, with a fixed rate or a schedule."""
    for rate in (0.0, lambda count: 0.0):
        with jax.numpy_dtype_promotion("standard"):  # of parameters of several dtypes, it asks for the highest
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
