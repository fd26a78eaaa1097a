"""An Equinox module as a model."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

from learnax.models.model import Adapter
from learnax.utils import PyTree

_logger = logging.getLogger("learnax")


class Equinox(Adapter):
    """An Equinox module, with the values that it has.

    It sees one datum at a time, as Equinox's modules do, under a map whose axis is named "batch"; its
    `eqx.nn.BatchNorm(axis_name="batch")` are those of a device's share. A parameter `key` of its call gets a random
    key.

    Args:
        module: the module. It is not changed; `merged` makes one with trained values.
        state: its `eqx.nn.State`, from `eqx.nn.make_with_state`; given to a parameter `state` of its call, which then
            returns `(output, state)`.
        filter: which leaves are trained, as for `eqx.partition`; by default `eqx.is_inexact_array`.
        batched: whether its call takes a device's share of a batch, leaves `(n, ...)`.
        inputs: how many parts of a datum that is a list it takes; see `learnax.models.model.Adapter`.
        train: keyword arguments of its call in training, beside `eqx.nn.inference_mode(module, False)`.
        eval: the same in evaluation, beside `eqx.nn.inference_mode(module, True)`.
        precision: see `learnax.models.model.Adapter`.
        remat: see `learnax.models.model.Adapter`.
    """

    def __init__(
        self,
        module: Any,
        *,
        state: Any = None,
        filter: Any = None,
        batched: bool = False,
        inputs: int | str | None = None,
        train: Mapping[str, Any] | None = None,
        eval: Mapping[str, Any] | None = None,
        precision: str | None = None,
        remat: str | Callable[..., Any] | None = None,
    ):
        import equinox

        super().__init__(batched=batched, inputs=inputs, train=train, eval=eval, precision=precision, remat=remat)
        if not isinstance(module, equinox.Module) or not callable(module):
            raise TypeError(f"Equinox takes an equinox module that can be called, but was given {module!r:.80}")
        self.module = module
        self._state = state
        self._keyed = "key" in inspect.signature(self.called).parameters
        chosen = equinox.is_inexact_array if filter is None else filter
        self._params = equinox.partition(module, chosen)[0]
        modes = {training: equinox.nn.inference_mode(module, value=not training) for training in (True, False)}
        self._rest = {training: equinox.partition(of_mode, chosen)[1] for training, of_mode in modes.items()}
        floats = [name for name, value in vars(module).items() if isinstance(value, float)]
        if floats and not type(module).__module__.startswith("equinox."):
            _logger.warning(
                "%s: %s: a Python number, which is no array, and is not trained; jnp.asarray(...) makes it a "
                "parameter, eqx.field(static=True) says that it is none",
                type(module).__name__,
                ", ".join(floats),
            )

    @property
    def called(self) -> Callable[..., Any]:
        """The module's `__call__`."""
        return self.module.__call__

    def init(self, key: jax.Array, *arguments: Any) -> tuple[PyTree, PyTree]:
        """The module's values: it was initialised when it was made."""
        return self.made()

    def made(self) -> tuple[PyTree, PyTree]:
        """The module with its trained leaves alone, and its state, or None."""
        return self._params, self._state

    def merged(self, params: PyTree, *, training: bool = False) -> Any:
        """The module with these parameters, `trainer.train_state.params` for instance."""
        import equinox

        return equinox.combine(params, self._rest[training])

    def _call(
        self, params: PyTree, model_state: PyTree, key: jax.Array, *arguments: Any, training: bool
    ) -> tuple[Any, PyTree]:
        with jax.numpy_dtype_promotion("standard"):  # Equinox's own arithmetic is not clean under "strict"
            return self._called(params, model_state, key, *arguments, training=training)

    def _called(
        self, params: PyTree, model_state: PyTree, key: jax.Array, *arguments: Any, training: bool
    ) -> tuple[Any, PyTree]:
        options = self.mode(training) | ({"key": key} if self._keyed else {})
        module = self.merged(params, training=training)
        if model_state is None:
            return module(*arguments, **options), None
        # A state can be used once; this one is looked at again behind the call.
        leaves, structure = jax.tree.flatten(model_state)
        output, after = module(*arguments, state=jax.tree.unflatten(structure, leaves), **options)
        return output, after if training else model_state
