"""Model and losses, traced on the first datum of each split before anything is compiled."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from learnax.checks.losses import Seen, check_signature, watched
from learnax.checks.optimizer import checked_optimizer
from learnax.checks.settings import Settings
from learnax.checks.texts import names_axis, raised, structure_of, value_lines
from learnax.data import FirstDatum
from learnax.engine.sharding import used_types
from learnax.metrics import terms_of
from learnax.models import BATCH_AXIS, MODES, Adapter, Model
from learnax.step import AXIS, Init, datum_loss, initial, is_weighted, share_loss, with_axis
from learnax.utils import PyTree, any_key, leaves_by_path

T = TypeVar("T")

_logger = logging.getLogger("learnax")


@dataclasses.dataclass(frozen=True)
class Traced:
    """What tracing a model and its losses tells.

    Attributes:
        model: the model, with what was found out about it kept.
        init: see `learnax.step.initial`.
        optimizer: the optimiser, as one of this model's parameters.
        asked: random streams that the model draws from in evaluation.
        metrics: their names.
        mapped: whether user code names the mapped axis `"devices"`.
        batch_axis: whether it names the one over the data of a share, `"batch"`.
        primitives: names of the JAX primitives that it is made of.
        weighted: whether the loss has weights.
        by_datum: whether losses and metrics are given for each datum.
        used: the type that each parameter is computed in, in training.
    """

    model: Model
    init: Init
    optimizer: Any
    asked: tuple[str, ...]
    metrics: tuple[str, ...]
    mapped: bool
    batch_axis: bool
    primitives: frozenset[str]
    weighted: bool
    by_datum: bool
    used: tuple[Any, ...]


def check_model(settings: Settings, data: Mapping[str, FirstDatum], rows: int) -> Traced:
    """Traces model, losses and a user's optimiser on the first datum of each split, without computing anything.

    Args:
        settings: the trainer's arguments: model, losses, optimiser, seed.
        data: split -> its first datum; the model is initialised on that of `train`.
        rows: data of a device's share, which a batched model sees at once.

    Raises:
        ValueError: the model, the losses or the optimiser cannot take what they get; it is in the text.
        TypeError: parameters that have no gradient; losses that return something else than they are to; an optimiser
            that asks for more than there is.
    """
    check_signature(settings.losses)
    trace = _Trace(settings, data, rows)
    axes = [AXIS] if settings.adapter.batched else [AXIS, BATCH_AXIS]
    while True:
        try:
            return trace()
        except NameError as error:
            axis = names_axis(error)
            if axis not in axes or axis in trace.around:
                raise
            trace.around.append(axis)


class _Trace:
    """Traces a model and its losses, inside the axes that user code names.

    Args:
        settings: see `check_model`.
        data: see `check_model`.
        rows: see `check_model`.

    Attributes:
        around: the axes' names, inner ones first.
    """

    def __init__(self, settings: Settings, data: Mapping[str, FirstDatum], rows: int):
        self._settings = settings
        self._data = data
        self._rows = rows
        self._init = initial(settings.adapter)
        self.around: list[str] = []

    def __call__(self) -> Traced:
        """Looks at all of it."""
        found: list[Traced] = []

        def look() -> None:
            found.append(self._look())

        traced: Callable[[], Any] = look
        for name in self.around:
            traced = functools.partial(with_axis, traced, name)
        traced()
        return found[-1]

    def _fresh(self) -> tuple[PyTree, PyTree]:
        """The shapes of parameters and of what the model carries on."""
        model = self._settings.adapter
        first = self._data["train"].arguments
        made = model.made()
        look = lambda: jax.eval_shape(self._init, any_key(), first)  # noqa: E731
        return jax.eval_shape(lambda: made) if made is not None else model_fits("train", model, first, first, look)

    def _look(self) -> Traced:
        settings = self._settings
        params, model_state = self._fresh()
        _check_params(params)
        optimizer = settings.optimizer
        if not settings.own_optimizer:
            optimizer = checked_optimizer(optimizer, params)
        model, first = settings.adapter, self._seen("train")
        key, step = any_key(), np.int32(0)
        if model_state is not None and not model.batched:
            self._check_carried(model, params, model_state, key, first)
        asked: tuple[str, ...] = ()
        names: dict[str, None] = {}
        primitives: set[str] = set()
        weighted, by_datum, used = False, True, ()
        for split in self._data:
            arguments = self._seen(split)
            look = functools.partial(model.ready, params, model_state, *arguments)
            ready, drawn, output = model_fits(split, model, arguments, first, look)
            if split == "train":
                model, asked = ready, drawn
            watching = watched(settings.losses, Seen(split, arguments, output, model.batched, self._rows))
            loss_of = functools.partial(share_loss if model.batched else datum_loss, model, watching)
            jaxpr, shapes = jax.make_jaxpr(loss_of, return_shape=True)(params, model_state, key, arguments, step)
            if split == "train":
                used = used_types(jaxpr.jaxpr, len(jax.tree.leaves(params)))
            names |= dict.fromkeys(shapes[2])
            weighted |= is_weighted(shapes[1])
            by_datum &= not model.batched or all(map(self._is_by_datum, (shapes[1], *shapes[2].values())))
            primitives.update(primitives_of(jaxpr.jaxpr))
        return Traced(
            model,
            self._init,
            optimizer,
            asked,
            tuple(names),
            AXIS in self.around,
            BATCH_AXIS in self.around,
            frozenset(primitives),
            weighted,
            by_datum,
            used,
        )

    def _seen(self, split: str) -> list[Any]:
        """A split's first datum as the model sees it: a batched one, as a share of its like."""
        return shown_to(self._settings.adapter, self._data[split].arguments, self._rows)

    def _is_by_datum(self, value: Any) -> bool:
        """Whether a loss or metric of a share is given for each datum of it."""
        numbers = [next(iter(jax.tree.leaves(term))) for term in terms_of(value)]
        return all(number.shape == (self._rows,) for number in numbers)

    def _check_carried(
        self, model: Model, params: PyTree, model_state: PyTree, key: jax.ShapeDtypeStruct, datum: list[Any]
    ) -> None:
        """Raises ValueError where what the model carries on differs between data, by name."""
        data = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *jnp.shape(leaf)), jnp.result_type(leaf)), datum)
        keys = jax.eval_shape(lambda key: jax.random.split(key, 2), key)

        def after(params: PyTree, model_state: PyTree, keys: jax.Array, data: list[Any], chosen: int | None) -> Any:
            def one(key: jax.Array, datum: list[Any]) -> Any:
                state = model.apply(params, model_state, key, *datum, training=True)[1]
                return state if chosen is None else jax.tree.leaves(state)[chosen]

            return jax.vmap(one, out_axes=None, axis_name=BATCH_AXIS)(keys, data)

        def fits(chosen: int | None) -> bool:
            try:
                jax.eval_shape(functools.partial(after, chosen=chosen), params, model_state, keys, data)
            except ValueError as error:
                return "out_axes" not in str(error)
            except Exception as error:  # told of where the model is looked at
                if names_axis(error):
                    raise
            return True

        if fits(None):
            return
        wrong = [path for number, path in enumerate(leaves_by_path(model_state)) if not fits(number)]
        layers = dict.fromkeys(path.rpartition("/")[0] for path in wrong)
        raise ValueError(
            f"what the model carries on differs between the data of a batch, in {', '.join(layers)}: it sees one datum "
            "at a time, so statistics of a batch need its axis. Either let the layers take their means over it, "
            f"nn.BatchNorm(..., axis_name={BATCH_AXIS!r}), or let the model see whole batches, "
            "model=learnax.models.Linen(module, batched=True), with losses that do so, too"
        )


