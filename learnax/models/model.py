"""What a model is to a run: two pure functions. And what all adapters have in common."""

from __future__ import annotations

import abc
import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from learnax.utils import PyTree, any_key

HALF = {"bf16": jnp.bfloat16, "fp16": jnp.float16}
"""What `precision` names."""
BATCH_AXIS = "batch"
"""The mapped axis over the data of a device's share, where a model sees one datum at a time."""


class Model(abc.ABC):
    """A model as pure functions. Subclass it for one that no adapter fits.

    Attributes:
        batched: whether the arguments are a device's share of a batch, leaves `(n, ...)`, or those of one datum.
        scaled: whether the loss is scaled for the gradient, as half precision with few exponents needs.
        holds_values: whether the user's object has values of its own, which `sync` sets.
    """

    batched: bool = False
    scaled: bool = False
    holds_values: bool = False

    @abc.abstractmethod
    def init(self, key: jax.Array, *arguments: Any) -> tuple[PyTree, PyTree]:
        """`(params, model_state)` from a random key; `model_state` is None where nothing else is carried on.

        A model that is batched is given arguments of one datum, leaves `(1, ...)`.
        """

    @abc.abstractmethod
    def apply(
        self, params: PyTree, model_state: PyTree, key: jax.Array, *arguments: Any, training: bool
    ) -> tuple[Any, PyTree]:
        """`(output, model_state)`: what the model makes of its arguments, and what it carries on after that.

        The latter is taken over by training steps alone, and has the structure, shapes and dtypes of what came in.
        """

    def made(self) -> tuple[PyTree, PyTree] | None:
        """`(params, model_state)` of an object that is initialised already; None where `init` makes them."""
        return None

    def ready(self, params: PyTree, model_state: PyTree, *arguments: Any) -> tuple[Model, tuple[str, ...], PyTree]:
        """Looks at the model on some arguments, traced and not computed.

        Returns:
            The model with what was found out kept; the random streams that it draws from in evaluation, by name; its
            output's shapes in training.
        """
        outputs = []
        for training in (False, True):
            apply = functools.partial(self.apply, training=training)
            outputs.append(jax.eval_shape(apply, params, model_state, any_key(), *arguments)[0])
        return self, (), outputs[-1]

    def sync(self, params: PyTree, model_state: PyTree) -> None:
        """Puts trained values into the user's object, where that holds values."""
        del params, model_state


