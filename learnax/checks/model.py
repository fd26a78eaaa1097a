"""Model and losses, traced on the first datum of each split before anything is compiled."""

from __future__ import annotations

import functools
import inspect
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from learnax.checks.losses import Seen, check_signature, watched
from learnax.checks.optimizer import check_optimizer
from learnax.checks.settings import Settings
from learnax.checks.texts import names_axis, raised, structure_of, value_lines
from learnax.data import FirstDatum
from learnax.models.linen import params_of
from learnax.models.streams import asked_streams, init_variables, lifted_streams
from learnax.step import datum_loss, with_axis
from learnax.utils import PyTree, leaves_by_path

T = TypeVar("T")

_MODES = ("train", "training", "is_training", "deterministic", "use_running_average", "eval")
"""What models call an argument that is no datum, but says how they run."""

_logger = logging.getLogger("learnax")


class Traced(NamedTuple):
    """What tracing a model and its losses tells.

    Attributes:
        asked: random streams that the model draws from.
        streams: those of them that need a key of their own, see `learnax.models.streams.lifted_streams`.
        metrics: their names.
        mapped: whether user code names the mapped axis `"devices"`.
        primitives: names of the JAX primitives that it is made of.
    """

    asked: tuple[str, ...]
    streams: tuple[str, ...]
    metrics: tuple[str, ...]
    mapped: bool
    primitives: frozenset[str]


def check_model(settings: Settings, data: Mapping[str, FirstDatum]) -> Traced:
    """Traces model, losses and a user's optimiser on the first datum of each split, without computing anything.

    Args:
        settings: the trainer's arguments: model, losses, optimiser, seed.
        data: split -> its first datum; the model is initialised on that of `train`.

    Raises:
        ValueError: the model, the losses or the optimiser cannot take what they get; it is in the text.
        TypeError: parameters that have no gradient; losses that return something else than they are to; an optimiser
            that asks for more than there is.
    """
    model, losses = settings.model, settings.losses
    check_signature(losses)
    names: list[str] = []
    streams: dict[str, tuple[str, ...]] = {}
    primitives: set[str] = set()
    key = jax.random.key(settings.seed)
    first = data["train"].arguments

    def trace() -> jax.Array:
        step = jnp.zeros((), jnp.int32)
        variables = _model_fits(
            "train", model, first, first, lambda: jax.eval_shape(functools.partial(init_variables, model), key, first)
        )
        params = params_of(variables)
        _check_params(params)
        if not settings.own_optimizer:
            check_optimizer(settings.optimizer, params)
        for split, (arguments, _) in data.items():
            look = functools.partial(asked_streams, model, params, arguments)
            asked, output = _model_fits(split, model, arguments, first, look)
            if split == "train":
                streams["asked"], streams["own"] = asked, lifted_streams(model, params, arguments, asked)
            watching = watched(losses, Seen(split, arguments, output))
            loss_of = functools.partial(datum_loss, model, watching, streams=streams["own"])
            traced = jax.make_jaxpr(loss_of, return_shape=True)(params, key, arguments, step)
            names.extend(name for name in traced[1][2] if name not in names)
            primitives.update(_primitives(traced[0].jaxpr))
        return step

    try:
        trace()
        return Traced(streams["asked"], streams["own"], tuple(names), False, frozenset(primitives))
    except NameError as error:
        if not names_axis(error):
            raise
    with_axis(trace)
    return Traced(streams["asked"], streams["own"], tuple(names), True, frozenset(primitives))


