"""What a run does between its steps and after its epochs: the user's hooks, plots, samples, saves, validation.

`Trainer(hooks=[...])` takes objects of what `__all__` lists; docs/between-steps.md is the page of it. The
room may import checkpoints, checks, the engine and data; it must not know the loop that calls it.
"""

from learnax.hooks.due import Hooks as Hooks
from learnax.hooks.due import Point as Point
from learnax.hooks.due import due as due
from learnax.hooks.given import AfterValidation as AfterValidation
from learnax.hooks.given import At as At
from learnax.hooks.given import AtEnd as AtEnd
from learnax.hooks.given import Every as Every
from learnax.hooks.given import Hook as Hook
from learnax.hooks.given import HookError as HookError
from learnax.hooks.moment import Ground as Ground
from learnax.hooks.moment import Moment as Moment
from learnax.hooks.moment import Trained as Trained
from learnax.hooks.plots import Plotter as Plotter
from learnax.hooks.probe import Probe as Probe
from learnax.hooks.ready.best import SaveBest as SaveBest
from learnax.hooks.ready.gradients import GradientHistogram as GradientHistogram
from learnax.hooks.ready.gradients import UpdateRatio as UpdateRatio
from learnax.hooks.ready.plateaus import EarlyStop as EarlyStop
from learnax.hooks.ready.plateaus import ScaleRateOnPlateau as ScaleRateOnPlateau
from learnax.hooks.ready.spikes import LossSpike as LossSpike
from learnax.hooks.ready.timer import Timer as Timer
from learnax.hooks.samples import Sampler as Sampler
from learnax.hooks.samples import sample_params as sample_params
from learnax.hooks.saves import BestSaver as BestSaver
from learnax.hooks.saves import ModelSaver as ModelSaver
from learnax.hooks.saves import StateSaver as StateSaver
from learnax.hooks.users import Seen as Seen
from learnax.hooks.users import Users as Users
from learnax.hooks.validation import Validation as Validation
from learnax.step import View as View

__all__ = [
    "AfterValidation",
    "At",
    "AtEnd",
    "EarlyStop",
    "Every",
    "GradientHistogram",
    "Hook",
    "HookError",
    "LossSpike",
    "Moment",
    "Probe",
    "SaveBest",
    "ScaleRateOnPlateau",
    "Timer",
    "Trained",
    "UpdateRatio",
    "View",
]
