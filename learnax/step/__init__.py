"""The mathematics of a run: losses, gradients, clip, guard, update, evaluation.

Pure functions of one device's share of a batch. The room may import models, losses and the state; it must not know
devices, files, clocks or the host.
"""

from learnax.step.amounts import Part as Part
from learnax.step.amounts import is_weighted as is_weighted
from learnax.step.evaluation import evaluate_many as evaluate_many
from learnax.step.evaluation import evaluate_tail as evaluate_tail
from learnax.step.evaluation import evaluated as evaluated
from learnax.step.gradients import datum_loss as datum_loss
from learnax.step.gradients import gradients as gradients
from learnax.step.gradients import mean_loss as mean_loss
from learnax.step.gradients import share_loss as share_loss
from learnax.step.optimizers import (
    LearningRate as LearningRate,
)
from learnax.step.optimizers import (
    adam as adam,
)
from learnax.step.optimizers import (
    asked_update as asked_update,
)
from learnax.step.optimizers import (
    evaluation_params as evaluation_params,
)
from learnax.step.optimizers import (
    functions_of as functions_of,
)
from learnax.step.optimizers import (
    has_own_evaluation as has_own_evaluation,
)
from learnax.step.optimizers import (
    hyperparams as hyperparams,
)
from learnax.step.optimizers import (
    in_pairs as in_pairs,
)
from learnax.step.optimizers import (
    scaled_rates as scaled_rates,
)
from learnax.step.optimizers import (
    takes_pairs as takes_pairs,
)
from learnax.step.optimizers import (
    with_rate as with_rate,
)
from learnax.step.packed import Form as Form
from learnax.step.packed import Packed as Packed
from learnax.step.packed import packs as packs
from learnax.step.patterns import ByPattern as ByPattern
from learnax.step.patterns import split as split
from learnax.step.prediction import predict_many as predict_many
from learnax.step.probing import View as View
from learnax.step.probing import probe as probe
from learnax.step.recipe import AXIS as AXIS
from learnax.step.recipe import Recipe as Recipe
from learnax.step.recipe import wide as wide
from learnax.step.recipe import with_axis as with_axis
from learnax.step.scalars import NAN_DATA as NAN_DATA
from learnax.step.scalars import Scalars as Scalars
from learnax.step.start import Init as Init
from learnax.step.start import fresh_state as fresh_state
from learnax.step.start import initial as initial
from learnax.step.start import key_pair as key_pair
from learnax.step.state import PyTree as PyTree
from learnax.step.state import TrainState as TrainState
from learnax.step.state import as_train_state as as_train_state
from learnax.step.training import train_many as train_many
from learnax.step.training import update as update
