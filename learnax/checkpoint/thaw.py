"""Pickles, read without running what a pickle asks to be run.

A pickle names functions and classes, and calls them. Here every name stands for a class of this module that only
keeps what it is given; names outside of the few that are known are refused. Once the file is read, the arrays and
containers are made from what was kept, each once, however often the file refers to it: what a file can make this
take, in time and in memory, grows with the file's size and no faster.
"""

from __future__ import annotations

import functools
import pickle
import re
import sys
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any, BinaryIO, ClassVar

import jax
import numpy as np

from learnax.checkpoint.files import DamagedError
from learnax.state import TrainState

_THREEFRY = "threefry2x32"
_MOST_VALUES = 1_000_000
"""Of a training state: a file of a kilobyte can hold one list a billion times over."""
_DEEPEST = 100
"""Containers in containers: each takes some of Python's stack."""
_MOST_ARGUMENTS = 16
"""Of a call: no known one takes more, and a file may make one that has a million a million times over."""
_MOST_TUPLE_KEYS = 10_000
"""Tuples can be made so that all have one hash, and are then compared each with each."""


def read_plain(path: Path) -> Any:
    """Reads a pickle of plain content: what was pickled, with nothing run.

    Numbers, text, bytes, None, numpy and jax arrays, numpy's numbers, and dicts, lists, tuples and sets of these come
    back as they were; a flax `FrozenDict` comes as a dict.

    Raises:
        ValueError: the file has something else; its class is named.
        DamagedError: the file is torn, or is no pickle.
        OSError: the file cannot be opened.
    """
    try:
        return read(path, plain=True)
    except _OddError as error:
        raise RefusedError(path, str(error), plain=True) from error
    except (RefusedError, OSError):
        raise
    except Exception as error:  # of a torn pickle nearly any kind
        raise damaged(path, error, "a pickle", "write it again") from error


def read(path: Path, *, plain: bool) -> Any:
    """What a file holds: plain content, or what a training state is made of, with numpy leaves."""
    with path.open("rb") as file:
        held = _Unpickler(file, path, plain=plain).load()
        return Thaw(path.stat().st_size, plain=plain)(held)


def damaged(path: Path, error: Exception, kind: str, way_out: str) -> DamagedError:
    """What is said of a file that cannot be read."""
    what = f"{type(error).__name__}: {error}".rstrip(": ").removeprefix("_OddError: ").removeprefix("ValueError: ")
    return DamagedError(f"{path} ({path.stat().st_size} bytes) is torn, or is not {kind}: {what[:300]}; {way_out}")


class RefusedError(ValueError):
    """A file that was not read, for what it holds."""

    def __init__(self, path: Path, what: str, *, plain: bool):
        if plain:
            text = (
                "which is not plain; reading runs no code, so only numbers, text, bytes, numpy and jax arrays, and "
                "dicts, lists, tuples and sets of these are read. If you trust the file, read it with a function of "
                "your own: read_fn=lambda path: pickle.loads(path.read_bytes())"
            )
        else:
            text = (
                "which no training state needs; opening a checkpoint runs no code but that of known containers (numpy "
                "and jax arrays, flax dicts, optax states). If the file is yours, load it with the versions that "
                "wrote it, save the parameters there as numpy arrays (numpy.savez), and give those to the model here"
            )
        super().__init__(f"{path} was not read: it has {what.removeprefix('it has ')}, {text}")


class _OddError(ValueError):
    """Content that is understood, and not taken."""


