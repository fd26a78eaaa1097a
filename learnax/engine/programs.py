"""A run's programs: what each is made of, and what it is given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from learnax.data import Block, FirstDatum, arranged, signature_of
from learnax.engine import BATCHES, SAME, SPLIT, Engine, Kind, Wanted
from learnax.step import (
    AXIS,
    Form,
    Packed,
    Recipe,
    Scalars,
    evaluate_many,
    evaluate_tail,
    evaluated,
    evaluation_params,
    gradients,
    has_own_evaluation,
    mean_loss,
    packs,
    predict_many,
    probe,
    train_many,
    update,
)
from learnax.step.state import TrainState
from learnax.utils import PyTree, is_key, key_data

Sums = list[tuple[Scalars, int, int]]
"""Parts of losses and metrics, of how many batches (a row each), of how many data."""


class Programs:
    """Training, evaluation, prediction, and an update by hand, compiled by an engine.

    Args:
        engine: compiles them.
        recipe: what a step is made of.
        room: steps at most in a dispatch.
        with_outputs: whether training gives the model's outputs.
        first: the first training datum, by which data given by hand are known.
        by_average: whether the average of the parameters is what is evaluated, where there is one.
        gathers: whether training gathers its batches from data that each device has whole.
    """

    def __init__(
        self,
        engine: Engine,
        recipe: Recipe,
        room: int,
        with_outputs: bool,
        first: FirstDatum,
        by_average: bool = True,
        gathers: bool = False,
    ):
        self._engine = engine
        self._first = first
        self._recipe = recipe
        self._by_average = by_average
        self._data = SAME if gathers else BATCHES
        layout, seen = engine.layout, engine.evaluated_layout
        self._train = Kind(
            "train",
            functools.partial(train_many, recipe, room, with_outputs),
            (layout, SAME, self._data, SAME, SAME),
            (layout, SAME, SAME, SPLIT),
            donated=(0,),
        )
        self._evaluate = Kind(
            "evaluate",
            functools.partial(evaluate_many, recipe, room),
            (seen, SAME, BATCHES, SAME, SAME),
            (SAME, SAME),
        )
        self._predict = Kind(
            "predict", functools.partial(predict_many, recipe), (seen, SAME, BATCHES, SAME, SAME), (SAME, BATCHES)
        )
        self._gather = Kind("gather", lambda outputs: (outputs,), (BATCHES,), (SAME,), whole=True)
        # Nothing is donated: the caller's state stays usable.
        self._update = Kind("update", functools.partial(update, recipe), (layout, SAME, SPLIT), (layout, SAME, SPLIT))
        self._weights = Kind("weights", self._own_weights, (layout,), (engine.params_layout,), whole=True)
        self._form: Form | None = None

    def live(self, state: TrainState, *, ours: bool = False) -> TrainState | Packed:
        """A state as training takes it: in arrays that are no one else's, and packed where it may be.

        Args:
            state: on the host, or on devices.
            ours: whether it is no one else's already, and lies as training has it.
        """
        engine, state = self._engine, jax.tree.map(_canonical, state)
        form = self._form_of(state)
        if form is None:
            return state if ours else engine.own(state, engine.layout)
        packed = form.pack(form.map_small(np.asarray, state))
        if not ours:
            return engine.own(packed)
        return jax.tree.map(lambda array: array if isinstance(array, jax.Array) else engine.own(array), packed)

    def live_shapes(self, shapes: TrainState) -> TrainState | Packed:
        """What `live` makes of a state, as shapes."""
        form = self._form_of(shapes)
        if form is None:
            return shapes
        packed = form.pack(form.map_small(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), packed)

    def _form_of(self, state: TrainState) -> Form | None:
        """How a state is packed, or its shapes; None where it is not."""
        if self._form is not None and self._form.fits(state):
            return self._form  # to ask whether a state may be packed traces the optimiser
        if not self._packs(state):
            return None
        self._form = Form(state)
        return self._form

    def _packs(self, state: TrainState) -> bool:
        # What lies in parts is no vector; and of several processes, one alone may look at its state.
        return self._engine.layout == SAME and not self._engine.spans and packs(self._recipe, state)

    def state(self, live: TrainState | Packed) -> TrainState:
        """The state that training has: small leaves are new arrays, large ones those that the next step takes over.

        Waits for the steps in flight, where it is packed.
        """
        if not isinstance(live, Packed):
            return live

        # On the host: a program of as many results as there are leaves takes longer to compile than many looks take.
        def small(form: Form, arrays: Sequence[Any]) -> list[Any]:
            # Copies: a view of a device's memory would keep the next step from updating it in place.
            leaves = form.small([None if array is None else np.array(array) for array in arrays])
            put: list[Any] = self._engine.put(leaves, SAME)
            return put

        return live.form.whole(live, small)

    @staticmethod
    def shapes(live: TrainState | Packed) -> TrainState:
        """`state`, or its shapes: nothing is dispatched."""
        return live.form.shapes(live) if isinstance(live, Packed) else live

    def places(self, live: TrainState | Packed) -> dict[str, list[int]]:
        """`Engine.places` of a state as training takes it: leaves that share an array lie where that does."""
        if not isinstance(live, Packed):
            return self._engine.places(live)
        arrays = zip(live.form.held, self._engine.places(live.arrays).values(), strict=True)
        found = {path: places for paths, places in arrays for path in paths}
        return {path: found[path] for path in live.form.paths}

    def train(
        self, live: TrainState | Packed, seq: jax.Array, block: Block, start: int, count: int
    ) -> tuple[TrainState | Packed, jax.Array, Scalars, Any]:
        """Dispatches `count` steps from a block's batch `start` on; see `learnax.step.train_many`."""
        args = self._train_args(live, seq, block.device, start, count)
        return self._engine.program(self._train, block.signature, args)(*args)

    def probe(self, name: str, look: Callable[[Any], PyTree]) -> Kind:
        """A program that looks into the step which `train` would make next; see `learnax.step.probe`."""
        function = functools.partial(probe, self._recipe, self._first.unwrap, look)
        return Kind(f"probe {name}", function, (self._engine.layout, SAME, self._data, SAME), (SAME,))

    def dispatch_probe(self, kind: Kind, live: TrainState | Packed, seq: jax.Array, block: Block, start: int) -> PyTree:
        """Dispatches a probe before the step that begins with a block's batch `start`."""
        args = (live, seq, block.device, self._engine.scalar(start))
        (values,) = self._engine.program(kind, block.signature, args)(*args)
        if not self._engine.in_flight:
            jax.block_until_ready(values)  # the step's own program must not wait beside it
        return values

    def wanted_probe(self, kind: Kind, live: TrainState | Packed, seq: jax.Array, block: PyTree) -> Wanted:
        """What to ask the engine for, of shapes."""
        return kind, signature_of(block), (live, jax.eval_shape(key_data, seq), block, self._engine.scalar(0))

    def evaluated(self, state: TrainState) -> TrainState:
        """A training state as evaluation sees it: its average where that is on, or what its optimiser means for it."""
        params, average = state.params, state.ema if self._by_average else None
        if average is not None and all(jax.tree.leaves(jax.tree.map(lambda a, b: a.dtype == b.dtype, average, params))):
            params = average
        elif average is not None or has_own_evaluation(state.opt_state):
            (params,) = self._engine.program(self._weights, (), (state,))(state)
        return evaluated(params, state)

    def evaluate(self, state: TrainState, seq: jax.Array, block: Block) -> tuple[jax.Array, Sums]:
        """Dispatches the evaluation of a block; see `learnax.step.evaluate_many`.

        Args:
            state: see `evaluated`.
            seq: the random sequence.
            block: the data.

        Returns:
            The random sequence after it, and what the data come to.
        """
        sums: Sums = []
        tail = 0 if self._recipe.by_datum else block.size % block.batch_size
        size = block.size - tail
        if size:
            count = -(-size // block.batch_size)
            args = self._evaluate_args(state, seq, block.device, count, size)
            seq, scalars = self._engine.program(self._evaluate, block.signature, args)(*args)
            sums.append((scalars, count, size))
        if tail:
            args = (state, seq, block.device, self._engine.scalar(size // block.batch_size))
            program = self._engine.program(self._tail(tail), block.signature, args)
            sums.append((*program(*args), 1, tail))
        return seq, sums

    def predict(self, state: TrainState, seq: jax.Array, block: Block) -> tuple[jax.Array, PyTree]:
        """Dispatches the model on a block; see `learnax.step.predict_many`.

        Args:
            state: see `evaluated`.
            seq: the random sequence.
            block: the data: of each, what the model takes.

        Returns:
            The random sequence after it, and the outputs, leaves `(n, batch_size, ...)`, whole for each process.
        """
        args = self._evaluate_args(state, seq, block.device, len(block), block.size)
        seq, outputs = self._engine.program(self._predict, block.signature, args)(*args)
        if self._engine.spans:
            (outputs,) = self._engine.program(self._gather, signature_of(outputs), (outputs,))(outputs)
        return seq, outputs

    def wanted(
        self, live: TrainState | Packed, seq: jax.Array, blocks: Mapping[str, PyTree], tails: Mapping[str, int]
    ) -> list[Wanted]:
        """What a run will ask the engine for.

        Args:
            live: the state as training takes it, or its shapes.
            seq: the random sequence, or its shape.
            blocks: split -> the shapes of its blocks; all but `train` are evaluated.
            tails: split -> data of its last batch, where that is not full.
        """
        wanted: list[Wanted] = []
        shapes = self.shapes(live)
        seen = evaluated(shapes.params, shapes)
        for name, block in blocks.items():
            signature = signature_of(block)
            if name == "train":
                wanted.append(
                    (self._train, signature, self._train_args(live, jax.eval_shape(key_data, seq), block, 0, 1))
                )
                continue
            wanted.append((self._evaluate, signature, self._evaluate_args(seen, seq, block, 1, 1)))
            if tails[name] and not self._recipe.by_datum:
                args = (seen, seq, block, self._engine.scalar(0))
                wanted.append((self._tail(tails[name]), signature, args))
        return wanted

    def loss(self, state: TrainState, params: PyTree, keys: jax.Array, batch: PyTree, step: Any) -> tuple[Any, Any]:
        """`learnax.step.mean_loss`, not compiled; of the state, what the model carries on is taken."""
        wrapped = self._first.wrap(batch)
        return mean_loss(self._recipe, params, state.model_state, keys, wrapped, jnp.asarray(step, jnp.int32))

    def grad(self, state: TrainState, params: PyTree, keys: jax.Array, batch: PyTree, step: Any) -> tuple[PyTree, Any]:
        """`learnax.step.gradients` under `jax.pmap`: keys, batch and results have a leading device axis."""
        wrapped = self._first.wrap(batch)
        return self._pmapped_gradients(params, state.model_state, keys, wrapped, jnp.asarray(step, jnp.int32))

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
        return jax.pmap(function, AXIS, in_axes=(None, None, 0, 0, None), devices=self._engine.devices)

    def _tail(self, size: int) -> Kind:
        tail = functools.partial(evaluate_tail, self._recipe, self._engine.mapped, size)
        name = f"evaluate a tail of {size}"
        return Kind(name, tail, (self._engine.evaluated_layout, SAME, BATCHES, SAME), (SAME,), whole=True)

    def _own_weights(self, state: TrainState) -> tuple[PyTree]:
        if self._by_average and state.ema is not None:
            return (jax.tree.map(lambda average, own: average.astype(own.dtype), state.ema, state.params),)
        return (evaluation_params(state.params, state.opt_state),)

    def _train_args(
        self, live: TrainState | Packed, seq: jax.Array, batches: PyTree, start: int, count: int
    ) -> tuple[Any, ...]:
        stride = count * self._recipe.accumulate
        following = range(start + stride, start + 64 * stride, stride)
        return live, seq, batches, self._engine.scalar(start, following), self._engine.scalar(count)

    def _evaluate_args(
        self, state: TrainState, seq: jax.Array, batches: PyTree, count: int, size: int
    ) -> tuple[Any, ...]:
        scalar = self._engine.scalar
        return state, seq, batches, scalar(count), scalar(size)


def _canonical(leaf: Any) -> Any:
    """A leaf as an array of the type that devices will hold."""
    if isinstance(leaf, jax.Array) or is_key(leaf):
        return leaf
    array = np.asarray(leaf)
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
