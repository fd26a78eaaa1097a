"""A training state as the plain nested dicts that are on disk, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from learnax.step.optimizers import adam
from learnax.step.state import TrainState
from learnax.utils import PyTree, is_key, key_data, leaves_by_path, unescaped

Names = Mapping[str, Any]
"""Leaves by their names, as `leaves_by_path` gives them."""


def nested(leaves: Names) -> dict[str, Any]:
    """Leaves by their names as nested dicts: what is on disk does not depend on a library's classes."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        place = tree
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = leaf
    return tree


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The inverse of `nested`."""
    leaves: dict[str, Any] = {}
    for name, item in tree.items():
        leaves |= flat(item, f"{above}{name}/") if isinstance(item, Mapping) else {f"{above}{name}": item}
    return leaves


def without_keys(leaves: Names) -> tuple[dict[str, Any], dict[str, str]]:
    """Leaves in which numbers take the place of typed random keys, and what kind of keys they are, by name."""
    kinds = {path: str(jax.random.key_impl(leaf)) for path, leaf in leaves.items() if is_key(leaf)}
    return {path: key_data(leaf) for path, leaf in leaves.items()}, kinds


def with_keys(leaves: Names, kinds: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of `without_keys`."""
    made = {path: jax.random.wrap_key_data(leaves[path], impl=kind) for path, kind in kinds.items() if path in leaves}
    return {**leaves, **made}


def old_names(tree: PyTree) -> dict[str, Any]:
    """Leaves by the names that they had before names were escaped."""
    flattened = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flattened}


def as_state(leaves: Names, target: TrainState | None, path: Path, *, old: bool = False) -> TrainState:
    """A state from its leaves, in the target's containers, or in those of the default optimiser.

    Args:
        leaves: by their names, with the state's fields before them.
        target: a state, or its shapes.
        path: the checkpoint, for the error.
        old: whether the names are those of before they were escaped.

    Raises:
        ValueError: the checkpoint does not fit the target; the leaves that differ are named.
    """
    named = old_names if old else leaves_by_path
    if target is None:
        tree = nested(leaves) if old else _with_keys_as_they_were(nested(leaves))
        fields = {"params": {}, "opt_state": {}} | {name: tree[name] for name in TrainState._fields if name in tree}
        default = _default_opt_state(fields["params"], _below("opt_state/", leaves), named)
        if default is not None:
            fields["opt_state"] = default
        return TrainState(**{**fields, "step": int(leaves["step"])})
    wanted = target.trees()
    names = named(wanted)
    # A target without an optimiser's state asks for what it has alone; of another one, what it lacks is not carried.
    looked_at = set(wanted) if target.opt_state is None else {*wanted, *TrainState._fields} - {"step"}
    saved = {name: leaf for name, leaf in leaves.items() if name.split("/")[0] in looked_at}
    structure: Any = jax.tree.structure(wanted)
    differences = _differences(saved, names)
    if len(names) < structure.num_leaves:
        differences.append("two leaves of the model have one name in this checkpoint, which is of an earlier version")
    if differences:
        raise ValueError(
            f"checkpoint {path} does not match this model and optimiser; leaves that differ ({len(differences)}):\n"
            + "\n".join(f"  {line}" for line in differences[:20])
        )
    filled = jax.tree.unflatten(structure, [saved[name] for name in names])
    return TrainState(**{"params": None, "opt_state": None, **filled, "step": leaves["step"]})


def _with_keys_as_they_were(tree: Any) -> Any:
    """Nested dicts under the keys that the tree had; under their names, where two of them are spelled alike."""
    if not isinstance(tree, dict):
        return tree
    keys = [unescaped(key) for key in tree]
    names: Iterable[str] = keys if len(set(keys)) == len(keys) else tree
    return {name: _with_keys_as_they_were(item) for name, item in zip(names, tree.values(), strict=True)}


def _below(start: str, leaves: Names) -> dict[str, Any]:
    return {name.removeprefix(start): leaf for name, leaf in leaves.items() if name.startswith(start)}


def _default_opt_state(params: PyTree, saved: Names, named: Any) -> PyTree | None:
    """The saved optimiser state in the default optimiser's containers, with a fixed rate or a schedule, if it fits."""
    for rate in (0.0, lambda count: 0.0):
        try:
            with jax.numpy_dtype_promotion("standard"):  # of parameters of several dtypes, it asks for the highest
                shapes = jax.eval_shape(adam(rate).init, params)
        except (TypeError, ValueError):  # it takes no such parameters: they were another optimiser's
            return None
        names = named(shapes)
        if not _differences(saved, names):
            return jax.tree.unflatten(jax.tree.structure(shapes), [saved[name] for name in names])
    return None


def _differences(saved: Names, wanted: Names) -> list[str]:
    """Leaves that are on one side only, or differ in shape or dtype."""

    def text(leaf: Any) -> str:
        leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
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
