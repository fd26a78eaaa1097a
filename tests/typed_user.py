"""A user's script that type checkers read: the types that public names have, and a mistake that has to be seen.

It is never run. `make test-wheel` has mypy and pyright read it beside the installed package.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_type

import flax.linen as nn
import jax
import numpy as np

from learnax.checkpoint import Checkpointer
from learnax.loss import LossFunction, LossPipe
from learnax.metrics import Mean, Metric, MetricPipe
from learnax.models import Linen
from learnax.registry import Registry
from learnax.run import Run
from learnax.trainer import Trainer, TrainState, in_notebook
from learnax.utils import tree_stack, tree_unstack


class Net(nn.Module):
    """A layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Eight numbers of an array."""
        return nn.Dense(8)(x)


class Squared(LossFunction):
    """A loss in the form of a class."""

    def _call(self, output: Any, batch: Any) -> tuple[Any, Any, dict[str, Any]]:
        error = (output - batch[0]) ** 2
        return output, error.mean(), {"worst": error.max(), "all": Mean(error.sum(), error.size)}


class Norm(Metric):
    """A metric in the form of a class."""

    def _call(self, output: Any, batch: Any) -> Mapping[str, Any]:
        return {"norm": (output**2).sum()}


def plain(output: Any, datum: Any) -> tuple[Any, Any, Mapping[str, Any]]:
    """A loss in the form of a function."""
    return output, (output - datum[0]).mean(), {}


data = [np.ones(8, np.float32)] * 64
registry = Registry("project", Path("runs"))
assert_type(registry.path, Path)
run = registry.new_run({"rate": 1e-3})
assert_type(run, Run)
trainer = Trainer(
    Linen(Net(), batched=False, train={}),
    1e-3,
    LossPipe([Squared(weight=2.0), plain]),
    seed=0,
    train_dataset=data,
    num_epochs=1,
    batch_size=8,
    num_workers=0,
    val_datasets={"val": data},
    registry=registry,
    run=run,
    sample_metrics=MetricPipe([Norm()]),
    steps_per_execution="auto",
)
trainer.train()
assert_type(trainer.metrics, dict[str, list[float]])
assert_type(trainer.metrics["train/loss"][-1], float)
state = trainer.train_state
assert_type(state, TrainState)
assert_type(trainer.preflight("h100:8").fits, bool)
assert_type(trainer.startup, dict[str, float])
assert_type(in_notebook(), bool)
checkpointer: Checkpointer = trainer.checkpointer
rows = tree_unstack(tree_stack(data))
print(trainer.ledger.verdict, int(state.step), rows)

# Without types these would be taken; a checker that sees no mistake here says that the comment is unused.
Trainer(Net(), 1e-3, plain, seed="0", train_dataset=data, num_epochs=1, batch_size=8, num_workers=0)  # type: ignore[arg-type]
