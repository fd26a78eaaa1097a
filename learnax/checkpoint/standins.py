"""What stands for the objects that a pickle names: classes that keep what they are given, and make those later."""

from __future__ import annotations

import functools
import re
import sys
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from learnax.step.state import TrainState

MOST_ARGUMENTS = 16
"""Of a call: no known one takes more, and a file may make one that has a million a million times over."""
_THREEFRY = "threefry2x32"


class Thawing(Protocol):
    """What makes the objects that stand-ins stand for, each once; `learnax.checkpoint.thaw.Thaw` is one."""

    plain: bool

    def __call__(self, value: Any) -> Any:
        """The object that a value of the file stands for."""

    def spend(self, nbytes: int) -> None:
        """Counts memory that is taken for a copy."""

    def items(self, items: Iterable[Iterable[Any]]) -> Iterable[tuple[Any, Any]]:
        """Made keys and values of a dict."""

    def key(self, key: Any) -> Any:
        """A made key."""


class OddError(ValueError):
    """Content that is understood, and not taken."""


def call(function: Any, args: Any) -> Any:
    """A stand-in of these arguments; nothing else is ever called."""
    if not (isinstance(function, type) and issubclass(function, StandIn)):
        raise ValueError(f"it calls a {name_of(function)}")
    if type(args) is not tuple or len(args) > MOST_ARGUMENTS:
        raise ValueError(f"it calls a {function.__name__.strip('_')} with other arguments than there can be")
    return function(*args)


def name_of(value: Any) -> str:
    """What a value is, for an error."""
    return type(value).__name__.strip("_")


