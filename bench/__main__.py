"""Measures: `python -m bench`, or `make bench`. A table here; JSON and a chart in the folder that `--out` names."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

# Before JAX and Keras are imported.
os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # contenders share one device

from bench import measure, processes, report, starts
from bench.chart import draw
from bench.machine import describe_machine
from bench.opponents import OPPONENTS
from bench.results import Results
from bench.workloads import OPTIMIZERS, SIZES, makers

ROUNDS = {
    "tiny-26": 15,
    "tiny-86": 15,
    "mlp-128": 15,
    "nnx-mlp": 15,
    "equinox-mlp": 15,
    "adamw-128": 15,
    "deep-60": 9,
    "mlp-2048": 9,
    "adamw-2048": 9,
    "digits": 9,
    "resnet": 9,
    "gpt": 7,
    "nested-0": 5,
    "nested-2": 5,
}
"""Turns by default: more where a round is short."""


OTHERS = {f"{name}-{width}": 9 for name in OPTIMIZERS for width in (128, 2048) if name != "adamw"}
"""Turns of what is measured where it is asked for: further optimisers."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--workloads", nargs="+", choices=[*ROUNDS, *OTHERS, "nested"], default=list(ROUNDS), help="what is trained"
    )
    parser.add_argument("--opponents", nargs="*", choices=list(OPPONENTS), default=list(OPPONENTS), help="by whom else")
    parser.add_argument("--rounds", type=int, help="turns of each; by default 5 to 15, more where a round is short")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for bench.json and bench.png")
    parser.add_argument("--scale", choices=list(SIZES), default="10m", help="parameters of the GPT")
    parser.add_argument("--quick", action="store_true", help="short rounds, no start-up and memory: does it run?")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measures what is asked for, and writes it."""
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    turns = {**ROUNDS, **OTHERS}
    asked = [*args.workloads, *(("nested-0", "nested-2") if "nested" in args.workloads else ())]
    chosen = [name for name in turns if name in asked]
    settings = {"workloads": chosen, "opponents": args.opponents, "scale": args.scale, "quick": args.quick}
    results = Results(describe_machine(), settings)
    began = time.perf_counter()
    # Progress bars cost what they cost, but are not looked at here; what a library says is kept with the results.
    with open(args.out / "bench.log", "w") as log, contextlib.redirect_stderr(log):
        for name in chosen:
            rounds = args.rounds or (2 if args.quick else turns[name])
            say(f"{name}: {rounds} rounds")
            workload = makers(args.scale, args.quick)[name]()
            measure.throughput(results, workload, args.opponents, rounds, calls=20 if args.quick else 100)
            if name == "mlp-2048":
                say(f"{name}: logging, {rounds} rounds")
                measure.logging(results, workload, rounds)
                wider = makers(args.scale, args.quick)["mlp-4096"]()
                say(f"{wider.name}: saving, {rounds} rounds")
                measure.saving(results, wider, rounds)
            if not args.quick:
                alone(results, name, args)
        if "deep-60" in chosen and not args.quick:
            say("starts")
            starts.measure(results, ["mlp", "deep"], pairs=3)
    results.settings["seconds"] = round(time.perf_counter() - began, 1)
    results.write(args.out / "bench.json")
    draw(results, args.out / "bench.png")
    print(report.table(results))
    print(f"{results.settings['seconds']} s; {args.out / 'bench.json'}, {args.out / 'bench.png'}")


def alone(results: Results, name: str, args: argparse.Namespace) -> None:
    """What takes processes of their own: memory for the widest, start-up for the one that compiles longest."""
    if name == "mlp-2048":
        keras = [other for other in ("keras-16",) if results.find(name, other, measure.STEP)]
        say(f"{name}: memory")
        processes.memory(results, name, ["learnax", "hand", *keras], args.scale)
    if name == "gpt":
        say(f"{name}: start-up")
        processes.startup(results, name, args.scale, pairs=5)
        processes.memory(results, name, ["learnax", "hand"], args.scale)


def say(text: str) -> None:
    """A line on what goes on, beside the table."""
    print(text, file=sys.__stderr__, flush=True)


if __name__ == "__main__":
    main()
