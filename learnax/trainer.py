"""The trainer: the documented arguments, attributes and methods; each is a few lines that call a room."""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import jax
import optax

from learnax import checks
from learnax.inference import Inference
from learnax.log import NoProgressError as NoProgressError
from learnax.log import in_notebook as in_notebook
from learnax.loop import Loop
from learnax.loss import LossPipe
from learnax.parts import NAME, Fit, Parts, Preflight
from learnax.profiling.cudart import libcudart as libcudart
from learnax.profiling.ledger import START, Ledger
from learnax.registry import Registry
from learnax.step import LearningRate, PyTree, as_train_state
from learnax.step import TrainState as TrainState


class _Forwarded:
    """A trainer attribute that is stored on the run's parts or settings: reading and setting it go there."""

    def __init__(self, holder: str):
        self._holder = operator.attrgetter(holder)

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, trainer: Any, owner: type) -> Any:
        return self if trainer is None else getattr(self._holder(trainer), self._name)

    def __set__(self, trainer: Any, value: Any) -> None:
        setattr(self._holder(trainer), self._name, value)


_setting = functools.partial(_Forwarded, "parts.settings")
_part = functools.partial(_Forwarded, "parts")


class Trainer:
    """Trains a JAX model on one compiled step.

    Once built, it is ready: arguments are checked, the state is initialised or loaded. `train()` runs
    to the end; `train_state` and `metrics` are live.

    Args:
        model: a flax linen or NNX module, an Equinox module, or an object with `init` and `apply`, which sees one datum
            at a time; or one of these in an adapter of `learnax.models`, which says more of it.
        learning_rate: Adam's rate, a number or an optax schedule `update count -> rate`. With an `optimizer` it may be
            left out.
        losses: `(output, datum, step) -> (output, loss, metrics)` for one datum, a `LossPipe` for one. A loss whose
            first parameter is named `key`, `rng`, `rng_key` or `rngs` gets a random key of the datum's there.
        seed: of the whole run, a whole number from 0 below 2**32; the same seed gives the same run.
        train_dataset: a list of data, or anything with `__len__` and `__getitem__`. A datum that is a list
            is splatted into the model's arguments, anything else is one argument.
        num_epochs: passes over the training data; left out with `num_steps`.
        batch_size: data per step, over all devices; a training batch that is not full is skipped.
        num_workers: processes that read each dataset; 0 reads in this one.
        max_grad: largest global L2 norm of a gradient; beyond it, the gradient is scaled down.
        save_every: steps between saves of the latest checkpoint and calls of `save_model`.
        checkpoint_every: steps between numbered checkpoints.
        max_checkpoints: numbered checkpoints kept; None keeps all.
        keep_best_checkpoint: whether the best state by `best_metric_name` is kept.
        best_metric_name: the metric that "best" is judged by, after each validation.
        minimize_metric: whether smaller is better.
        load_checkpoint: None for a fresh start; True, -1 or a run's id for the latest; "best"; a step.
        val_every: epochs between validations; None validates after each.
        val_datasets: a mapping of names to datasets, or a list of datasets (`val`, `val_1`, ...).
        save_model: `params -> None`, called every `save_every` steps with a copy on the host.
        run: where metrics go: a wandb run, a `learnax.run.Run`, anything with `id`, `name` and `log(dict)`, one of
            `learnax.sinks`, a list of several of these, or None.
        registry: the project under `TRAINAX_REGISTRY_PATH`, or a `Registry`; where checkpoints go. None
            keeps none.
        compile: whether programs are compiled when the trainer is built, or at first use.
        single_datum: every step sees the first datum, repeated; an epoch has 1000 steps, without validation.
        single_batch: every step sees the first batch; an epoch has 1000 steps, without validation.
        train_only: no validation.
        plot_pipe: `(run, outputs, batch) -> None`, both lists of one pytree per datum, on the host.
        plot_every: steps between plots.
        plot_model: `output -> output`, applied to each output before it is plotted.
        load_weights: whether `load_checkpoint` takes the parameters only, for a run that starts anew; "ema" takes
            their average.
        sample_every: steps between samplings; None never samples.
        sample_model: `(params, key, datum) -> sample`, compiled and mapped over the first data of a batch.
        sample_params: merged over the parameters for sampling: a nested mapping, or a checkpoints folder.
        sample_plot: `(run, samples, None) -> None`, samples a list of one pytree per datum, on the host.
        sample_batch_size: data that are sampled on, by default the smaller of 9 and `batch_size`.
        sample_metrics: `(sample, datum) -> dict of scalars`, averaged into the step's metrics.
        steps_per_execution: steps that one dispatch makes at most; "auto" decides by a rule that gives the
            same answer each time, see `plan`.
        accumulate_steps: batches whose gradients are averaged before an update; a step is an update.
        optimizer: any optax transformation in place of Adam, or several by patterns of the parameters' paths,
            `{"head/.*": optax.adamw(1e-3), ".*": None}`; None freezes. The metric `learning_rate` is what its state
            keeps (`optax.inject_hyperparams`), or else what the argument `learning_rate` says.
        compilation_cache: the folder in which compiled programs outlive the process; False for none; by default
            what `LEARNAX_COMPILATION_CACHE` says (a folder or "off"), or a folder among the user's caches.
        max_dropped: updates dropped in a row, because they would have put NaN into the parameters, after which the run
            ends with an error; None never does.
        max_seconds: seconds that `train()` may take; after them it stops as for a signal, but returns. None for
            no limit.
        devices: devices that a batch is split over, by default all there are, those of other processes included.
        shard_state: whether parameters and optimiser state are divided over the devices, and gathered where a step
            needs them: memory per device falls as the devices grow in number.
        val_dataset: one validation set, named `val`: how `val_datasets` was once given.
        ema: the decay of an average of the parameters that is kept beside them, from 0 to 1, or a schedule of it,
            `updates made -> decay`: `average = decay * average + (1 - decay) * parameters` after each update.
        ema_eval: whether the average is what validation and samples see, and so what "best" is judged by.
        num_steps: training steps, in place of `num_epochs`; those whose update is dropped count.
        val_every_steps: steps between validations, in place of `val_every`. The last state is validated in any case.
        val_steps: batches that a validation of each set takes at most.
        shuffle: whether each epoch has the training data in an order of its own, a function of seed and epoch alone.
        hooks: what is to be done between steps, objects of `learnax.hooks`: called at exactly their steps, and after
            validations; their state is kept in checkpoints.
        profile: steps that a profiler is to look at, `"cuda:100-110"`, `"trace:epoch 2"`, ...; see
            `learnax.profiling.windows.parse`. By default what `LEARNAX_PROFILE` says, or none.

    Raises:
        TypeError: an argument, a loss or a metric of the wrong type.
        ValueError: an argument out of range, data that do not fit, a model that cannot take a datum.
        FileNotFoundError: a checkpoint asked for by name is not there.
        OwnedError: another process trains in the run's folder.
        OSError: a sink cannot be written to, or another run writes to it.
    """

    name = NAME
    model, learning_rate, losses, seed, train_dataset = _setting(), _setting(), _setting(), _setting(), _setting()
    num_epochs, batch_size, num_workers, max_grad = _setting(), _setting(), _setting(), _setting()
    accumulate_steps, optimizer, run, save_model = _setting(), _setting(), _setting(), _setting()
    load_checkpoint, load_weights, best_metric_name, val_every = _setting(), _setting(), _setting(), _setting()
    plot_pipe, plot_every, plot_model, sample_every = _setting(), _setting(), _setting(), _setting()
    train_only, single_batch, single_datum = _setting(), _setting(), _setting()
    checkpointer, engine, loaders, log = _part(), _part(), _part(), _part()
    phases, plan, programs = _part(), _part(), _part()
    hooks, processes, profiler, stops, watchdog = _part(), _part(), _part(), _part(), _part()

    @checks.checked
    def __init__(
        self,
        model: Any,
        learning_rate: LearningRate | None,
        losses: LossPipe | Callable[..., Any],
        seed: int,
        train_dataset: Any,
        num_epochs: int | None,
        batch_size: int,
        num_workers: int,
        max_grad: float = 1.0,
        save_every: int = 300,
        checkpoint_every: int = 5000,
        max_checkpoints: int | None = None,
        keep_best_checkpoint: bool = False,
        best_metric_name: str = "val/loss",
        minimize_metric: bool = True,
        load_checkpoint: Any = None,
        val_every: int | None = None,
        val_datasets: Mapping[str, Any] | Sequence[Any] | None = None,
        save_model: Callable[[PyTree], Any] | None = None,
        run: Any = None,
        registry: str | Registry | None = None,
        compile: bool = False,
        single_datum: bool = False,
        single_batch: bool = False,
        train_only: bool = False,
        plot_pipe: Callable[..., Any] | None = None,
        plot_every: int = 1000,
        plot_model: Callable[[Any], Any] | None = None,
        load_weights: bool | str = False,
        sample_every: int | None = None,
        sample_model: Callable[..., Any] | None = None,
        sample_params: Any = None,
        sample_plot: Callable[..., Any] | None = None,
        sample_batch_size: int | None = None,
        sample_metrics: Callable[..., Mapping[str, Any]] | None = None,
        *,
        steps_per_execution: int | str = "auto",
        accumulate_steps: int = 1,
        optimizer: optax.GradientTransformation | Mapping[str, Any] | None = None,
        compilation_cache: str | os.PathLike[str] | bool | None = None,
        max_dropped: int | None = 100,
        max_seconds: float | None = None,
        devices: Sequence[jax.Device] | None = None,
        shard_state: bool = False,
        profile: str | None = None,
        val_dataset: Any = None,
        ema: float | Callable[[Any], Any] | None = None,
        ema_eval: bool = True,
        shuffle: bool = False,
        num_steps: int | None = None,
        val_every_steps: int | None = None,
        val_steps: int | None = None,
        hooks: Sequence[Any] | None = None,
    ):
        given = dict(locals())
        del given["self"]
        self.parts = Parts(checks.Settings.of(given))
        self.loop = Loop(self.parts)
        self.inference = Inference(self.parts, self.loop.session)
        self.maybe_init()
        if compile:
            self.parts.compile()
        self.parts.phases.ready()

    def train(self) -> Any:
        """Runs the epochs or steps that are left, and returns the run with everything written.

        A trainer that loaded a checkpoint goes on where that was made; one that was stopped, where it stopped. A
        SIGINT or SIGTERM (a second one acts at once), `max_seconds`, and whatever is raised inside, end it after the
        steps in flight, with the state saved and everything logged.

        Raises:
            SaveError: the last save did not succeed.
            NoProgressError: the last `max_dropped` updates were all dropped.
            KeyboardInterrupt, SystemExit: SIGINT or SIGTERM came; the exit status is 143 for the latter.
        """
        self.loop.run(self.epoch)
        self.log.conclude(self.ledger)
        self.sync_model()
        return self.run

    def epoch(self, epoch: int) -> None:
        """Trains one epoch, or as much of it as `num_steps` has left, and validates where that is due.

        Args:
            epoch: its number, from 0. The epoch that the run stands in goes on where it stopped.
        """
        self.loop.epoch(epoch)

    def sync_model(self) -> None:
        """Puts the trained parameters, and what the model carries on, into the user's own module, if that is NNX."""
        self.parts.sync()

    def evaluate(self, dataset: Any, *, params: Any = None) -> dict[str, float]:
        """Means of losses and metrics over any dataset, as a validation has them. The run stays as it is.

        Args:
            dataset: of data like those of training.
            params: None for the parameters that a validation sees now; "best", "latest" or a step for a checkpoint's;
                or a tree of them.

        Raises:
            RuntimeError: the run is under way.
            ValueError, TypeError: no dataset, an empty one, data or parameters that do not fit the model.
            FileNotFoundError: a checkpoint that is not there.
        """
        return self.inference.evaluate(dataset, params)

    @overload
    def predict(self, dataset: Any, *, params: Any = None) -> Iterator[Any]: ...
    @overload
    def predict(self, dataset: Any, *, params: Any = None, stacked: bool) -> Any: ...
    def predict(self, dataset: Any, *, params: Any = None, stacked: bool = False) -> Any:
        """What the model makes of each datum, in the mode of validation; losses are not called. The run stays as it is.

        Args:
            dataset: of data like those of training; what the model does without, a label for one, may be left out.
            params: see `evaluate`, also for what is raised.
            stacked: whether all outputs are wanted at once.

        Returns:
            An iterator of outputs in the order of the data, pytrees of numpy arrays: computed as they are asked for,
            by several batches; training may not go on in between. Stacked, one pytree of arrays `(n, ...)`.
        """
        return self.inference.predict(dataset, params, stacked=stacked)

    @overload
    def preflight(self) -> Preflight: ...
    @overload
    def preflight(self, target: str) -> Fit: ...
    def preflight(self, target: str | None = None) -> Preflight | Fit:
        """Finds out what the run will take, before it is made. The trainer stays as it was.

        Args:
            target: GPUs that are not here, "a100", "h100", "h200" or "b200", or several, "h100:8". The run's programs
                are compiled for them, and nothing is run. Without, a few steps, a batch of each validation, and a save
                that is read again are tried on the devices there are.

        Returns:
            Memory, FLOPs, times, what donation achieves; of a target, whether it fits and what would run there: see
            `learnax.engine.preflight.Preflight` and `learnax.engine.fit.Fit`. Printed, a table.

        Raises:
            MemoryError: the devices cannot hold the run.
            RuntimeError: the run is under way; or what compiles for a target is not installed.
            ValueError: a target that is not known, or whose GPUs do not divide the batch.
        """
        if target is not None:
            return self.parts.fit(target)
        if self.loop.session.running:
            raise RuntimeError("preflight() is for before train(): the run is under way")
        return self.parts.preflight()

    def report(self, path: str | os.PathLike[str]) -> None:
        """Writes what became of the run so far as a page of HTML that needs nothing beside it.

        Curves, the ledger, gradients' norms, checkpoints, stops, arguments; see `learnax.sinks.Report`, which writes it
        while the run goes on and knows the gradients' norms and the stops of earlier processes, too.

        Args:
            path: of the page, `out/report.html` for one.
        """
        self.parts.report(path)

    # ---- the state

    @property
    def train_state(self) -> TrainState:
        """The live state. A step takes over its buffers: keep a copy of what must outlast the next one."""
        return self.parts.progress.state

    @train_state.setter
    def train_state(self, state: TrainState) -> None:
        self.parts.progress.state = state

    @property
    def metrics(self) -> dict[str, list[float]]:
        """Lists of floats by name: a value for each step, or for each epoch."""
        return self.log.metrics

    @property
    def position(self) -> Any:
        """Where the run stands in its data."""
        return self.parts.progress.position

    def order(self, epoch: int) -> Any:
        """The indices of the training data in the order of an epoch, those that fill no batch at the end included.

        Args:
            epoch: its number, from 0.

        Returns:
            A `learnax.data.Order`, or a range of the dataset's own order. It is computed where it is looked at.
        """
        return self.parts.order(epoch)

    @property
    def rng_seq(self) -> jax.Array:
        """The run's random sequence."""
        return self.parts.progress.seq

    @property
    def transform(self) -> Any:
        """The model."""
        return self.model

    @property
    def device_count(self) -> int:
        """Devices that a batch is split over."""
        return len(self.engine.devices)

    @property
    def startup(self) -> dict[str, float]:
        """Seconds that the start took, so far: import, init, trace, lower, compile, first step.

        Import is that of the process, told to its first trainer. Programs are compiled side by side, `compile` is
        what was waited for them. `first step` is the first dispatch on a state, until its result is there.
        """
        seconds = self.phases.seconds()
        return {name: seconds[name] for name in START}

    @property
    def ledger(self) -> Ledger:
        """Where the time went so far, from the import on; between two calls of the trainer no time counts."""
        return self.parts.ledger()

    def maybe_init(self, train_state: TrainState | None = None) -> None:
        """Makes the state where there is none: from the checkpoint asked for, or fresh.

        Args:
            train_state: taken in place of the one there is, with its step; the run begins its epochs from the first.
        """
        self.parts.progress.begin(train_state)

    init = maybe_init

    def init_train_state(self) -> TrainState:
        """A fresh state: the same for the same seed."""
        return self.parts.origin.state()

    def __reduce__(self) -> Any:
        raise TypeError(
            "a trainer cannot be copied or pickled: it holds compiled programs, devices and files. Build another one "
            "with the same arguments; jax.device_get(trainer.train_state) and trainer.metrics are plain data"
        )

    # ---- the step, by hand

    def loss(
        self, params: PyTree, keys: jax.Array, batch: PyTree, step: Any = None
    ) -> tuple[jax.Array, tuple[Any, Any, Any]]:
        """The loss of some data.

        Args:
            params: parameters.
            keys: one random key per datum, `(n,)`.
            batch: stacked data, leaves `(n, ...)`.
            step: what schedules in losses see; by default the current step.

        Returns:
            `(loss, (outputs, loss, metrics))`: means over the data, outputs of each.
        """
        return self.programs.loss(self.train_state, params, keys, batch, self._step(step))

    def grad(
        self, params: PyTree, keys: jax.Array, batch: PyTree, step: Any = None
    ) -> tuple[PyTree, tuple[Any, Any, Any]]:
        """The gradient of `loss`, mapped over the devices (`jax.pmap`).

        Args:
            params: parameters, the same for each device.
            keys: `(devices, n)` random keys.
            batch: stacked data, leaves `(devices, n, ...)`.
            step: as for `loss`.

        Returns:
            `(gradients, (outputs, loss, metrics))`, all with a leading device axis; all but the outputs are
            means over the devices.
        """
        return self.programs.grad(self.train_state, params, keys, batch, self._step(step))

    def update(
        self, rng: jax.Array, state: TrainState, batch: Any, step: Any = None
    ) -> tuple[PyTree, TrainState, dict[str, jax.Array]]:
        """One update by hand; the caller's state stays usable.

        Args:
            rng: the batch's random key; datum i gets `split(rng, batch_size)[i]`.
            state: the state before.
            batch: a list of `batch_size` data, or data stacked to `(batch_size, ...)` or
                `(devices, batch_size // devices, ...)`.
            step: taken in place of the state's.

        Returns:
            `(outputs, state, metrics)`: outputs stacked to `(batch_size, ...)`, the state after, and a dict
            of scalars.

        Raises:
            ValueError: a batch of another size or structure.
        """
        state = as_train_state(state)
        state = state if step is None else state._replace(step=step)
        new_state, metrics, outputs = self.programs.update(rng, state, batch)
        return outputs, new_state, metrics

    def _step(self, given: Any) -> Any:
        return self.train_state.step if given is None else given