class StandIn:
    """What a file says of one object: the arguments it is made with, the state it is given, the items set on it."""

    args: tuple[Any, ...]
    state: Any
    items: dict[Any, Any]

    def __new__(cls, *args: Any) -> Any:  # noqa: D102 - what a file calls
        made = super().__new__(cls)
        made.args, made.state, made.items = args, None, {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def build(self, thaw: Thawing) -> Any:
        """The object; most classes have none that may stand by itself."""
        raise OddError(f"it has a {name_of(self)} where none should be")


class Bytes(StandIn):
    """`bytes` before pickle protocol 3: `_codecs.encode(text, "latin1")`, or `bytes()` if empty."""

    def build(self, thaw: Thawing) -> bytes:
        """The bytes; a training state has none that stand by themselves."""
        if not thaw.plain:
            return super().build(thaw)
        return self.raw(thaw)

    def raw(self, thaw: Thawing) -> bytes:
        """The bytes."""
        thaw.spend(len(self.args[0]) if self.args else 0)
        return self.args[0].encode("latin1") if self.args else b""


class _Ndarray(StandIn):
    """`numpy.ndarray`, as the class of an array."""


class _Dtype(StandIn):
    """`numpy.dtype(kind and size, align, copy)`, with its byte order in its state."""

    def dtype(self, thaw: Thawing) -> np.dtype:
        kind, order = self.args[0], self.state[1]
        if isinstance(kind, type) and issubclass(kind, _Extended):
            return kind.extended
        if isinstance(kind, str) and re.fullmatch(r"[biufc][0-9]+", kind):
            return np.dtype(kind).newbyteorder(order)
        if thaw.plain and isinstance(kind, str) and re.fullmatch(r"[SU][1-9][0-9]*", kind):
            return np.dtype(kind).newbyteorder(order)
        raise OddError("it has an array that is not of numbers" + (" or text" if thaw.plain else ""))


class _Extended(StandIn):
    """A number type of `ml_dtypes`."""

    extended: ClassVar[np.dtype]


class Scalar(StandIn):
    """`scalar(dtype, data)`."""

    def build(self, thaw: Thawing) -> Any:
        """A number of numpy's; an array in a training state."""
        array = _array(thaw, self.args[0], (), self.args[1])
        return array[()] if thaw.plain else array


class _Buffer(StandIn):
    """`_frombuffer(data, dtype, shape, order, axes)`: an array in protocol 5."""

    def build(self, thaw: Thawing) -> np.ndarray:
        data, dtype, shape, order, *axes = self.args
        if order == "K":
            return _array(thaw, dtype, shape, data).transpose(*axes)
        return _array(thaw, dtype, shape, data, order)


class _Array(StandIn):
    """`_reconstruct(class, shape, kind)`, with a state: an array before protocol 5."""

    def build(self, thaw: Thawing) -> np.ndarray:
        if self.args[0] is not _Ndarray:
            raise OddError("it has an array of a class that is not numpy.ndarray")
        _, shape, dtype, fortran, data = self.state
        return _array(thaw, dtype, shape, data, "F" if fortran else "C")


class _JaxArray(StandIn):
    """`_reconstruct_array(numpy's _reconstruct, its arguments, its state, abstract value)`."""

    def build(self, thaw: Thawing) -> Any:
        make, args, state, _ = self.args
        if make is not _Array:
            raise OddError("it has a jax array that is not made from a numpy one")
        array = call(make, args)
        array.__setstate__(state)
        built = array.build(thaw)
        # One of 64 bits, where they are off, stays numpy: it would lose half of them.
        fits = jax.dtypes.canonicalize_dtype(built.dtype) == built.dtype
        return jax.numpy.asarray(built) if thaw.plain and fits else built


class _KeyPart(StandIn):
    """The kind of a typed random key, or a function of that kind."""


class _Key(StandIn):
    """A typed random key."""

    def build(self, thaw: Thawing) -> jax.Array:
        if _THREEFRY not in self.state["_impl"].args:
            raise OddError(f"it has a random key that is not of {_THREEFRY}")
        return jax.random.wrap_key_data(thaw(self.state["_base_array"]), impl=_THREEFRY)


class _FrozenDict(StandIn):
    """`FrozenDict(dict)`."""

    def build(self, thaw: Thawing) -> dict:
        (held,) = self.args
        made = thaw(held)
        if not isinstance(made, dict):
            raise OddError("it has a FrozenDict that is made of no dict")
        return made


class Ordered(StandIn):
    """`OrderedDict()`, with items set on it; before protocol 2, of a list of items."""

    def build(self, thaw: Thawing) -> OrderedDict:
        """The dict."""
        given = self.args[0] if self.args else ()
        thaw.spend(64 * len(given))
        given = given.items() if type(given) is dict else given
        return OrderedDict(thaw.items([*given, *self.items.items()]))


class _Set(StandIn):
    """`set(list)`, before protocol 4."""

    kind: ClassVar[type] = set

    def build(self, thaw: Thawing) -> Any:
        thaw.spend(64 * len(self.args[0]))
        return self.kind(map(thaw.key, self.args[0]))


class _Frozenset(_Set):
    kind = frozenset


class _Complex(StandIn):
    """`complex(real, imaginary)`."""

    def build(self, thaw: Thawing) -> complex:
        real, imaginary = self.args
        return complex(float(real), float(imaginary))


class _Bytearrays(StandIn):
    """`bytearray(bytes)`, before protocol 5."""

    def build(self, thaw: Thawing) -> bytearray:
        data = self.args[0] if self.args else b""
        data = data.raw(thaw) if isinstance(data, Bytes) else data
        if type(data) is not bytes:
            raise OddError(f"it has a bytearray that is made of a {name_of(data)}")
        thaw.spend(len(data))
        return bytearray(data)


class _Tuple(StandIn):
    """A NamedTuple of its fields."""

    named: ClassVar[Any]

    def build(self, thaw: Thawing) -> Any:
        if self.state is not None or self.items:
            raise OddError(f"it has a {self.named.__name__} with more than its fields")
        return self.named._make(self.fields(thaw))

    def fields(self, thaw: Thawing) -> Iterable[Any]:
        return thaw(self.args)


class _State(_Tuple):
    """A `TrainState`; the first one had no step, which is None here."""

    named = TrainState

    def build(self, thaw: Thawing) -> TrainState:
        if self.state is not None or self.items:
            return super().build(thaw)
        params, opt_state, *rest = thaw(self.args)
        return TrainState(params, opt_state, *(rest or [None]))


KNOWN: dict[tuple[str, str], type[StandIn]] = {
    ("_codecs", "encode"): Bytes,
    ("__builtin__", "bytes"): Bytes,
    ("builtins", "bytes"): Bytes,
    ("collections", "OrderedDict"): Ordered,
    ("flax.core.frozen_dict", "FrozenDict"): _FrozenDict,
    ("jax._src.array", "_reconstruct_array"): _JaxArray,
    ("jax._src.device_array", "reconstruct_device_array"): _JaxArray,
    ("numpy", "ndarray"): _Ndarray,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): Scalar,
    ("numpy.core.numeric", "_frombuffer"): _Buffer,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "scalar"): Scalar,
    ("numpy._core.numeric", "_frombuffer"): _Buffer,
    ("jax._src.prng", "PRNGKeyArray"): _Key,
    ("jax._src.random.prng", "PRNGKeyArray"): _Key,
    ("jax._src.prng", "PRNGImpl"): _KeyPart,
    ("jax._src.random.prng", "PRNGImpl"): _KeyPart,
    **{
        (module, f"threefry_{name}"): _KeyPart
        for module in ("jax._src.prng", "jax._src.random.threefry2x32")
        for name in ("seed", "split", "random_bits", "fold_in")
    },
}
PLAIN: dict[tuple[str, str], type[StandIn]] = {
    (module, cls.__name__.strip("_").removesuffix("s").lower()): cls
    for module in ("builtins", "__builtin__")
    for cls in (_Set, _Frozenset, _Complex, _Bytearrays)
}


