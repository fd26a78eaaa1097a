"""Checkpoints of learnax 0.1.0, which were pickles, read without running what a pickle asks to be run.

A pickle names functions and classes, and calls them. Here every name stands for a class of this module that only
keeps what it is given; names outside of the few that a training state needs are refused. Once the file is read,
the arrays and containers are made from what was kept.
"""

from __future__ import annotations

import functools
import operator
import pickle
import re
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, ClassVar

import jax
import numpy as np
import optax

from learnax.checkpoint.files import DamagedError
from learnax.checkpoint.trees import as_dicts
from learnax.state import PyTree, TrainState

_FILE = re.compile(r"state_(latest|best|[0-9]+)\.pyd")
_KEYS = ("state", "step", "time")
_THREEFRY = "threefry2x32"
_NUMBERS = {bool: np.bool_, int: np.int32, float: np.float32}
# A file of a kilobyte can hold one list a billion times over.
_MOST_VALUES = 1_000_000


def find(folder: Path) -> dict[str | int, Path]:
    """The 0.1.0 checkpoints in a folder, by "latest", "best" or their step; empty where there is no folder."""
    if not folder.is_dir():
        return {}
    matches = ((_FILE.fullmatch(path.name), path) for path in sorted(folder.iterdir()) if path.is_file())
    return {int(match[1]) if match[1].isdecimal() else match[1]: path for match, path in matches if match}


