"""Optimisers that make no NaN of finite numbers: what is known of optax's own, part by part.

An update of such an optimiser is finite where gradients, parameters and its state are, short of parameters of 1e38: the
guard looks at the gradients alone, and the update is made once. What is not known here has its updates looked at before
they count, which makes them twice. A part is known by optax's name for its function and by what that closes over: where
another version of optax has other names, nothing is known, and all is looked at.

Each part is read in the order in which updates go through it, with the largest number that can come to it: a part that
squares, or multiplies, makes finite numbers of what is small enough alone. Numbers are float32 at least.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from learnax.utils import PyTree

_LARGEST = 1e37
"""What no update and no sum may exceed: a tenth of what float32 holds."""
_SQUARED = 5e18
"""The largest number that may be squared."""
_PARAMETER = 1e9
"""The largest parameter, where a part needs to know one: norms of parameters are finite then, and quotients of them."""
_TINY = 1e-15
"""More than any number whose square is 0: those pass where a norm is compared with a limit."""


@dataclasses.dataclass
class Conditions:
    """What has to hold when an update is made, beside finite gradients.

    Attributes:
        needed: without one of these the update is no good: rates above all. One of more than 1e12 counts as none.
        enough: where one of these does not hold, nothing is known of this update, and it is to be looked at.
        by_element: whether each element of an update comes from what is at its own place, and from numbers that are the
            same for all: it does not matter then in which shape they come.
    """

    needed: list[jax.Array] = dataclasses.field(default_factory=list)
    enough: list[jax.Array] = dataclasses.field(default_factory=list)
    by_element: bool = True


def conditions_of(optimizer: Any, opt_state: Any, params: PyTree, max_grad: float) -> Conditions | None:
    """What has to hold for finite updates; None where nobody knows.

    Args:
        optimizer: an optax transformation.
        opt_state: its state.
        params: what it trains.
        max_grad: the largest global norm of what it is given.
    """
    reading = _Reading(params)
    try:
        with jax.numpy_dtype_promotion("standard"):  # as for optax's schedules
            reading.part(optimizer, opt_state, _Size(2 * max_grad + _TINY))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # not the closure or state that was expected
        return None
    return reading.conditions()


class _UnknownError(ValueError):
    """A part, or one of its settings, of which nothing is known."""


class _Size(NamedTuple):
    """How large the numbers are that come to a part.

    Attributes:
        most: the largest.
        decays: whether it counts on parameters of no more than `_PARAMETER`.
    """

    most: float
    decays: bool = False


class _Reading:
    """Goes through the parts of an optimiser, and notes what has to hold.

    Args:
        params: what it trains.
    """

    def __init__(self, params: PyTree):
        self._params = jax.tree.leaves(params)
        self._found = Conditions()
        self._small_params = False
        self.root = math.sqrt(max((leaf.size for leaf in self._params), default=1))
        """The root of the elements of the largest leaf: a leaf's norm is no more than this times its largest number."""

    def conditions(self) -> Conditions:
        """All that was noted."""
        if self._small_params:
            # By sums of squares, which take less time than comparisons: a NaN or an infinity is in those, too.
            self._found.enough += [jnp.sum(jnp.square(leaf)) <= _PARAMETER**2 for leaf in self._params]
        return self._found

    def part(self, tx: Any, state: Any, size: _Size) -> _Size:
        """Reads a transformation, or one that is made of several.

        Args:
            tx: the transformation.
            state: its state.
            size: of what comes to it.

        Returns:
            The size of what it makes.

        Raises:
            _UnknownError: it is not known, or not with such settings or numbers.
        """
        if not getattr(tx.update, "__module__", "").startswith("optax."):
            raise _UnknownError
        name = tx.update.__qualname__.split(".")[0]
        held = {**_held(tx.init), **_held(tx.update)}
        self._found.by_element &= name in _BY_ELEMENT
        size = _KNOWN[name](self, held, state, size)
        if not size.most <= _LARGEST:
            raise _UnknownError
        return size

    # ---- what a part asks of its settings, each a number or, where it is injected, an array

    def within(self, value: Any, low: float, high: float) -> None:
        """A setting lies in a range."""
        if isinstance(value, (int, float)):
            if not low <= value <= high:
                raise _UnknownError
        else:
            value = _exact(value)
            self._found.enough.append(((value >= low) & (value <= high)).all())

    def rest(self, decay: Any) -> float:
        """A decay is less than 1, also in float32, where optax divides by `1 - decay**count`; what is left to 1."""
        self.within(decay, 0, 1 - 1e-6)
        return 1 - decay if isinstance(decay, (int, float)) else 1e-6

    def divisor(self, eps: Any) -> float:
        """What keeps a divisor from 0 does so; the least that it is."""
        least = eps if isinstance(eps, (int, float)) else 1e-20
        self.within(eps, max(least, 1e-30), 1e30)
        return least

    def limit(self, value: Any) -> float:
        """A limit of norms is one; the most that it is."""
        most = value if isinstance(value, (int, float)) else 1e6
        self.within(value, 1e-30, min(most, 1e30))
        return most

    def factor(self, value: Any, size: _Size) -> float:
        """A rate, or what else updates are multiplied by, is finite; the most that it is."""
        if isinstance(value, (int, float)):
            if not math.isfinite(value):
                raise _UnknownError
            return abs(value)
        most = min(1e12, _LARGEST / max(size.most, 1e-12))
        if most < 1e3:
            raise _UnknownError
        self._found.needed.append((jnp.abs(_exact(value)) <= most).all())
        return most

    def dtype(self, held: Any) -> None:
        """An accumulator has the type of the parameters, or float32."""
        if held is not None and held not in (jnp.float32, jnp.float64):
            raise _UnknownError

    def at_most(self, size: _Size, most: float) -> None:
        """What comes to a part is no larger than it can take."""
        if not size.most <= most:
            raise _UnknownError
        self._small_params |= size.decays

    def small_params(self) -> None:
        """The parameters' norms are finite."""
        self._small_params = True

    def before_end(self, count: Any) -> None:
        """A count of updates can still be counted on."""
        self._found.enough.append(count < np.iinfo(count.dtype).max)