def _primitives(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
    for inner in jax.extend.core.subjaxprs(jaxpr):
        yield from _primitives(inner)


def _check_params(params: PyTree) -> None:
    """Raises TypeError for parameters that no gradient can be taken of, by path."""
    wrong = [
        f"  {path}: {leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves_by_path(params).items()
        if not jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    if wrong:
        lines = "\n".join([*wrong[:5], *(["  ..."] if len(wrong) > 5 else [])])
        raise TypeError(
            f"the model's parameters must be floats, to have a gradient, but these are not:\n{lines}\n"
            "what is not trained is no parameter: make it a constant in the module, jnp.arange(8) for instance, or "
            "give its self.param an initialiser of floats"
        )


def _model_fits(split: str, model: Any, datum: list[Any], first: list[Any], trace: Callable[[], T]) -> T:
    """What tracing the model gives; a ValueError with the datum where it fails."""
    try:
        return trace()
    except Exception as error:
        if names_axis(error):
            raise
        count = f"{len(datum)} argument{'s' * (len(datum) != 1)}"
        lines = [
            f"the model {type(model).__name__} cannot take a datum of {split!r}, of this structure ({count}):",
            structure_of(datum),
            *(_signature_lines(model, datum) or _inside_lines(model, datum, first, error)),
        ]
        raise ValueError("\n".join(lines)) from error


def _signature_lines(model: Any, datum: list[Any]) -> list[str]:
    """What to write where the number of arguments is not that of the model's `__call__`; nothing where it is."""
    try:
        signature = inspect.signature(model.__call__)
    except (AttributeError, TypeError, ValueError):
        return []
    try:
        signature.bind(*datum)
        return []
    except TypeError:
        pass
    positional = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes = f"but its __call__ takes {len(positional)}, ({', '.join(map(_written, signature.parameters.values()))})"
    if len(datum) > len(positional):
        names = [_written(p) for p in positional]
        names += [f"{name}=None" for name in _new_names(len(datum) - len(positional), list(signature.parameters))]
        return [
            takes,
            "a datum that is a list is spread over the model's arguments, so the label goes there as well; write",
            f"  def __call__(self, {', '.join(names)}):",
            'or make each datum a dict, {"image": x, "label": y}: the model then takes that as one argument',
        ]
    own = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [p.name for p in own if p.default is p.empty][len(datum) :]
    if any(name in _MODES for name in missing):
        mode = next(name for name in missing if name in _MODES)
        return [takes, f"the model gets the datum alone, so {mode} needs a default, {mode}=True for instance"]
    return [
        takes,
        f"so {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: a datum that is a list, [x, y], is "
        "spread over the arguments,",
        "anything else (a tuple, a dict, an array) is one argument",
    ]


def _new_names(count: int, taken: list[str]) -> list[str]:
    names = [name for name in ("y", "z", "w") if name not in taken]
    return [*names, *(f"a{place}" for place in range(count))][:count]


def _written(parameter: inspect.Parameter) -> str:
    """A parameter as it is written, without its annotation."""
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"


def _inside_lines(model: Any, datum: list[Any], first: list[Any], error: BaseException) -> list[str]:
    """What went wrong inside the model, and what a datum is to it."""
    layer = _layer(error)
    lines = [raised(error)]
    taken = list(inspect.signature(model.__call__).parameters)[: len(datum)] if callable(model) else []
    for place, name in enumerate(taken):
        if name in _MODES:
            return [*lines, f"its argument {name} gets [{place}] of the datum: give it a place behind, and a default"]
    if datum is not first:
        return [*lines, "while it takes a datum of 'train':", structure_of(first)]
    if any(leaf is None for leaf in jax.tree.leaves(datum, is_leaf=lambda leaf: leaf is None)):
        lines.append("what has no array in it, text for instance, is kept from the model: it gets None")
    if len(datum) == 1 and isinstance(datum[0], dict):
        key = next(iter(datum[0]), "image")
        lines.append(f"a datum that is a dict is one argument: the model gets it whole, and reads x[{key!r}] of it")
    elif len(datum) == 1 and isinstance(datum[0], tuple):
        lines.append(
            "a datum that is a tuple is one argument: write x, y = datum in the model; a list, [x, y], is spread"
        )
    if layer.startswith("Conv") and any(np.ndim(leaf) == 2 for leaf in jax.tree.leaves(datum)):
        lines.append(f"{layer} takes an image of (height, width, channels): of one channel, give it x[..., None]")
    one = "a model sees one datum at a time, without a batch axis: x.reshape(-1), not x.reshape(x.shape[0], -1)"
    return [*lines, *(value_lines(error, "the model is", datum) or [one])]


def _layer(error: BaseException) -> str:
    """The type of the innermost linen module that an error came through; empty where there is none."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [frame.f_locals["self"] for frame in frames if isinstance(frame.f_locals.get("self"), nn.Module)]
    return type(modules[-1]).__name__ if modules else ""


def tell_random(streams: Sequence[str]) -> None:
    """Says that validation draws random numbers, and how it can do without."""
    _logger.warning(
        "the model draws random numbers in validation as in training, from %s: dropout, for one, is not switched off. "
        "Where that is not meant, let each datum say which it is, [x, y, training], and the model choose: "
        "jnp.where(training, nn.Dropout(0.5, deterministic=False)(x), x)",
        ", ".join(map(repr, streams)),
    )
