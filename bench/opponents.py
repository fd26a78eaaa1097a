"""Who trains: learnax as it comes, loops written by hand, and Keras."""

from __future__ import annotations

import functools
import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench.workloads import Workload
from learnax.trainer import Trainer
from learnax.utils.extras import missing

FUSED = 16
"""Steps in a dispatch of those that fuse them."""


class Round(NamedTuple):
    """What a round of `workload.steps` steps took.

    Attributes:
        seconds: by the clock, until the last step is done.
        host: CPU seconds of the loop's own thread, where they are asked for.
        waited: seconds in which the loop waited for data.
        dispatches: calls of a compiled program.
    """

    seconds: float
    host: float = 0.0
    waited: float = 0.0
    dispatches: int = 0


class Contender(Protocol):
    """One way to train a workload."""

    def round(self) -> Round:
        """Trains one pass over the data, to its end."""

    def step(self) -> None:
        """One step, from the call until its result is there."""

    def close(self) -> None:
        """Ends what was started."""


class Hand:
    """A loop as one would write it by hand: a donated jitted step with no clip, no guard, and nothing read back.

    Where the workload names an optimiser, there is a clip before it, as learnax has it.

    Batches are stacked in numpy beforehand, unless the workload measures reading.

    Args:
        workload: what to train.
        fused: steps in a dispatch, by `lax.scan`.
        params: parameters to begin with; by default fresh ones.
    """

    def __init__(self, workload: Workload, fused: int = 1, params: Any = None):
        self._workload = workload
        self._fused = fused
        devices = jax.local_devices()
        mesh = Mesh(np.asarray(devices), ("devices",))
        lead: tuple[Any, ...] = (None, "devices") if fused > 1 else ("devices",)
        self._split = NamedSharding(mesh, PartitionSpec(*lead)) if len(devices) > 1 else None
        # Programs of several CPU devices starve each other of threads when many are in flight.
        self._careful = len(devices) > 1 and devices[0].platform == "cpu"
        self._stacked = None if workload.live else list(self._read())

        if workload.optimizer is None:
            self._optimizer = optax.adam(workload.learning_rate)
        else:
            own = workload.optimizer(workload.learning_rate)
            self._optimizer = optax.chain(optax.clip_by_global_norm(1.0), own)
        state = self._start(params)
        self._state = jax.device_put(state, NamedSharding(mesh, PartitionSpec())) if self._split else state
        self._step = self._compiled()

    def _start(self, params: Any) -> Any:
        """What a step carries on."""
        workload = self._workload
        if params is None:
            first = workload.arguments(workload.data[0])
            params = jax.jit(workload.model.init)(jax.random.key(0), *first)["params"]
        return params, jax.jit(self._optimizer.init)(params)

    def _one(self, state: Any, batch: Any) -> tuple[Any, jax.Array]:
        """A step."""
        workload = self._workload

        def loss(params: Any) -> jax.Array:
            return workload.loss(workload.model.apply({"params": params}, *workload.arguments(batch)), batch)

        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = self._optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    def _compiled(self) -> Callable[[Any, Any], tuple[Any, jax.Array]]:
        """A dispatch: a step, or several."""

        def many(state: Any, batches: Any) -> tuple[Any, jax.Array]:
            return jax.lax.scan(self._one, state, batches)

        return jax.jit(many if self._fused > 1 else self._one, donate_argnums=0)

    def _read(self) -> Iterator[Any]:
        workload = self._workload
        size = workload.batch_size * self._fused
        for start in range(0, workload.steps * workload.batch_size, size):
            data = [workload.data[i] for i in range(start, start + size)]
            batch = jax.tree.map(lambda *leaves: np.stack(leaves), *data)
            if self._fused > 1:
                batch = jax.tree.map(lambda leaf: leaf.reshape(self._fused, -1, *leaf.shape[1:]), batch)
            yield batch

    def losses(self) -> np.ndarray:
        """Trains one pass; the loss of each step."""
        values = [self._dispatch(batch) for batch in self._stacked or self._read()]
        return np.concatenate([np.atleast_1d(value) for value in jax.device_get(values)])

    def round(self) -> Round:
        """Trains one pass over the data."""
        began = time.perf_counter()
        for batch in self._stacked or self._read():
            loss = self._dispatch(batch)
        jax.block_until_ready((self._state, loss))
        return Round(time.perf_counter() - began)

    def step(self) -> None:
        """One dispatch, waited for."""
        batch = self._stacked[0] if self._stacked else next(self._read())
        self._dispatch(batch)
        jax.block_until_ready(self._state)

    def close(self) -> None:
        """Nothing was started."""

    def _dispatch(self, batch: Any) -> jax.Array:
        # jit puts numpy arrays on one device itself, and faster than `device_put` does.
        batch = jax.device_put(batch, self._split) if self._split else batch
        self._state, loss = self._step(self._state, batch)
        if self._careful:
            jax.block_until_ready(self._state)
        return loss