class _Keys:
    """Looks at what is to be a key before it is hashed: to hash a deep tuple ends the process."""

    def __init__(self, *, plain: bool):
        self._plain = plain
        self._tuples = 0

    def __call__(self, keys: Iterable[Any]) -> None:
        for key in keys:
            if type(key) is str or self._is_plain(key):
                continue
            if self._plain and type(key) is tuple and len(key) <= _MOST_ARGUMENTS and all(map(self._is_plain, key)):
                self._tuples += 1
                if self._tuples <= _MOST_TUPLE_KEYS:
                    continue
                raise _OddError(f"it has more than {_MOST_TUPLE_KEYS} keys that are tuples")
            rest = ", scalars or short tuples of these" if self._plain else ""
            raise _OddError(f"it has a key of type {_name(key)}; keys have to be text or small integers{rest}")

    def _is_plain(self, key: Any) -> bool:
        if type(key) is int:
            return abs(key) < 1 << 60  # up to there no two have one hash
        return self._plain and (type(key) in (str, bytes, float, bool, NoneType) or isinstance(key, (_Scalar, _Bytes)))


class _Bytearray(bytes):
    """What a file says is a bytearray."""


_Pure: Any = pickle._Unpickler


class _Unpickler(_Pure):
    """Makes stand-ins alone.

    It is the unpickler that is written in Python: the one in C takes objects of the extension registry without
    asking `find_class`, and sets memory aside by numbers in the file.
    """

    dispatch: ClassVar[dict[int, Any]] = {**_Pure.dispatch}
    del dispatch[pickle.NEWOBJ_EX[0]]  # calls with arguments by name: nothing that is known has such

    def __init__(self, file: BinaryIO, path: Path, *, plain: bool):
        size = path.stat().st_size
        # A read sets aside the bytes that it asks for, even where the file has fewer.
        bounded: Any = SimpleNamespace(read=lambda n: file.read(min(n, size)), readline=file.readline)
        super().__init__(bounded)
        self._path = path
        self._plain = plain
        self._check_keys = _Keys(plain=plain)

    def find_class(self, module: str, name: str) -> Any:
        known = _known(module, name) or (_PLAIN.get((module, name)) if self._plain else None)
        if known is None:
            raise self._refused(ascii(f"{module}.{name}"[:200]))
        return known

    def get_extension(self, code: int) -> Any:
        raise self._refused(f"extension code {code}")

    def persistent_load(self, pid: Any) -> Any:
        raise self._refused("a persistent id")

    def _refused(self, what: str) -> RefusedError:
        return RefusedError(self._path, what, plain=self._plain)

    def _reduce(self) -> None:
        args = self.stack.pop()
        self.stack.append(_call(self.stack.pop(), args))

    def _build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], StandIn):
            raise ValueError(f"it sets a state on a {_name(self.stack[-1])}")
        self.stack[-1].__setstate__(state)

    def _dict(self) -> None:
        items = self.pop_mark()
        self._check_keys(items[::2])
        self.append(dict(zip(items[::2], items[1::2], strict=True)))

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, (dict, _OrderedDict)):
            raise ValueError(f"it sets an item on a {_name(target)}")
        self._check_keys(items[::2])
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key] = value

    def _empty_set(self) -> None:
        if not self._plain:
            raise self._refused("a set")
        self.append(set())

    def _additems(self) -> None:
        items = self.pop_mark()
        if not isinstance(self.stack[-1], set):
            raise ValueError(f"it adds to a {_name(self.stack[-1])}")
        self._check_keys(items)
        self.stack[-1].update(items)

    def _frozenset(self) -> None:
        self._empty_set()
        self.stack.pop()
        items = self.pop_mark()
        self._check_keys(items)
        self.append(frozenset(items))

    def _bytearray8(self) -> None:
        # As bytes: the original sets aside, and clears, as much memory as the file says.
        self.load_binbytes8()
        self.stack[-1] = _Bytearray(self.stack[-1])

    def _put(self) -> None:
        place = int(self.readline()[:-1])
        if not 0 <= place < 1 << 32:
            raise ValueError(f"it keeps something at place {str(place)[:30]}")
        self.memo[place] = self.stack[-1]

    dispatch |= {
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _reduce,  # here a class is made with its arguments, too
        pickle.BUILD[0]: _build,
        pickle.DICT[0]: _dict,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
        pickle.EMPTY_SET[0]: _empty_set,
        pickle.ADDITEMS[0]: _additems,
        pickle.FROZENSET[0]: _frozenset,
        pickle.BYTEARRAY8[0]: _bytearray8,
        pickle.PUT[0]: _put,
    }


