"""What a run begins with: a fresh state, whose program is compiled beside those of the run."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from learnax.checks.settings import Settings
from learnax.engine import SAME, Engine
from learnax.engine.options import options_once
from learnax.models import Model
from learnax.step import Init, fresh_state, hyperparams, key_pair, split, with_axis
from learnax.step.state import TrainState


class Coming:
    """A fresh state on its way: its program is compiled by a thread, beside whatever else a start has to do.

    Args:
        lowered: the program.
        given: its arguments.
        shapes: of the state, and how it lies.
        options: of the compiler.

    Attributes:
        shapes: as given.
    """

    def __init__(
        self, lowered: jax.stages.Lowered, given: tuple[Any, ...], shapes: TrainState, options: dict[str, Any]
    ):
        self.shapes = shapes
        self._given = given
        pool = ThreadPoolExecutor(1, thread_name_prefix="learnax-compiler")
        self._compiled = pool.submit(lowered.compile, options or None)
        pool.shutdown(wait=False)

    def made(self) -> tuple[TrainState, jax.Array]:
        """The state, on the devices, and the random sequence of the run."""
        with jax.transfer_guard("allow"):  # what it is made from goes to the devices here, whatever the user forbids
            made: tuple[TrainState, jax.Array] = self._compiled.result()(*self._given)
        return made


class Origin:
    """The state that a run begins with, the same for the same seed.

    Args:
        settings: of the run.
        model: what is trained.
        init: see `learnax.step.initial`.
        optimizer: the optax transformation.
        datum: the model's arguments for one datum.
        engine: lays it out.
    """

    def __init__(self, settings: Settings, model: Model, init: Init, optimizer: Any, datum: list[Any], engine: Engine):
        self._settings = settings
        self._model = model
        self._init = init
        self._optimizer = optimizer
        self._datum = datum
        self._engine = engine

    @property
    def makes_all(self) -> bool:
        """Whether each array of a fresh state is a new one: the model brings none."""
        return self._model.made() is None

    def begin(self) -> Coming:
        """A fresh state, and the random sequence of the run."""
        # Where the state is divided, it is nowhere whole, not even at first.
        layout = self._engine.shardings((self._engine.layout, SAME))
        traced = jax.jit(self.fresh, out_shardings=layout).trace(*self._given)
        with _random_numbers_of_a_kernel():
            lowered = traced.lower()
        return Coming(lowered, self._given, self._lying(traced.out_info[0]), options_once(self._engine.devices))

    @property
    def _given(self) -> tuple[Any, ...]:
        """What a fresh state is made from."""
        return np.uint32(self._settings.seed), self._datum, self._model.made()

    def fresh(self, seed: Any, datum: list[Any], made: Any) -> tuple[TrainState, jax.Array]:
        """One program, as each takes a start its time; and of the seed, to serve another one, too."""
        seq, key = key_pair(seed)
        averages = self._settings.ema is not None
        make = functools.partial(fresh_state, self._model, self._init, self._optimizer, averages, made, key, datum)
        return (with_axis(make) if self._engine.mapped else make()), seq

    def state(self) -> TrainState:
        """A fresh state, on the devices."""
        return self.begin().made()[0]

    def shapes(self) -> TrainState:
        """Its shapes, and how it lies where it is divided."""
        return self._lying(jax.eval_shape(self.fresh, *self._given)[0])

    def hyperparams(self) -> dict[str, Any]:
        """Those that the optimiser's fresh state keeps."""
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.shapes().params)
        return jax.jit(lambda: hyperparams(self._optimizer.init(split(self._optimizer, zeros)[0])))()

    def _lying(self, shapes: TrainState) -> TrainState:
        if self._engine.layout == SAME:
            return shapes
        lying: TrainState = jax.tree.map(
            lambda leaf, lies: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies),
            shapes,
            self._engine.shardings(self._engine.layout),
        )
        return lying


@contextlib.contextmanager
def _random_numbers_of_a_kernel() -> Iterator[None]:
    """What is lowered inside for a GPU draws its random numbers by a kernel that JAX brings: the same numbers.

    By default they become code at each place where some are drawn. A program that draws the parameters of a GPT of
    124 M was compiled for an H100 in 16 to 20 s so, and in 4 by the kernel (2 cores).
    """
    before = jax.config.jax_threefry_gpu_kernel_lowering  # type: ignore[attr-defined]
    jax.config.update("jax_threefry_gpu_kernel_lowering", True)
    try:
        yield
    finally:
        jax.config.update("jax_threefry_gpu_kernel_lowering", before)