def shown_to(model: Model, datum: list[Any], rows: int) -> list[Any]:
    """A datum as a model sees it: a batched one, as a share of so many like it."""
    if not model.batched:
        return datum
    shape = lambda leaf: jax.ShapeDtypeStruct((rows, *jnp.shape(leaf)), jnp.result_type(leaf))  # noqa: E731
    shapes: list[Any] = jax.tree.map(shape, datum)
    return shapes


def primitives_of(jaxpr: Any) -> Iterator[str]:
    """The names of all primitives of a traced function, those of its inner ones included."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
    for inner in jax.extend.core.subjaxprs(jaxpr):
        yield from primitives_of(inner)


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


def model_fits(split: str, model: Model, datum: list[Any], first: list[Any], trace: Callable[[], T]) -> T:
    """What tracing the model gives; a ValueError with the datum where it fails."""
    try:
        return trace()
    except Exception as error:
        if names_axis(error):
            raise
        count = f"{len(datum)} argument{'s' * (len(datum) != 1)}"
        what = "batch" if model.batched else "datum"
        user = getattr(model, "module", model)
        lines = [
            f"the model {type(user).__name__} cannot take a {what} of {split!r}, of this structure ({count}):",
            structure_of(datum),
            *(_signature_lines(model, datum) or _inside_lines(model, datum, first, error)),
        ]
        raise ValueError("\n".join(lines)) from error


def _signature_lines(model: Model, datum: list[Any]) -> list[str]:
    """What to write where the number of arguments is not that of the model's `__call__`; nothing where it is."""
    if not isinstance(model, Adapter):
        return []
    try:
        signature = inspect.signature(model.called)
    except (AttributeError, TypeError, ValueError):
        return []
    taken = model.taken(datum)
    named = {*model.train, "key", "state"}  # Equinox's names for what is given by name
    parameters = [p for p in signature.parameters.values() if p.name not in named]
    written = ", ".join(map(_written, signature.parameters.values()))
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name, given in (("train", model.train), ("eval", model.eval)):
            unknown = [key for key in given if key not in signature.parameters]
            if unknown:
                return [f"{name}={given} gives it {', '.join(unknown)}, but its __call__ takes ({written})"]
    try:
        signature.bind(*taken, **model.train)
        return []
    except TypeError:
        pass
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes = f"but its __call__ takes {len(positional)}, ({written})"
    if len(taken) > len(positional):
        names = [_written(p) for p in positional]
        names += [f"{name}=None" for name in _new_names(len(taken) - len(positional), list(signature.parameters))]
        return [
            takes,
            "a datum that is a list is spread over the model's arguments, so the label goes there as well; write",
            f"  def __call__(self, {', '.join(names)}):",
            'or make each datum a dict, {"image": x, "label": y}: the model then takes that as one argument',
        ]
    own = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [p.name for p in own if p.default is p.empty][len(taken) :]
    modes = [name for name in missing if name in MODES]
    if modes:
        mode = modes[0]
        return [
            takes,
            f"the model gets the datum alone, so {mode} needs a default, {mode}=True for instance, or "
            f"model=learnax.models.Linen(module, train={{{mode!r}: ...}}, eval={{{mode!r}: ...}}) says what it is",
        ]
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


