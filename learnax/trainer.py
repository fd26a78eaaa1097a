"""The trainer: checks its arguments, wires the parts, runs epochs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from learnax import checks, clock
from learnax.actions import Action, ModelSaver, Moment, Plotter, Sampler, StateSaver
from learnax.cache import use_cache
from learnax.checkpoint import Checkpointer, SaveError
from learnax.data import Block, Loader, Repeated, copied, tell_of_generators
from learnax.engine import BATCHES, SAME, Engine
from learnax.log import Log, Means
from learnax.log import NoProgressError as NoProgressError
from learnax.log import in_notebook as in_notebook
from learnax.loss import LossPipe
from learnax.names import expanded
from learnax.plan import RESIDENT_BYTES, plan
from learnax.preflight import Flight, Preflight
from learnax.processes import Processes, processes_of
from learnax.profiling.costs import Costs, peak_of
from learnax.profiling.cudart import libcudart as libcudart
from learnax.profiling.ledger import START, Ledger, Setting
from learnax.profiling.marks import marks_for
from learnax.profiling.phases import Phases
from learnax.profiling.profiler import NoProfiler, Profiler, WindowProfiler
from learnax.profiling.watchdog import Watchdog
from learnax.programs import Programs
from learnax.registry import Registry
from learnax.sharding import Gather, divided
from learnax.state import (
    LearningRate,
    Position,
    PyTree,
    adam,
    as_train_state,
    fresh_state,
    hyperparams,
    key_pair,
    with_rate,
)
from learnax.state import TrainState as TrainState
from learnax.step import AXIS, Recipe, with_axis
from learnax.stops import Stops, TimeUpError
from learnax.utils import same_structure, tree_bytes

_logger = logging.getLogger("learnax")
_SINGLE_BATCH_STEPS = 1000
_LAST_STREAM = 0x1A57
"""Folded into the random sequence for the validation of a last epoch that none was due in."""
_SAFE_GRAD = 1e18
"""A gradient clipped to no more than this has squares that are finite in float32, and Adam divides by nothing else."""


class Trainer:
    """Trains a Flax model on one compiled step.

    Once built, it is ready: arguments are checked, the state is initialised or loaded. `train()` runs
    to the end; `train_state` and `metrics` are live.

    Args:
        model: a flax linen module, applied to one datum at a time.
        learning_rate: Adam's rate, a number or an optax schedule `update count -> rate`.
        losses: `(output, datum, step) -> (output, loss, metrics)` for one datum, a `LossPipe` for one. A loss whose
            first parameter is named `key`, `rng`, `rng_key` or `rngs` gets a random key of the datum's there.
        seed: of the whole run, a whole number from 0 below 2**32; the same seed gives the same run.
        train_dataset: a list of data, or anything with `__len__` and `__getitem__`. A datum that is a list
            is splatted into the model's arguments, anything else is one argument.
        num_epochs: passes over the training data.
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
        run: a wandb run, a `learnax.run.Run`, anything with `id`, `name` and `log(dict)`, or None.
        registry: the project under `TRAINAX_REGISTRY_PATH`, or a `Registry`; where checkpoints go. None
            keeps none.
        compile: whether programs are compiled when the trainer is built, or at first use.
        single_datum: every step sees the first datum, repeated; an epoch has 1000 steps, without validation.
        single_batch: every step sees the first batch; an epoch has 1000 steps, without validation.
        train_only: no validation.
        plot_pipe: `(run, outputs, batch) -> None`, both lists of one pytree per datum, on the host.
        plot_every: steps between plots.
        plot_model: `output -> output`, applied to each output before it is plotted.
        load_weights: whether `load_checkpoint` takes the parameters only, for a run that starts anew.
        sample_every: steps between samplings; None never samples.
        sample_model: `(params, key, datum) -> sample`, compiled and mapped over the first data of a batch.
        sample_params: merged over the parameters for sampling: a nested mapping, or a checkpoints folder.
        sample_plot: `(run, samples, None) -> None`, samples a list of one pytree per datum, on the host.
        sample_batch_size: data that are sampled on, by default the smaller of 9 and `batch_size`.
        sample_metrics: `(sample, datum) -> dict of scalars`, averaged into the step's metrics.
        steps_per_execution: steps that one dispatch makes at most; "auto" decides by a rule that gives the
            same answer each time, see `plan`.
        accumulate_steps: batches whose gradients are averaged before an update; a step is an update.
        optimizer: any optax transformation in place of Adam. The metric `learning_rate` is what its state
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
        profile: steps that a profiler is to look at, `"cuda:100-110"`, `"trace:epoch 2"`, ...; see
            `learnax.profiling.windows.parse`. By default what `LEARNAX_PROFILE` says, or none.

    Raises:
        TypeError: an argument, a loss or a metric of the wrong type.
        ValueError: an argument out of range, data that do not fit, a model that cannot take a datum.
        FileNotFoundError: a checkpoint asked for by name is not there.
        OwnedError: another process trains in the run's folder.
    """

    name = "trainer"

    @checks.checked
    def __init__(
        self,
        model: Any,
        learning_rate: LearningRate,
        losses: LossPipe | Callable[..., Any],
        seed: int,
        train_dataset: Any,
        num_epochs: int,
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
        load_weights: bool = False,
        sample_every: int | None = None,
        sample_model: Callable[..., Any] | None = None,
        sample_params: Any = None,
        sample_plot: Callable[..., Any] | None = None,
        sample_batch_size: int | None = None,
        sample_metrics: Callable[..., Mapping[str, Any]] | None = None,
        *,
        steps_per_execution: int | str = "auto",
        accumulate_steps: int = 1,
        optimizer: optax.GradientTransformation | None = None,
        compilation_cache: str | os.PathLike[str] | bool | None = None,
        max_dropped: int | None = 100,
        max_seconds: float | None = None,
        devices: Sequence[jax.Device] | None = None,
        shard_state: bool = False,
        profile: str | None = None,
        val_dataset: Any = None,
    ):
        given = dict(locals())
        profiled = checks.check_profile(profile)
        marks = marks_for(profiled)
        self.phases = Phases(clock.take_import_seconds(), marks)
        self.model = self.transform = model
        self.optimizer = adam(learning_rate) if optimizer is None else optimizer
        self._own_optimizer = optimizer is None
        self.losses = losses
        self.learning_rate = learning_rate
        self.train_dataset = train_dataset
        self.num_epochs = num_epochs
        self.seed = seed
        self.load_checkpoint = load_checkpoint
        self.load_weights = load_weights
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.accumulate_steps = accumulate_steps
        self.save_model = save_model
        self.run = run
        self.max_grad = max_grad
        self.single_datum = single_datum
        self.single_batch = single_batch
        self.train_only = train_only or single_batch or single_datum
        self.plot_pipe = plot_pipe
        self.plot_every = plot_every
        self.plot_model = plot_model
        val_datasets = _one_or_more(val_datasets, val_dataset)
        self.val_every = val_every
        self.sample_every = sample_every
        self.best_metric_name = best_metric_name

        use_cache(compilation_cache)
        devices = list(devices or jax.devices())
        self.processes = processes_of(devices)
        self.device_count = len(devices)
        checks.check_split(batch_size, self.device_count)
        self.engine = Engine(devices, self.phases)
        validated = None if self.train_only else val_datasets
        splits, self._data = checks.splits_of(train_dataset, validated, batch_size, accumulate_steps)
        traced = checks.check_model(model, losses, seed, self._data, optimizer)
        checks.check_names(traced.metrics, list(splits))
        self.engine.mapped = traced.mapped
        gather: dict[str, Any] = {}
        if shard_state:
            checks.check_sharded(self.engine.mapped)
            self.engine.layout = divided(self._shapes(), self.device_count, AXIS)
            specs = jax.tree.leaves(self.engine.params_layout, is_leaf=lambda spec: isinstance(spec, PartitionSpec))
            gather["gather"] = Gather(self.engine.mesh, tuple(specs))
        self.processes.compare("arguments", lambda: checks.comparable(given, splits, self._data, self._shapes()))
        if traced.asked and len(splits) > 1:
            _tell_random(traced.asked)
        if keep_best_checkpoint:
            checks.check_best(best_metric_name, traced.metrics, list(splits))

        self._epoch_steps = (
            _SINGLE_BATCH_STEPS if self._single else len(train_dataset) // batch_size // accumulate_steps
        )
        step_bytes = accumulate_steps * batch_size * tree_bytes(self._first)
        platform = devices[0].platform
        self.plan = plan(steps_per_execution, platform, traced.primitives, step_bytes, self._epoch_steps)
        self.loaders = {name: self._loader(name, dataset) for name, dataset in splits.items()}
        recipe = Recipe(
            model,
            losses,
            self.optimizer,
            learning_rate,
            max_grad,
            batch_size,
            1 if shard_state else self.device_count,
            accumulate_steps,
            trusted=self._own_optimizer and max_grad <= _SAFE_GRAD,
            looped=self.plan.looped,
            streams=traced.streams,
            **gather,
        )
        self.programs = Programs(self.engine, recipe, self.plan.room, with_outputs=plot_pipe is not None)

        steps = num_epochs * self._epoch_steps
        batch_data = batch_size * accumulate_steps
        self.log = Log(run, self.engine.in_flight, steps, self.phases, self.processes, batch_data, max_dropped)
        self.metrics = self.log.metrics
        self.checkpointer = _checkpointer(
            registry,
            run,
            self.processes,
            save_every=save_every,
            checkpoint_every=checkpoint_every,
            max_to_keep=max_checkpoints,
            keep_best=keep_best_checkpoint,
            metric_name=best_metric_name,
            minimize_metric=minimize_metric,
        )
        voice = self.processes.voice
        self._shows: list[Action] = []
        self._saves: list[Action] = []
        if plot_pipe is not None:
            self._shows.append(Plotter(plot_every, voice(plot_pipe), voice(plot_model), run, self._unwrap))
        if sample_model is not None and sample_every is not None:
            self._shows.append(
                Sampler(
                    sample_every,
                    sample_model,
                    _sample_params(sample_params),
                    voice(sample_plot),
                    sample_metrics and checks.SampleMetrics(sample_metrics, traced.metrics),
                    min(9, batch_size) if sample_batch_size is None else sample_batch_size,
                    seed,
                    run,
                    self.engine,
                    self._unwrap,
                )
            )
        if save_model is not None:
            self._saves.append(ModelSaver(save_every, voice(save_model), self.engine))
        if self.checkpointer is not None:
            self._saves.append(StateSaver(self.checkpointer, self._resume_point))

        self.stops = Stops(max_seconds, self.processes)
        self.profiler: Profiler = NoProfiler()
        if profiled:
            folder = Path("learnax-profile") if self.checkpointer is None else self.checkpointer.path.parent / "profile"
            if self.processes.count > 1:
                folder /= f"process-{self.processes.index}"
            self.profiler = WindowProfiler(profiled, folder, self._settle, self.phases, marks)
        self.watchdog = Watchdog(self._calls, lambda: self.phases.current.name)
        self.rng_seq = self.engine.put(key_pair(seed)[0], SAME)
        self.position = Position()
        self._state: TrainState | None = None
        self._places: dict[str, list[int]] = {}
        self._running = False
        self.maybe_init()
        if compile:
            self._compile()
        self.phases.ready()

    # ---- the run, top to bottom

    def train(self) -> Any:
        """Runs the epochs that are left, and returns the run with everything written.

        A trainer that loaded a checkpoint goes on where that was made; one that was stopped, where it stopped. A
        SIGINT or SIGTERM (a second one acts at once), `max_seconds`, and whatever is raised inside, end it after the
        steps in flight, with the state saved and everything logged.

        Raises:
            SaveError: the last save did not succeed.
            NoProgressError: the last `max_dropped` updates were all dropped.
            KeyboardInterrupt, SystemExit: SIGINT or SIGTERM came; the exit status is 143 for the latter.
        """
        with self._session():
            if self.position.epoch < self.num_epochs:
                self._compile()
            else:
                self._tell_complete()
            params = jax.tree.leaves(self.train_state.params)
            self.log.send_once({"model/num_params": sum(leaf.size for leaf in params)})
            for epoch in range(self.position.epoch, self.num_epochs):
                self.epoch(epoch)
        self.log.conclude(self.ledger)
        return self.run

    def epoch(self, epoch: int) -> None:
        """Trains one epoch, then validates where that is due.

        Args:
            epoch: its number, from 0. The epoch that the run stands in goes on where it stopped.
        """
        if epoch != self.position.epoch:
            self.position = Position(epoch, 0, self.log.lengths())
        with self._session():
            self.log.begin_epoch(epoch, self.num_epochs)
            for block in self.phases.waiting(self.phases.data, self.loaders["train"].blocks(self.position.batch)):
                for start, count in self._dispatches(block):
                    outputs = self._train_steps(block, start, count)
                    self._act(block, start + count * self.accumulate_steps - 1, outputs)
                    self.stops.check()
            self.log.drain()
            means = {"train": self.log.training_means(self.position.marks)}
            validated, seq = self._validations(epoch)
            # Only now that all is done: an epoch that is interrupted before validates again, on the same keys.
            self._end_epoch(epoch, means | validated, seq)

    def _dispatches(self, block: Block) -> Iterator[tuple[int, int]]:
        """Cuts a block where something is due: `(first batch, steps)` of each dispatch, at most `plan.room` steps."""
        start = block.first
        while start < len(block):
            left = (len(block) - start) // self.accumulate_steps
            step = self.log.step_at_most
            room = min(self.plan.room, self.profiler.room(step, self.position.epoch))
            count = int(min(left, room, self._next_due(step) - step))
            yield start, count
            start += count * self.accumulate_steps

    def _train_steps(self, block: Block, start: int, count: int) -> PyTree:
        """Dispatches training steps; returns the outputs of the last, on the devices, where they are plotted."""
        self.log.wait_for_room()
        first = bool(self._places)
        with self.profiler.steps(self.log.step_at_most, count), self.phases.first if first else self.phases.dispatch:
            self._state, self.rng_seq, scalars, outputs = self.programs.train(
                self.train_state, self.rng_seq, block, start, count
            )
            if first:
                self._check_first()
        self.position.batch += count * self.accumulate_steps
        self.log.push(scalars, count, self.position.epoch)
        return outputs

    def _check_first(self) -> None:
        """Waits for the first dispatch on a state, and says which of its arrays were not updated in place."""
        jax.block_until_ready(self._state)
        before, self._places = self._places, {}
        after = self.engine.places(self._state)
        moved = [name for name in before if before[name] != after[name]]
        if moved:
            _logger.warning(
                "the step did not reuse the memory of %d of the state's %d arrays, and copies them: %s",
                len(moved),
                len(before),
                ", ".join([*moved[:10], *(["and others"] if len(moved) > 10 else [])]),
            )

    def _next_due(self, step: int) -> float:
        acts = [act.next_due(step) for act in (*self._shows, *self._saves)]
        return min([self.profiler.next_due(step), *acts])

    def _act(self, block: Block, batch: int, outputs: PyTree) -> None:
        """Plots, samples and saves, at exactly their steps.

        Which step this is depends on updates that were dropped and are not known of yet. It is at most
        `step_at_most`, so only where something is due at that one the loop waits to know.
        """
        if self._next_due(self.log.step_at_most - 1) > self.log.step_at_most:
            return
        with self.log.newest() as metrics:
            self.profiler.leave(self.log.step, self.position.epoch)  # what follows is not of the step
            if metrics["has_nan"]:  # the step is an old one: what is due at it was done when it was new
                return
            step = self.log.step
            shows = [show for show in self._shows if show.next_due(step - 1) == step]
            data, outputs = (self._batch(block, batch), self.engine.whole(outputs)) if shows else ([], None)
            moment = Moment(step, self.train_state, data, outputs, metrics)
            if shows:
                self.log.flush()  # what a user's function finds logged does not depend on the speed of the run
                with self.phases.plot:
                    for show in shows:
                        metrics |= show(moment)
        # After the step's metrics are kept: a checkpoint holds the history up to its step.
        saves = [save for save in self._saves if save.next_due(moment.step - 1) == moment.step]
        if saves:
            with self.phases.save:
                for save in saves:
                    save(moment)

    def _batch(self, block: Block, number: int) -> list[Any]:
        """One batch of a block on the host, those parts that other processes have read included."""
        if not self.engine.spans:
            return block.batch(number)
        return self.engine.whole(jax.tree.map(lambda leaf: leaf[number % len(leaf)], block.device))

    def _validations(self, epoch: int) -> tuple[dict[str, dict[str, float]], jax.Array]:
        """Evaluates the validation sets where that is due: the means of each, and the random sequence after it."""
        due = self.val_every is None or epoch % self.val_every == 0
        if not due and epoch != self.num_epochs - 1:
            return {}, self.rng_seq
        seq = self.rng_seq
        if not due:
            # The last epoch is validated in any case, by keys beside the run's: one that is made longer later draws
            # what it would have drawn without.
            fold = jax.jit(jax.random.fold_in, out_shardings=self.engine.sharding(SAME))
            seq = fold(seq, np.uint32(_LAST_STREAM))
        means = {}
        for name in [name for name in self.loaders if name != "train"]:
            means[name], seq = self._validate(name, seq)
        return means, seq if due else self.rng_seq

    def _validate(self, name: str, seq: jax.Array) -> tuple[dict[str, float], jax.Array]:
        """Evaluates one validation set, every datum once: its means, and the random sequence after it."""
        means = Means(self.engine.in_flight)
        with self.phases.validate:
            for block in self.phases.waiting(self.phases.validate_data, self.loaders[name].blocks()):
                seq, sums = self.programs.evaluate(self.train_state, seq, block)
                means.push(sums, len(block), block.size)
                self.stops.check()
            return means.result(), seq

    def _end_epoch(self, epoch: int, means: Mapping[str, Mapping[str, float]], seq: jax.Array) -> None:
        named = self.log.keep_epoch(means)
        made_now = len(self.metrics.get(self.best_metric_name, ())) > self.position.marks.get(self.best_metric_name, 0)
        self.rng_seq = seq
        self.position = Position(epoch + 1, 0, self.log.lengths())
        if self.checkpointer is not None and made_now:
            latest = {name: values[-1] for name, values in self.metrics.items()}
            with self.phases.save:
                self.checkpointer.update_best_checkpoint(
                    self.train_state,
                    latest[self.best_metric_name],
                    self.log.step,
                    metrics=latest,
                    resume=self._resume_point(),
                )
        for values in named:
            self.log.send({**values, "step": self.log.step, "epoch": epoch})
        self.profiler.leave(self.log.step, epoch + 1)

    def _tell_complete(self) -> None:
        """Says that there is nothing to train: the script may be meant for another run."""
        _logger.warning(
            "this run is complete: %d of %d epochs, %d steps; train() makes no step. A larger num_epochs trains on, "
            "another run= (or load_checkpoint=None, which moves its checkpoints aside) trains anew",
            self.position.epoch,
            self.num_epochs,
            self.log.step,
        )

    def _save_last(self) -> None:
        """Saves the end of a session, so that nothing of it is lost between two saves."""
        if self.checkpointer is not None:
            with self.phases.save:
                self.checkpointer.save_latest(self.train_state, self.log.step, resume=self._resume_point())
                self.checkpointer.wait()

    def _save_stopped(self, why: BaseException) -> None:
        """Saves a run that is about to end before its time."""
        try:
            self.log.drain()
            self._save_last()
        except Exception as error:
            _logger.warning("stopped at step %d; the state could not be saved: %s", self.log.step, error)
        else:
            saved = "" if self.checkpointer is None else ", and saved: load_checkpoint=True goes on from here"
            reason = self.stops.reason or f"{type(why).__name__}: {why}".removesuffix(": ")
            _logger.warning("stopped at step %d by %s%s", self.log.step, reason, saved)

    @contextlib.contextmanager
    def _session(self) -> Iterator[None]:
        """Shows progress inside, and leaves with everything written; a session in a session is part of it."""
        if self._running:
            yield
            return
        self._running = True
        done, alone = self._done(), False
        with self.phases.other, self.watchdog.watching(), self.processes.watching():
            try:
                if self.checkpointer is not None:
                    with self.phases.save:
                        self.checkpointer.prepare(self.train_state)
                with self.stops.watched(), self.log.session(done):
                    try:
                        with contextlib.closing(self.profiler):
                            yield
                        if self._done() > done:
                            self._save_last()
                    except SaveError:
                        raise
                    except BaseException as error:
                        if self.processes.count > 1 and not self.stops.agreed:
                            alone = True
                            self.log.forget()
                            raise self.processes.failed(error) from error
                        if self._done() > done and not self.stops.at_once:
                            self._save_stopped(error)
                        raise
                    finally:
                        if self.stops.at_once:
                            self.log.abandon()
            except TimeUpError:
                pass  # a limit that was asked for is no error: what called goes on
            finally:
                self._running = False
                for loader in self.loaders.values():
                    loader.close()
                if self.checkpointer is not None and not (self.stops.at_once or alone):
                    with self.phases.save:
                        self.checkpointer.close()

    def _done(self) -> int:
        """Steps that the position in the data is at."""
        return self.position.epoch * self._epoch_steps + self.position.batch // self.accumulate_steps

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
        used = sorted(self.engine.programs.values(), key=lambda program: -program.calls)
        setting = Setting(
            platform=self.engine.devices[0].platform,
            room=self.plan.room,
            batches=self.accumulate_steps if self.plan.looped else 1,
            num_workers=self.num_workers,
            overlaps=self.engine.in_flight > 0,
            peak=peak_of(self.engine.devices[0]),
        )
        costs: dict[str, Costs] = {}
        for program in used:
            if program.calls:
                costs.setdefault(program.kind, program.costs)
        return Ledger(self.phases.seconds(), self.log.rows, costs, setting)

    def preflight(self) -> Preflight:
        """Finds out what the run will take, by a few steps, a batch of each validation, and a save that is read again.

        It compiles what the run needs. The trainer stays as it was, state, position and metrics.

        Returns:
            Memory, FLOPs, times, where data are read, what donation achieves; printed, a table.

        Raises:
            MemoryError: the devices cannot hold the run.
            RuntimeError: the run is under way.
        """
        if self._running:
            raise RuntimeError("preflight() is for before train(): the run is under way")
        self._compile()
        flight = Flight(self.engine, self.programs, self.plan, self.loaders, self.accumulate_steps, self._epoch_steps)
        # A step takes over the buffers. A host has room for a state, devices may not; but a host has not all of it
        # where it is divided over several.
        kept = self.train_state
        spread = self.engine.spans and self.engine.layout != SAME
        kept = self.engine.own(kept, self.engine.layout) if spread else jax.tree.map(self.engine.host_copy, kept)
        try:
            return flight.fly(self.train_state, self.rng_seq, self._resume_point())
        finally:
            self.train_state = kept

    def _calls(self) -> int:
        """Dispatches made so far."""
        return sum(program.calls for program in list(self.engine.programs.values()))

    def _settle(self) -> None:
        """Waits for all steps that were dispatched."""
        if not self.stops.at_once:
            jax.block_until_ready(self._state)

    # ---- the state

    @property
    def train_state(self) -> TrainState:
        """The live state. A step takes over its buffers: keep a copy of what must outlast the next one."""
        assert self._state is not None
        return self._state

    @train_state.setter
    def train_state(self, state: TrainState) -> None:
        state = as_train_state(state)
        self._state = self.engine.own(state._replace(step=np.int32(state.step)), self.engine.layout)
        self._places = self.engine.places(self._state)

    def maybe_init(self, train_state: TrainState | None = None) -> None:
        """Makes the state where there is none: from the checkpoint asked for, or fresh.

        Args:
            train_state: taken in place of the one there is, with its step; the run begins its epochs from the first.
        """
        if train_state is not None:
            self.train_state = train_state
            self.log.step, self.position = int(as_train_state(train_state).step), Position(marks=self.log.lengths())
        if self._state is not None:
            return
        if not self._load():
            self.train_state = self.init_train_state()

    init = maybe_init

    def init_train_state(self) -> TrainState:
        """A fresh state: the same for the same seed."""

        def fresh(key: jax.Array, datum: list[Any]) -> TrainState:
            make = functools.partial(fresh_state, self.model, self.optimizer, key, datum)
            return with_axis(make) if self.engine.mapped else make()

        # Where the state is divided, it is nowhere whole, not even at first.
        layout = None if self.engine.layout == SAME else self.engine.shardings(self.engine.layout)
        return jax.jit(fresh, out_shardings=layout)(key_pair(self.seed)[1], self._first)

    def _shapes(self) -> TrainState:
        """The training state's shapes, and how it lies where it is divided."""
        shapes: TrainState = jax.eval_shape(self.init_train_state)
        if self.engine.layout == SAME:
            return shapes
        return jax.tree.map(
            lambda leaf, lies: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies),
            shapes,
            self.engine.shardings(self.engine.layout),
        )

    def _load(self) -> bool:
        """Takes over the checkpoint that `load_checkpoint` asks for; False where there is none to take."""
        if self.checkpointer is None:
            return False
        loaded = None
        if self.load_checkpoint:
            target = self._shapes()
            if self.load_weights:
                target = target._replace(opt_state=None)
            loaded = self.checkpointer.load(self.load_checkpoint, target=target, resume=not self.load_weights)
            if loaded is None:
                _logger.warning("no checkpoint in %s yet: starting fresh", self.checkpointer.path)
        goes_on = loaded is not None and not self.load_weights
        self.checkpointer.leave_behind(loaded["number"] if loaded and goes_on else None)
        if loaded is None:
            return False
        if not goes_on:
            self.train_state = self.init_train_state()._replace(params=loaded["state"].params)
            return True
        state, resume = loaded["state"], loaded["resume"]
        if self._own_optimizer:  # only of that one the rate is sure to be the argument `learning_rate`
            state = state._replace(opt_state=with_rate(self.learning_rate, state.opt_state))
        else:
            self._tell_kept(state.opt_state)
        self.train_state = state
        self.log.resume(loaded["step"], resume["history"] if resume else {})
        if resume:
            checks.check_same_script(loaded["step"], resume.get("script"), self._script())
            self.position = Position(**resume["position"])
            self.rng_seq = self.engine.put(jax.random.wrap_key_data(jnp.asarray(resume["rng"])), SAME)
        return True

    def _tell_kept(self, opt_state: PyTree) -> None:
        """Names the hyperparameters that the script gives otherwise than the state that was read."""
        kept = hyperparams(opt_state)
        if not kept:
            return
        given = jax.jit(lambda: hyperparams(self.optimizer.init(_zeros(self._shapes().params))))()
        lines = [
            f"{name} is {np.asarray(kept[name]):g} in the checkpoint and {np.asarray(value):g} in the script"
            for name, value in given.items()
            if np.ndim(value) == 0 and name in kept and np.asarray(kept[name]) != np.asarray(value)
        ]
        if lines:
            _logger.warning(
                "the optimizer keeps hyperparameters in its state, and goes on with those of the checkpoint: %s. Put "
                "another one into trainer.train_state.opt_state to change it",
                "; ".join(lines),
            )

    def _resume_point(self) -> dict[str, Any]:
        """What a checkpoint holds beside the state, for a run to go on as if it had not stopped."""
        return {
            "rng": np.asarray(jax.random.key_data(self.rng_seq)),
            "position": dataclasses.asdict(self.position),
            "history": self.metrics,
            "script": self._script(),
        }

    def _script(self) -> dict[str, Any]:
        """What a position in the data and in the random sequence depends on."""
        return {
            "batch_size": int(self.batch_size),
            "accumulate_steps": int(self.accumulate_steps),
            "len(train_dataset)": len(self.train_dataset),
            "single_batch": bool(self.single_batch),
            "single_datum": bool(self.single_datum),
            "seed": int(self.seed),
        }

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
        return self.programs.loss(params, keys, self._as_arguments(batch), self._step(step))

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
        return self.programs.grad(params, keys, self._as_arguments(batch), self._step(step))

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
        new_state, metrics, outputs = self.programs.update(rng, state, batch, self._first)
        return outputs, new_state, metrics

    def _step(self, given: Any) -> Any:
        """The current step, or another one that was given, of the same type."""
        return self.train_state.step if given is None else jnp.asarray(given, jnp.int32)

    # ---- wiring

    @property
    def _first(self) -> list[Any]:
        """The first training datum, as the step sees each."""
        return self._data["train"].arguments

    @property
    def _single(self) -> bool:
        return self.single_batch or self.single_datum

    def _loader(self, name: str, dataset: Any) -> Loader | Repeated:
        put = functools.partial(self.engine.put, spec=BATCHES)
        rows = self.batch_size // self.device_count
        first, last = self.engine.share
        training = name == "train"
        loader = Loader(
            name,
            dataset,
            self.batch_size,
            tail=not training,
            num_workers=0 if self._single else self.num_workers,
            share=(first * rows, last * rows),
            group=self.accumulate_steps if training else 1,
            room=self.plan.room * (self.accumulate_steps if training else 1),
            budget=RESIDENT_BYTES,
            put=put,
            heed=self._heed,
        )
        if not self._single:
            tell_of_generators(name, dataset)
            return loader
        return Repeated(loader, self._epoch_steps * self.accumulate_steps, datum=self.single_datum, put=put)

    def _heed(self) -> None:
        """Stops while data are waited for, as after a dispatch; several processes agree on a dispatch to stop after."""
        if self._running and self.processes.count == 1:
            self.stops.check()

    def _compile(self) -> None:
        """Compiles the run's programs, on the shapes of each split's first datum."""

        def shapes(lead: tuple[int, ...], arguments: list[Any]) -> PyTree:
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype), arguments)

        size = self.batch_size
        blocks = {name: shapes((self.loaders[name].room, size), first.arguments) for name, first in self._data.items()}
        samplers = [show for show in self._shows if isinstance(show, Sampler)]
        more = [sampler.wanted(self.train_state, shapes((size,), self._first)) for sampler in samplers]
        self.programs.prepare(self.train_state, self.rng_seq, blocks, more)

    def _unwrap(self, arguments: list[Any]) -> PyTree:
        """Arguments as the training set gives them: a datum that is no list is one argument."""
        return arguments if self._data["train"].is_list else arguments[0]

    def _as_arguments(self, batch: PyTree) -> list[Any]:
        """A stacked batch as arguments, whether it was given as those or as the dataset gives them."""
        batch = copied(batch)  # devices may read it when the caller changes it
        return batch if same_structure(batch, self._first) else [batch]