def known(module: str, name: str) -> type[StandIn] | None:
    """The stand-in for what a file names; None for what is refused. Nothing is imported to find out."""
    package = module.split(".")[0]
    if package == "learnax" and name == "TrainState":
        return _State
    if package == "optax" and name in optax_states():
        return _optax_state(name)
    if module == "ml_dtypes" and re.fullmatch(r"(b?float|u?int)[0-9]\w{0,20}", name):
        return _extended(name)
    return KNOWN.get((module, name))


@functools.cache
def _optax_state(name: str) -> type[StandIn]:
    return type(name, (_Tuple,), {"named": optax_states()[name]})


@functools.lru_cache(64)
def _extended(name: str) -> type[StandIn] | None:
    try:
        return type(name, (_Extended,), {"extended": np.dtype(name)})
    except TypeError:
        return None


@functools.cache
def optax_states() -> dict[str, Any]:
    """optax's NamedTuples by name alone: they have moved between its modules, and no two share a name."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "optax"]
    return {
        member.__name__: member
        for module in modules
        for member in vars(module).values()
        if isinstance(member, type)
        and issubclass(member, tuple)
        and hasattr(member, "_fields")
        and member.__module__.startswith("optax.")
    }


def _array(thaw: Thawing, dtype: _Dtype, shape: tuple[int, ...], data: Any, order: Any = "C") -> np.ndarray:
    """An array on these bytes, in the machine's byte order; one that may be written to, where content is plain."""
    raw, kind = data.raw(thaw) if isinstance(data, Bytes) else data, dtype.dtype(thaw)
    array: np.ndarray = np.ndarray(shape, kind, raw, order=order)
    if array.shape != shape or array.nbytes != len(raw):  # numpy takes a length of -1 for "what fits"
        raise OddError(f"it has an array whose shape is not that of its {len(raw)} bytes")
    if kind.isnative and not thaw.plain:
        return array
    thaw.spend(array.nbytes)
    return array.astype(kind.newbyteorder("="))
