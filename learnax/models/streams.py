"""The random streams of a flax linen module: which it asks for, and which need a key of their own."""

from __future__ import annotations

import contextlib
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.extend.core
from flax.core import Scope
from flax.errors import InvalidRngError
from jax.extend.core import Literal

from learnax.utils import PyTree, any_key

T = TypeVar("T")
Rngs = dict[str, jax.Array]
Apply = Callable[[PyTree, Rngs], T]
"""A module's call on what it is given (its variables and arguments), with a key for each of some streams."""
_LOCK = threading.Lock()

_ASKS = re.compile(r'needs PRNG for "(.*)"')


def rngs_of(key: jax.Array, streams: tuple[str, ...]) -> dict[str, jax.Array]:
    """What a module is applied with.

    flax draws from `params` where a stream that is asked for is not given, so that key alone serves all of them.

    Args:
        key: of one datum.
        streams: those that get a key of their own, see `lifted_streams`.
    """
    return {"params": key, **{name: jax.random.fold_in(key, zlib.crc32(name.encode())) for name in streams}}


def initialised(init: Callable[[Rngs], T], key: jax.Array) -> T:
    """A module's fresh variables, drawn from `key`."""
    return _with_streams(lambda streams: init(rngs_of(key, streams)))[0]


def asked_streams(apply: Apply[Any], given: PyTree) -> tuple[tuple[str, ...], PyTree]:
    """The random streams that a module draws from, by name, and its output's shapes; traced, not computed.

    Raises:
        Exception: what the module raises.
    """
    key = any_key()
    with _recording() as asked:
        output, _ = _with_streams(lambda streams: jax.eval_shape(_keyed(apply, ("params", *streams)), given, key))
    return tuple(asked), output


def lifted_streams(apply: Apply[Any], given: PyTree, asked: tuple[str, ...]) -> tuple[str, ...]:
    """Of the streams that a module draws from, those that one of its lifted transforms splits, or lets in alone.

    `nn.RNN`, `nn.scan`, `nn.vmap` split a stream that their `split_rngs` names only where it is given: by the
    `params` stream alone, which they are told not to split, every step and every row would draw the same.
    """
    others = [name for name in asked if name != "params"]
    if not others:
        return ()
    plain, needed = _with_streams(lambda streams: _splits(apply, given, ("params", *streams)))
    return tuple(name for name in others if name in needed or _splits(apply, given, ("params", *needed, name)) > plain)


@contextlib.contextmanager
def _recording() -> Iterator[dict[str, None]]:
    """Notes the streams that modules ask for inside; flax itself tells of those alone that it has no key for."""
    asked: dict[str, None] = {}
    with _LOCK:
        make_rng = Scope.make_rng

        def noted(scope: Scope, name: str = "params") -> Any:
            asked[name] = None
            return make_rng(scope, name)

        Scope.make_rng = noted  # type: ignore[method-assign, assignment]
        try:
            yield asked
        finally:
            Scope.make_rng = make_rng  # type: ignore[method-assign]


def _with_streams(call: Callable[[tuple[str, ...]], T]) -> tuple[T, tuple[str, ...]]:
    """Calls a function with the streams without which flax raises; what it returns, and those streams."""
    streams: tuple[str, ...] = ()
    while True:
        try:
            return call(streams), streams
        except InvalidRngError as error:
            found = _ASKS.search(str(error))
            if found is None or found[1] in streams:
                raise
            streams = (*streams, found[1])


def _keyed(apply: Apply[T], streams: tuple[str, ...]) -> Callable[[PyTree, jax.Array], T]:
    return lambda given, key: apply(given, dict.fromkeys(streams, key))


def _splits(apply: Apply[Any], given: PyTree, streams: tuple[str, ...]) -> int:
    """How often a key is split, or a number that is not constant is folded into one: what a lift does for a stream."""
    return _count(jax.make_jaxpr(_keyed(apply, streams))(given, any_key()).jaxpr)


def _count(jaxpr: Any) -> int:
    own = sum(
        equation.primitive.name == "random_split"
        or (equation.primitive.name == "random_fold_in" and not isinstance(equation.invars[1], Literal))
        for equation in jaxpr.eqns
    )
    return own + sum(map(_count, jax.extend.core.subjaxprs(jaxpr)))