def _tell_random(streams: Sequence[str]) -> None:
    _logger.warning(
        "the model draws random numbers in validation as in training, from %s: dropout, for one, is not switched off. "
        "Where that is not meant, let each datum say which it is, [x, y, training], and the model choose: "
        "jnp.where(training, nn.Dropout(0.5, deterministic=False)(x), x)",
        ", ".join(map(repr, streams)),
    )


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _checkpointer(
    registry: str | Registry | None, run: Any, processes: Processes, **policy: Any
) -> Checkpointer | None:
    if registry is None:
        return None
    if not isinstance(registry, Registry):
        registry = Registry(registry)
    # Each process may have a run of its own, with an id of its own.
    path = processes.from_first(str(registry.checkpoints(Trainer.name if run is None else run.id)))
    checkpointer = Checkpointer.at(path, processes=processes, **policy)
    checkpointer.check_free()
    return checkpointer


def _one_or_more(val_datasets: Any, val_dataset: Any) -> Any:
    """The validation sets, where one alone may be given by the name that once was its."""
    if val_dataset is None:
        return val_datasets
    if val_datasets is not None:
        raise ValueError(
            "val_dataset and val_datasets are both given; val_datasets={'val': ...} takes all validation sets"
        )
    _logger.warning("val_dataset is taken as the validation set 'val'; its name is now val_datasets={'val': ...}")
    return {"val": val_dataset}


def _sample_params(given: Any) -> Mapping[str, Any] | None:
    """Parameters to merge for sampling: a mapping as it is, a path as the checkpoints folder to read."""
    if given is None or isinstance(given, Mapping):
        return given
    loaded = Checkpointer.at(expanded(given, "sample_params")).load_latest(resume=False)
    if loaded is None:
        raise FileNotFoundError(f"sample_params: no checkpoint in {given}; give a checkpoints folder or a mapping")
    return loaded["state"].params
