"""A flax linen module as a model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.errors import ModifyScopeVariableError

from learnax.models.model import Adapter, Model, carried
from learnax.models.streams import Apply, asked_streams, initialised, lifted_streams, rngs_of
from learnax.utils import PyTree


class Linen(Adapter):
    """A flax linen module. A bare one given to a trainer is `Linen(module, inputs="all")`.

    Every collection besides `params` is carried as `model_state`, and updated by training steps.

    Args:
        module: the module.
        batched: whether it sees a device's share of a batch, leaves `(n, ...)`, or one datum at a time.
        inputs: how many parts of a datum that is a list it takes; see `learnax.models.model.Adapter`.
        train: keyword arguments of its call in training, `{"train": True}` for instance.
        eval: the same in evaluation.
        streams: random streams that get a key of their own; by default those that a lifted transform splits. All
            others are drawn from the `params` stream, which is a key of the datum (of the share, where batched).
        precision: see `learnax.models.model.Adapter`.
        remat: see `learnax.models.model.Adapter`.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        batched: bool = False,
        inputs: int | str | None = None,
        train: Mapping[str, Any] | None = None,
        eval: Mapping[str, Any] | None = None,
        streams: Sequence[str] | None = None,
        precision: str | None = None,
        remat: str | Callable[..., Any] | None = None,
    ):
        super().__init__(batched=batched, inputs=inputs, train=train, eval=eval, precision=precision, remat=remat)
        if not isinstance(module, nn.Module):
            raise TypeError(f"Linen takes a flax linen module, but was given {module!r:.80}")
        self.module = module
        self.streams = None if streams is None else tuple(streams)
        self._once: dict[bool, Apply[Any]] = {}

    @property
    def called(self) -> Callable[..., Any]:
        """The module's `__call__`."""
        return self.module.__call__

    def init(self, key: jax.Array, *arguments: Any) -> tuple[PyTree, PyTree]:
        """The module's `params`, and its other collections, or None where there are none."""
        arguments = self.taken(arguments)
        variables = initialised(lambda rngs: self.module.init(rngs, *arguments, **self.train), key)
        others = {name: variables[name] for name in variables if name != "params"}
        return variables.get("params", {}), others or None

    def _call(
        self, params: PyTree, model_state: PyTree, key: jax.Array, *arguments: Any, training: bool
    ) -> tuple[Any, PyTree]:
        apply = self._once.get(training) or functools.partial(self._applied, training)
        streams = self.streams
        if streams is None:
            asked = asked_streams(apply, (params, model_state, arguments))[0]
            streams = lifted_streams(apply, (params, model_state, arguments), asked)
        return apply((params, model_state, arguments), rngs_of(key, streams))

    def _applied(self, training: bool, given: PyTree, rngs: dict[str, jax.Array]) -> tuple[Any, PyTree]:
        params, model_state, arguments = given
        mode = self.mode(training)
        if model_state is None:
            return self.module.apply({"params": params}, *arguments, rngs=rngs, **mode), None
        variables = {"params": params, **model_state}
        if not training:
            try:
                return self.module.apply(variables, *arguments, rngs=rngs, **mode), model_state
            except ModifyScopeVariableError as error:
                raise ValueError(
                    f"in evaluation the module writes to {', '.join(model_state)}: say how it is called, "
                    "Linen(module, train={'train': True}, eval={'train': False}) for instance"
                ) from error
        output, after = self.module.apply(variables, *arguments, rngs=rngs, mutable=list(model_state), **mode)
        carried(type(self.module).__name__, after, model_state)
        return output, {name: after[name] for name in model_state}

    def ready(self, params: PyTree, model_state: PyTree, *arguments: Any) -> tuple[Model, tuple[str, ...], PyTree]:
        """See `Model.ready`: it is the streams that are found out."""
        given = (params, model_state, self.taken(arguments))
        modes = (True, False) if self.train != self.eval or model_state is not None else (True,)
        asked, outputs = {}, {}
        streams: tuple[str, ...] = self.streams or ()
        known = copy.copy(self)
        # A jitted function is traced once for arguments of the same shapes: here, and not again for a step.
        known._once = {mode: jax.jit(functools.partial(self._applied, mode), inline=True) for mode in (True, False)}
        for training in modes:
            apply = known._once[training]
            asked[training], (outputs[training], _) = asked_streams(apply, given)
            if self.streams is None:
                own = lifted_streams(apply, given, asked[training])
                streams = (*streams, *(name for name in own if name not in streams))
        known.streams = streams
        return known, asked[modes[-1]], outputs[True]