def _call(function: Any, args: Any) -> Any:
    if not (isinstance(function, type) and issubclass(function, StandIn)):
        raise ValueError(f"it calls a {_name(function)}")
    if type(args) is not tuple or len(args) > _MOST_ARGUMENTS:
        raise ValueError(f"it calls a {function.__name__.strip('_')} with other arguments than there can be")
    return function(*args)


def _name(value: Any) -> str:
    return type(value).__name__.strip("_")


class Thaw:
    """Makes the objects that stand-ins stand for, each once.

    Args:
        size: of the file, in bytes.
        plain: whether it is content of any kind, or a training state.
    """

    def __init__(self, size: int, *, plain: bool):
        self.plain = plain
        self.check_keys = _Keys(plain=plain)
        self._made: dict[int, tuple[Any, Any, int]] = {}
        self._depth = self._values = 0
        # An array in another byte order, and text that stands for bytes, are copied; of one in the file, once or twice.
        self._left = 4 * size + (1 << 20)

    def __call__(self, value: Any) -> Any:
        """The object that a value of the file stands for."""
        self._values += 1
        if value is None or type(value) in (bool, int, float, str):
            return value
        if id(value) in self._made:
            _, made, values = self._made[id(value)]
            if made is ...:
                raise _OddError("it has a container in itself")
            self._values += values
        else:
            if self._depth >= _DEEPEST:
                raise _OddError(f"it has containers more than {_DEEPEST} deep")
            before = self._values
            self._made[id(value)] = value, ..., 0
            self._depth += 1
            made = self._make(value)
            self._depth -= 1
            self._made[id(value)] = value, made, self._values - before
        if self._values > _MOST_VALUES and not self.plain:
            raise _OddError(f"it has more than {_MOST_VALUES} values")
        return made

    def spend(self, nbytes: int) -> None:
        """Counts memory that is taken for a copy."""
        self._left -= nbytes
        if self._left < 0:
            raise _OddError("it has one array or text in so many places that its copies are larger than the file")

    def items(self, items: Iterable[Iterable[Any]]) -> Iterable[tuple[Any, Any]]:
        """Made keys and values of a dict."""
        for key, item in items:
            yield self.key(key), self(item)

    def key(self, key: Any) -> Any:
        """A made key."""
        self.check_keys([key])
        if type(key) is tuple:
            return tuple(map(self.key, key))
        return self(key)

    def _make(self, value: Any) -> Any:
        if isinstance(value, StandIn):
            return value.build(self)
        kind = type(value)
        if kind is dict:
            if not self.plain and {type(key) for key in value} not in (set(), {str}, {int}):
                raise _OddError("it has a dict whose keys are not all text or all integers")
            return dict(self.items(value.items()))
        if kind in (list, tuple):
            return kind([self(item) for item in value])
        if self.plain:
            if kind in (set, frozenset):
                return kind(map(self.key, value))
            if kind is _Bytearray:
                return bytearray(value)
            if kind is bytes:
                return value
        raise _OddError(f"it has a {_name(value)} where an array, a number or a container should be")


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

    def build(self, thaw: Thaw) -> Any:
        """The object; most classes have none that may stand by itself."""
        raise _OddError(f"it has a {_name(self)} where none should be")


class _Bytes(StandIn):
    """`bytes` before pickle protocol 3: `_codecs.encode(text, "latin1")`, or `bytes()` if empty."""

    def build(self, thaw: Thaw) -> bytes:
        if not thaw.plain:
            return super().build(thaw)
        return self.raw(thaw)

    def raw(self, thaw: Thaw) -> bytes:
        thaw.spend(len(self.args[0]) if self.args else 0)
        return self.args[0].encode("latin1") if self.args else b""


