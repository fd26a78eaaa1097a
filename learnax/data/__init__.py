"""Datasets to batches: read here or in worker processes, stacked, handed to the devices.

The room may import utils; it must not know models, steps or what devices there are.
"""

from learnax.data.batch import (
    Block as Block,
    ShuffledBlock as ShuffledBlock,
    arranged as arranged,
    as_list as as_list,
    copied as copied,
    signature_of as signature_of,
    stack_on_host as stack_on_host,
)
from learnax.data.loader import (
    Gathered as Gathered,
    Loader as Loader,
    Repeated as Repeated,
    Split as Split,
    FirstDatum as FirstDatum,
    first_datum as first_datum,
    stays as stays,
)
from learnax.data.arrays import Arrays as Arrays
from learnax.data.arrays import arrays as arrays
from learnax.data.arrow import ArrowFile as ArrowFile
from learnax.data.flow import Flow as Flow
from learnax.data.order import Order as Order
from learnax.data.streams import (
    Batches as Batches,
    Feed as Feed,
    Stream as Stream,
)
from learnax.data.randomness import tell_of_generators as tell_of_generators
