"""A pair of functions as a model: haiku's transforms, or plain JAX."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

from learnax.models.model import Adapter
from learnax.utils import PyTree

_KEYS = ("key", "rng", "rng_key", "rngs")


class Functions(Adapter):
    """Two functions: `init(key, *arguments)` or `init(key)` gives parameters, `apply(params, *arguments)` an output.

    An `apply` whose parameter behind those is named `key`, `rng`, `rng_key` or `rngs` is given a random key there.

    Args:
        init: makes the parameters; or an object that has both functions, as haiku's `transform` gives it.
        apply: the model.
        stateful: whether `init` gives `(params, state)`, and `apply(params, state, ...)` gives `(output, state)`.
        batched: whether `apply` takes a device's share of a batch, leaves `(n, ...)`, or one datum at a time.
        inputs: how many parts of a datum that is a list it takes; see `learnax.models.model.Adapter`.
        train: keyword arguments of `apply` in training.
        eval: the same in evaluation.
        precision: see `learnax.models.model.Adapter`.
        remat: see `learnax.models.model.Adapter`.
    """

    def __init__(
        self,
        init: Any,
        apply: Callable[..., Any] | None = None,
        *,
        stateful: bool = False,
        batched: bool = False,
        inputs: int | str | None = None,
        train: Mapping[str, Any] | None = None,
        eval: Mapping[str, Any] | None = None,
        precision: str | None = None,
        remat: str | Callable[..., Any] | None = None,
    ):
        super().__init__(batched=batched, inputs=inputs, train=train, eval=eval, precision=precision, remat=remat)
        if apply is None:
            init, apply = getattr(init, "init", None), getattr(init, "apply", None)
        if not callable(init) or not callable(apply):
            raise TypeError("Functions takes init and apply, or an object that has both")
        self._init, self._apply = init, apply
        self.stateful = stateful
        behind = list(inspect.signature(apply).parameters.values())[1 + stateful :]
        self._keyed = bool(behind) and behind[0].name in _KEYS

    @property
    def called(self) -> Callable[..., Any]:
        """`apply`, behind its parameters, state and key."""
        skipped = 1 + self.stateful + self._keyed

        def call(*args: Any, **kwargs: Any) -> Any: ...

        parameters = list(inspect.signature(self._apply).parameters.values())
        kept = parameters[skipped:] if len(parameters) >= skipped else parameters
        call.__signature__ = inspect.Signature(kept)  # type: ignore[attr-defined]
        return call

    def init(self, key: jax.Array, *arguments: Any) -> tuple[PyTree, PyTree]:
        """What `init` makes."""
        arguments = self.taken(arguments)
        signature = inspect.signature(self._init)
        # haiku's takes the modes that its function takes.
        options = {name: value for name, value in self.train.items() if name in signature.parameters}
        try:
            signature.bind(key, *arguments, **options)
        except TypeError:
            arguments, options = (), {}
        made = self._init(key, *arguments, **options)
        params, state = made if self.stateful else (made, None)
        return params, state

    def _call(
        self, params: PyTree, model_state: PyTree, key: jax.Array, *arguments: Any, training: bool
    ) -> tuple[Any, PyTree]:
        given = (params, *((model_state,) if self.stateful else ()), *((key,) if self._keyed else ()))
        result = self._apply(*given, *arguments, **self.mode(training))
        if not self.stateful:
            return result, None
        output, after = result
        return output, after if training else model_state