class _Ndarray(StandIn):
    """`numpy.ndarray`, as the class of an array."""


class _Dtype(StandIn):
    """`numpy.dtype(kind and size, align, copy)`, with its byte order in its state."""

    def dtype(self, thaw: Thaw) -> np.dtype:
        kind, order = self.args[0], self.state[1]
        if isinstance(kind, type) and issubclass(kind, _Extended):
            return kind.extended
        if isinstance(kind, str) and re.fullmatch(r"[biufc][0-9]+", kind):
            return np.dtype(kind).newbyteorder(order)
        if thaw.plain and isinstance(kind, str) and re.fullmatch(r"[SU][1-9][0-9]*", kind):
            return np.dtype(kind).newbyteorder(order)
        raise _OddError("it has an array that is not of numbers" + (" or text" if thaw.plain else ""))


class _Extended(StandIn):
    """A number type of `ml_dtypes`."""

    extended: ClassVar[np.dtype]


class _Scalar(StandIn):
    """`scalar(dtype, data)`."""

    def build(self, thaw: Thaw) -> Any:
        array = _array(thaw, self.args[0], (), self.args[1])
        return array[()] if thaw.plain else array


class _Buffer(StandIn):
    """`_frombuffer(data, dtype, shape, order, axes)`: an array in protocol 5."""

    def build(self, thaw: Thaw) -> np.ndarray:
        data, dtype, shape, order, *axes = self.args
        if order == "K":
            return _array(thaw, dtype, shape, data).transpose(*axes)
        return _array(thaw, dtype, shape, data, order)


class _Array(StandIn):
    """`_reconstruct(class, shape, kind)`, with a state: an array before protocol 5."""

    def build(self, thaw: Thaw) -> np.ndarray:
        if self.args[0] is not _Ndarray:
            raise _OddError("it has an array of a class that is not numpy.ndarray")
        _, shape, dtype, fortran, data = self.state
        return _array(thaw, dtype, shape, data, "F" if fortran else "C")


class _JaxArray(StandIn):
    """`_reconstruct_array(numpy's _reconstruct, its arguments, its state, abstract value)`."""

    def build(self, thaw: Thaw) -> Any:
        make, args, state, _ = self.args
        if make is not _Array:
            raise _OddError("it has a jax array that is not made from a numpy one")
        array = _call(make, args)
        array.__setstate__(state)
        built = array.build(thaw)
        # One of 64 bits, where they are off, stays numpy: it would lose half of them.
        fits = jax.dtypes.canonicalize_dtype(built.dtype) == built.dtype
        return jax.numpy.asarray(built) if thaw.plain and fits else built


class _KeyPart(StandIn):
    """The kind of a typed random key, or a function of that kind."""


class _Key(StandIn):
    """A typed random key."""

    def build(self, thaw: Thaw) -> jax.Array:
        if _THREEFRY not in self.state["_impl"].args:
            raise _OddError(f"it has a random key that is not of {_THREEFRY}")
        return jax.random.wrap_key_data(thaw(self.state["_base_array"]), impl=_THREEFRY)


class _FrozenDict(StandIn):
    """`FrozenDict(dict)`."""

    def build(self, thaw: Thaw) -> dict:
        (held,) = self.args
        made = thaw(held)
        if not isinstance(made, dict):
            raise _OddError("it has a FrozenDict that is made of no dict")
        return made


class _OrderedDict(StandIn):
    """`OrderedDict()`, with items set on it; before protocol 2, of a list of items."""

    def build(self, thaw: Thaw) -> OrderedDict:
        given = self.args[0] if self.args else ()
        thaw.spend(64 * len(given))
        given = given.items() if type(given) is dict else given
        return OrderedDict(thaw.items([*given, *self.items.items()]))


