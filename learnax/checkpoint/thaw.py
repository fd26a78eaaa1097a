"""Pickles, read without running what a pickle asks to be run.

A pickle names functions and classes, and calls them. Here every name stands for a class of this module that only
keeps what it is given; names outside of the few that are known are refused. Once the file is read, the arrays and
containers are made from what was kept, each once, however often the file refers to it: what a file can make this
take, in time and in memory, grows with the file's size and no faster.
"""

from __future__ import annotations

import pickle
import stat
from collections.abc import Iterable
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any, BinaryIO, ClassVar

from learnax.checkpoint.files import DamagedError
from learnax.checkpoint.places import memory
from learnax.checkpoint.standins import (
    MOST_ARGUMENTS,
    PLAIN,
    Bytes,
    OddError,
    Ordered,
    Scalar,
    StandIn,
    call,
    known,
    name_of,
)

_MOST_VALUES = 1_000_000
"""Of a training state: a file of a kilobyte can hold one list a billion times over."""
_DEEPEST = 100
"""Containers in containers: each takes some of Python's stack."""
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
    except OddError as error:
        raise RefusedError(path, str(error), plain=True) from error
    except (RefusedError, DamagedError, OSError):
        raise
    except Exception as error:  # of a torn pickle nearly any kind
        raise damaged(path, error, "a pickle", "write it again") from error


def read(path: Path, *, plain: bool) -> Any:
    """What a file holds: plain content, or what a training state is made of, with numpy leaves."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode) or about.st_size > memory():
        raise DamagedError(f"{path} is no file that can be read")  # whoever opens a pipe waits for ever
    with path.open("rb") as file:
        held = _Unpickler(file, path, plain=plain).load()
        return Thaw(about.st_size, plain=plain)(held)


def damaged(path: Path, error: Exception, kind: str, way_out: str) -> DamagedError:
    """What is said of a file that cannot be read."""
    what = f"{type(error).__name__}: {error}".rstrip(": ").removeprefix("OddError: ").removeprefix("ValueError: ")
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


class _Keys:
    """Looks at what is to be a key before it is hashed: to hash a deep tuple ends the process."""

    def __init__(self, *, plain: bool):
        self._plain = plain
        self._tuples = 0

    def __call__(self, keys: Iterable[Any]) -> None:
        for key in keys:
            if type(key) is str or self._is_plain(key):
                continue
            if self._plain and type(key) is tuple and len(key) <= MOST_ARGUMENTS and all(map(self._is_plain, key)):
                self._tuples += 1
                if self._tuples <= _MOST_TUPLE_KEYS:
                    continue
                raise OddError(f"it has more than {_MOST_TUPLE_KEYS} keys that are tuples")
            rest = ", scalars or short tuples of these" if self._plain else ""
            raise OddError(f"it has a key of type {name_of(key)}; keys have to be text or small integers{rest}")

    def _is_plain(self, key: Any) -> bool:
        if type(key) is int:
            return abs(key) < 1 << 60  # up to there no two have one hash
        return self._plain and (type(key) in (str, bytes, float, bool, NoneType) or isinstance(key, (Scalar, Bytes)))


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
        found = known(module, name) or (PLAIN.get((module, name)) if self._plain else None)
        if found is None:
            raise self._refused(ascii(f"{module}.{name}"[:200]))
        return found

    def get_extension(self, code: int) -> Any:
        raise self._refused(f"extension code {code}")

    def persistent_load(self, pid: Any) -> Any:
        raise self._refused("a persistent id")

    def _refused(self, what: str) -> RefusedError:
        return RefusedError(self._path, what, plain=self._plain)

    def _reduce(self) -> None:
        args = self.stack.pop()
        self.stack.append(call(self.stack.pop(), args))

    def _build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], StandIn):
            raise ValueError(f"it sets a state on a {name_of(self.stack[-1])}")
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
        if not isinstance(target, (dict, Ordered)):
            raise ValueError(f"it sets an item on a {name_of(target)}")
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
            raise ValueError(f"it adds to a {name_of(self.stack[-1])}")
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
                raise OddError("it has a container in itself")
            self._values += values
        else:
            if self._depth >= _DEEPEST:
                raise OddError(f"it has containers more than {_DEEPEST} deep")
            before = self._values
            self._made[id(value)] = value, ..., 0
            self._depth += 1
            made = self._make(value)
            self._depth -= 1
            self._made[id(value)] = value, made, self._values - before
        if self._values > _MOST_VALUES and not self.plain:
            raise OddError(f"it has more than {_MOST_VALUES} values")
        return made

    def spend(self, nbytes: int) -> None:
        """Counts memory that is taken for a copy."""
        self._left -= nbytes
        if self._left < 0:
            raise OddError("it has one array or text in so many places that its copies are larger than the file")

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
                raise OddError("it has a dict whose keys are not all text or all integers")
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
        raise OddError(f"it has a {name_of(value)} where an array, a number or a container should be")
