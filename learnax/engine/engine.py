"""Step functions to compiled programs: parallelised, lowered, compiled ahead of time, kept.

One device takes plain `jit`: a mapped axis of one costs copies and collectives for nothing. Several
take `jit(shard_map)`, which is what `pmap` is made of, without its leading device axis on the state. A state that
is divided over the devices takes plain `jit` again, and XLA's partitioner.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from learnax.engine.options import compiler_options
from learnax.profiling.costs import Costs, costs_of
from learnax.profiling.phases import Phases
from learnax.step import AXIS, evaluated
from learnax.utils import PyTree, is_key, key_data, leaves_by_path, like_key
from learnax.utils.memory import give_back

_logger = logging.getLogger("learnax")
MANY_PROGRAMS = 8
"""Programs of one kind at which a line says how to do with fewer."""

SAME = PartitionSpec()
"""How an argument lies on the devices: the same on each."""
SPLIT = PartitionSpec(AXIS)
"""How an argument lies on the devices: split along its leading axis."""
BATCHES = PartitionSpec(None, AXIS)
"""How an argument lies on the devices: n batches, each of them split."""


@dataclasses.dataclass
class Program:
    """A compiled program and what it cost.

    Attributes:
        kind: which step it is.
        compiled: the callable.
        seconds: time spent to trace, lower and compile it.
        calls: times it was dispatched.
    """

    kind: str
    compiled: jax.stages.Compiled
    seconds: dict[str, float]
    calls: int = 0

    def __call__(self, *args: Any) -> Any:
        """Dispatches it, and does not wait."""
        self.calls += 1
        return self.compiled(*args)

    @functools.cached_property
    def costs(self) -> Costs:
        """What a call costs, by the compiler's count."""
        return costs_of(self.compiled)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A step to be compiled.

    Attributes:
        name: what it is called in the cache.
        function: one device's share of the work, or all of it where the state is divided.
        inputs: how each argument, or each of its leaves, lies on the devices.
        outputs: how each result does.
        donated: arguments whose buffers the program may reuse.
        whole: whether the function is of all devices' data together, which XLA's partitioner divides.
    """

    name: str
    function: Callable[..., tuple[Any, ...]]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    donated: tuple[int, ...] = ()
    whole: bool = False


Wanted = tuple[Kind, Hashable, tuple[Any, ...]]
"""A program to be compiled: its kind, what of its arguments may change, and the arguments or their shapes."""


def check_compiling() -> None:
    """Raises RuntimeError where JAX is told to compile nothing."""
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        raise RuntimeError(
            "jax.disable_jit() is on (or JAX_DISABLE_JIT), but a trainer's step is compiled before it runs: take it "
            "away from around the trainer. To look into model and losses step by step, call model.apply(...) and the "
            "losses by hand under it; jax.debug.print works in a compiled step"
        )


class Engine:
    """Compiles steps for a set of devices, and lays data out on them.

    Args:
        devices: that a batch is split over.
        phases: the run's clock; what compiling takes goes there.

    Attributes:
        devices: the devices that a batch is split over, those of a process side by side.
        spans: whether some of them belong to other processes.
        own_devices: those of this process.
        share: this process's part of a batch: the first of `len(devices)` equal parts and the one after its last.
        mapped: whether user code names the mapped axis, so that one device needs it, too.
        layout: how the training state lies: `SAME`, or a `PartitionSpec` for each leaf of a state that is divided.
        in_flight: dispatches that may be unfinished when another one is made.
        programs: what has been compiled.
    """

    def __init__(self, devices: Sequence[jax.Device], phases: Phases):
        here = jax.process_index()
        self.devices = sorted(devices, key=lambda device: device.process_index)
        mine = [place for place, device in enumerate(self.devices) if device.process_index == here]
        self.spans = len(mine) < len(self.devices)
        self.own_devices = [self.devices[place] for place in mine]
        self.share = (mine[0], mine[-1] + 1)
        self._phases = phases
        self.mesh = Mesh(np.asarray(self.devices), (AXIS,))
        self.mapped = False
        self.layout: Any = SAME
        # Programs of several CPU devices that wait for one another's collectives can starve each other of threads.
        self.in_flight = 0 if len(self.devices) > 1 and self.devices[0].platform == "cpu" else 2
        self.programs: dict[tuple[str, Hashable], Program] = {}
        self._scalars: dict[int, jax.Array] = {}

    @property
    def calls(self) -> int:
        """Dispatches made so far."""
        return sum(program.calls for program in list(self.programs.values()))

    @property
    def params_layout(self) -> Any:
        """How the parameters lie."""
        return self.layout if self.layout == SAME else self.layout.params

    @property
    def evaluated_layout(self) -> Any:
        """How a state lies that is evaluated, see `learnax.engine.programs.Programs.evaluated`."""
        return self.layout if self.layout == SAME else evaluated(self.layout.params, self.layout)

    def put(self, tree: PyTree, spec: PartitionSpec) -> PyTree:
        """Starts the transfer of a tree to the devices; of what is split, each process gives its own part."""
        sharding = self.sharding(spec)
        if not self.spans:
            return jax.device_put(tree, sharding)

        def put(leaf: Any) -> jax.Array:
            if is_key(leaf):
                return like_key(leaf, put(key_data(leaf)))
            shape = None if spec != SAME else leaf.shape
            return jax.make_array_from_process_local_data(sharding, np.asarray(leaf), shape)

        return jax.tree.map(put, tree)

    def spread(self, tree: PyTree, spec: PartitionSpec) -> PyTree:
        """`put` of a tree that each process has whole."""
        if not self.spans:
            return self.put(tree, spec)
        sharding = self.sharding(spec)
        return jax.tree.map(
            lambda leaf: jax.make_array_from_callback(leaf.shape, sharding, np.asarray(leaf).__getitem__), tree
        )

    def whole(self, tree: PyTree) -> PyTree:
        """A tree from the devices, on each process's host: from all of its parts. All processes call it."""
        if self.spans:
            tree = jax.jit(lambda tree: tree, out_shardings=self.sharding(SAME))(tree)

        def fetch(leaf: Any) -> Any:
            return like_key(leaf, np.asarray(key_data(leaf))) if is_key(leaf) else np.asarray(leaf)

        return jax.tree.map(fetch, tree)

    def scalar(self, value: int, following: Iterable[int] = ()) -> jax.Array:
        """A whole number on the devices; few of them come up, again and again.

        Args:
            value: the number.
            following: those that will probably be asked for next. Sending many takes little longer than one.
        """
        if value not in self._scalars:
            numbers = [value, *following]
            self._scalars |= zip(numbers, self.put([np.int32(number) for number in numbers], SAME), strict=True)
        return self._scalars[value]

    @staticmethod
    def places(tree: PyTree) -> dict[str, list[int]]:
        """Where each leaf lies: the addresses of its buffers, one for each device."""
        return {
            path: [shard.data.unsafe_buffer_pointer() for shard in key_data(leaf).addressable_shards]
            for path, leaf in leaves_by_path(tree).items()
        }

    @staticmethod
    def host_copy(array: jax.Array) -> np.ndarray | jax.Array:
        """A copy on the host. No view of the device's buffer stays: it would keep a step from updating it in place."""
        if is_key(array):
            return like_key(array, Engine.host_copy(key_data(array)))
        copy = np.empty(array.shape, array.dtype)
        for shard in array.addressable_shards[:1] if array.is_fully_replicated else array.addressable_shards:
            copy[shard.index] = np.array(shard.data)
        return copy

    def own(self, tree: PyTree, layout: Any = SAME) -> PyTree:
        """Copies a tree to the devices, into buffers that a program may take for its own.

        Args:
            tree: on the host, or on devices; the same on all processes.
            layout: how it is to lie: a spec, or one for each leaf.
        """

        # `device_put` alone may not copy: a CPU device goes on using numpy's memory where it can, and a device a buffer
        # that it holds already. So each leaf is laid out first, then copied; leaf by leaf, as two states may not fit.
        def copy(leaf: Any, spec: PartitionSpec) -> jax.Array:
            if is_key(leaf):
                return like_key(leaf, copy(key_data(leaf), spec))
            sharding = self.sharding(spec)
            if isinstance(leaf, jax.Array) and not (leaf.is_fully_replicated or leaf.is_fully_addressable):
                return jax.jit(jnp.copy, out_shardings=sharding)(leaf)
            if self.spans:
                value = np.asarray(leaf)
                places = sharding.addressable_devices_indices_map(value.shape)
                held = [jax.device_put(value[place], device) for device, place in places.items()]
                parts = [jax.device_put(part, part.device, may_alias=False) for part in held]
                return jax.make_array_from_single_device_arrays(value.shape, sharding, parts)
            held = jax.device_put(leaf if isinstance(leaf, jax.Array) else np.array(leaf), sharding)
            return jax.device_put(held, sharding, may_alias=False)

        return jax.tree.map(copy, tree, jax.tree.map(lambda _: SAME, tree) if layout == SAME else layout)

    def shardings(self, specs: Any) -> Any:
        """`sharding` for each spec of a tree."""
        return jax.tree.map(self.sharding, specs, is_leaf=lambda spec: isinstance(spec, PartitionSpec))

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
            self.prepare([(kind, signature, args)])
            program = self.programs[kind.name, signature]
            self._tell_again(kind.name, signature, program)
        return program

    def prepare(self, wanted: Iterable[Wanted]) -> None:
        """Compiles those of these programs that are not there yet, side by side."""
        missing = {(kind.name, signature): (kind, args) for kind, signature, args in wanted}
        options = compiler_options(self.devices, divided=self.layout != SAME)
        with ThreadPoolExecutor(thread_name_prefix="learnax-compiler") as pool:
            # Tracing is Python and goes one by one; XLA compiles the first program while the next is traced.
            compiling = {
                key: pool.submit(self._compile, *self._lower(kind, args), options)
                for key, (kind, args) in missing.items()
                if key not in self.programs
            }
            with self._phases.compile:
                wait(compiling.values())
        for (name, signature), future in compiling.items():
            self.programs[name, signature] = future.result()
        # What was read from the cache, or is soon compiled, leaves little behind.
        if any(self.programs[key].seconds["compile"] > 1 for key in compiling):
            give_back()

    def look(self, kind: Kind, args: tuple[Any, ...]) -> None:
        """Traces a step on arguments, or their shapes, for what is wrong with it; nothing is lowered or kept."""
        with self._phases.trace:
            self._jitted(kind).trace(*args)

    def _jitted(self, kind: Kind) -> Any:
        check_compiling()

        # A function, not a `functools.partial`: JAX puts the text of a partial into its messages, and that text would
        # have all that the losses hold, a dataset for one.
        def function(*args: Any) -> Any:
            return kind.function(*args)

        function.__name__ = function.__qualname__ = kind.name
        if self.layout == SAME and not kind.whole and (self.mapped or len(self.devices) > 1):
            # Replication of the results is not checked by shard_map, as it is not by pmap: the step's own
            # means over the devices make it so, and the tests compare one device with several.
            function = jax.shard_map(
                function, mesh=self.mesh, in_specs=kind.inputs, out_specs=kind.outputs, check_vma=False
            )
        return jax.jit(
            function,
            donate_argnums=kind.donated,
            in_shardings=self.shardings(kind.inputs),
            out_shardings=self.shardings(kind.outputs),
        )

    def _lower(self, kind: Kind, args: tuple[Any, ...]) -> tuple[str, jax.stages.Lowered, dict[str, float]]:
        jitted = self._jitted(kind)
        began = time.perf_counter()
        with self._phases.trace:
            traced = jitted.trace(*args)
        middle = time.perf_counter()
        with self._phases.lower:
            lowered = traced.lower()
        return kind.name, lowered, {"trace": middle - began, "lower": time.perf_counter() - middle}

    @staticmethod
    def _compile(name: str, lowered: jax.stages.Lowered, seconds: dict[str, float], options: dict[str, Any]) -> Program:
        began = time.perf_counter()
        compiled = lowered.compile(options or None)
        return Program(name, compiled, {**seconds, "compile": time.perf_counter() - began})

    def _tell_again(self, name: str, signature: Hashable, program: Program) -> None:
        """Says that one more program of a kind was compiled, and what differs from the one before it."""
        before = [known for kind, known in self.programs if kind == name and known != signature]
        if not before:
            return
        _logger.warning(
            "%s: a batch of a new shape was compiled for in %.2f s: %s (program %d of its kind)",
            name,
            sum(program.seconds.values()),
            _difference(before[-1], signature),
            len(before) + 1,
        )
        if len(before) + 1 == MANY_PROGRAMS:
            _logger.warning(
                "%s: %d programs are compiled, for batches of as many shapes. Each costs its compilation and its "
                "memory: pad the data to one shape, or sort them into a few buckets of one shape each",
                name,
                MANY_PROGRAMS,
            )


def _difference(old: Any, new: Any) -> str:
    """Which leaves of two batches' signatures differ."""
    leaves = [
        leaves_by_path(jax.tree.unflatten(structure, [f"{dtype}{list(shape)}" for shape, dtype in shapes]))
        for structure, shapes in (old, new)
    ]
    before, after = leaves
    changed = [
        f"[{path}] from {before.get(path, 'nothing')} to {after.get(path, 'nothing')}"
        for path in dict.fromkeys([*before, *after])
        if before.get(path) != after.get(path)
    ]
    return ", ".join(changed) or "its containers"
