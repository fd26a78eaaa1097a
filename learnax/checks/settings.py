"""A trainer's arguments, checked: what a run goes by."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from learnax.data import Stream
from learnax.loss import LossPipe
from learnax.models import Model, as_model
from learnax.registry import Registry
from learnax.step import ByPattern, LearningRate, adam
from learnax.utils import PyTree

_SINGLE_BATCH_STEPS = 1000
_SAFE_GRAD = 1e18
"""A gradient clipped to no more than this has squares that are finite in float32, and Adam divides by nothing else."""


@dataclasses.dataclass
class Settings:
    """A trainer's arguments; see `learnax.trainer.Trainer` for what each is.

    Attributes:
        given: the arguments as they were given.
        own_optimizer: whether the optimiser is the default one.
        adapter: the model, as one of `learnax.models`.
    """

    model: Any
    learning_rate: LearningRate | None
    losses: LossPipe | Callable[..., Any]
    seed: int
    train_dataset: Any
    num_epochs: int | None
    batch_size: int
    num_workers: int
    max_grad: float
    save_every: int
    checkpoint_every: int
    max_checkpoints: int | None
    keep_best_checkpoint: bool
    best_metric_name: str
    minimize_metric: bool
    load_checkpoint: Any
    val_every: int | None
    val_datasets: Mapping[str, Any] | Sequence[Any] | None
    save_model: Callable[[PyTree], Any] | None
    run: Any
    registry: str | Registry | None
    compile: bool
    single_datum: bool
    single_batch: bool
    train_only: bool
    plot_pipe: Callable[..., Any] | None
    plot_every: int
    plot_model: Callable[[Any], Any] | None
    load_weights: bool | str
    sample_every: int | None
    sample_model: Callable[..., Any] | None
    sample_params: Any
    sample_plot: Callable[..., Any] | None
    sample_batch_size: int | None
    sample_metrics: Callable[..., Mapping[str, Any]] | None
    steps_per_execution: int | str
    accumulate_steps: int
    optimizer: Any
    compilation_cache: str | os.PathLike[str] | bool | None
    max_dropped: int | None
    max_seconds: float | None
    devices: Sequence[jax.Device] | None
    shard_state: bool
    profile: str | None
    val_dataset: Any
    ema: float | Callable[[Any], Any] | None
    ema_eval: bool
    shuffle: bool
    num_steps: int | None
    val_every_steps: int | None
    val_steps: int | None
    hooks: Sequence[Any]
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    own_optimizer: bool = True
    adapter: Model = dataclasses.field(init=False, repr=False)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """What a run goes by, from the arguments by name: Adam where no optimiser was given, for one."""
        settings = cls(**given)
        settings.given = given
        settings.own_optimizer = settings.optimizer is None
        if settings.own_optimizer:
            assert settings.learning_rate is not None  # checked before
            settings.optimizer = adam(settings.learning_rate)
        elif isinstance(settings.optimizer, Mapping):
            settings.optimizer = ByPattern(settings.optimizer)
        settings.adapter = as_model(settings.model)
        settings.train_only = settings.train_only or settings.single
        return settings

    @property
    def single(self) -> bool:
        """Whether every step sees the same data."""
        return self.single_batch or self.single_datum

    @property
    def safe(self) -> bool:
        """Whether the squares of clipped gradients are finite."""
        return self.max_grad <= _SAFE_GRAD

    @property
    def trusted(self) -> bool:
        """Whether finite gradients and a finite rate make a finite update."""
        return self.own_optimizer and self.safe

    @functools.cached_property
    def epoch_steps(self) -> int | None:
        """Training steps in an epoch, by the data as they were when the trainer was built; None of an open stream."""
        if self.single:
            return _SINGLE_BATCH_STEPS
        if isinstance(self.train_dataset, Stream):
            return self.train_dataset.steps_per_epoch
        return len(self.train_dataset) // self.batch_size // self.accumulate_steps

    @property
    def epochs(self) -> float:
        """Epochs that a run begins."""
        if self.num_epochs is not None:
            return self.num_epochs
        assert self.num_steps is not None  # one of the two is given
        return math.inf if self.epoch_steps is None else -(-self.num_steps // self.epoch_steps)

    @property
    def total_steps(self) -> int | None:
        """Training steps of a whole run, those included whose update is dropped; None where nobody knows."""
        if self.num_epochs is None or self.epoch_steps is None:
            return self.num_steps
        return self.num_epochs * self.epoch_steps

    @property
    def device_list(self) -> list[jax.Device]:
        """Devices that a batch is split over."""
        return list(self.devices or jax.devices())

    @property
    def train_size(self) -> int | str:
        """Training data; or what there is to say of a stream."""
        data = self.train_dataset
        if not isinstance(data, Stream):
            return len(data)
        length = "" if data.steps_per_epoch is None else f" of {data.steps_per_epoch} steps an epoch"
        return f"{type(data).__name__}{length}"

    def script(self) -> dict[str, Any]:
        """What a position in the data and in the random sequence depends on."""
        return {
            "batch_size": int(self.batch_size),
            "accumulate_steps": int(self.accumulate_steps),
            "len(train_dataset)": self.train_size,
            "single_batch": bool(self.single_batch),
            "single_datum": bool(self.single_datum),
            "seed": int(self.seed),
            "shuffle": bool(self.shuffle),
        }
