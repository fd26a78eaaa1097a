"""Taking turns: what is compared is measured side by side, so that what slows the machine slows all."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bench.opponents import OPPONENTS, Contender, Learnax, Round, why_not
from bench.results import Results
from bench.workloads import Workload
from learnax.registry import Registry
from learnax.sinks import JsonLines, TensorBoard

STEP, LATENCY, HOST, WAITED = "step", "synchronous step", "host work per step", "waiting for data"
STALL, SLOWED = "stall per checkpoint", "longer steps while one is written"
SAVE_EVERY = 32


def in_turns(contenders: Mapping[str, Contender], rounds: int) -> dict[str, list[Round]]:
    """Rounds of each, one after the other, each turn begun by another; the first turn is for warming up."""
    names = list(contenders)
    taken: dict[str, list[Round]] = {name: [] for name in names}
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            result = contenders[name].round()
            if isinstance(contenders[name], Learnax):
                contenders[name].settle()
            taken[name].append(result)
    return {name: results[1:] for name, results in taken.items()}


def throughput(results: Results, workload: Workload, opponents: list[str], rounds: int, calls: int) -> None:
    """Time of a step in a running loop, latency of one that is waited for, and what learnax's loop costs the host.

    Args:
        results: where figures go.
        workload: what is trained.
        opponents: whom learnax is measured against.
        rounds: turns.
        calls: synchronous steps.
    """
    contenders: dict[str, Contender] = {"learnax": Learnax(workload)}
    for name in opponents:
        reason = why_not(name, workload)
        if reason is None:
            contenders[name] = OPPONENTS[name](workload)
        else:
            results.notes.append(f"{workload.name} without {name}: {reason}")
    with contextlib.ExitStack() as stack:
        for contender in contenders.values():
            stack.callback(contender.close)
        taken = in_turns(contenders, rounds)
        for name, each in taken.items():
            _add_step(results, workload, name, each)
            if name != "learnax":
                results.compare(workload.name, STEP, "learnax", name)
        own = taken["learnax"]
        per_dispatch = [r.host / max(r.dispatches, 1) for r in own]
        results.add(
            workload.name,
            "learnax",
            HOST,
            "s",
            [r.host / workload.steps for r in own],
            per_dispatch_s=float(np.median(per_dispatch)),
            steps_per_dispatch=workload.steps / own[0].dispatches,
        )
        results.add(workload.name, "learnax", WAITED, "", [r.waited / r.seconds for r in own])
        for name, contender in contenders.items():
            # One dispatch of a fused loop is no step.
            if name not in ("hand-fused", "keras-16", "linen") and not workload.live:
                _add_latency(results, workload, name, contender, calls)


def logging(results: Results, workload: Workload, rounds: int) -> None:
    """What logging every step costs: to an offline wandb run, and to TensorBoard and JSON lines together."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="learnax-bench-"))
        stack.enter_context(_environment(WANDB_MODE="offline", WANDB_SILENT="true"))
        run = Registry("logged", folder).new_run()
        stack.callback(run.finish)
        contenders = {
            "learnax": Learnax(workload),
            "learnax, wandb": Learnax(workload, run=run),
            "learnax, files": Learnax(workload, run=[TensorBoard(f"{folder}/tb"), JsonLines(f"{folder}/rows.jsonl")]),
        }
        for contender in contenders.values():
            stack.callback(contender.close)
        taken = in_turns(contenders, rounds)
    for name in ("learnax, wandb", "learnax, files"):
        _add_step(results, workload, name, taken[name])
    # The plain loop again, in turns with this one: the samples of a ratio are pairs.
    for name, each in taken.items():
        results.add(workload.name, name, "logging", "s", [r.seconds / workload.steps for r in each])
    for name in ("learnax, wandb", "learnax, files"):
        results.compare(workload.name, "logging", name, "learnax")


def saving(results: Results, workload: Workload, rounds: int) -> None:
    """How long a save holds up the loop, and by how much steps are slower while it is written."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="learnax-bench-"))
        saves = _Saving(workload, registry=Registry("saved", folder), save_every=SAVE_EVERY)
        contenders = {"learnax": Learnax(workload), "learnax, saves": saves}
        for contender in contenders.values():
            stack.callback(contender.close)
        taken = in_turns(contenders, rounds)
    count = workload.steps // SAVE_EVERY
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(saves.trainer.train_state))
    held = [after - before for before, after in itertools.pairwise(saves.held)][1:]
    written = [after - before for before, after in itertools.pairwise(saves.written)][1:]
    longer = [
        (with_saves.seconds - plain.seconds - stall) / seconds
        for with_saves, plain, stall, seconds in zip(*reversed(taken.values()), held, written, strict=True)
    ]
    stalls = [stall / count for stall in held]
    results.add(workload.name, "learnax, saves", STALL, "s", stalls, state_bytes=size)
    write_s = float(np.median(written)) / count
    results.add(workload.name, "learnax, saves", SLOWED, "", longer, write_s=write_s)


class _Saving(Learnax):
    """With saves, and what they took up to the end of each round."""

    def __init__(self, workload: Workload, **extra: Any):
        super().__init__(workload, **extra)
        self.held, self.written = [0.0], [0.0]

    def settle(self) -> None:
        """As `Learnax`: a round ends when its saves are on disk, though that is not in its time."""
        super().settle()
        checkpointer = self.trainer.checkpointer
        self.held.append(self.trainer.phases.save.seconds)
        self.written.append(checkpointer.writing)


def matrix_rate(dtype: Any) -> float:
    """The most floating-point operations a second that matrix products of random numbers reach here, of this type.

    Of random ones, as all the same take a GPU less power, and so run faster: by 13 % on an H200.
    """
    size = 1024 if jax.default_backend() == "cpu" else 8192
    many = 4 if jax.default_backend() == "cpu" else 20
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda a, b: jax.lax.fori_loop(0, many, lambda _, c: (a @ c) / math.sqrt(size), b))
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        jax.block_until_ready(product(matrix, matrix))
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 * many / min(seconds)


def _add_step(results: Results, workload: Workload, name: str, each: list[Round]) -> None:
    samples = [r.seconds / workload.steps for r in each]
    rate = 1 / float(np.median(samples))
    more = {"steps_per_s": rate, "items_per_s": rate * workload.batch_size}
    if workload.flops and name == "learnax":
        more["share_of_matrix_rate"] = workload.flops * rate / matrix_rate(workload.dtype) / len(jax.local_devices())
    results.add(workload.name, name, STEP, "s", samples, **more)


def _add_latency(results: Results, workload: Workload, name: str, contender: Contender, calls: int) -> None:
    samples = []
    for number in range(calls + 3):
        began = time.perf_counter()
        contender.step()
        if number >= 3:
            samples.append(time.perf_counter() - began)
    p90, p99 = np.percentile(samples, [90, 99])
    results.add(workload.name, name, LATENCY, "s", samples, p90=float(p90), p99=float(p99))


@contextlib.contextmanager
def _environment(**variables: str) -> Any:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
