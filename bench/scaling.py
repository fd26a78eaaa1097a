"""Weak scaling: 1, 2 and 4 processes of this machine, a CPU device and the same data for each: `make bench-scaling`.

Each process is held to one core, so that one alone has no more of the machine than one of two. Where there are more
processes than cores, they take turns on them: that row says that it works, and nothing of how it scales. The sets of
processes live side by side and take turns, round by round; the bytes that a step moves are counted in the compiled
program. A table here; JSON in the folder that `--out` names.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from bench import report
from bench.machine import describe_machine
from bench.measure import HOST, STEP
from bench.results import Results
from bench.workloads import Workload, mlp
from learnax.trainer import Trainer

COUNTS = (1, 2, 4)
WIDTHS = {"mlp-128": 128, "mlp-2048": 2048}
STEPS = {"mlp-128": 256, "mlp-2048": 16}
"""Steps of a round: some tenths of a second for one process."""
LIMIT_S = 300.0
"""Seconds after which the processes of a workload are taken for stuck."""
_ALL_REDUCE = re.compile(r"= (.*?) all-reduce(?:-start)?\(")
_SHAPE = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")


def all_reduce_bytes(program: str) -> int:
    """The bytes that a device gives to all-reduces, by a compiled program's text; those of a loop count once."""
    total = 0
    for results in _ALL_REDUCE.findall(program):  # as many and as large as the operands
        for _, bits, shape in _SHAPE.findall(results):
            total += math.prod(int(size) for size in shape.split(",") if size) * int(bits or 8) // 8  # `pred` has none
    return total


# ---- one of the processes


class Paced(Trainer):
    """A trainer that waits for a line before each epoch, and answers with one that says what the epoch took."""

    def epoch(self, epoch: int) -> None:
        """One epoch, when it is time."""
        if not sys.stdin.readline():  # whoever measures is gone, and the others of the set with it
            os._exit(1)
        calls, began, host = self.engine.calls, time.perf_counter(), time.thread_time()
        super().epoch(epoch)
        seconds, host = time.perf_counter() - began, time.thread_time() - host
        _answer(seconds=seconds, host=host, dispatches=self.engine.calls - calls)


def child(name: str, steps: int, rounds: int, index: int, count: int, port: int) -> None:
    """One process of a set: builds its trainer, says what a step moves, and trains when it is told to."""
    if hasattr(os, "sched_setaffinity"):  # before XLA counts the cores
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[index % len(cores)]})
    if count > 1:
        jax.distributed.initialize(f"localhost:{port}", count, index, cluster_detection_method="deactivate")
    work = workload(name, steps, count)

    # A function, and no method of the workload: JAX writes out what a step is made of, and that would be all data.
    def losses(output: Any, datum: Any) -> Any:
        return work.losses(output, datum)

    trainer = Paced(
        work.model,
        work.learning_rate,
        losses,
        seed=0,
        train_dataset=work.data,
        num_epochs=rounds,
        batch_size=work.batch_size,
        num_workers=0,
        compile=True,
    )
    (program,) = trainer.engine.programs.values()
    params = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.train_state.params))
    _answer(moved=all_reduce_bytes(program.compiled.as_text()), params=params)
    trainer.train()


def workload(name: str, steps: int, count: int) -> Workload:
    """An MLP with so many times the data and the batch: the same for each process as for one alone."""
    work = mlp(WIDTHS[name], steps * count)
    return dataclasses.replace(work, batch_size=work.batch_size * count, steps=steps)


def _answer(**values: Any) -> None:
    print(json.dumps(values), flush=True)


# ---- the sets of them


