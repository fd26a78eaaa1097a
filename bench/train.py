"""Trains a workload of the benchmark by learnax as it comes, for about so many seconds: something to profile.

python -m bench.train mlp-128 --seconds 10
"""

from __future__ import annotations

import argparse
import time

from bench.workloads import SIZES, makers
from learnax.trainer import Trainer

EPOCHS = 100_000
"""More than there is time for."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__.partition("\n")[0])
    parser.add_argument("workload", choices=list(makers("10m", quick=False)), help="what is trained")
    parser.add_argument("--seconds", type=float, default=10.0, help="for how long; default: %(default)s")
    parser.add_argument("--scale", choices=list(SIZES), default="10m", help="parameters of the GPT")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Compiles, trains, and says how many steps that were."""
    args = parse(arguments)
    workload = makers(args.scale, quick=False)[args.workload]()
    trainer = Trainer(**workload.given(EPOCHS), compile=True, max_seconds=args.seconds)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    steps = len(trainer.metrics["train/loss"])
    print(f"{workload.name}: {steps:,} steps in {seconds:.1f} s, {steps / seconds:,.0f} steps/s")


if __name__ == "__main__":
    main()
