"""Before the run: what it will take, found out by doing a little of it."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from learnax.checkpoint import Checkpointer
from learnax.data import Block, Split
from learnax.engine import Engine
from learnax.engine.plan import Plan
from learnax.engine.programs import Programs
from learnax.profiling.costs import Costs, amount, memory_of
from learnax.step import Packed
from learnax.step.state import TrainState
from learnax.utils import PyTree, key_data, leaves_by_path, tree_bytes
from learnax.utils.permutation import Shuffled

_TIMED = 5
"""Dispatches that are timed, after one that is not."""


@dataclasses.dataclass(frozen=True)
class Preflight:
    """What a run will take. Printed, it is a table.

    Attributes:
        params: parameters.
        state_bytes: size of the training state.
        programs: what each program costs, by kind.
        memory: bytes that are taken on each device: the largest program, and the data that stay there.
        capacity: bytes that a device has; None where it is not told.
        plan: steps in a dispatch, and why.
        data: where each split is read.
        copied: arrays of the state, by name, that a step does not update in place.
        arrays: arrays of the state.
        step_s: seconds of a training step, of several in one dispatch where that is planned.
        read_s: seconds in which the data of a step are read and sent.
        validation_s: seconds of a validation.
        epoch_s: seconds of an epoch with its validation, by these.
        steps: training steps in an epoch; 0 where nobody knows how long a stream is.
        save_s: seconds of a save, until it is on disk; None over several processes, where it is not tried.
        restore_s: seconds of reading it again; it is compared bit for bit.
    """

    params: int
    state_bytes: int
    programs: Mapping[str, Costs]
    memory: int
    capacity: int | None
    plan: Plan
    data: tuple[str, ...]
    copied: tuple[str, ...]
    arrays: int
    step_s: float
    read_s: float
    validation_s: float
    epoch_s: float
    steps: int
    save_s: float | None
    restore_s: float | None

    def __str__(self) -> str:
        in_place = f"{self.arrays - len(self.copied)} of the state's {self.arrays} arrays"
        if self.copied:
            in_place += f"; copied: {', '.join(self.copied[:10])}"
        rows = [
            ("parameters", f"{self.params:,}; the training state takes {amount(self.state_bytes, 'B')}"),
            ("plan", str(self.plan)),
            *((f"program: {kind}", str(costs)) for kind, costs in self.programs.items()),
            ("memory", f"{amount(self.memory, 'B')} on each device" + _of(self.capacity)),
            *(("data", line) for line in self.data),
            ("updated in place", in_place),
            ("a step", f"{amount(self.step_s, 's')}; its data are read in {amount(self.read_s, 's')}"),
            ("a validation", amount(self.validation_s, "s")),
        ]
        if self.steps:
            rows.append(("an epoch", f"{amount(self.epoch_s, 's')}, {self.steps} steps and a validation"))
        if self.save_s is not None and self.restore_s is not None:
            text = f"{amount(self.save_s, 's')}; read again in {amount(self.restore_s, 's')}, bit for bit"
            rows.append(("a save", text))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


class Flight:
    """A little of a run: steps, a batch of each validation, a save and its restoration.

    Args:
        engine: lays out data, knows the devices.
        programs: the run's, compiled.
        plan: how a run is cut.
        loaders: each split's.
        accumulate: batches of an update.
        steps: training steps in an epoch.
    """

    def __init__(
        self,
        engine: Engine,
        programs: Programs,
        plan: Plan,
        loaders: Mapping[str, Split],
        accumulate: int,
        steps: int,
    ):
        self._engine = engine
        self._programs = programs
        self._plan = plan
        self._loaders = loaders
        self._accumulate = accumulate
        self._steps = steps

    def fly(self, live: TrainState | Packed, seq: jax.Array, resume: Mapping[str, Any]) -> Preflight:
        """Does it, and tells. The state's buffers are used up.

        Args:
            live: the state as training takes it.
            seq: the random sequence.
            resume: what a checkpoint holds beside the state.

        Raises:
            MemoryError: the devices cannot hold the run; nothing was dispatched then.
            OSError: a checkpoint does not come back as it was saved.
        """
        state = self._programs.state(live)
        params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        state_bytes = tree_bytes(state)
        programs = sorted(self._engine.programs.values(), key=lambda program: program.kind != "train")
        costs = {program.kind: program.costs for program in programs}
        block, read_s = self._read("train")
        memory = max(cost.memory for cost in costs.values()) + self._kept(block)
        capacity = min(memory_of(device) or 0 for device in self._engine.own_devices) or None
        if capacity is not None and memory > capacity:
            raise MemoryError(
                f"the run takes {amount(memory, 'B')} on each device, which has {amount(capacity, 'B')}: a smaller "
                "batch_size, with accumulate_steps to make up for it, or more devices make it fit"
            )
        # The steps come first: a look from the host at the state may keep a step from updating it in place.
        live, step_s, copied = self._train(live, key_data(seq), block)
        state = self._programs.state(live)
        validation_s = sum(self._validation(name, state, seq) for name in self._loaders if name != "train")
        # Over several processes a save needs storage that all share, which a temporary folder is not.
        save_s, restore_s = (None, None) if self._engine.spans else _save_and_restore(state, resume)
        reading = 0.0 if self._loaders["train"].kept(block) else read_s
        a_step = max(step_s, reading) if self._engine.in_flight else step_s + reading
        return Preflight(
            params=params,
            state_bytes=state_bytes,
            programs=costs,
            memory=memory,
            capacity=capacity,
            plan=self._plan,
            data=tuple(str(loader) for loader in self._loaders.values()),
            copied=copied,
            arrays=len(leaves_by_path(state)),
            step_s=step_s,
            read_s=read_s,
            validation_s=validation_s,
            epoch_s=self._steps * a_step + validation_s,
            steps=self._steps,
            save_s=save_s,
            restore_s=restore_s,
        )

    def _read(self, name: str) -> tuple[Block, float]:
        """A split's first block, and the seconds that the data of a step take: of the second, where there is one."""
        blocks = self._loaders[name].ahead(2)
        taken: list[float] = []
        first = None
        while len(taken) < 2:
            began = time.perf_counter()
            block = next(blocks, None)
            if block is None:
                break
            jax.block_until_ready(block.device)
            taken.append((time.perf_counter() - began) / len(block))
            first = first or block
        self._loaders[name].close()
        assert first is not None  # an empty split is an error before
        return first, taken[-1] * (self._accumulate if name == "train" else 1)

    def _kept(self, block: Block) -> int:
        if isinstance(block.device, Shuffled):
            return 0  # the program is given all of it
        return self._loaders["train"].kept(block) // len(self._engine.devices)

    def _train(
        self, live: TrainState | Packed, seq: jax.Array, block: Block
    ) -> tuple[TrainState | Packed, float, tuple[str, ...]]:
        """The state after some steps, seconds of one, and the arrays that the first did not update in place."""
        before = self._programs.places(live)
        live, seq, _, _ = jax.block_until_ready(self._programs.train(live, seq, block, 0, 1))
        after = self._programs.places(live)
        count = min(self._plan.room, len(block) // self._accumulate)
        seconds = []
        for _ in range(_TIMED):
            began = time.perf_counter()
            live, seq, _, _ = jax.block_until_ready(self._programs.train(live, seq, block, 0, count))
            seconds.append((time.perf_counter() - began) / count)
        return live, statistics.median(seconds), tuple(name for name in before if before[name] != after[name])

    def _validation(self, name: str, state: TrainState, seq: jax.Array) -> float:
        """Seconds of a pass over a validation set, by its first block."""
        block, read_s = self._read(name)
        seen = self._programs.evaluated(state)
        jax.block_until_ready(self._programs.evaluate(seen, seq, block))
        began = time.perf_counter()
        jax.block_until_ready(self._programs.evaluate(seen, seq, block))
        a_batch = (time.perf_counter() - began) / len(block)
        return len(self._loaders[name]) * (a_batch + (0.0 if self._loaders[name].kept(block) else read_s))


def _save_and_restore(state: TrainState, resume: Mapping[str, Any]) -> tuple[float, float]:
    """Saves into a temporary folder and reads that again: the seconds of both."""
    with tempfile.TemporaryDirectory(prefix="learnax-preflight-") as folder:
        checkpointer = Checkpointer(folder, "run")
        began = time.perf_counter()
        checkpointer.save_latest(state, int(state.step), resume=resume)
        checkpointer.wait()
        middle = time.perf_counter()
        loaded = Checkpointer(folder, "run").load_latest(target=jax.eval_shape(lambda: state))
        ended = time.perf_counter()
        checkpointer.close()
    assert loaded is not None
    wrong = _differing(state, loaded["state"])
    if wrong:
        raise OSError(f"a checkpoint did not come back as it was saved: {', '.join(wrong[:10])}; is {folder} sound?")
    return middle - began, ended - middle


def _differing(left: PyTree, right: PyTree) -> list[str]:
    a, b = leaves_by_path(left), leaves_by_path(right)
    return [path for path in a if _raw(a[path]) != _raw(b[path])]


def _raw(leaf: Any) -> bytes:
    return np.asarray(key_data(leaf)).tobytes()


def _of(capacity: int | None) -> str:
    return "" if capacity is None else f", which has {amount(capacity, 'B')}"
