"""A flax NNX module as a model: split once, merged while a step is traced, never while it runs."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from learnax.models.model import Adapter, carried
from learnax.utils import PyTree


class NNX(Adapter):
    """A flax NNX module, with the values that it has.

    Its `nnx.Param`s are the parameters; its other variables are carried as `model_state`, but for those of its random
    streams: a step gives these fresh keys, drawn from the run's own, so that a run goes on as if it had not stopped.
    Training steps use the module as `module.train()` leaves it, evaluation as `module.eval()` does.

    Args:
        module: the module. After `Trainer.train`, and on `Trainer.sync_model()`, it holds the trained values.
        batched: whether it sees a device's share of a batch, leaves `(n, ...)`, or one datum at a time.
        inputs: how many parts of a datum that is a list it takes; see `learnax.models.model.Adapter`.
        train: keyword arguments of its call in training.
        eval: the same in evaluation.
        precision: see `learnax.models.model.Adapter`.
        remat: see `learnax.models.model.Adapter`.
    """

    holds_values = True

    def __init__(
        self,
        module: Any,
        *,
        batched: bool = False,
        inputs: int | str | None = None,
        train: Mapping[str, Any] | None = None,
        eval: Mapping[str, Any] | None = None,
        precision: str | None = None,
        remat: str | Callable[..., Any] | None = None,
    ):
        from flax import nnx

        super().__init__(batched=batched, inputs=inputs, train=train, eval=eval, precision=precision, remat=remat)
        if not isinstance(module, nnx.Module):
            raise TypeError(f"NNX takes a flax nnx module, but was given {module!r:.80}")
        self.module = module
        graph, *states = nnx.split(module, nnx.Param, nnx.RngState, ...)
        states = jax.tree.map(lambda leaf: leaf, states)  # variables of their own: those of the module change with it
        twin = nnx.merge(graph, *states)  # the modes are set on an object of its own, which shares the values
        self._graphs = {}
        for training, switch in ((True, twin.train), (False, twin.eval)):
            switch()
            self._graphs[training], *_ = nnx.split(twin, nnx.Param, nnx.RngState, ...)
        self._params, self._random, self._rest = states

    @property
    def called(self) -> Callable[..., Any]:
        """The module's `__call__`."""
        return self.module.__call__

    def init(self, key: jax.Array, *arguments: Any) -> tuple[PyTree, PyTree]:
        """The module's values: it was initialised when it was made."""
        return self.made()

    def made(self) -> tuple[PyTree, PyTree]:
        """The module's parameters, and what else it carries, or None."""
        from flax import nnx

        params, rest = (nnx.to_pure_dict(state) for state in (self._params, self._rest))
        return params, rest or None

    def _call(
        self, params: PyTree, model_state: PyTree, key: jax.Array, *arguments: Any, training: bool
    ) -> tuple[Any, PyTree]:
        from flax import nnx

        rest = self._rest if model_state is None else _filled(self._rest, model_state)
        states = [_filled(self._params, params), _reseeded(self._random, key), rest]
        module = nnx.merge(self._graphs[training], *states)
        output = module(*arguments, **self.mode(training))
        if not training:
            return output, model_state
        nnx.pop(module, nnx.Intermediate)  # what was sown is of this call
        graph, *after = nnx.split(module, nnx.Param, nnx.RngState, ...)
        name = type(self.module).__name__
        if model_state is not None:
            carried(name, nnx.to_pure_dict(after[-1]), model_state)
        if graph != self._graphs[True]:
            raise ValueError(
                f"{name}: its call changes the module's structure (an attribute that is no variable, a variable that "
                "was not there): a step is compiled once, and would not see it. Keep numbers that change in an "
                "nnx.Variable that is made in __init__"
            )
        return output, None if model_state is None else nnx.to_pure_dict(after[-1])

    def sync(self, params: PyTree, model_state: PyTree) -> None:
        """Puts values into the user's module."""
        from flax import nnx

        states = [_filled(self._params, params)]
        if model_state is not None:
            states.append(_filled(self._rest, model_state))
        nnx.update(self.module, *(jax.tree.map(jnp.array, state) for state in states))


def _filled(state: Any, values: PyTree) -> Any:
    """A state of NNX with other values: the variables' types and metadata stay."""
    from flax import nnx

    def found(path: tuple[Any, ...]) -> Any:
        value = values
        for part in path:
            value = value[part]
        return value

    return nnx.from_flat_state([(path, variable.replace(found(path))) for path, variable in nnx.to_flat_state(state)])


def _reseeded(state: Any, key: jax.Array) -> Any:
    """The state of random streams, each with a key of its own derived from one, and counted from 0."""
    from flax import nnx

    def fresh(path: tuple[Any, ...], variable: Any) -> Any:
        shape = np.shape(variable.get_value())
        if not isinstance(variable, nnx.RngKey):
            return variable.replace(jnp.zeros(shape, variable.get_value().dtype))
        own = jax.random.fold_in(key, zlib.crc32("/".join(map(str, path)).encode()))
        return variable.replace(jax.random.split(own, shape) if shape else own)

    return nnx.from_flat_state([(path, fresh(path, variable)) for path, variable in nnx.to_flat_state(state)])
