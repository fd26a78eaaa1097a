"""Data that come one after another, with no numbers to read them by: what users wrap them in, and how they are read."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any

from learnax.data.reading import DatasetError, takes_epochs, tell_epoch
from learnax.data.spawning import grain_library

REPLAY = "replay"
_STATES = (("get_state", "set_state"), ("state_dict", "load_state_dict"))
"""How a stream tells where it stands, and goes back there: grain's way, and that of Hugging Face and torchdata."""


class Stream:
    """Data that come one after another, a datum at a time.

    Each epoch is one pass over them, or `steps_per_epoch` steps of a pass that goes on from epoch to epoch. They are
    read by the process that trains. A stream that tells where it stands (grain's `get_state` and `set_state`, or
    `state_dict` and `load_state_dict`) is gone on with from there after a stop, and nothing is read again.

    Args:
        source: anything to iterate over, or a function that makes such a thing: a generator function, a grain
            `IterDataset` or `DataLoader`, an iterable dataset of Hugging Face. It may be endless.
        steps_per_epoch: training steps after which an epoch ends; by default, when the stream does.
        resume: "replay" for a stream that does not tell where it stands: what was seen is read again and skipped. By
            default, to go on amid such a stream is an error.

    Raises:
        TypeError: the source is nothing to iterate over.
        ValueError: another `resume`, or fewer than one step in an epoch.
    """

    def __init__(self, source: Any, *, steps_per_epoch: int | None = None, resume: str | None = None):
        kind = type(self).__name__
        if not callable(source) and not hasattr(source, "__iter__"):
            raise TypeError(
                f"{kind} needs something to iterate over, or a function that makes such a thing, but got "
                f"{type(source).__name__}"
            )
        if resume not in (None, REPLAY):
            raise ValueError(f"{kind}: resume must be 'replay' or None, but is {resume!r}")
        if steps_per_epoch is not None and operator.index(steps_per_epoch) < 1:
            raise ValueError(f"{kind}: steps_per_epoch must be at least 1, but is {steps_per_epoch}")
        self.source = source
        self.steps_per_epoch = steps_per_epoch
        self.resume = resume
        self.per_process = False


class Batches(Stream):
    """Data that come in batches, stacked already: leaves `(batch_size, ...)`.

    The last batch of a pass may be short: training skips it, validation counts its data. As with single data, a batch
    that is a list is the model's arguments, anything else is one argument.

    Args:
        loader: anything to iterate over, or a function that makes such a thing: a grain dataset after `.batch(n)`, a
            loader of torch that collates to numpy, `tf.data` through `as_numpy_iterator`.
        per_process: whether each process of a run gives batches of its own share, `(batch_size / processes, ...)`,
            and as many of them as the others; by default each gives the whole batches, all the same ones.
        steps_per_epoch: see `Stream`.
        resume: see `Stream`.
    """

    def __init__(
        self,
        loader: Any,
        *,
        per_process: bool = False,
        steps_per_epoch: int | None = None,
        resume: str | None = None,
    ):
        super().__init__(loader, steps_per_epoch=steps_per_epoch, resume=resume)
        self.per_process = per_process


class EndedError(Exception):
    """A pass over a stream is at its end."""


class Feed:
    """The items of a stream, one after another, with one kept that was looked at.

    Args:
        name: the split.
        stream: what was given.
        told: whether a source with `set_epoch` is told each epoch's number.

    Attributes:
        count: items of this pass that were taken.
    """

    def __init__(self, name: str, stream: Stream, *, told: bool):
        self.name, self.stream = name, stream
        self._told = told
        self._iterator: Iterator[Any] | None = None
        self._holder: Any = None
        self._origin: Any = None  # what an iterator that cannot be made again said when it was new
        self._looked_at: list[Any] = []
        self._epoch: int | None = None
        self.count = 0

    def __repr__(self) -> str:
        return f"{type(self.stream).__name__} of {type(self.stream.source).__name__}"

    def look(self) -> Any:
        """The first item of the first pass, which is taken again later.

        Raises:
            ValueError: there is none.
            DatasetError: the stream raised.
        """
        self.begin(0)
        try:
            item = self.take()
        except EndedError:
            raise ValueError(f"dataset {self.name!r} yields nothing: is its stream used up already?") from None
        self._looked_at, self.count = [item], 0
        return item

    def begin(self, epoch: int) -> None:
        """Stands at the beginning of a pass.

        Raises:
            ValueError: the stream is an iterator, which was used, and cannot go back.
        """
        if self._epoch == epoch and self._iterator is not None and not self.count:
            return
        again = self._iterator is not None
        self._open(epoch)
        if again and self._is_once and self._origin is None:
            self._iterator = None
            raise ValueError(
                f"dataset {self.name!r} is an iterator ({type(self._made).__name__}), which was used, and is needed "
                f"again from its beginning: give a function that makes one, {type(self.stream).__name__}(lambda: ...), "
                "or steps_per_epoch= where it is endless"
            )
        if self._is_once and self._tells:
            if self._origin is None:
                self._origin = self.state()
            else:
                self._put(self._origin)

    def take(self) -> Any:
        """The next item.

        Raises:
            EndedError: there is none.
            DatasetError: the stream raised.
        """
        if self._looked_at:
            item = self._looked_at.pop()
        else:
            assert self._iterator is not None
            try:
                item = next(self._iterator)
            except StopIteration:
                raise EndedError from None
            except Exception as error:
                what = "batch" if isinstance(self.stream, Batches) else "datum"
                raise DatasetError(
                    f"dataset {self.name!r} raised after {what} {self.count} of this pass: {type(error).__name__}: "
                    f"{error}"
                ) from error
        self.count += 1
        return item

    @property
    def tells(self) -> bool:
        """Whether the stream tells where it stands, and may be asked to go back there."""
        if self._iterator is None:
            self._open(0)
        return bool(self._tells) and self.stream.resume is None

    def state(self) -> Any:
        """Where the stream stands: a copy."""
        assert self._tells
        return copy.deepcopy(getattr(self._holder, self._tells[0])())

    def restore(self, state: Any, epoch: int, count: int) -> None:
        """Goes back to where `state` was told, after `count` items of a pass."""
        self._open(epoch)
        self._put(state)
        self.count = count

    def _open(self, epoch: int) -> None:
        """Makes the iterator."""
        source = self.stream.source
        self._looked_at, self.count, self._epoch = [], 0, epoch
        if self._told and takes_epochs(source):
            tell_epoch(self.name, source, epoch)
        if type(source).__module__.partition(".")[0] == "grain":
            grain_library()  # what it needs of a plain script
        try:
            self._made = source if hasattr(source, "__iter__") else source()
            self._iterator = iter(self._made)
        except Exception as error:
            raise DatasetError(f"dataset {self.name!r} cannot be begun: {type(error).__name__}: {error}") from error
        self._is_once = self._iterator is source
        self._holder, self._tells = None, ()
        for holder in (self._iterator, self._made):
            for names in _STATES:
                if self._holder is None and all(callable(getattr(holder, name, None)) for name in names):
                    self._holder, self._tells = holder, names

    def _put(self, state: Any) -> None:
        getattr(self._holder, self._tells[1])(copy.deepcopy(state))
        if self._holder is not self._iterator:  # what it goes on with is asked for when it is begun
            self._iterator = iter(self._made)

    _made: Any = None
    _is_once = False
    _tells: tuple[str, ...] = ()