class Adapter(Model):
    """What the adapters have in common: arguments, modes, precision, rematerialisation.

    Args:
        batched: see `Model`.
        inputs: how many parts of a datum that is a list the model takes, from the first; "all"; or None for as many as
            its call has places for.
        train: keyword arguments of the model's call in training.
        eval: the same in evaluation.
        precision: None computes in the types that there are; "bf16" or "fp16" in half precision, from parameters
            that stay float32, with outputs in float32. "fp16" scales the loss for the gradient.
        remat: which values the backward pass keeps and which it computes again: the name of a policy of
            `jax.checkpoint_policies`, or one itself; None keeps all.

    Raises:
        ValueError: an unknown precision or policy.
        TypeError: a mode that is no mapping.
    """

    def __init__(
        self,
        *,
        batched: bool = False,
        inputs: int | str | None = None,
        train: Mapping[str, Any] | None = None,
        eval: Mapping[str, Any] | None = None,
        precision: str | None = None,
        remat: str | Callable[..., Any] | None = None,
    ):
        what = type(self).__name__
        for name, mode in (("train", train), ("eval", eval)):
            if mode is not None and not isinstance(mode, Mapping):
                raise TypeError(
                    f"{what}: {name} must be keyword arguments of the model's call, {name}={{'train': "
                    f"{name == 'train'}}} for instance, but is {mode!r}"
                )
        if precision is not None and precision not in HALF:
            raise ValueError(f"{what}: precision must be None, 'bf16' or 'fp16', but is {precision!r}")
        if inputs is not None and inputs != "all" and (isinstance(inputs, (bool, str)) or inputs < 1):
            raise ValueError(f"{what}: inputs must be a number of a datum's parts, 'all' or None, but is {inputs!r}")
        self.batched = bool(batched)
        self.inputs = inputs
        self.train, self.eval = dict(train or {}), dict(eval or {})
        self.precision = precision
        self.remat = remat
        self.scaled = precision == "fp16"
        self._policy = policy_of(what, remat)

    @abc.abstractmethod
    def _call(
        self, params: PyTree, model_state: PyTree, key: jax.Array, *arguments: Any, training: bool
    ) -> tuple[Any, PyTree]:
        """`apply`, of the arguments that the model takes, in the types that they have."""

    @property
    @abc.abstractmethod
    def called(self) -> Callable[..., Any]:
        """The user's call, whose signature says what the model takes."""

    def apply(
        self, params: PyTree, model_state: PyTree, key: jax.Array, *arguments: Any, training: bool
    ) -> tuple[Any, PyTree]:
        """See `Model.apply`."""
        arguments = self.taken(arguments)
        call: Callable[..., Any] = functools.partial(self._call, training=training)
        if self.remat is not None and training:
            call = jax.checkpoint(call, policy=self._policy)
        if self.precision is None:
            output, after = call(params, model_state, key, *arguments)
        else:
            half = HALF[self.precision]
            output, after = call(narrow(params, half), model_state, key, *narrow(arguments, half))
            output = jax.tree.map(lambda x: x.astype(jnp.float32) if _has_type(x, half) else x, output)
        if training and model_state is not None:
            after = jax.tree.map(lambda new, old: jnp.asarray(new).astype(old.dtype), after, model_state)
        return output, after

    def with_remat(self, policy: str) -> Adapter:
        """The same model with another rematerialisation."""
        other = copy.copy(self)
        other.remat, other._policy = policy, policy_of(type(self).__name__, policy)
        return other

    def mode(self, training: bool) -> dict[str, Any]:
        """The keyword arguments of a call."""
        return self.train if training else self.eval

    def taken(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Those parts of a datum that the model takes."""
        count = places(self.called, {*self.train, *self.eval}) if self.inputs is None else self.inputs
        return tuple(arguments) if isinstance(count, str) else tuple(arguments[:count])


def places(call: Callable[..., Any], named: set[str]) -> int | str:
    """How many of a datum's parts a call has places for: its positional parameters, but for those of modes and keys.

    Args:
        call: the model's.
        named: parameters that are given by name.
    """
    parameters = inspect.signature(call).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return "all"
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len([name for name in positional if name not in named and name not in _NO_DATA])


MODES = ("train", "training", "is_training", "deterministic", "use_running_average", "inference", "eval")
"""What models call an argument that is no part of a datum, but says how they run."""
_NO_DATA = (*MODES, "key", "state", "rngs", "out_sharding")
"""What calls of flax and equinox name that is no part of a datum."""


def policy_of(what: str, remat: Any) -> Callable[..., Any] | None:
    """The checkpoint policy that is named; a ValueError for a name that is none."""
    if remat is None or callable(remat):
        return remat
    # Of those with a capital or an argument of names, none can be had by name alone.
    known = [
        name
        for name in dir(jax.checkpoint_policies)
        if not name.startswith(("_", "save_", "offload_", "Offloadable", "Recompute", "Saveable"))
    ]
    if remat not in known:
        raise ValueError(
            f"{what}: remat must name a policy of jax.checkpoint_policies, one of {', '.join(known)}, "
            f"or be one, but is {remat!r}"
        )
    policy: Callable[..., Any] = getattr(jax.checkpoint_policies, remat)
    return policy


def narrow(tree: PyTree, half: Any) -> PyTree:
    """float32 numbers in half precision; all else as it is."""
    return jax.tree.map(lambda x: x.astype(half) if _has_type(x, jnp.float32) else x, tree)


def _has_type(leaf: Any, dtype: Any) -> bool:
    return getattr(leaf, "dtype", None) == dtype


def carried(what: str, after: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Checks that what a model carries on has the shape of what came in.

    Raises:
        ValueError: it has not; the part is named.
    """
    for name in before:
        new, old = jax.tree.map(jnp.shape, after.get(name)), jax.tree.map(jnp.shape, before[name])
        if new != old:
            raise ValueError(
                f"{what}: what it carries from step to step must keep its structure and shapes, but {name!r} was "
                f"{old} and is {new} after a call; values that are sown grow with each call, and belong into the output"
            )
