"""Step functions to compiled programs: parallelised, lowered, compiled ahead of time, kept.

One device takes plain `jit`: a mapped axis of one costs copies and collectives for nothing. Several
take `jit(shard_map)`, which is what `pmap` is made of, without its leading device axis on the state.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from learnax.state import PyTree
from learnax.step import AXIS, Recipe, evaluate, pack, train, update

SAME = PartitionSpec()
"""How an argument lies on the devices: the same on each."""
SPLIT = PartitionSpec(AXIS)
"""How an argument lies on the devices: split along its leading axis."""


@dataclasses.dataclass
class Program:
    """A compiled program and what it cost.

    Attributes:
        kind: which step it is.
        compiled: the callable.
        names: names of the scalars it packs.
        seconds: time spent to trace, lower and compile it.
        calls: times it was dispatched.
    """

    kind: str
    compiled: jax.stages.Compiled
    names: tuple[str, ...]
    seconds: dict[str, float]
    calls: int = 0

    def __call__(self, *args: Any) -> Any:
        """Dispatches it, and does not wait."""
        self.calls += 1
        return self.compiled(*args)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A step to be compiled.

    Attributes:
        name: what it is called in the cache.
        function: one device's share of the work; the scalars it returns are a dict.
        inputs: how each argument lies on the devices.
        outputs: how each result does.
        scalars: which result is packed into one vector, or None.
        donated: arguments whose buffers the program may reuse.
    """

    name: str
    function: Callable[..., tuple[Any, ...]]
    inputs: tuple[PartitionSpec, ...]
    outputs: tuple[PartitionSpec, ...]
    scalars: int | None = None
    donated: tuple[int, ...] = ()


class Engine:
    """Compiles steps for a set of devices, and lays data out on them.

    Attributes:
        devices: the devices that a batch is split over.
        mapped: whether user code names the mapped axis, so that one device needs it, too.
        in_flight: dispatches that may be unfinished when another one is made.
        programs: what has been compiled.
    """

    def __init__(self, devices: Sequence[jax.Device]):
        self.devices = list(devices)
        self.mesh = Mesh(np.asarray(self.devices), (AXIS,))
        self.mapped = False
        # Programs of several CPU devices that wait for one another's collectives can starve each other of threads.
        self.in_flight = 0 if len(self.devices) > 1 and self.devices[0].platform == "cpu" else 2
        self.programs: dict[Hashable, Program] = {}

    def put(self, tree: PyTree, spec: PartitionSpec) -> PyTree:
        """Starts the transfer of a tree to the devices."""
        return jax.device_put(tree, self.sharding(spec))

    def own(self, tree: PyTree) -> PyTree:
        """Copies a tree to each device, into buffers that a program may take for its own."""
        sharding = self.sharding(SAME)

        # Only a copy of what is laid out already is sure to be one: a CPU device goes on using numpy's memory where
        # it can, and a device the buffer that it has a share in. Leaf by leaf: no second state is there in between.
        def copy(leaf: Any) -> jax.Array:
            held = jax.device_put(leaf if isinstance(leaf, jax.Array) else np.array(leaf), sharding)
            return jax.device_put(held, sharding, may_alias=False)

        return jax.tree.map(copy, tree)

    def sharding(self, spec: PartitionSpec) -> jax.sharding.Sharding:
        """The same in JAX's terms; plain for one device, so that its arrays are like any others."""
        if len(self.devices) == 1:
            return jax.sharding.SingleDeviceSharding(self.devices[0])
        return NamedSharding(self.mesh, spec)

    def program(self, kind: Kind, signature: Hashable, args: tuple[Any, ...]) -> Program:
        """The program for these arguments: from the cache, or compiled now.

        Args:
            kind: the step.
            signature: what of the arguments may change from call to call.
            args: arguments, or `jax.ShapeDtypeStruct`s in their place.
        """
        program = self.programs.get((kind.name, signature))
        if program is None:
            program = self.programs[kind.name, signature] = self._compile(kind, args)
        return program

    def _compile(self, kind: Kind, args: tuple[Any, ...]) -> Program:
        names: list[str] = []

        def packed(*shares: Any) -> tuple[Any, ...]:
            results = list(kind.function(*shares))
            if kind.scalars is not None:
                names[:] = results[kind.scalars]
                results[kind.scalars] = pack(results[kind.scalars])
            return tuple(results)

        function: Callable[..., Any] = packed
        if self.mapped or len(self.devices) > 1:
            # Replication of the results is not checked by shard_map, as it is not by pmap: the step's own
            # means over the devices make it so, and the tests compare one device with several.
            function = jax.shard_map(
                packed, mesh=self.mesh, in_specs=kind.inputs, out_specs=kind.outputs, check_vma=False
            )
        jitted = jax.jit(
            function,
            donate_argnums=kind.donated,
            in_shardings=tuple(self.sharding(spec) for spec in kind.inputs),
            out_shardings=tuple(self.sharding(spec) for spec in kind.outputs),
        )
        seconds, clock = {}, time.perf_counter
        began = clock()
        traced = jitted.trace(*args)
        seconds["trace"] = clock() - began
        lowered = traced.lower()
        seconds["lower"] = clock() - began - sum(seconds.values())
        compiled = lowered.compile()
        seconds["compile"] = clock() - began - sum(seconds.values())
        return Program(kind.name, compiled, tuple(names), seconds)


def train_kind(recipe: Recipe, outputs: bool) -> Kind:
    """`(state, seq, batch) -> (state, seq, scalars, outputs)`, the state donated.

    Args:
        recipe: what the step is made of.
        outputs: whether the model's outputs leave the program; None stands in their place if not.
    """

    def function(state: Any, seq: Any, batch: Any) -> tuple[Any, ...]:
        state, seq, scalars, made = train(recipe, state, seq, batch)
        return state, seq, scalars, made if outputs else None

    return Kind("train", function, (SAME, SAME, SPLIT), (SAME, SAME, SAME, SPLIT), scalars=2, donated=(0,))


def update_kind(recipe: Recipe) -> Kind:
    """`(state, key, batch) -> (state, scalars, outputs)`: one update by hand, nothing donated."""
    function = functools.partial(update, recipe)
    return Kind("update", function, (SAME, SAME, SPLIT), (SAME, SAME, SPLIT))


def evaluate_kind(recipe: Recipe) -> Kind:
    """`(params, step, seq, batch, count) -> (seq, sums)`."""
    function = functools.partial(evaluate, recipe)
    return Kind("evaluate", function, (SAME, SAME, SAME, SPLIT, SAME), (SAME, SAME), scalars=1)
