"""What a run does between its steps and after its epochs: plots, samples, saves, validation.

The room may import checkpoints, the engine and data; it must not know the loop that calls it.
"""

from learnax.hooks.hook import Every as Every
from learnax.hooks.hook import Hook as Hook
from learnax.hooks.hook import Hooks as Hooks
from learnax.hooks.hook import Moment as Moment
from learnax.hooks.hook import due as due
from learnax.hooks.plots import Plotter as Plotter
from learnax.hooks.samples import Sampler as Sampler
from learnax.hooks.samples import sample_params as sample_params
from learnax.hooks.saves import BestSaver as BestSaver
from learnax.hooks.saves import ModelSaver as ModelSaver
from learnax.hooks.saves import StateSaver as StateSaver
from learnax.hooks.validation import Validation as Validation