class _Set(StandIn):
    """`set(list)`, before protocol 4."""

    kind: ClassVar[type] = set

    def build(self, thaw: Thaw) -> Any:
        thaw.spend(64 * len(self.args[0]))
        return self.kind(map(thaw.key, self.args[0]))


class _Frozenset(_Set):
    kind = frozenset


class _Complex(StandIn):
    """`complex(real, imaginary)`."""

    def build(self, thaw: Thaw) -> complex:
        real, imaginary = self.args
        return complex(float(real), float(imaginary))


class _Bytearrays(StandIn):
    """`bytearray(bytes)`, before protocol 5."""

    def build(self, thaw: Thaw) -> bytearray:
        data = self.args[0] if self.args else b""
        data = data.raw(thaw) if isinstance(data, _Bytes) else data
        if type(data) is not bytes:
            raise _OddError(f"it has a bytearray that is made of a {_name(data)}")
        thaw.spend(len(data))
        return bytearray(data)


class _Tuple(StandIn):
    """A NamedTuple of its fields."""

    named: ClassVar[Any]

    def build(self, thaw: Thaw) -> Any:
        if self.state is not None or self.items:
            raise _OddError(f"it has a {self.named.__name__} with more than its fields")
        return self.named._make(self.fields(thaw))

    def fields(self, thaw: Thaw) -> Iterable[Any]:
        return thaw(self.args)


class _State(_Tuple):
    """A `TrainState`; the first one had no step, which is None here."""

    named = TrainState

    def fields(self, thaw: Thaw) -> Iterable[Any]:
        params, opt_state, *step = thaw(self.args)
        return params, opt_state, *(step or [None])


_KNOWN: dict[tuple[str, str], type[StandIn]] = {
    ("_codecs", "encode"): _Bytes,
    ("__builtin__", "bytes"): _Bytes,
    ("builtins", "bytes"): _Bytes,
    ("collections", "OrderedDict"): _OrderedDict,
    ("flax.core.frozen_dict", "FrozenDict"): _FrozenDict,
    ("jax._src.array", "_reconstruct_array"): _JaxArray,
    ("jax._src.device_array", "reconstruct_device_array"): _JaxArray,
    ("numpy", "ndarray"): _Ndarray,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _Scalar,
    ("numpy.core.numeric", "_frombuffer"): _Buffer,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "scalar"): _Scalar,
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
_PLAIN: dict[tuple[str, str], type[StandIn]] = {
    (module, cls.__name__.strip("_").removesuffix("s").lower()): cls
    for module in ("builtins", "__builtin__")
    for cls in (_Set, _Frozenset, _Complex, _Bytearrays)
}


def _known(module: str, name: str) -> type[StandIn] | None:
    """The stand-in for what a file names; None for what is refused. Nothing is imported to find out."""
    package = module.split(".")[0]
    if package == "learnax" and name == "TrainState":
        return _State
    if package == "optax" and name in optax_states():
        return _optax_state(name)
    if module == "ml_dtypes" and re.fullmatch(r"(b?float|u?int)[0-9]\w{0,20}", name):
        return _extended(name)
    return _KNOWN.get((module, name))


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


def _array(thaw: Thaw, dtype: _Dtype, shape: tuple[int, ...], data: Any, order: Any = "C") -> np.ndarray:
    """An array on these bytes, in the machine's byte order; one that may be written to, where content is plain."""
    raw, kind = data.raw(thaw) if isinstance(data, _Bytes) else data, dtype.dtype(thaw)
    array: np.ndarray = np.ndarray(shape, kind, raw, order=order)
    if array.shape != shape or array.nbytes != len(raw):  # numpy takes a length of -1 for "what fits"
        raise _OddError(f"it has an array whose shape is not that of its {len(raw)} bytes")
    if kind.isnative and not thaw.plain:
        return array
    thaw.spend(array.nbytes)
    return array.astype(kind.newbyteorder("="))
