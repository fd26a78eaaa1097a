"""Losses: how they are called, what they return, and what they got where they fail."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import learnax.loss
from learnax.checks.texts import (
    call_of,
    in_file,
    name_of,
    names_axis,
    raised,
    short,
    structure_of,
    value_lines,
    what_is,
)
from learnax.loss import KEY_NAMES, Losses, LossPipe
from learnax.metrics import Amount, Max, Mean, Min, Sum, Terms, terms_of
from learnax.utils import PyTree
from learnax.utils.leaves import is_array

_STEPS = re.compile(r"_|(.*_)?(step|steps|iter|iters|iteration|iterations|count|counter|it)|[itkn]|_.+")
"""What a loss calls the training step: a third parameter of another name is meant for something else."""


@dataclasses.dataclass
class Seen:
    """What losses are traced on.

    Attributes:
        split: the dataset's name.
        datum: the model's arguments, as losses see them.
        output: the model's output, or its shapes.
        batched: whether that is a device's share of a batch, and not one datum.
        rows: data in the share.
        told: errors whose text is complete.
    """

    split: str
    datum: list[Any]
    output: PyTree
    batched: bool = False
    rows: int = 1
    told: list[BaseException] = dataclasses.field(default_factory=list)


def check_signature(losses: Losses, name: str = "losses") -> None:
    """Checks that what a loss asks for beside output and datum is the training step.

    Raises:
        TypeError: it is called something else.
    """
    for place, inner in enumerate(_inner(losses)):
        check_signature(inner, _inner_name(name, place, inner))
    try:
        parameters = list(inspect.signature(losses).parameters.values())
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must be a function (output, datum) -> (output, loss, metrics), but is {short(losses)}, whose "
            "arguments Python does not tell"
        ) from None
    if parameters and parameters[0].name in KEY_NAMES:
        parameters = parameters[1:]
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    wrong = [p.name for p in required[2:] if not _STEPS.fullmatch(p.name)]
    if wrong:
        raise TypeError(
            f"{name}: {call_of(losses)} asks for {', '.join(wrong)}, but losses are called with (output, datum), and "
            f"with the training step where that is called step. If {wrong[0]} is the step, call it step; else give it "
            f"a default, {wrong[0]}=..., or bind it, functools.partial({name_of(losses)}, {wrong[0]}=...)"
        )


def watched(losses: Losses, seen: Seen, name: str = "losses") -> Losses:
    """The same losses, with texts for a person where they raise, or return something else than they are to.

    Of a `LossPipe` each of its losses is watched.
    """
    inner = [watched(loss, seen, _inner_name(name, i, loss)) for i, loss in enumerate(_inner(losses))]
    if isinstance(losses, LossPipe):
        losses = copy.copy(losses)
        losses.loss_list = inner

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            result = losses(*args, **kwargs)
        except Exception as error:
            if names_axis(error) or any(error is told for told in seen.told):
                raise
            output = args[skipped] if len(args) > skipped else seen.output
            raise _told(seen, ValueError(_failure_text(name, losses, seen, output, error))) from error
        wrong = _wrong_result(name, losses, seen, result)
        if wrong:
            raise _told(seen, TypeError(wrong))
        return result

    signature = inspect.signature(losses)
    skipped = int(next(iter(signature.parameters), "") in KEY_NAMES)
    # The wrapper keeps the signature, by which the step is passed on or not.
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _inner(losses: Losses) -> list[Losses]:
    """What a `LossPipe` is made of."""
    return list(getattr(losses, "loss_list", ())) if isinstance(losses, LossPipe) else []


def _inner_name(name: str, place: int, loss: Any) -> str:
    return f"{name}.loss_list[{place}] ({name_of(loss)})"


def _told(seen: Seen, error: Exception) -> Exception:
    seen.told.append(error)
    return error


def _failure_text(name: str, losses: Losses, seen: Seen, output: PyTree, error: BaseException) -> str:
    what = "batch" if seen.batched else "datum"
    lines = [
        f"{name} failed on a {what} of {seen.split!r}: {raised(error)}",
        f"losses get (output, {what}), where {what} is always a list, that of the model's arguments:",
        structure_of(seen.datum, "datum"),
        structure_of(output, "output"),
    ]
    if _is_of_a_library(losses):
        return "\n".join([*lines, _definition(losses, seen)])
    if in_file(error, learnax.loss.__file__):
        return "\n".join(
            [*lines, "a loss returns (output, loss, metrics), and so does its _call: return output, loss, {}"]
        )
    lines.append(f"take it apart by: {_reading(seen.datum)}")
    reshaped = _has_rows(seen, output) and not seen.batched
    lines += [_RESHAPE] if reshaped else value_lines(error, "the losses are", seen.datum)
    return "\n".join(lines)


_RESHAPE = (
    "both are of one datum, without a batch axis: if the model has x.reshape(x.shape[0], -1), write x.reshape(-1)"
)


def _has_rows(seen: Seen, value: Any) -> bool:
    """Whether a value's first axis is that of something in the datum, as if that were a batch."""
    rows = {leaf.shape[0] for leaf in jax.tree.leaves(seen.datum) if getattr(leaf, "ndim", 0) > 1}
    return any(jnp.ndim(leaf) and jnp.shape(leaf)[0] in rows for leaf in jax.tree.leaves(value) if is_array(leaf))


