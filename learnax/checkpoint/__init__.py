"""Checkpoints on disk, through orbax: written while training goes on, read back exactly."""

from learnax.checkpoint.checkpointer import Checkpointer as Checkpointer