def read(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of 0.1.0.

    Returns:
        A dict with `state`, `step` (an int), `time` (seconds since 1970), and `metrics` if saved. The state is
        today's `TrainState`: plain dicts in place of flax's frozen ones, optimiser states of the class of that name
        in today's optax, numpy leaves that cannot be written to (typed random keys stay jax arrays), an int `step`.

    Raises:
        ValueError: the file names something that no training state needs.
        DamagedError: the file is torn, or is something else.
        OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        try:
            return _checkpoint(_Thaw()(_Unpickler(file, path).load()))
        except (_RefusedError, OSError):
            raise
        except Exception as error:  # of a torn pickle nearly any kind
            what = f"{type(error).__name__}: {error}".rstrip(": ").removeprefix("ValueError: ")[:300]
            raise DamagedError(
                f"{path} ({path.stat().st_size} bytes) is torn, or is not a checkpoint of learnax 0.1.0: {what}; "
                "load another one of the run"
            ) from error


def as_tree(state: TrainState, target: TrainState | None = None) -> dict[str, Any]:
    """A state that `read` gave as nested dicts, their leaves under the names that today's optimisers use.

    An older optax kept no count of its own for a scheduled hyperparameter: `InjectHyperparamsState` went by the
    count of updates. Where the target has such counts, they are that count. Nothing in such a state tells whether
    it had a schedule, so without a target it is taken to have none.

    Args:
        state: a state, as `read` gives it.
        target: the state (or its shapes) that it is to fit.
    """
    opt_state = as_dicts(state.opt_state)
    if isinstance(state.opt_state, optax.InjectHyperparamsState):
        scheduled = getattr(target and target.opt_state, "hyperparams_states", {})
        opt_state["hyperparams_states"] = {name: {"count": state.opt_state.count} for name in scheduled}
    return {"params": as_dicts(state.params), "opt_state": opt_state, "step": np.asarray(state.step, np.int32)}


class _RefusedError(ValueError):
    def __init__(self, path: Path, what: str):
        super().__init__(
            f"{path} was not read: it has {what}, which no training state needs; opening a checkpoint runs no "
            "code but that of known containers (numpy and jax arrays, flax dicts, optax states). If the file is "
            "yours, load it with the versions that wrote it, save the parameters there as numpy arrays "
            "(numpy.savez), and give those to the model here"
        )


class _Unpickler(pickle._Unpickler):
    """Makes stand-ins alone.

    It is the unpickler that is written in Python: the one in C takes objects of the extension registry without
    asking `find_class`, and sets memory aside by numbers in the file.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        # As bytes: the original sets aside, and clears, as much memory as the file says.
        pickle.BYTEARRAY8[0]: pickle._Unpickler.dispatch[pickle.BINBYTES8[0]],
    }

    def __init__(self, file: BinaryIO, path: Path):
        size = path.stat().st_size
        # A read sets aside the bytes that it asks for, even where the file has fewer.
        bounded: Any = SimpleNamespace(read=lambda n: file.read(min(n, size)), readline=file.readline)
        super().__init__(bounded)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        known = _known(module, name)
        if known is None:
            raise _RefusedError(self._path, ascii(f"{module}.{name}"[:200]))
        return known

    def get_extension(self, code: int) -> Any:
        raise _RefusedError(self._path, f"extension code {code}")

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError(self._path, "a persistent id")


class _Thaw:
    """Makes the objects that stand-ins stand for."""

    def __init__(self) -> None:
        self._left = _MOST_VALUES

    def __call__(self, value: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"it has more than {_MOST_VALUES} values")
        if isinstance(value, _StandIn):
            return value.build(self)
        if type(value) is dict:
            if {type(key) for key in value} not in (set(), {str}, {int}):
                raise ValueError("it has a dict whose keys are not all text or all integers")
            return {key: self(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)([self(item) for item in value])
        if value is None or type(value) in (bool, int, float, str):
            return value
        raise ValueError(f"it has a {type(value).__name__} where an array, a number or a container should be")


class _StandIn:
    """What a file says of one object: the arguments it is made with, the state it is given, the items set on it."""

    args: tuple[Any, ...]
    state: Any
    items: dict[Any, Any]

    def __new__(cls, *args: Any) -> Any:
        made = super().__new__(cls)
        made.args, made.state, made.items = args, None, {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def build(self, thaw: _Thaw) -> Any:
        raise ValueError(f"it has a {type(self).__name__.strip('_')} where none should be")


class _Bytes(_StandIn):
    """`bytes` before pickle protocol 3: `_codecs.encode(text, "latin1")`, or `bytes()` if empty."""

    def raw(self) -> bytes:
        return self.args[0].encode("latin1") if self.args else b""


class _Ndarray(_StandIn):
    """`numpy.ndarray`, as the class of an array."""


class _Dtype(_StandIn):
    """`numpy.dtype(kind and size, align, copy)`, with its byte order in its state."""

    def dtype(self) -> np.dtype:
        kind, order = self.args[0], self.state[1]
        if isinstance(kind, type) and issubclass(kind, _Extended):
            return kind.extended
        if not isinstance(kind, str) or not re.fullmatch(r"[biufc][0-9]+", kind):
            raise ValueError("it has an array that is not of numbers")
        return np.dtype(kind).newbyteorder(order)


class _Extended(_StandIn):
    """A number type of `ml_dtypes`."""

    extended: ClassVar[np.dtype]


class _Scalar(_StandIn):
    """`scalar(dtype, data)`."""

    def build(self, thaw: _Thaw) -> np.ndarray:
        return _array(self.args[0], (), self.args[1])


class _Buffer(_StandIn):
    """`_frombuffer(data, dtype, shape, order, axes)`: an array in protocol 5."""

    def build(self, thaw: _Thaw) -> np.ndarray:
        data, dtype, shape, order, *axes = self.args
        if order == "K":
            return _array(dtype, shape, data).transpose(*axes)
        return _array(dtype, shape, data, order)


class _Array(_StandIn):
    """`_reconstruct(class, shape, kind)`, with a state: an array before protocol 5."""

    def build(self, thaw: _Thaw) -> np.ndarray:
        if self.args[0] is not _Ndarray:
            raise ValueError("it has an array of a class that is not numpy.ndarray")
        _, shape, dtype, fortran, data = self.state
        return _array(dtype, shape, data, "F" if fortran else "C")


class _JaxArray(_StandIn):
    """`_reconstruct_array(numpy's _reconstruct, its arguments, its state, abstract value)`."""

    def build(self, thaw: _Thaw) -> np.ndarray:
        make, args, state, _ = self.args
        if make is not _Array:
            raise ValueError("it has a jax array that is not made from a numpy one")
        array = _Array(*args)
        array.__setstate__(state)
        return array.build(thaw)


class _KeyPart(_StandIn):
    """The kind of a typed random key, or a function of that kind."""


class _Key(_StandIn):
    """A typed random key."""

    def build(self, thaw: _Thaw) -> jax.Array:
        if _THREEFRY not in self.state["_impl"].args:
            raise ValueError(f"it has a random key that is not of {_THREEFRY}")
        return jax.random.wrap_key_data(thaw(self.state["_base_array"]), impl=_THREEFRY)


class _FrozenDict(_StandIn):
    """`FrozenDict(dict)`."""

    def build(self, thaw: _Thaw) -> dict:
        return dict(thaw(*self.args))


class _OrderedDict(_StandIn):
    """`OrderedDict()`, with items set on it."""

    def build(self, thaw: _Thaw) -> OrderedDict:
        return OrderedDict(thaw(dict(*self.args) | self.items))


class _Tuple(_StandIn):
    """A NamedTuple of its fields."""

    named: ClassVar[Any]

    def build(self, thaw: _Thaw) -> Any:
        if self.state is not None or self.items:
            raise ValueError(f"it has a {self.named.__name__} with more than its fields")
        return self.named._make(thaw(self.args))


_KNOWN: dict[tuple[str, str], type[_StandIn]] = {
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


def _known(module: str, name: str) -> type[_StandIn] | None:
    """The stand-in for what a file names; None for what is refused. Nothing is imported to find out."""
    package = module.split(".")[0]
    if package == "learnax" and name == "TrainState":
        return type(name, (_Tuple,), {"named": TrainState})
    if package == "optax" and name in _optax_states():
        return type(name, (_Tuple,), {"named": _optax_states()[name]})
    if module == "ml_dtypes" and re.fullmatch(r"(b?float|u?int)[0-9]\w*", name):
        try:
            return type(name, (_Extended,), {"extended": np.dtype(name)})
        except TypeError:
            return None
    return _KNOWN.get((module, name))


@functools.cache
def _optax_states() -> dict[str, Any]:
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


def _array(dtype: _Dtype, shape: tuple[int, ...], data: bytes | _Bytes, order: Any = "C") -> np.ndarray:
    """An array on these bytes, in the machine's byte order."""
    raw, kind = data.raw() if isinstance(data, _Bytes) else data, dtype.dtype()
    array: np.ndarray = np.ndarray(shape, kind, raw, order=order)
    if array.shape != shape or array.nbytes != len(raw):  # numpy takes a length of -1 for "what fits"
        raise ValueError(f"it has an array whose shape is not that of its {len(raw)} bytes")
    return array if kind.isnative else array.astype(kind.newbyteorder("="))


def _checkpoint(held: Any) -> dict[str, Any]:
    """The parts of a checkpoint, as today's code takes them."""
    if type(held) is not dict:
        raise ValueError(f"expected a dict with {', '.join(_KEYS)}, found a {type(held).__name__}")
    if missing := [key for key in _KEYS if key not in held]:
        raise ValueError(f"it has no {', '.join(missing)}")
    state = held["state"]
    if type(state) is not TrainState:
        raise ValueError(f"expected its state to be a TrainState, found a {type(state).__name__}")
    parts = {"params": state.params, "opt_state": state.opt_state}
    parts = jax.tree_util.tree_map_with_path(_leaf, parts)
    if len(jax.tree.leaves(as_dicts(parts))) < len(jax.tree.leaves(parts)):
        raise ValueError("its state has two leaves of one path")
    step = operator.index(state.step)
    np.int32(step)  # raises on a step that none can have
    checkpoint = {
        "state": TrainState(parts["params"], parts["opt_state"], step),
        "step": operator.index(held["step"]),
        "time": float(held["time"]),
    }
    return checkpoint | ({"metrics": jax.tree.map(_number, held["metrics"])} if held.get("metrics") else {})


def _leaf(path: Any, leaf: Any) -> PyTree:
    if type(leaf) in _NUMBERS:
        return np.asarray(leaf, _NUMBERS[type(leaf)])
    if not isinstance(leaf, (np.ndarray, jax.Array)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise ValueError(f"{name} of its state is a {type(leaf).__name__}, not an array")
    return leaf


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
