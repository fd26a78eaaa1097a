"""A compiled training engine for JAX models: hand a `Trainer` a model, losses and data, and it trains."""

from learnax.profiling import clock  # isort: skip  (first, to see all of the import)
from learnax.utils import lowest as lowest  # isort: skip  (before all that an older JAX lacks)
from learnax import checkpoint as checkpoint
from learnax import loss as loss
from learnax import metrics as metrics
from learnax import profiling as profiling
from learnax import registry as registry
from learnax import run as run
from learnax import sinks as sinks
from learnax import trainer as trainer
from learnax import utils as utils
from learnax.registry import Registry
from learnax.run import Run
from learnax.trainer import Trainer, TrainState, in_notebook
from learnax.utils import tree_stack, tree_unstack

clock.imported()

__version__ = "1.0.0rc1"

# What `from learnax import *` gives; modules beside it would hide a script's own `run` or `loss`.
__all__ = ["Registry", "Run", "TrainState", "Trainer", "in_notebook", "tree_stack", "tree_unstack"]
