"""What a run minimises: losses of one datum, and pipes of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Losses = Callable[..., tuple[Any, Any, Mapping[str, Any]]]


class LossFunction:
    """A loss of one datum: implement `_call(output, batch)`, or override `__call__` itself.

    Args:
        weight: factor on the loss.
        scheduler: `step -> factor` on the loss, an optax schedule for one; None is 1.
    """

    # Class attributes, so that a subclass need not call `super().__init__`.
    weight: float = 1.0
    scheduler: Callable[[Any], Any] | None = None

    def __init__(self, weight: float = 1.0, scheduler: Callable[[Any], Any] | None = None):
        self.weight = weight
        self.scheduler = scheduler

    def _call(self, output: Any, batch: Any) -> tuple[Any, Any, dict[str, Any]]:
        """The unweighted loss.

        Args:
            output: the model's output for one datum.
            batch: that datum, always as a list.

        Returns:
            `(output, loss, metrics)`: the output handed on, a scalar, and a dict of scalars.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement _call(output, batch) or override __call__")

    def __call__(self, output: Any, batch: Any, step: Any = 0) -> tuple[Any, Any, dict[str, Any]]:
        """The loss times `weight` times `scheduler(step)`; `step` counts the updates before this one."""
        output, loss, metrics = self._call(output, batch)
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

    def __call__(self, output: Any, batch: Any, step: Any = 0) -> tuple[Any, Any, dict[str, Any]]:
        """`(output, sum of the losses, all metrics)`; of two metrics of one name the later loss's stays."""
        if self.transform is not None:
            output = self.transform(output)
        total: Any = 0.0
        merged: dict[str, Any] = {}
        for loss_fn in self.loss_list:
            output, loss, metrics = call_loss(loss_fn, output, batch, step)
            total = total + loss
            merged.update(metrics)
        return output, total, merged


def call_loss(losses: Losses, output: Any, batch: Any, step: Any) -> tuple[Any, Any, Mapping[str, Any]]:
    """Calls a loss with the step where its signature takes one, and without where it does not.

    It takes one by the name `step`, as a third argument without a default, or among `*args` or `**kwargs`.
    """
    parameters = inspect.signature(losses).parameters
    kinds = {p.kind for p in parameters.values()}
    if "step" in parameters or inspect.Parameter.VAR_KEYWORD in kinds:
        return losses(output, batch, step=step)
    required = [p for p in parameters.values() if p.default is p.empty]
    if len(required) >= 3 or inspect.Parameter.VAR_POSITIONAL in kinds:
        return losses(output, batch, step)
    return losses(output, batch)
