"""What a run's model makes of any data: losses and metrics, or its outputs. The run stays as it is."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Generator, Hashable, Iterator
from typing import Any

import jax
import numpy as np

from learnax import checks
from learnax.data import Block, Feed, Split, Stream, first_datum, signature_of
from learnax.engine import BATCHES
from learnax.engine.plan import BLOCK_BYTES
from learnax.log import Means, progress_bar
from learnax.parts import Parts
from learnax.session import Session
from learnax.step.state import TrainState
from learnax.utils import PyTree, describe, leaves_by_path

_Chunks = Generator[tuple[PyTree, int], None, None]
"""Outputs of a block of batches on the host, leaves `(n, ...)`, of which so many are of real data."""


@dataclasses.dataclass(frozen=True)
class _Pass:
    """One pass over a dataset that was given.

    Attributes:
        what: the call, which is what the dataset is called, too.
        loader: its batches; of a stream, nobody knows how many.
        state: what is evaluated.
        live: the run's state as it was then; a training step takes over its arrays.
        seq: the run's random sequence: the model draws what it would draw in a validation now.
    """

    what: str
    loader: Split
    state: TrainState
    live: Any
    seq: jax.Array


class Inference:
    """Evaluates and predicts while the run stands still.

    Args:
        parts: of the run.
        session: knows whether it does.
    """

    def __init__(self, parts: Parts, session: Session):
        self._parts = parts
        self._session = session
        # What is known to fit, and the shapes of the outputs for it, where these are wanted.
        known = (("evaluate", signature_of(first.arguments)) for first in parts.first.values())
        self._outputs: dict[Hashable, PyTree] = dict.fromkeys(known)

    def evaluate(self, dataset: Any, params: Any) -> dict[str, float]:
        """See `learnax.trainer.Trainer.evaluate`."""
        with self._session.alone("evaluate()"):
            given = self._begin("evaluate", dataset, params)
            means, seq = Means(given.what, self._parts.engine.in_flight), given.seq
            with self._blocks(given) as blocks:
                for block in blocks:
                    seq, sums = self._parts.programs.evaluate(given.state, seq, block)
                    for scalars, count, size in sums:
                        means.push(scalars, count, size)
                return means.result()

    def predict(self, dataset: Any, params: Any, *, stacked: bool) -> Any:
        """See `learnax.trainer.Trainer.predict`."""
        with self._session.alone("predict()"):
            given = self._begin("predict", dataset, params)
            if stacked:
                return _stacked(self._chunks(given), given.loader.size)
        return self._each(self._chunks(given))

    def _each(self, chunks: _Chunks) -> Iterator[PyTree]:
        with contextlib.closing(chunks):
            while True:
                # Between two chunks the caller may train or evaluate; while one is computed, nobody may.
                with self._session.alone("predict()"):
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                yield from _rows(*chunk)

    def _chunks(self, given: _Pass) -> _Chunks:
        in_flight, seq = self._parts.engine.in_flight, given.seq
        pending: deque[tuple[PyTree, int]] = deque()
        with self._blocks(given) as blocks:
            try:
                for block in blocks:
                    seq, outputs = self._parts.programs.predict(given.state, seq, block)
                    for leaf in jax.tree.leaves(outputs):
                        leaf.copy_to_host_async()
                    pending.append((outputs, block.size))
                    while len(pending) > in_flight:
                        yield _on_host(*pending.popleft())
            except Exception:  # of the data: what comes before them is given first
                while pending:
                    yield _on_host(*pending.popleft())
                raise
            while pending:
                yield _on_host(*pending.popleft())

    def _begin(self, what: str, dataset: Any, params: Any) -> _Pass:
        """Checks what was given: of the dataset, the first datum is read."""
        parts = self._parts
        if isinstance(dataset, Stream):
            dataset = Feed(what, dataset, told=False)
        else:
            checks.check_dataset(what, dataset, 1, parts.settings.batch_size)
        datum = first_datum(what, dataset).arguments
        parts.processes.compare(
            f"what {what}() is given",
            lambda: {
                "len(dataset)": repr(dataset) if isinstance(dataset, Feed) else str(len(dataset)),
                "params": repr(params) if isinstance(params, (str, int)) else type(params).__name__,
                "a datum": describe(datum),
            },
        )
        state = parts.weights(params)
        try:
            output = self._fitting(what, what, datum, state)
        except ValueError:
            checks.check_no_arrays(what, dataset, parts.first["train"])  # what it may be in place of a dataset
            raise
        room = parts.draft.room(what)
        while what == "predict" and room > 1 and room * self._bytes(output) > BLOCK_BYTES:
            room //= 2
        loader = parts.loader(
            what, dataset, lambda data: parts.engine.put(self._taken(what, data), BATCHES), room=room, tail=True
        )
        return _Pass(what, loader, state, parts.progress.live, parts.progress.seq)

    @contextlib.contextmanager
    def _blocks(self, given: _Pass) -> Iterator[Iterator[Block]]:
        """One pass over the data; where this process fails in it, the others are told."""
        processes = self._parts.processes
        bar = progress_bar(given.loader.size or None, shown=processes.first, what=given.what)
        with processes.watching(), contextlib.closing(given.loader), contextlib.closing(bar):
            try:
                yield self._read(given, bar)
            except (Exception, KeyboardInterrupt, SystemExit) as error:
                if processes.count > 1:
                    raise processes.failed(error) from error
                raise

    def _read(self, given: _Pass, bar: Any) -> Iterator[Block]:
        done = 0
        for block in given.loader.blocks():
            if self._parts.progress.live is not given.live:
                raise RuntimeError(
                    f"{given.what}(): the run has another state by now than when this began: what it was asked for "
                    "is gone. Take all outputs before training goes on: stacked=True, or list(trainer.predict(...))"
                )
            datum = jax.tree.map(lambda leaf: leaf[0, 0], block.host)
            self._fitting(given.what, f"{given.what}, from datum {done} on", datum, given.state)
            yield block
            done += block.size
            bar.advance(block.size)
            bar.tell([])

    def _taken(self, what: str, arguments: list[Any]) -> list[Any]:
        """What of a datum's parts, or of batches of them, is wanted: labels are of no use to the model alone."""
        return checks.taken_of(self._parts.model, arguments) if what == "predict" else arguments

    def _fitting(self, what: str, name: str, datum: list[Any], state: TrainState) -> PyTree:
        """The shapes of the model's output for a datum that fits, see `learnax.checks.check_datum`."""
        parts, datum = self._parts, self._taken(what, datum)
        known = {split: self._taken(what, first.arguments) for split, first in parts.first.items()}
        signature = (what, signature_of(datum))
        if signature not in self._outputs:
            rows = parts.settings.batch_size // len(parts.engine.devices)
            self._outputs[signature] = checks.check_datum(
                name, datum, parts.settings, parts.traced, known, state, rows, losses=what == "evaluate"
            )
        return self._outputs[signature]

    def _bytes(self, output: PyTree) -> int:
        """What the outputs of a batch take."""
        parts = self._parts
        times = len(parts.engine.devices) if parts.model.batched else parts.settings.batch_size
        return times * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(output))


