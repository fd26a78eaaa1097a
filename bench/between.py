"""What shuffling, hooks, a probe and files cost a run: `python -m bench.between`.

Each is a run of the same workload as one without, and all take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from typing import Any

import jax.numpy as jnp
import numpy as np

from bench.machine import describe_machine
from bench.measure import in_turns
from bench.opponents import Contender, Learnax
from bench.report import seconds
from bench.stats import bootstrap_ratio
from bench.workloads import makers
from learnax.hooks import Every, Probe
from learnax.sinks import JsonLines, TensorBoard


def _outputs(view: Any) -> dict[str, Any]:
    return {"size": jnp.sum(view.outputs**2)}


def settings(name: str, folder: str) -> dict[str, dict[str, Any]]:
    """What is given beside a workload, by what it is called; first nothing."""
    if name == "mlp-2048":
        files = [TensorBoard(f"{folder}/board"), JsonLines(f"{folder}/rows.jsonl")]
        return {"without": {}, "TensorBoard and JsonLines, each step": {"run": files}}
    hooks = [Every(1000, lambda moment: None, name=f"hook-{number}") for number in range(10)]
    return {
        "without": {},
        "shuffle=True": {"shuffle": True},
        "10 hooks due each 1,000 steps": {"hooks": hooks},
        "a hook due each 100 steps": {"hooks": [Every(100, lambda moment: None, name="hook")]},
        "a probe each 100 steps": {"hooks": [Probe(100, _outputs, "probe")]},
    }


def table(name: str, rounds: int) -> list[str]:
    """A line for each setting: a step, and its ratio to one without, paired by round."""
    workload = makers("10m", quick=False)[name]()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        contenders: dict[str, Contender] = {
            what: Learnax(workload, **more) for what, more in settings(name, folder).items()
        }
        for contender in contenders.values():
            stack.callback(contender.close)
        taken = {what: [one.seconds for one in each] for what, each in in_turns(contenders, rounds).items()}
    without = taken["without"]
    return [
        f"{name:9} {what:37} {seconds(float(np.median(each)) / workload.steps):>8}  "
        f"{bootstrap_ratio(each, without, paired=True)}"
        for what, each in taken.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measures what is asked for, and prints it."""
    parser = argparse.ArgumentParser(prog="python -m bench.between", description=__doc__.partition("\n")[0])
    names = ["mlp-128", "mlp-2048"]
    parser.add_argument("--workloads", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=21, help="turns of each; default: %(default)s")
    args = parser.parse_args(arguments)
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['devices']}, jax {machine['jax']}; {args.rounds} rounds")
    for name in args.workloads:
        print("\n".join(table(name, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