class Set:
    """So many processes that train one model together.

    Args:
        stack: ends them when it is left.
        log: where what they say goes.
        name: the workload.
        steps: steps of a round.
        rounds: rounds that will be asked for.
        count: how many.
    """

    def __init__(self, stack: contextlib.ExitStack, log: IO[str], name: str, steps: int, rounds: int, count: int):
        self.count = count
        self._log = log
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        # One device each, and only on CPUs can processes share one.
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TQDM_DISABLE": "1"}
        self._processes = []
        for index in range(count):
            numbers = map(str, (steps, rounds, index, count, port))
            process = subprocess.Popen(
                [sys.executable, "-m", "bench.scaling", "--child", name, *numbers],
                cwd=Path(__file__).parents[1],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            stack.callback(_end, process)
            self._processes.append(process)

    def answers(self) -> list[dict[str, Any]]:
        """The next line of each.

        Raises:
            RuntimeError: one has ended.
        """
        return [self._next(process.stdout) for process in self._processes]

    def round(self) -> list[dict[str, Any]]:
        """Has them train an epoch; what it took each."""
        for process in self._processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        return self.answers()

    def kill(self) -> None:
        """Ends them as they stand."""
        for process in self._processes:
            process.kill()

    def _next(self, stream: IO[str]) -> dict[str, Any]:
        for line in stream:
            if line.startswith("{"):  # Gloo and the ledger write there, too
                return json.loads(line)
        self._log.seek(0)
        raise RuntimeError(f"one of {self.count} processes has ended, or hung:\n{self._log.read()[-4000:]}")


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


@contextlib.contextmanager
def _limited(sets: list[Set]) -> Iterator[None]:
    """Ends all sets where this takes too long, so that nobody waits for an answer for ever."""
    timer = threading.Timer(LIMIT_S, lambda: [each.kill() for each in sets])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def measure(results: Results, log: IO[str], name: str, counts: Sequence[int], steps: int, rounds: int) -> None:
    """Trains a workload on each number of processes, in turns; the first turn is for warming up."""
    cores = results.machine["cores"]
    with contextlib.ExitStack() as stack:
        sets = [Set(stack, log, name, steps, rounds + 1, count) for count in counts]
        stack.enter_context(_limited(sets))
        facts = {each.count: each.answers()[0] for each in sets}
        taken: dict[int, list[list[dict[str, Any]]]] = {each.count: [] for each in sets}
        for number in range(rounds + 1):
            shift = number % len(sets)
            for each in sets[shift:] + sets[:shift]:
                taken[each.count].append(each.round())
    for count, each in taken.items():
        who, every = title(count), each[1:]
        samples = [max(process["seconds"] for process in one) / steps for one in every]
        rate = 1 / float(np.median(samples))
        more = {
            "processes": count,
            "oversubscribed": count > cores,
            "steps_per_s": rate,
            "items_per_s": rate * 64 * count,
            "all_reduce_bytes": facts[count]["moved"],
            "parameter_bytes": facts[count]["params"],
            "dispatches": every[0][0]["dispatches"],
            "steps": steps,
        }
        results.add(name, who, STEP, "s", samples, **more)
        results.add(name, who, HOST, "s", [max(process["host"] for process in one) / steps for one in every])
        if count > 1 and 1 in taken:
            results.compare(name, STEP, who, title(1))


def title(count: int) -> str:
    """What a set of so many is called."""
    return "1 process" if count == 1 else f"{count} processes"


# ---- for a person


def table(results: Results) -> str:
    """Everything that was measured, as text."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Results) -> Iterator[str]:
    machine = results.machine
    pinned = "one core for each process" if hasattr(os, "sched_setaffinity") else "processes on any core"
    yield f"{machine['cpu']}, {machine['cores']} cores, {pinned}; load at start {machine['load at start']}"
    yield f"python {machine['python']}, jax {machine['jax']}; the same data for each process, 64 a step"
    for name in dict.fromkeys(figure.workload for figure in results.figures):
        yield ""
        yield (
            f"{name:<12}{'a step':>10}{'steps/s':>10}{'items/s':>10}{'host work':>11}{'all-reduced':>14}"
            f"{'dispatches':>12}    times one process, 95 % interval"
        )
        for figure in [figure for figure in results.figures if (figure.workload, figure.measure) == (name, STEP)]:
            more = figure.more
            host = results.find(name, figure.contender, HOST)
            ratios = [r.ratio for r in results.ratios if (r.workload, r.contender) == (name, figure.contender)]
            shared = "; oversubscribed" if more["oversubscribed"] else ""
            yield (
                f"{figure.contender:<12}{report.amount(figure):>10}{report.rate(more['steps_per_s']):>10}"
                f"{report.rate(more['items_per_s']):>10}{report.amount(host):>11}{more['all_reduce_bytes']:>12,} B"
                f"{more['dispatches']:>5} for {more['steps']:<3}    {' '.join(map(str, ratios))}{shared}".rstrip()
            )
        yield f"  the parameters take {figure.more['parameter_bytes']:,} B"
    yield from ["", *results.notes]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=list(WIDTHS), help="what is trained")
    parser.add_argument("--processes", type=int, nargs="+", help="how many at a time, 1, 2 and 4 by default")
    parser.add_argument("--rounds", type=int, help="turns of each, 5 by default")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for scaling.json")
    parser.add_argument("--quick", action="store_true", help="the narrow model on 1 and 2 processes: does it run?")
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measures what is asked for, and writes it."""
    args = parse(arguments)
    if args.child:
        name, *numbers = args.child
        child(name, *map(int, numbers))
        return
    workloads = args.workloads or list(WIDTHS)[: 1 if args.quick else None]
    counts = args.processes or COUNTS[: 2 if args.quick else None]
    jax.config.update("jax_platforms", "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(describe_machine(), {"workloads": workloads, "processes": counts, "quick": args.quick})
    results.notes.append("rounds in turns on one machine; no network was between the processes, and no GPU was used")
    with open(args.out / "scaling.log", "w+") as log:
        for name in workloads:
            steps = 64 if args.quick else STEPS[name]
            rounds = args.rounds or (2 if args.quick else 5)
            print(f"{name}: {rounds} rounds of {steps} steps", file=sys.stderr, flush=True)
            measure(results, log, name, counts, steps, rounds)
    results.write(args.out / "scaling.json")
    print(table(results))
    print(args.out / "scaling.json")


if __name__ == "__main__":
    main()
