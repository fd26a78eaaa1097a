"""A compiled training engine for Flax models: hand a `Trainer` a model, losses and data, and it trains."""

from learnax import clock  # isort: skip  (first, to see all of the import)
from learnax import checkpoint, loss, metrics, profiling, registry, run, trainer, utils
from learnax.trainer import Trainer, TrainState

clock.imported()

__version__ = "1.0.0.dev0"

__all__ = [
    "TrainState",
    "Trainer",
    "checkpoint",
    "loss",
    "metrics",
    "profiling",
    "registry",
    "run",
    "trainer",
    "utils",
]