def _exact(value: Any) -> jax.Array:
    value = jnp.asarray(value)
    if value.dtype not in (jnp.float32, jnp.float64, jnp.int32, jnp.int64):
        raise _UnknownError
    return value


def _held(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function closes over, and what the functions of its own among that do."""
    held = dict(inspect.getclosurevars(function).nonlocals)
    home = f"{function.__qualname__.split('.')[0]}.<locals>."
    inner = [value for value in held.values() if getattr(value, "__qualname__", "").startswith(home)]
    for value in inner:
        held = {**_held(value), **held}
    return held


_Held = dict[str, Any]
_Read = Callable[[_Reading, _Held, Any, _Size], _Size]


# ---- what is made of other transformations


def _chain(reading: _Reading, held: _Held, states: Any, size: _Size) -> _Size:
    for init, update, state in zip(held["init_fns"], held["update_fns"], states, strict=True):
        size = reading.part(_Pair(init, update), state, size)
    return size


class _Pair(NamedTuple):
    init: Callable[..., Any]
    update: Callable[..., Any]


def _partition(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    sizes = [size]
    for label, tx in held["transforms"].items():
        sizes.append(reading.part(tx, state.inner_states[label].inner_state, size))
    return _Size(max(size.most for size in sizes), any(size.decays for size in sizes))


def _masked(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    inner = reading.part(held["inner"], state.inner_state, size)
    return _Size(max(size.most, inner.most), size.decays or inner.decays)


def _injected(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    reading.dtype(held["hyperparam_dtype"])
    scheduled = {name: value(state.hyperparams_states[name]) for name, value in held["sched_hps"].items()}
    values = {name: jnp.asarray(value) for name, value in {**state.hyperparams, **scheduled}.items()}
    return reading.part(held["inner_factory"](**held["other_hps"], **values), state.inner_state, size)


# ---- what is linear, or has a limit


def _scale(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    return size._replace(most=size.most * reading.factor(held["step_size"], size))


def _schedule(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    return size._replace(most=size.most * reading.factor(jnp.asarray(held["step_size_fn"](state.count)), size))


def _decayed_weights(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    decay = held["weight_decay"]
    factor = reading.factor(jnp.asarray(decay(state.count)) if callable(decay) else decay, _Size(_PARAMETER))
    return _Size(size.most + factor * _PARAMETER, size.decays or factor != 0)


def _trace(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    reading.dtype(held["accumulator_dtype"])
    return size._replace(most=2 * size.most / reading.rest(held["decay"]))


def _average(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    reading.dtype(held["accumulator_dtype"])
    reading.rest(held["decay"])
    return size._replace(most=2 * size.most)


def _clip(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    reading.within(held["max_delta"], 0, _LARGEST)
    return size


def _clip_norm(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    # A norm that is not finite makes zeros of finite numbers.
    return _limited(size, reading.limit(held["max_norm"]))


def _clip_rms(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    # Divided by 1 at least; a mean of squares that is not finite makes zeros.
    return _limited(size, reading.limit(held["threshold"]) * reading.root)


def _limited(size: _Size, limit: float) -> _Size:
    return size._replace(most=min(size.most, 2 * limit + _TINY))


# ---- what divides by the root of squares


def _adam(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    # mu / (sqrt(nu) + eps): nu is a mean of squares, and eps keeps the divisor from 0.
    reading.dtype(held.get("mu_dtype"))
    reading.at_most(size, _SQUARED)
    reading.rest(held["b1"])
    reading.rest(held["b2"])
    reading.within(held["eps_root"], 0, 1e30)
    return _Size(4 * size.most / reading.divisor(held["eps"]))


def _radam(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    # The root is of something negative only where its result is not taken: below a threshold of 4.
    reading.within(held["threshold"], 4, math.inf)
    return _Size(max(4 * size.most, 2 * _adam(reading, held, state, size).most))


def _adan(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    reading.rest(held["b3"])
    return _Size(4 * _adam(reading, held, state, size._replace(most=4 * size.most)).most)


def _adamax(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    # Divided by a largest number, to which eps is added.
    reading.rest(held["b1"])
    reading.rest(held["b2"])
    return size._replace(most=2 * size.most / reading.divisor(held["eps"]))


def _novograd(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    decay = reading.factor(held["weight_decay"], _Size(_PARAMETER)) * _PARAMETER
    normed = _adam(reading, held, state, size._replace(most=size.most * reading.root)).most
    return _Size((normed + decay) / reading.rest(held["b1"]), decay != 0)


def _rms(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    reading.at_most(size, _SQUARED)
    reading.within(held["initial_scale"], 0, 1e30)
    reading.rest(held["decay"])
    eps = reading.divisor(held["eps"])
    return _Size(2 * size.most / (math.sqrt(eps) if held["eps_in_sqrt"] else eps))


def _rss(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    # The sum grows to infinity in the end, which makes zeros.
    reading.at_most(size, _SQUARED)
    return _Size(2 * size.most / math.sqrt(reading.divisor(held["eps"])))


def _lion(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    reading.dtype(held["mu_dtype"])
    reading.rest(held["b1"])
    reading.rest(held["b2"])
    if held.get("mode", "hard") != "hard":
        raise _UnknownError
    return _Size(1)


def _factored(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    # Means of squares plus epsilon are epsilon at least, from the first on, whose decay is 0. Divided by their own mean
    # they are no less than float32 holds, where gradients are no larger than 1e3.
    reading.at_most(size, 1e3)
    decay = held["decay_rate_fn"]
    if (decay.__module__, decay.__qualname__) != ("optax._src.factorized", "_decay_rate_pow"):
        raise _UnknownError
    reading.within(held["decay_rate"], 0, 10)
    reading.within(held["step_offset"], 0, 0)
    reading.within(held["epsilon"], 0.9e-30, 1)
    reading.before_end(state.count)
    return _Size(2 * size.most / 0.9e-30 * (size.most + 1))


# ---- what looks at whole matrices, or at parameters


def _trust_ratio(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    # A norm of updates that is not 0 is 3e-23 at least, the root of the least that float32 holds.
    reading.small_params()
    coefficient = held["trust_coefficient"]
    reading.within(coefficient, 0, 10)
    reading.within(held["min_norm"], 0, _PARAMETER)
    reading.within(held["eps"], 0, _PARAMETER)
    if reading.root > 1e5:
        raise _UnknownError
    return _Size(max(size.most, 1e5 * _PARAMETER * reading.root))


def _param_rms(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    reading.small_params()
    reading.within(held["min_scale"], 0, _PARAMETER)
    return _Size(size.most * _PARAMETER * 2)


def _param_norm(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    return _Size(_param_rms(reading, held, state, size).most * reading.root)


def _muon(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    # A matrix is divided by its norm, so that its singular values are 1 at most, and by these polynomials they stay
    # below 1.3. A norm that is not finite makes zeros.
    reading.dtype(held["mu_dtype"])
    reading.rest(held["beta"])
    reading.within(held["eps"], 1e-12, 1e30)
    usual = np.array([3.4445, -4.7750, 2.0315], np.float32)
    plain = held["preconditioning"] == "frobenius" and not held["adaptive"] and state.ns_coeffs.shape == usual.shape
    if not plain or not isinstance(held["ns_steps"], int):
        raise _UnknownError
    reading.within(jnp.abs(state.ns_coeffs - usual), 0, 1e-5)
    return _Size(4)


def _shape(reading: _Reading, held: _Held, state: Any, size: _Size) -> _Size:
    own = held["consistent_rms"]
    factor = 1 if own is None else reading.factor(own, size)
    return size._replace(most=size.most * factor * reading.root)


_KNOWN: dict[str, _Read] = {
    "chain": _chain,
    "partition": _partition,
    "masked": _masked,
    "inject_hyperparams": _injected,
    "with_extra_args_support": lambda reading, held, state, size: reading.part(held["tx"], state, size),
    "identity": lambda reading, held, state, size: size,
    "set_to_zero": lambda reading, held, state, size: _Size(0),
    "scale": _scale,
    "scale_by_schedule": _schedule,
    "add_decayed_weights": _decayed_weights,
    "trace": _trace,
    "ema": _average,
    "clip": _clip,
    "clip_by_global_norm": _clip_norm,
    "clip_by_block_rms": _clip_rms,
    "scale_by_sign": lambda reading, held, state, size: _Size(1),
    "scale_by_adam": _adam,
    "scale_by_amsgrad": _adam,
    "scale_by_radam": _radam,
    "scale_by_adan": _adan,
    "scale_by_adamax": _adamax,
    "scale_by_belief": _adam,
    "scale_by_novograd": _novograd,
    "scale_by_rms": _rms,
    "scale_by_rss": _rss,
    "scale_by_lion": _lion,
    "scale_by_factored_rms": _factored,
    "scale_by_trust_ratio": _trust_ratio,
    "scale_by_param_block_rms": _param_rms,
    "scale_by_param_block_norm": _param_norm,
    "scale_by_muon": _muon,
    "scale_by_shape": _shape,
}
"""By optax's name of what makes the part: how large its updates are, or that nobody knows."""

_BY_ELEMENT = {
    "chain",
    "inject_hyperparams",
    "with_extra_args_support",
    "identity",
    "set_to_zero",
    "scale",
    "scale_by_schedule",
    "add_decayed_weights",
    "trace",
    "ema",
    "clip",
    "clip_by_global_norm",
    "scale_by_sign",
    "scale_by_adam",
    "scale_by_amsgrad",
    "scale_by_radam",
    "scale_by_adan",
    "scale_by_adamax",
    "scale_by_belief",
    "scale_by_rms",
    "scale_by_rss",
    "scale_by_lion",
}
"""Of these, those that treat each element alone, and make zeros of zeros."""