class HandStatistics(Hand):
    """The same with batch statistics, carried beside the parameters."""

    def _start(self, params: Any) -> Any:
        module = self._workload.model.module
        image = np.asarray(self._workload.data[0][0])[None]
        variables = module.init(jax.random.key(0), image, train=True)
        params = variables["params"] if params is None else params
        return params, self._optimizer.init(params), variables["batch_stats"]

    def _one(self, state: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, opt_state, statistics = state

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": statistics}
            module = self._workload.model.module
            output, after = module.apply(variables, batch[0], train=True, mutable=["batch_stats"])
            return self._workload.loss(output, batch), after["batch_stats"]

        (value, statistics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = self._optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, statistics), value


class HandNNX(Hand):
    """A loop as flax's NNX has it: `nnx.jit` of a step on a module and an `nnx.Optimizer`.

    Fused, the module is split once, and a functional step is scanned.
    """

    def _start(self, params: Any) -> Any:
        from flax import nnx

        module = nnx.clone(self._workload.model.module)
        if self._fused == 1:
            return module, nnx.Optimizer(module, self._optimizer, wrt=nnx.Param)
        self._graph, state = nnx.split(module)
        return state, self._optimizer.init(state)

    def _one(self, state: Any, batch: Any) -> tuple[Any, jax.Array]:
        from flax import nnx

        def loss(params: Any) -> jax.Array:
            return self._workload.loss(nnx.merge(self._graph, params)(batch[0]), batch)

        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = self._optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    def _compiled(self) -> Callable[[Any, Any], tuple[Any, jax.Array]]:
        from flax import nnx

        if self._fused > 1:
            return super()._compiled()

        @nnx.jit
        def step(module: Any, optimizer: Any, batch: Any) -> jax.Array:
            def loss(module: Any) -> jax.Array:
                return self._workload.loss(module(batch[0]), batch)

            value, grads = nnx.value_and_grad(loss)(module)
            optimizer.update(module, grads)
            return value

        return lambda state, batch: (state, step(*state, batch))


class HandEquinox(Hand):
    """A loop as Equinox has it: `eqx.filter_jit` of a step on a module; fused, its arrays are scanned over."""

    def _start(self, params: Any) -> Any:
        import equinox

        module = self._workload.model.module
        own, self._rest = equinox.partition(module, equinox.is_inexact_array)
        # Donated, as learnax's are, and so copies.
        own = jax.tree.map(jax.numpy.array, own)
        state = own if self._fused > 1 else equinox.combine(own, self._rest)
        return state, self._optimizer.init(own)

    def _updated(self, params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        import equinox

        def loss(params: Any) -> jax.Array:
            module = equinox.combine(params, self._rest)
            return self._workload.loss(jax.vmap(module)(batch[0]), batch)

        value, grads = equinox.filter_value_and_grad(loss)(params)
        updates, opt_state = self._optimizer.update(grads, opt_state, params)
        return equinox.apply_updates(params, updates), opt_state, value

    def _one(self, state: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, opt_state, value = self._updated(*state, batch)
        return (params, opt_state), value

    def _compiled(self) -> Callable[[Any, Any], tuple[Any, jax.Array]]:
        import equinox

        if self._fused > 1:
            return super()._compiled()

        @equinox.filter_jit(donate="all-except-first")
        def step(batch: Any, module: Any, opt_state: Any) -> tuple[Any, Any, jax.Array]:
            params, _ = equinox.partition(module, equinox.is_inexact_array)
            params, opt_state, value = self._updated(params, opt_state, batch)
            return equinox.combine(params, self._rest), opt_state, value

        def dispatch(state: Any, batch: Any) -> tuple[Any, jax.Array]:
            module, opt_state, value = step(batch, *state)
            return (module, opt_state), value

        return dispatch


HANDS: dict[str, type[Hand]] = {
    "linen": Hand,
    "statistics": HandStatistics,
    "nnx": HandNNX,
    "equinox": HandEquinox,
}
"""Loops written by hand, each in its own idiom."""


class Keras:
    """Keras 3 on JAX, by `fit`.

    Args:
        workload: what to train.
        fused: `steps_per_execution`.
    """

    def __init__(self, workload: Workload, fused: int):
        import keras

        if len(jax.local_devices()) > 1:
            keras.distribution.set_distribution(keras.distribution.DataParallel(devices=jax.local_devices()))
        keras.utils.set_random_seed(0)
        assert workload.keras is not None
        self._model, loss = workload.keras()
        optimizer = keras.optimizers.Adam(workload.learning_rate, epsilon=1e-8)
        self._model.compile(optimizer=optimizer, loss=loss, steps_per_execution=fused)
        self._x, self._y = (np.stack(column) for column in zip(*workload.data, strict=True))
        self._batch_size = workload.batch_size

    def round(self) -> Round:
        """Trains one pass over the data."""
        began = time.perf_counter()
        self._fit(len(self._x))
        return Round(time.perf_counter() - began)

    def step(self) -> None:
        """One batch, waited for: `train_on_batch` gives the loss back as a number."""
        self._model.train_on_batch(self._x[: self._batch_size], self._y[: self._batch_size])

    def close(self) -> None:
        """Nothing was started."""

    def _fit(self, size: int) -> None:
        data = {"x": self._x[:size], "y": self._y[:size]}
        self._model.fit(**data, batch_size=self._batch_size, epochs=1, shuffle=False, verbose=0)


class _StopError(Exception):
    """Ends a training that is paced from outside."""


class _Paced(Trainer):
    """A trainer whose `train` waits before each epoch until it is told to go on."""

    go: queue.SimpleQueue
    done: queue.SimpleQueue

    def epoch(self, epoch: int) -> None:
        """One epoch, when it is time, and what it took."""
        if not self.go.get():
            raise _StopError
        waited, calls = self.phases.data.seconds, self.engine.calls
        began, host = time.perf_counter(), time.thread_time()
        super().epoch(epoch)
        seconds, host = time.perf_counter() - began, time.thread_time() - host
        self.done.put(Round(seconds, host, self.phases.data.seconds - waited, self.engine.calls - calls))


class Learnax:
    """A `Trainer` with its default arguments, in the midst of `train()`: each round is an epoch of one session.

    Args:
        workload: what to train.
        extra: arguments beside those that everybody has to give.
    """

    def __init__(self, workload: Workload, **extra: Any):
        self.trainer = _Paced(**{**workload.given(100_000), **extra})
        self.trainer.go, self.trainer.done = queue.SimpleQueue(), queue.SimpleQueue()
        self._thread = threading.Thread(target=self._train, name="learnax", daemon=True)

    def _train(self) -> None:
        try:
            self.trainer.train()
        except _StopError:
            pass
        except BaseException as error:
            self.trainer.done.put(error)

    def round(self) -> Round:
        """Trains one epoch; raises what the training raises."""
        if not self._thread.is_alive():
            self._thread.start()
        self.trainer.go.put(True)
        result = self.trainer.done.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def step(self) -> None:
        """One step by the program that trains, waited for: a dispatch with a count of one."""
        self._one()

    @functools.cached_property
    def _one(self) -> Callable[[], None]:
        """On a state of its own: the program takes over what it is given."""
        trainer, engine = self.trainer, self.trainer.engine
        live, seq = trainer.programs.live(trainer.train_state), jax.random.key_data(trainer.rng_seq)
        block = next(iter(trainer.loaders["train"].blocks()))
        start, count = engine.scalar(0), engine.scalar(1)
        (program,) = [program for (kind, _), program in engine.programs.items() if kind == "train"]

        def one() -> None:
            nonlocal live, seq
            live, seq, scalars, _ = program(live, seq, block.device, start, count)
            jax.block_until_ready((live, scalars.values))

        return one

    def settle(self) -> None:
        """Waits for what goes on beside the loop, for it not to disturb the next round of another."""
        self.trainer.log.flush()
        if self.trainer.checkpointer is not None:
            self.trainer.checkpointer.wait()

    def close(self) -> None:
        """Ends the training, and its worker processes."""
        if self._thread.is_alive():
            self.trainer.go.put(False)
            self._thread.join()


def _twin(workload: Workload) -> Contender:
    assert workload.twin is not None
    return Learnax(workload.twin())


OPPONENTS: dict[str, Callable[[Workload], Contender]] = {
    "hand": lambda workload: HANDS[workload.kind](workload),
    "hand-fused": lambda workload: HANDS[workload.kind](workload, FUSED),
    "linen": _twin,
    "keras-1": lambda workload: Keras(workload, 1),
    "keras-16": lambda workload: Keras(workload, FUSED),
}
"""Whom learnax is measured against, by name."""


def why_not(opponent: str, workload: Workload) -> str | None:
    """Why an opponent does not take part, or None."""
    if opponent == "hand-fused" and workload.live:
        return "its data are read as it goes"
    if opponent == "hand-fused" and workload.fused == 1:
        return "it makes one step a dispatch"
    if opponent == "linen" and workload.twin is None:
        return "it is of linen itself"
    if opponent.startswith("keras"):
        if workload.keras is None:
            return "it has no Keras form"
        if importlib.util.find_spec("keras") is None:
            return missing("bench", "keras")
    return None
