"""What fusing steps is worth here: `python -m bench.fusing`.

A dispatch of one step, of four and of sixteen, and a hand-written loop of a step and of sixteen, in turns. What "auto"
does, see `learnax.engine.plan`, is decided by such a table.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # contenders share one device

import numpy as np

from bench.machine import describe_machine
from bench.measure import in_turns
from bench.opponents import HANDS, Contender, Learnax
from bench.report import seconds
from bench.workloads import SIZES, Workload, makers

ROOMS = (1, 4, 16)
"""Steps in a dispatch."""
WORKLOADS = ["tiny-26", "mlp-128", "mlp-2048", "digits", "resnet", "gpt"]


def line(workload: Workload, rounds: int) -> str:
    """A step by each contender, and by how many times it is longer than one of learnax's default."""
    hand = HANDS[workload.kind]
    contenders: dict[str, Contender] = {
        **{str(room): Learnax(workload, steps_per_execution=room) for room in ROOMS},
        "hand": hand(workload),
        "hand-16": hand(workload, 16),
    }
    with contextlib.ExitStack() as stack:
        for contender in contenders.values():
            stack.callback(contender.close)
        taken = in_turns(contenders, rounds)
    medians = {name: float(np.median([one.seconds for one in each])) / workload.steps for name, each in taken.items()}
    cells = [f"{seconds(median):>9} {median / medians['hand']:5.2f}" for median in medians.values()]
    return f"{workload.name:10} {'  '.join(cells)}"


def main(arguments: list[str] | None = None) -> None:
    """Measures what is asked for, and prints it."""
    parser = argparse.ArgumentParser(prog="python -m bench.fusing", description=__doc__.partition("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=list(makers("10m", quick=True)), default=WORKLOADS)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each; default: %(default)s")
    parser.add_argument("--scale", choices=list(SIZES), default="10m", help="parameters of the GPT")
    args = parser.parse_args(arguments)
    machine = describe_machine()
    print(f"{machine['devices']}; a step, and its ratio to the hand-written loop of one step a dispatch")
    names = [*(f"learnax, {room}" for room in ROOMS), "hand, 1", "hand, 16"]
    print(f"{'':10} {'  '.join(f'{name:>15}' for name in names)}")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        for name in args.workloads:
            workload = makers(args.scale, quick=False)[name]()
            print(line(workload, args.rounds), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
