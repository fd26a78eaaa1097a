"""Errors at the earliest moment: what can be known to be wrong before anything is compiled.

Each text names the thing, says what was expected and what came, and what to write instead. The room may import all that
is below the loop; nothing below may import it.
"""

from learnax.checks.arguments import check_profile as check_profile
from learnax.checks.arguments import check_sharded as check_sharded
from learnax.checks.arguments import check_split as check_split
from learnax.checks.arguments import checked as checked
from learnax.checks.data import check_dataset as check_dataset
from learnax.checks.data import check_no_arrays as check_no_arrays
from learnax.checks.data import splits_of as splits_of
from learnax.checks.given import check_datum as check_datum
from learnax.checks.given import check_params as check_params
from learnax.checks.given import checkpoint_of as checkpoint_of
from learnax.checks.given import taken_of as taken_of
from learnax.checks.hooks import check_watched as check_watched
from learnax.checks.hooks import hook_name as hook_name
from learnax.checks.hooks import wants_outputs as wants_outputs
from learnax.checks.model import Traced as Traced
from learnax.checks.model import check_model as check_model
from learnax.checks.model import primitives_of as primitives_of
from learnax.checks.model import tell_random as tell_random
from learnax.checks.names import SampleMetrics as SampleMetrics
from learnax.checks.names import check_best as check_best
from learnax.checks.names import check_metric as check_metric
from learnax.checks.names import check_names as check_names
from learnax.checks.resume import check_same_script as check_same_script
from learnax.checks.resume import comparable as comparable
from learnax.checks.settings import Settings as Settings
from learnax.checks.texts import raised as raised
from learnax.checks.texts import value_lines as value_lines
from learnax.checks.texts import what_is as what_is
