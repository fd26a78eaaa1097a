"""What a run minimises: losses of one datum, and pipes of them.

A loss is `(output, datum[, step]) -> (output, loss, metrics)`. One whose first parameter is named `key`, `rng`,
`rng_key` or `rngs` is given a random key before these: `(key, output, datum[, step])`; one with a keyword-only
parameter `rng_key` is given it there. It is derived from the datum's own, which the model has drawn from:
`fold_in(key, 0x105)`; in a `LossPipe`, `fold_in` by a loss's place comes on top.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

Losses = Callable[..., tuple[Any, Any, Mapping[str, Any]]]

KEY_NAMES = ("key", "rng", "rng_key", "rngs")
"""What a loss calls a first parameter that is a random key; output and datum come behind it."""
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_LOSS_STREAM = 0x105
"""Folded into a datum's key: the model has drawn from the key itself."""


def constant(step: Any) -> float:
    """The schedule that is 1 at every step."""
    return 1.0


class LossFunction:
    """A loss of one datum: implement `_call(output, batch)`, or override `__call__` itself.

    Args:
        weight: factor on the loss.
        scheduler: `step -> factor` on the loss, an optax schedule for one; by default 1 everywhere, as None is.
    """

    # Class attributes, so that a subclass need not call `super().__init__`.
    weight: float = 1.0
    scheduler: Callable[[Any], Any] | None = staticmethod(constant)

    def __init__(self, weight: float = 1.0, scheduler: Callable[[Any], Any] | None = constant):
        self.weight = weight
        self.scheduler = scheduler

    def _call(self, output: Any, batch: Any) -> tuple[Any, Any, dict[str, Any]]:
        """The unweighted loss; one that draws random numbers is `_call(key, output, batch)`.

        Args:
            output: the model's output for one datum.
            batch: that datum, always as a list.

        Returns:
            `(output, loss, metrics)`: the output handed on, a scalar, and a dict of scalars.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement _call(output, batch) or override __call__")

    def __call__(
        self, output: Any, batch: Any, step: Any = 0, *, rng_key: Any = None
    ) -> tuple[Any, Any, dict[str, Any]]:
        """The loss times `weight` times `scheduler(step)`.

        Args:
            output: see `_call`.
            batch: see `_call`.
            step: counts the updates before this one.
            rng_key: given to a `_call` that takes a key.
        """
        call: Callable[..., Any] = self._call
        given = (_there(rng_key, self),) if _begins_with_key(call) else ()
        output, loss, metrics = call(*given, output, batch)
        factor = self.weight if self.scheduler is None else self.weight * self.scheduler(step)
        return output, factor * loss, metrics


class LossPipe:
    """Several losses of one output: transformed once, threaded through them, summed.

    Args:
        loss_list: losses, called in order; each gets the output that the one before handed on.
        transform: `output -> output`, applied once before the first loss.
    """

    def __init__(self, loss_list: Sequence[Losses], transform: Callable[[Any], Any] | None = None):
        self.loss_list = list(loss_list)
        self.transform = transform

    def __call__(
        self, output: Any, batch: Any, step: Any = 0, *, rng_key: Any = None
    ) -> tuple[Any, Any, dict[str, Any]]:
        """`(output, sum of the losses, all metrics)`; of two metrics of one name the later loss's stays.

        Args:
            output: the model's output for one datum.
            batch: that datum, as a list.
            step: counts the updates before this one.
            rng_key: for losses that take a key: the one at place i gets `fold_in(rng_key, i)`.
        """
        if self.transform is not None:
            output = self.transform(output)
        total: Any = 0.0
        merged: dict[str, Any] = {}
        for place, loss_fn in enumerate(self.loss_list):
            key = jax.random.fold_in(_there(rng_key, self), place) if takes_key(loss_fn) else None
            output, loss, metrics = call_loss(loss_fn, output, batch, step, key)
            total = total + loss
            merged.update(metrics)
        return output, total, merged


def takes_key(losses: Losses) -> bool:
    """Whether a loss, or one of the losses in a pipe, takes a random key."""
    if isinstance(losses, LossPipe) and type(losses).__call__ is LossPipe.__call__:
        return any(takes_key(loss) for loss in losses.loss_list)
    if isinstance(losses, LossFunction) and type(losses).__call__ is LossFunction.__call__:
        return _begins_with_key(losses._call)
    return _begins_with_key(losses) or _has_keyword(losses)


def loss_key(losses: Losses, key: Any) -> Any:
    """The key that the losses of a datum draw from, where they take one, derived from the datum's own."""
    return jax.random.fold_in(key, _LOSS_STREAM) if takes_key(losses) else None


def call_loss(
    losses: Losses, output: Any, batch: Any, step: Any, rng_key: Any = None
) -> tuple[Any, Any, Mapping[str, Any]]:
    """Calls a loss with what its signature takes. It is looked at while a step is traced, never while it runs.

    The step is taken by the name `step`, as a further argument without a default, or among `*args` or `**kwargs`.

    Args:
        losses: the loss.
        output: the model's output for one datum.
        batch: that datum, as a list.
        step: the training step.
        rng_key: a random key, where `takes_key(losses)`.
    """
    args: tuple[Any, ...] = (output, batch)
    options: dict[str, Any] = {}
    if _begins_with_key(losses):
        args = (_there(rng_key, losses), *args)
    elif takes_key(losses):
        options["rng_key"] = rng_key
    parameters = inspect.signature(losses).parameters
    kinds = {p.kind for p in parameters.values()}
    if "step" in parameters or inspect.Parameter.VAR_KEYWORD in kinds:
        return losses(*args, step=step, **options)
    required = [p for p in parameters.values() if p.default is p.empty and p.name not in options]
    if len(required) > len(args) or inspect.Parameter.VAR_POSITIONAL in kinds:
        return losses(*args, step, **options)
    return losses(*args, **options)


def _begins_with_key(function: Callable[..., Any]) -> bool:
    """By the name of the first parameter, where there is room behind it for output and datum."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind in _POSITIONAL]
    room = len(names) >= 3 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return bool(names) and names[0] in KEY_NAMES and room


def _has_keyword(function: Callable[..., Any]) -> bool:
    """Whether it takes a key by keyword, as a pipe does; one that was bound to it is meant to stay."""
    parameter = inspect.signature(function).parameters.get("rng_key")
    return (
        parameter is not None
        and parameter.kind is parameter.KEYWORD_ONLY
        and parameter.default in (None, parameter.empty)
    )


def _there(key: Any, losses: Losses) -> Any:
    if key is None:
        name = getattr(losses, "__name__", type(losses).__name__)
        raise TypeError(f"{name} takes a random key, but was called without: give it as rng_key=")
    return key
