"""A run's programs: what each is made of, and what it is given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from learnax.data import Block, FirstDatum, arranged, signature_of
from learnax.engine import BATCHES, SAME, SPLIT, Engine, Kind, Wanted
from learnax.step import AXIS, Recipe, Scalars, evaluate_many, gradients, mean_loss, train_many, update
from learnax.step.state import TrainState
from learnax.utils import PyTree


class Programs:
    """Training, evaluation, and an update by hand, compiled by an engine.

    Args:
        engine: compiles them.
        recipe: what a step is made of.
        room: steps at most in a dispatch.
        with_outputs: whether training gives the model's outputs.
        first: the first training datum, by which data given by hand are known.
    """

    def __init__(self, engine: Engine, recipe: Recipe, room: int, with_outputs: bool, first: FirstDatum):
        self._engine = engine
        self._first = first
        self._recipe = recipe
        self._train = Kind(
            "train",
            functools.partial(train_many, recipe, room, with_outputs),
            (engine.layout, SAME, BATCHES, SAME, SAME),
            (engine.layout, SAME, SAME, SPLIT),
            donated=(0,),
        )
        self._evaluate = Kind(
            "evaluate",
            functools.partial(evaluate_many, recipe, room),
            (engine.params_layout, SAME, SAME, BATCHES, SAME, SAME),
            (SAME, SAME),
        )
        # Nothing is donated: the caller's state stays usable.
        state = engine.layout
        self._update = Kind("update", functools.partial(update, recipe), (state, SAME, SPLIT), (state, SAME, SPLIT))

    def train(
        self, state: TrainState, seq: jax.Array, block: Block, start: int, count: int
    ) -> tuple[TrainState, jax.Array, Scalars, Any]:
        """Dispatches `count` steps from a block's batch `start` on; see `learnax.step.train_many`."""
        args = self._train_args(state, seq, block.device, start, count)
        return self._engine.program(self._train, block.signature, args)(*args)

    def evaluate(self, state: TrainState, seq: jax.Array, block: Block) -> tuple[jax.Array, Scalars]:
        """Dispatches the evaluation of a block; see `learnax.step.evaluate_many`."""
        args = self._evaluate_args(state, seq, block.device, len(block), block.size)
        return self._engine.program(self._evaluate, block.signature, args)(*args)

    def prepare(
        self, state: TrainState, seq: jax.Array, blocks: Mapping[str, PyTree], more: Iterable[Wanted] = ()
    ) -> None:
        """Compiles what a run will need, side by side.

        Args:
            state: the training state.
            seq: the random sequence.
            blocks: split -> the shapes of its blocks; all but `train` are evaluated.
            more: other programs.
        """
        wanted = list(more)
        for name, block in blocks.items():
            if name == "train":
                wanted.append((self._train, signature_of(block), self._train_args(state, seq, block, 0, 1)))
            else:
                wanted.append((self._evaluate, signature_of(block), self._evaluate_args(state, seq, block, 1, 1)))
        self._engine.prepare(wanted)

    def loss(self, params: PyTree, keys: jax.Array, batch: PyTree, step: Any) -> tuple[jax.Array, Any]:
        """`learnax.step.mean_loss`, not compiled."""
        return mean_loss(self._recipe, params, keys, self._first.wrap(batch), jnp.asarray(step, jnp.int32))

    def grad(self, params: PyTree, keys: jax.Array, batch: PyTree, step: Any) -> tuple[PyTree, Any]:
        """`learnax.step.gradients` under `jax.pmap`: keys, batch and results have a leading device axis."""
        return self._pmapped_gradients(params, keys, self._first.wrap(batch), jnp.asarray(step, jnp.int32))

    def update(self, key: jax.Array, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array], Any]:
        """`learnax.step.update` of a batch given by hand.

        Args:
            key: the batch's key, typed or raw.
            state: the state before; it stays usable.
            batch: see `learnax.data.arranged`.
        """
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(jnp.array(key))  # a copy: the caller may change it
        host = arranged(batch, self._first.arguments, self._recipe.batch_size, self._recipe.shards)
        data = self._engine.spread(host, SPLIT)
        owned = self._engine.own(state._replace(step=np.int32(state.step)), self._engine.layout)
        args = (owned, self._engine.put(key, SAME), data)
        return self._engine.program(self._update, signature_of(data), args)(*args)

    @functools.cached_property
    def _pmapped_gradients(self) -> Callable[..., Any]:
        function = functools.partial(gradients, self._recipe)
        return jax.pmap(function, AXIS, in_axes=(None, 0, 0, None), devices=self._engine.devices)

    def _train_args(
        self, state: TrainState, seq: jax.Array, batches: PyTree, start: int, count: int
    ) -> tuple[Any, ...]:
        scalar = self._engine.scalar
        return state, seq, batches, scalar(start), scalar(count)

    def _evaluate_args(
        self, state: TrainState, seq: jax.Array, batches: PyTree, count: int, size: int
    ) -> tuple[Any, ...]:
        scalar = self._engine.scalar
        return state.params, state.step, seq, batches, scalar(count), scalar(size)