def _reading(datum: list[Any]) -> str:
    """The line of a loss that takes a datum apart."""
    names = ["x", "y", "z", "w"]
    if len(datum) != 1:
        return f"{', '.join(names[: len(datum)])}{', *others' * (len(datum) > 4)} = datum"
    inside = datum[0]
    if isinstance(inside, Mapping):
        keys = list(inside)[:3]
        left = [key if isinstance(key, str) and key.isidentifier() else f"v{i}" for i, key in enumerate(keys)]
        right = [f"datum[0][{_key(key)}]" for key in keys]
        return f"{', '.join(left)} = {', '.join(right)}"
    fields = getattr(inside, "_fields", None) or getattr(inside, "__dataclass_fields__", None)
    if fields:
        fields = list(fields)[:3]
        return f"{', '.join(fields)} = {', '.join(f'datum[0].{field}' for field in fields)}"
    if isinstance(inside, tuple):
        return f"{', '.join(names[: len(inside)])}{', *others' * (len(inside) > 4)} = datum[0]"
    return "x = datum[0]"


def _key(key: Any) -> str:
    """A key as most people write it."""
    return f'"{key}"' if isinstance(key, str) else repr(key)


def _is_of_a_library(losses: Losses) -> bool:
    return str(getattr(losses, "__module__", "")).split(".")[0] in ("optax", "jax", "flax")


def _definition(losses: Losses, seen: Seen) -> str:
    """A function of losses around one of a library."""
    target = "datum[1]" if len(seen.datum) > 1 else "datum[0]"
    package = losses.__module__.split(".")[0]
    return (
        f"{package}.{name_of(losses)} knows nothing of these; use it in a function of your own:\n"
        f"  def losses(output, datum):\n"
        f"      return output, {package}.{name_of(losses)}(output, {target}).mean(), {{}}"
    )


def _wrong_result(name: str, losses: Losses, seen: Seen, result: Any) -> str | None:
    """What is wrong with what losses returned, and what to write; None where it is as it should be."""
    if not isinstance(result, tuple) or len(result) != 3:
        text = f"{name} must return (output, loss, metrics), but returned {what_is(result)}"
        if _is_of_a_library(losses):
            return f"{text}\n{_definition(losses, seen)}"
        return f"{text}; {_return_line(result)}"
    _, loss, metrics = result
    wrong = _wrong_loss(name, seen, loss)
    if wrong:
        return wrong
    if not isinstance(metrics, Mapping):
        hint = "write {} where there are none" if metrics is None else 'write {"error": error}, a name for each'
        return f"{name}: metrics, the third of what they return, must be a dict, but is {what_is(metrics)}; {hint}"
    for key, value in metrics.items():
        if not isinstance(key, str):
            return f"{name}: a metric's name must be text, but is {short(key)}; write {str(key)!r}, or what it measures"
        if isinstance(value, Terms):
            return f"{name}: metric {key!r} is a sum of several amounts, which a loss may be; report each by itself"
        wrong = _wrong_value(f"{name}: metric {key!r}", seen, value)
        if wrong:
            return wrong
    return None


def _wrong_loss(name: str, seen: Seen, loss: Any) -> str | None:
    """What is wrong with a loss, term by term."""
    of = "" if seen.batched else " of one datum"
    for term in terms_of(loss):
        if isinstance(term, (Max, Min)):
            return (
                f"{name}: the loss must be a number, or a Mean or Sum of learnax.metrics, but is a "
                f"{type(term).__name__}, which is for metrics"
            )
        wrong = _wrong_value(f"{name}: the loss", seen, term)
        if wrong:
            return wrong
        value = term.total if isinstance(term, (Mean, Sum)) else term
        if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            return (
                f"{name}: the loss{of} must be a float, to have a gradient, but is {jnp.result_type(value)}; a "
                "count or an accuracy is a metric, and jnp.float32(...) makes a float of a number"
            )
    return None


def _wrong_value(what: str, seen: Seen, value: Any) -> str | None:
    """What is wrong with a number, or an amount of learnax.metrics."""
    for leaf in jax.tree.leaves(value, is_leaf=lambda leaf: leaf is None) if isinstance(value, Amount) else [value]:
        shapes = [(), (seen.rows,)] if seen.batched else [()]
        if is_array(leaf) and jnp.shape(leaf) in shapes:
            continue
        if seen.batched:
            return (
                f"{what} of a batch must be ({seen.rows},), a number for each datum, or one for all of them, but "
                f"{_has(leaf)}; reduce what is of one datum, with .mean(axis=-1) for one"
            )
        return f"{what} of one datum must be a scalar, but {_has(leaf)}{_reducing(seen, leaf)}"
    if isinstance(value, Mean) and not isinstance(value.weight, jax.core.Tracer):
        weight = np.asarray(value.weight)
        if not (weight >= 0).all():
            return f"{what} has the weight {weight}, but a weight is 0 or more"
    return None


def _return_line(result: Any) -> str:
    if isinstance(result, tuple) and len(result) == 2:
        return "write return output, loss, metrics: the model's output, or what is to be plotted of it, comes first"
    if result is None:
        return "write return output, loss, {} at its end"
    if isinstance(result, list) and len(result) == 3:
        return "write a tuple, in parentheses"
    return f"write return output, loss{'.mean()' * bool(np.ndim(result) if is_array(result) else 0)}, {{}}"


def _has(value: Any) -> str:
    if value is None:
        return "has None"
    return f"has shape {jnp.shape(value)}" if is_array(value) else f"is {what_is(value)}"


def _reducing(seen: Seen, value: Any) -> str:
    """How to make a scalar of a value, and where its axis may come from."""
    if value is None or not is_array(value):
        return ""
    text = "; reduce it, with .mean() for one"
    if not _has_rows(seen, value):
        return text
    shapes = f"{structure_of(seen.output, 'output')}\n{structure_of(seen.datum, 'datum')}"
    return f"{text}. The model's output and the datum are\n{shapes}\n{_RESHAPE}"
