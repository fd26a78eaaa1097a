"""Checkpoints on disk, through orbax: written while training goes on, read back exactly."""

from learnax.checkpoint.checkpointer import Checkpointer as Checkpointer
from learnax.checkpoint.checkpointer import SaveError as SaveError
from learnax.checkpoint.files import DamagedError as DamagedError