def _inside_lines(model: Model, datum: list[Any], first: list[Any], error: BaseException) -> list[str]:
    """What went wrong inside the model, and what a datum is to it."""
    layer = _layer(error)
    lines = [raised(error)]
    if "cudnn" in str(error).lower():
        wheel = "nvidia-cudnn-cu12"
        return [*lines, f"it asks for cuDNN, which is not here: pip install {wheel}, or leave the choice to XLA"]
    taken = list(inspect.signature(model.called).parameters)[: len(datum)] if isinstance(model, Adapter) else []
    for place, name in enumerate(taken):
        if isinstance(model, Adapter) and model.inputs == "all" and name in MODES and name not in model.train:
            return [*lines, f"its argument {name} gets [{place}] of the datum: give it a place behind, and a default"]
    if datum is not first and not _is_like(datum, first):
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
    count = len(model.taken(datum)) if isinstance(model, Adapter) else 0
    if isinstance(model, Adapter) and model.inputs is None and count > 1:
        lines.append(f"it gets {count} parts of the datum: inputs=1 in its adapter gives it the first one alone")
    one = "a model sees one datum at a time, without a batch axis: x.reshape(-1), not x.reshape(x.shape[0], -1)"
    if model.batched:
        one = "a batched model sees a device's share of a batch, leaves (n, ...): x.reshape(x.shape[0], -1)"
    return [*lines, *(value_lines(error, "the model is", datum) or [one])]


def _is_like(datum: list[Any], first: list[Any]) -> bool:
    shapes = [jax.tree.map(lambda leaf: (jnp.shape(leaf), str(jnp.result_type(leaf))), data) for data in (datum, first)]
    return bool(shapes[0] == shapes[1])


def _layer(error: BaseException) -> str:
    """The type of the innermost linen module that an error came through; empty where there is none."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [frame.f_locals["self"] for frame in frames if isinstance(frame.f_locals.get("self"), nn.Module)]
    return type(modules[-1]).__name__ if modules else ""


def tell_random(streams: Sequence[str]) -> None:
    """Says that validation draws random numbers, and how it can do without."""
    _logger.warning(
        "the model draws random numbers in validation as in training, from %s: dropout, for one, is not switched off. "
        "Where that is not meant, say how the model is called in each mode: "
        "model=learnax.models.Linen(module, train={'train': True}, eval={'train': False}) for one that has "
        "nn.Dropout(0.5, deterministic=not train)",
        ", ".join(map(repr, streams)),
    )
