"""Probes: a function of a training step, compiled, that changes no bit of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from learnax import checks
from learnax.hooks.given import Hook, HookError, Returned, whole_number
from learnax.hooks.moment import Moment
from learnax.step import View

MOST = 1 << 16
"""Elements of the largest array that a probe may return."""
_CALLS_BACK = ("io_callback", "pure_callback", "debug_callback", "debug_print")


class Probe(Hook):
    """Looks into every `every`-th training step: its gradients, updates, outputs.

    The function is compiled into a program of its own, which is dispatched right before the step, on the same state,
    random keys and batch. It computes gradients and updates once more, so that a step that is looked into takes about
    twice as long; the steps between pay nothing, and the run keeps its bits. What is seen is that of the step but for
    rounding: another program may add in another order. Without `then` nothing waits for it: its metrics join those of
    the step when these are read, and `every` counts all training steps, those whose update is dropped included.

    Args:
        every: steps from one look to the next, 1 or more: at `every`, 2 `every`, ...
        function: `view -> dict` of scalars, or of arrays of at most 65,536 elements; pure, of JAX's operations alone.
            For what a view has, see `learnax.hooks.View`.
        name: by default the function's. A scalar `x` becomes the metric `train/<name>/x`.
        then: `(moment, values) -> dict of metrics, or None`, called on the host right after the step with all that the
            function returned, as numpy arrays. Arrays need one, for they are no metrics.
        everywhere: whether all processes call `then`; else the first one alone does.

    Raises:
        TypeError, ValueError: `every` is no whole number above 0, or something cannot be called.
    """

    def __init__(
        self,
        every: int,
        function: Callable[[View], Mapping[str, Any]],
        name: str | None = None,
        *,
        then: Callable[[Moment, dict[str, np.ndarray]], Returned] | None = None,
        everywhere: bool = False,
    ):
        kind = type(self).__name__
        self._every = whole_number(f"{kind}: every", every)
        for what, given in (("function", function), ("then", then)):
            if not callable(given) and not (given is None and what == "then"):
                raise TypeError(f"{kind}: {what} must be callable, but is {given!r}")
        self._function, self._then, self.everywhere = function, then, everywhere
        self.name = name or getattr(function, "__name__", type(function).__name__)

    @property
    def late(self) -> bool:
        """Whether nothing on the host is due at its steps: all that comes of it is metrics of numbers."""
        own = type(self)
        return self._then is None and own.seen is Probe.seen and own.next_due is Probe.next_due

    def next_due(self, step: int) -> float:
        """The next multiple of `every`."""
        return step - step % self._every + self._every

    def look(self, view: View) -> dict[str, jax.Array]:
        """Calls the function, while the program is traced.

        Raises:
            HookError: it raised, returned something else than it is to, or does work on the host.
        """
        values = self._called(view)
        traced = jax.make_jaxpr(self._called)(view)
        calls = sorted(set(checks.primitives_of(traced.jaxpr)) & set(_CALLS_BACK))
        if calls or traced.jaxpr.effects:
            what = ", ".join(calls) or ", ".join(map(str, traced.jaxpr.effects))
            raise HookError(
                f"probe {self.name!r} works on the host ({what}), for which the device would wait at each look; return "
                "what is to be looked at there, and take it in then=function(moment, values)"
            )
        return values

    def seen(self, moment: Moment, values: dict[str, np.ndarray]) -> Returned:
        """Takes what the function made of a step; returns what joins its metrics."""
        metrics = self.metrics_of(values)
        more = None if self._then is None else self._then(moment, values)
        if more is None or not isinstance(more, Mapping):
            return metrics if more is None else more
        return {**metrics, **more}

    def metrics_of(self, values: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The scalars among what the function made of a step, under their names."""
        return {f"{self.name}/{name}": float(value) for name, value in values.items() if not value.ndim}

    def _called(self, view: View) -> dict[str, jax.Array]:
        who = f"probe {self.name!r}"
        try:
            returned = self._function(view)
        except Exception as error:
            lines = checks.value_lines(error, "a probe is", [])
            raise HookError("\n".join([f"{who} failed while it was traced: {checks.raised(error)}", *lines])) from error
        if not isinstance(returned, Mapping):
            raise HookError(f"{who} must return a dict of scalars or arrays, but returned {checks.what_is(returned)}")
        values: dict[str, jax.Array] = {}
        for name, value in returned.items():
            if not isinstance(name, str):
                raise HookError(f"{who} returned the name {name!r}, but names are text: write {str(name)!r}")
            values[name] = self._checked(f"{who} returned for {name!r}", value)
        return values

    def _checked(self, what: str, value: Any) -> jax.Array:
        is_array = isinstance(value, (jax.Array, np.ndarray, np.generic, bool, int, float))
        if not is_array or not (jnp.isrealobj(value) and jnp.result_type(value).kind in "biufV"):
            raise HookError(f"{what} {checks.what_is(value)}, but values are real numbers, or arrays of them")
        array = jnp.asarray(value)
        if array.size > MOST:
            raise HookError(
                f"{what} {checks.what_is(value)}, which has {array.size} elements; at most {MOST} leave the device: "
                "return its norm, or a histogram (jnp.histogram) for instance"
            )
        if array.ndim and self._then is None:
            raise HookError(
                f"{what} {checks.what_is(value)}, which is no scalar to become a metric, and nothing takes it: give "
                "then=function(moment, values), or reduce it"
            )
        return array
