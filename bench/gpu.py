"""Programs of one step compiled for GPUs that are not here, counted: `python -m bench.gpu`, or `make bench-gpu`.

learnax beside a loop written by hand, which clips as learnax does, and Keras. Nothing is run, and nothing is timed:
kernels, loops, branches, copies, bytes. Compiled text is exact, so one sample of each figure is enough.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before JAX and Keras are imported.
os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from bench.machine import describe_machine
from bench.opponents import FUSED, HANDS
from bench.report import amount
from bench.results import Figure, Results
from bench.workloads import Workload, gpt_124m, makers
from learnax.engine.cache import without_cache
from learnax.engine.fit import Compiled, looked_at
from learnax.engine.targets import Remote, target_of
from learnax.step import AXIS
from learnax.trainer import Trainer

WORKLOADS = ("mlp-128", "mlp-2048", "adamw-2048", "digits", "resnet", "gpt", "gpt-124m")
TARGETS = ("h100", "h100:8")
MEASURES = {
    "kernels": "n",
    "unknown loops": "n",
    "branches": "n",
    "copies of state": "n",
    "state": "B",
    "temporary": "B",
    "moved": "B",
}
"""What is counted of each program, and its unit."""


def learnax(workload: Workload, target: str, **extra: Any) -> Compiled:
    """The trainer's own program."""
    trainer = Trainer(**{**workload.given(1), "train_only": True, "steps_per_execution": 1, **extra})
    return trainer.preflight(target=target).programs["train"]


def hand(workload: Workload, target: str) -> Compiled:
    """The step written by hand, with its clip."""
    clipped = dataclasses.replace(workload, optimizer=workload.optimizer or optax.adam)
    # Those of NNX and Equinox are functions of arrays where they are fused.
    fused = FUSED if workload.kind in ("nnx", "equinox") else 1
    loop = HANDS[workload.kind](clipped, fused=fused)
    batch = jax.tree.map(lambda leaf: _shape(leaf, workload.batch_size), workload.data[0])
    return _compiled(loop._one, jax.eval_shape(lambda: loop._state), batch, target)


def keras(workload: Workload, target: str) -> Compiled | None:
    """Keras's train step; it dispatches one step at a time, whatever `steps_per_execution` says."""
    if workload.keras is None or importlib.util.find_spec("keras") is None:
        return None
    import keras as library

    model, loss = workload.keras()
    optimizer = library.optimizers.Adam(workload.learning_rate, epsilon=1e-8, global_clipnorm=1.0)
    model.compile(optimizer=optimizer, loss=loss)
    x, y = (_shape(leaf, workload.batch_size) for leaf in workload.data[0])
    model._symbolic_build(data_batch=(jnp.zeros(x.shape, x.dtype), jnp.zeros(y.shape, y.dtype)))
    variables = (model.trainable_variables, model.non_trainable_variables, optimizer.variables, model.metrics_variables)
    state = tuple([jax.ShapeDtypeStruct(v.shape, v.dtype) for v in some] for some in variables)
    return _compiled(lambda state, data: model.train_step(state, data)[::-1], state, (x, y), target)


def _compiled(step: Callable[[Any, Any], Any], state: Any, batch: Any, asked: str) -> Compiled:
    target = target_of(asked)
    engine = Remote(target)
    same, split = engine.sharding(PartitionSpec()), engine.sharding(PartitionSpec(AXIS))
    with without_cache(), jax.numpy_dtype_promotion("standard"):
        compiled = jax.jit(step, donate_argnums=0, in_shardings=(same, split)).lower(state, batch).compile()
    return looked_at(compiled, jax.tree.leaves(state), target.card)


def _values(program: Compiled) -> dict[str, float]:
    numbers = (
        program.kernels,
        program.unknown_loops,
        program.conditionals,
        program.state_copies,
        program.state_bytes,
        program.temporary_bytes,
        sum(program.collectives.values()),
    )
    return dict(zip(MEASURES, map(float, numbers), strict=True))


def _shape(leaf: Any, rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, *np.shape(leaf)), jnp.result_type(leaf))


def counted(workload: Workload, target: str) -> dict[str, dict[str, float]]:
    """What all contenders' programs come to, by contender."""
    found: dict[str, Compiled | None] = {"learnax": learnax(workload, target)}
    if workload.name.startswith("gpt") and target_of(target).count > 1:
        found["learnax, divided"] = learnax(workload, target, shard_state=True)
    found |= {"hand": hand(workload, target), "keras": keras(workload, target)}
    return {contender: _values(program) for contender, program in found.items() if program is not None}


def lines(workload: str, target: str, found: dict[str, dict[str, float]]) -> list[str]:
    """A table of one workload on one target."""
    rows = [[f"{workload}, {target}", *MEASURES]]
    for contender, values in found.items():
        cells = [amount(Figure("", "", name, unit, [values[name]])) for name, unit in MEASURES.items()]
        rows.append([contender, *cells])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def main(arguments: list[str] | None = None) -> None:
    """Compiles what is asked for, prints it, and keeps it."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), metavar="GPU[:COUNT]")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for gpu.json")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    made = {**makers("10m", quick=True), "gpt-124m": gpt_124m}
    results = Results(describe_machine(), {"workloads": args.workloads, "targets": args.targets})
    for name in args.workloads:
        workload = made[name]()
        for target in args.targets:
            if workload.batch_size % target_of(target).count:
                print(f"{name}, {target}: left out, a batch of {workload.batch_size} does not divide over it\n")
                continue
            # What compilers say on the way.
            with open(args.out / "gpu.log", "a") as log, contextlib.redirect_stderr(log):
                found = counted(workload, target)
            for contender, values in found.items():
                for measure, unit in MEASURES.items():
                    results.add(f"{name} on {target}", contender, measure, unit, [values[measure]])
            print("\n".join(lines(name, target, found)), end="\n\n", flush=True)
    results.write(args.out / "gpu.json")
    print(args.out / "gpu.json")


if __name__ == "__main__":
    sys.exit(main())
