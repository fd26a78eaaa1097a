"""A model as pure functions of its parameters, what it carries on, a random key and data: flax linen and NNX,
Equinox, a pair of functions.

The room may import flax and utils, and NNX and Equinox where a model of theirs is used; it must not know losses, steps
or devices.
"""

from learnax.models.bare import as_model as as_model
from learnax.models.equinox import Equinox as Equinox
from learnax.models.functions import Functions as Functions
from learnax.models.linen import Linen as Linen
from learnax.models.model import BATCH_AXIS as BATCH_AXIS
from learnax.models.model import MODES as MODES
from learnax.models.model import Adapter as Adapter
from learnax.models.model import Model as Model
from learnax.models.nnx import NNX as NNX

# Its modules are named after the libraries: a star must not hide these.
__all__ = ["BATCH_AXIS", "MODES", "NNX", "Adapter", "Equinox", "Functions", "Linen", "Model", "as_model"]
