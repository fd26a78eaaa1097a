"""What a trainer's `evaluate` and `predict` are given: datasets and parameters that are to fit its model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from learnax.checks.losses import Seen, watched
from learnax.checks.model import Traced, model_fits, shown_to
from learnax.checks.settings import Settings
from learnax.checks.texts import short, structure_of
from learnax.models import BATCH_AXIS, Adapter
from learnax.step import AXIS, datum_loss, share_loss, with_axis
from learnax.step.state import TrainState
from learnax.utils import PyTree, any_key, is_key, leaves_by_path
from learnax.utils.leaves import held_dtype

_LINES = 10
"""Leaves that differ, of which a text shows so many."""


def check_datum(
    what: str,
    arguments: list[Any],
    settings: Settings,
    traced: Traced,
    known: Mapping[str, list[Any]],
    state: TrainState,
    rows: int,
    *,
    losses: bool,
) -> PyTree:
    """Checks that a datum is one of those that the model, and the losses, were made for.

    Names and types are to be those of the training data, or of a validation set. Sizes may be others, where the model
    takes them, but one of 1 where losses would broadcast it. For the model alone, what it does without may be left out,
    labels above all.

    Args:
        what: the dataset's name.
        arguments: the datum, as the step sees it.
        settings: the trainer's arguments.
        traced: what is known of its model.
        known: split -> its first datum, in the same form.
        state: as evaluation sees it, or its shapes.
        rows: data of a device's share.
        losses: whether losses are to take it, too.

    Returns:
        The shapes of the model's output: for one datum, or for a share where the model sees that.

    Raises:
        ValueError: it is none, or model or losses cannot take it; the leaves that differ are named.
        TypeError: losses do not return what they are to.
    """
    differences = {split: _differences(arguments, datum, split, partly=not losses) for split, datum in known.items()}
    if all(differences.values()):
        split, lines = min(differences.items(), key=lambda pair: len(pair[1]))
        shown = "\n".join(f"  {line}" for line in [*lines[:_LINES], *(["..."] if len(lines) > _LINES else [])])
        raise ValueError(
            f"dataset {what!r}: its data are not like those of {split!r}, which differ in\n{shown}\n"
            f"give data as those of {split!r}, each\n{structure_of(known[split], 'datum')}"
        )
    model, found = traced.model, list[Any]()

    def look() -> None:
        datum, first = (shown_to(model, one, rows) for one in (arguments, known["train"]))
        key = any_key()
        apply = functools.partial(model.apply, training=False)
        call = lambda: jax.eval_shape(apply, state.params, state.model_state, key, *datum)[0]  # noqa: E731
        found.append(model_fits(what, model, datum, first, call))
        if losses:
            watching = watched(settings.losses, Seen(what, datum, found[-1], model.batched, rows))
            loss_of = functools.partial(share_loss if model.batched else datum_loss, model, watching, training=False)
            jax.eval_shape(loss_of, state.params, state.model_state, key, datum, np.int32(0))

    traced_in: Callable[[], Any] = look
    for name in [*([BATCH_AXIS] if traced.batch_axis else []), *([AXIS] if traced.mapped else [])]:
        traced_in = functools.partial(with_axis, traced_in, name)
    traced_in()
    return found[-1]


def taken_of(model: Any, arguments: list[Any]) -> list[Any]:
    """Those parts of a datum that a model takes."""
    return [*model.taken(arguments)] if isinstance(model, Adapter) else arguments


def checkpoint_of(given: Any) -> Any:
    """What a checkpointer is asked for where `params` names a checkpoint; None where it is a tree.

    Raises:
        TypeError, ValueError: a name or number that is none of a checkpoint.
    """
    wanted = "params must be None, 'best', 'latest', a step or a tree of parameters,"
    if isinstance(given, str):
        if given not in ("best", "latest"):
            raise ValueError(f"{wanted} but is {short(given)}")
        return -1 if given == "latest" else given
    if isinstance(given, (bool, float)):
        raise TypeError(f"{wanted} but is {given!r}")
    if isinstance(given, (int, np.integer)):
        if given < 0:
            raise ValueError(f"{wanted} but is {given}; 'latest' is the newest checkpoint")
        return int(given)
    return None


def check_params(given: Any, wanted: PyTree) -> PyTree:
    """Parameters given by hand, in the containers of the model's.

    Args:
        given: a tree whose leaves have the names of the model's, in containers of any kind.
        wanted: the model's parameters, or their shapes.

    Raises:
        ValueError: they are not those of the model: the leaves that differ are named.
    """
    leaves, own = leaves_by_path(given), leaves_by_path(wanted)
    lines = []
    for name in dict.fromkeys([*own, *leaves]):
        if name not in own:
            lines.append(f"{name}: given only, {_kind(leaves[name])}")
        elif name not in leaves:
            lines.append(f"{name}: in the model only, {_kind(own[name])}")
        elif _kind(leaves[name]) != _kind(own[name]):
            lines.append(f"{name}: {_kind(leaves[name])} given, {_kind(own[name])} in the model")
    gone = [name for name, leaf in leaves.items() if isinstance(leaf, jax.Array) and leaf.is_deleted()]
    if not lines and gone:
        raise ValueError(
            f"params: {gone[0]} is an array that a training step has taken over since; keep a copy, "
            "jax.device_get(trainer.train_state.params)"
        )
    if lines:
        shown = "\n".join(f"  {line}" for line in [*lines[:_LINES], *(["..."] if len(lines) > _LINES else [])])
        inside = [name for name in ("params", "state/params") if {f"{name}/{path}" for path in own} <= set(leaves)]
        hint = f"\nthey are inside of what was given: give what it has under {inside[0]!r}" if inside else ""
        raise ValueError(f"params are not those of this model; leaves that differ ({len(lines)}):\n{shown}{hint}")
    return jax.tree.unflatten(jax.tree.structure(wanted), [_array(leaves[name]) for name in own])


def _array(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return leaf
    array = np.asarray(leaf)
    return array.astype(held_dtype(array.dtype), copy=False)


def _kind(leaf: Any) -> str:
    """A leaf's type and shape, as devices hold it."""
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) or is_key(leaf):
        return f"{leaf.dtype}{list(leaf.shape)}"
    try:
        array = np.asarray(leaf)
        return f"{held_dtype(array.dtype)}{list(array.shape)}"
    except TypeError:
        return f"of type {type(leaf).__name__}"


def _differences(given: list[Any], known: list[Any], split: str, *, partly: bool) -> list[str]:
    """Where a datum is unlike a known one, by name: in a leaf, in its type or axes."""
    own, other = _leaves(given), _leaves(known)
    lines = []
    for path in dict.fromkeys([*other, *own]):
        if path not in other:
            lines.append(f"{path}: {_datum_kind(own[path])} here, nothing in {split!r}")
        elif path not in own:
            if not partly:
                lines.append(f"{path}: nothing here, {_datum_kind(other[path])} in {split!r}")
        elif _class(own[path], sizes=not partly) != _class(other[path], sizes=not partly):
            lines.append(f"{path}: {_datum_kind(own[path])} here, {_datum_kind(other[path])} in {split!r}")
    return lines


def _leaves(datum: list[Any]) -> dict[str, Any]:
    flat = jax.tree_util.tree_flatten_with_path(datum, is_leaf=lambda leaf: leaf is None)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def _class(leaf: Any, *, sizes: bool) -> Any:
    return None if leaf is None else (leaf.dtype, leaf.ndim, sizes and [size == 1 for size in leaf.shape])


def _datum_kind(leaf: Any) -> str:
    return "no array" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"
