"""Scalars off the device: to `trainer.metrics`, to the progress bar, to the run.

The room may import the step's scalars, sinks, the clock and the processes of a run; it must not know data, checkpoints
or hooks.
"""

from learnax.log.bar import in_notebook as in_notebook
from learnax.log.bar import progress_bar as progress_bar
from learnax.log.bar import unbroken as unbroken
from learnax.log.log import Log as Log
from learnax.log.log import Means as Means
from learnax.log.log import NoProgressError as NoProgressError
from learnax.log.rows import full_name as full_name
from learnax.log.runs import named_run as named_run
from learnax.log.runs import runs_of as runs_of
