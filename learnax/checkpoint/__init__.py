"""Checkpoints on disk, through orbax: written while training goes on, read back exactly.

The room may import the training state and the processes of a run; it must not know the loop, data or devices' layout.
"""

from learnax.checkpoint.checkpointer import Checkpointer as Checkpointer
from learnax.checkpoint.files import DamagedError as DamagedError
from learnax.checkpoint.owner import OwnedError as OwnedError
from learnax.checkpoint.saving import SaveError as SaveError