def _on_host(outputs: PyTree, size: int) -> tuple[PyTree, int]:
    """Waits for outputs of batches; their rows one after the other, without those of padding: views of one array."""

    def rows(leaf: jax.Array) -> np.ndarray:
        batches, batch_size, *shape = leaf.shape
        return np.asarray(leaf).reshape(batches * batch_size, *shape)[:size]

    return jax.tree.map(rows, outputs), size


def _rows(outputs: PyTree, size: int) -> Iterator[PyTree]:
    """The output of each datum: views of arrays that are the caller's own."""
    leaves: list[np.ndarray]
    structure: Any
    leaves, structure = jax.tree.flatten(outputs)
    owned = [np.array(leaf) for leaf in leaves]
    if jax.tree.structure(0) == structure:
        yield from owned[0]
        return
    for row in zip(*owned, strict=True) if owned else [()] * size:
        yield jax.tree.unflatten(structure, row)


def _stacked(chunks: _Chunks, size: int) -> PyTree:
    """All outputs, leaves `(n, ...)`; `size` is n, or 0 where nobody knows it yet."""
    whole: PyTree = None
    first: PyTree = None
    done = 0
    known = []
    with contextlib.closing(chunks):
        for outputs, count in chunks:
            if not done:
                first = outputs
                if size:
                    whole = jax.tree.map(lambda leaf: np.empty((size, *leaf.shape[1:]), leaf.dtype), outputs)
            _check_alike(first, outputs, done)
            if size:
                for into, leaf in zip(jax.tree.leaves(whole), jax.tree.leaves(outputs), strict=True):
                    into[done : done + count] = leaf
            else:
                known.append(jax.tree.map(np.array, outputs))
            done += count
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *known) if known else whole


def _check_alike(whole: PyTree, outputs: PyTree, done: int) -> None:
    """Raises ValueError where outputs do not go into one array with those before them."""
    before, after = ({path: leaf.shape[1:] for path, leaf in leaves_by_path(tree).items()} for tree in (whole, outputs))
    for path in dict.fromkeys([*before, *after]):
        if before.get(path) != after.get(path):
            raise ValueError(
                f"predict(stacked=True): the output{path and f' {path}'} is of shape {before.get(path)} at first, and "
                f"{after.get(path)} from datum {done} on: they are no one array. Without stacked= each comes by itself"
            )
