"""The parts of a run, made from its settings in the order in which a batch meets them."""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from learnax import checks
from learnax.checkpoint import Checkpointer
from learnax.checks import Settings
from learnax.cluster.processes import processes_of
from learnax.cluster.stops import Stops
from learnax.data import Feed, Flow, Gathered, Loader, Order, Repeated, Split, Stream, tell_of_generators
from learnax.engine import BATCHES, SAME, Engine, Wanted
from learnax.engine.accounts import ledger_of
from learnax.engine.cache import use_cache
from learnax.engine.fit import Fit as Fit
from learnax.engine.plan import RESIDENT_BYTES
from learnax.engine.preflight import Flight
from learnax.engine.preflight import Preflight as Preflight
from learnax.engine.targets import target_of
from learnax.hooks import (
    BestSaver,
    Ground,
    Hooks,
    ModelSaver,
    Plotter,
    Sampler,
    StateSaver,
    Users,
    Validation,
    sample_params,
)
from learnax.log import Log, named_run, runs_of
from learnax.parts.draft import Draft
from learnax.parts.facts import Facts
from learnax.parts.fitting import Fitting
from learnax.parts.progress import Progress
from learnax.parts.weights import Weights
from learnax.profiling import clock
from learnax.profiling.ledger import Ledger
from learnax.profiling.marks import marks_for
from learnax.profiling.phases import Phases
from learnax.profiling.profiler import NoProfiler, Profiler, WindowProfiler
from learnax.profiling.watchdog import Watchdog
from learnax.registry import Registry
from learnax.sinks import Report, Sink
from learnax.sinks.report import report
from learnax.step import evaluated
from learnax.utils import PyTree, any_key
from learnax.utils.names import expanded

_matters = itertools.count()  # of this process: all processes make the same calls in the same order
NAME = "trainer"
"""The folder of a run without an id, in its registry."""


class Parts:
    """What a run is made of. Building it raises what is wrong between arguments, or between them and the data.

    Args:
        settings: the trainer's arguments, checked.

    Attributes:
        phases: the clock.
        processes: of the run: which of them this is, and what they agree on.
        stops: what ends a run before its last step.
        first: each split's first datum.
        traced: what tracing model and losses told.
        model: what is trained.
        engine: compiles, and lays data out on the devices.
        draft: what the step is made of on these devices.
        origin: the state that a run begins with.
        plan: how many steps a dispatch makes.
        loaders: each split's batches, on the devices.
        programs: training, evaluation, an update by hand.
        log: the metrics.
        checkpointer: the run's saves; or None.
        progress: where it stands.
        weights: its parameters, by what a user calls them.
        users: the user's hooks.
        hooks: what it does between its steps, the user's hooks among it.
        validation: what it does after some of its epochs.
        profiler: the windows of steps that a profiler looks at.
        watchdog: tells where a run hangs.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        windows = checks.check_profile(settings.profile)
        marks = marks_for(windows)
        self.phases = Phases(clock.take_import_seconds(), marks)
        use_cache(settings.compilation_cache)
        devices = settings.device_list
        self.processes = processes_of(devices)
        checks.check_split(settings.batch_size, len(devices))
        self.stops = Stops(settings.max_seconds, self.processes)

        # The data, and what the model makes of them.
        splits, self.first = checks.splits_of(settings)
        self.traced = traced = checks.check_model(settings, self.first, settings.batch_size // len(devices))
        checks.check_names(traced.metrics, list(splits))
        self.model = traced.model

        # The devices, how state and batches lie on them, and the step.
        self.engine = Engine(devices, self.phases)
        self.draft = Draft(settings, traced, self.first, self.engine)
        self.origin, self.plan, self.programs = self.draft.origin, self.draft.plan, self.draft.programs
        self.processes.compare(
            "arguments", lambda: checks.comparable(settings, splits, self.first, self.origin.shapes())
        )
        if traced.asked and len(splits) > 1:
            checks.tell_random(traced.asked)
        if settings.keep_best_checkpoint:
            checks.check_best(settings.best_metric_name, traced.metrics, list(splits))
        self.loaders = {name: self._loader(name, dataset) for name, dataset in splits.items()}

        # What comes of it.
        self.log = self._log()
        self.checkpointer = self._checkpointer()
        train = self.loaders["train"]
        flow = train if isinstance(train, Flow) else None
        self.users = self._users(traced, list(splits))
        self.progress = Progress(
            settings, self.origin, self.engine, self.programs, self.log, self.checkpointer, self.users, flow
        )
        self.weights = Weights(settings, self.engine, self.programs, self.progress, self.checkpointer)
        self.hooks = self._hooks(traced)
        self._check_probes()
        self.validation = Validation(
            settings, self.loaders, self.engine, self.programs, self.phases, self.stops, shown=self.processes.first
        )
        self.profiler: Profiler = NoProfiler()
        if windows:
            self.profiler = WindowProfiler(windows, self._profile_folder(), self._settle, self.phases, marks)
        self.watchdog = Watchdog(lambda: self.engine.calls, lambda: self.phases.current.name)
        self.log.facts = Facts(self)

    def compile(self) -> None:
        """Compiles the run's programs, on the shapes of each split's first datum, and has the state there."""
        progress = self.progress
        live, seq = progress.live_shapes, any_key()
        wanted = self.draft.wanted(live, seq, self._sizes)
        seen, batch = evaluated(progress.shapes.params, progress.shapes), self.draft.batches(self.settings.batch_size)
        wanted += [show.wanted(seen, batch) for show in self.hooks.shows if isinstance(show, Sampler)]
        wanted += self._probes(live, seq)
        self.engine.prepare(wanted)
        with self.phases.compile:
            progress.settle()

    def _probes(self, live: Any, seq: Any) -> list[Wanted]:
        """The programs of the hooks' probes, for a state as training takes it, or for its shapes."""
        block = self.draft.block("train")
        return [self.programs.wanted_probe(kind, live, seq, block) for kind in self.users.probes.values()]

    def sync(self) -> None:
        """Puts the trained values into the user's object, where that holds values."""
        if not self.model.holds_values:
            return
        state = evaluated(self.progress.state.params, self.progress.state)
        self.model.sync(self.engine.whole(state.params), self.engine.whole(state.model_state))

    def preflight(self) -> Preflight:
        """Finds out what the run will take; all stays as it was.

        Raises:
            MemoryError: the devices cannot hold the run.
        """
        self.compile()
        engine, progress = self.engine, self.progress
        batches, steps = self.settings.accumulate_steps, self.settings.epoch_steps or 0
        flight = Flight(engine, self.programs, self.plan, self.loaders, batches, steps)
        # A step reuses the state's buffers, so a copy is kept. It is on the host, which has room for one where a device
        # may not; but on the devices where the state is divided over several processes and no host has all of it.
        kept = progress.state
        spread = engine.spans and engine.layout != SAME
        kept = engine.own(kept, engine.layout) if spread else jax.tree.map(engine.host_copy, kept)
        try:
            return flight.fly(progress.live, progress.seq, progress.resume_point())
        finally:
            progress.state = kept

    def fit(self, target: str) -> Fit:
        """Compiles the run's programs for devices that are not here; all stays as it was."""
        kept = frozenset(name for name, loader in self.loaders.items() if loader.keeps)
        return Fitting(self.settings, self.traced, self.first, self._sizes, kept).on(target_of(target))

    def report(self, path: str | os.PathLike[str]) -> None:
        """Writes the run so far as a page."""
        if not self.processes.first:
            return
        follows = [run for run in runs_of(self.settings.run) if isinstance(run, Report)]
        report(self.log, expanded(path, "the path of a report"), self.log.step, follows[0] if follows else None)

    def ledger(self) -> Ledger:
        """Where the time went so far, and what the programs cost."""
        return ledger_of(
            self.engine,
            self.phases,
            self.plan,
            self.log.rows,
            self.settings.num_workers,
            self.settings.accumulate_steps,
        )

    @property
    def _sizes(self) -> dict[str, int]:
        """Data of each split."""
        return {name: loader.size for name, loader in self.loaders.items()}

    def order(self, epoch: int) -> Order | range:
        """The indices of the training data in the order of an epoch."""
        if isinstance(self.settings.train_dataset, Stream):
            raise TypeError("a stream's data have no indices: their order is that in which they come")
        size = len(self.settings.train_dataset)
        return Order(size, self.settings.seed, epoch) if self.settings.shuffle else range(size)

    def loader(
        self, name: str, dataset: Any, put: Callable[[PyTree], PyTree], *, room: int, **more: Any
    ) -> Loader | Flow:
        """A dataset as batches, read as those of the run are; `more` is for `learnax.data.Loader`, or its `Flow`."""
        settings = self.settings
        if isinstance(dataset, Feed):
            return Flow(
                dataset,
                settings.batch_size,
                share=self._share,
                room=room,
                put=put,
                heed=self.stops.heed,
                agree=self._exchange if self.processes.count > 1 else None,
                index=self.processes.index,
                **more,
            )
        return Loader(
            name,
            dataset,
            settings.batch_size,
            num_workers=0 if settings.single else settings.num_workers,
            share=self._share,
            room=room,
            put=put,
            heed=self.stops.heed,
            **more,
        )

    @property
    def _share(self) -> tuple[int, int]:
        """The rows of each batch that this process reads."""
        rows = self.settings.batch_size // len(self.engine.devices)
        first, last = self.engine.share
        return first * rows, last * rows

    def _loader(self, name: str, dataset: Any) -> Split:
        settings, train = self.settings, name == "train"
        if train and self.draft.gathers:
            return Gathered(
                name,
                dataset,
                settings.batch_size,
                group=settings.accumulate_steps,
                seed=settings.seed,
                put=functools.partial(self.engine.put, spec=SAME),
                lies=self.draft.lies,
                heed=self.stops.heed,
            )
        how: dict[str, Any] = {
            "room": self.draft.room(name),
            "most": None if train else settings.val_steps,
            "tail": not train,
            "group": settings.accumulate_steps if train else 1,
        }
        if not isinstance(dataset, Feed):
            seed = settings.seed if train and settings.shuffle else None
            how |= {"budget": RESIDENT_BYTES, "seed": seed, "told": train}
        loader = self.loader(name, dataset, self._put_batches, **how)
        if settings.single:
            assert settings.epoch_steps is not None  # that of a single batch
            length = settings.epoch_steps * settings.accumulate_steps
            return Repeated(loader, length, datum=settings.single_datum, put=self._put_batches)
        tell_of_generators(name, dataset)
        return loader

    def _put_batches(self, tree: PyTree) -> PyTree:
        return self.engine.put(tree, BATCHES)

    def _exchange(self, text: str) -> list[str]:
        """Each process's text, in their order."""
        matter = f"batches of this process's own, {next(_matters)}"
        told: list[str] = json.loads(self.processes.settle(matter, text, json.dumps))
        return told

    def _check_probes(self) -> None:
        """Traces probes: what is wrong with one is told before anything is compiled."""
        if self.users.probes:
            for kind, _, args in self._probes(self.origin.shapes(), any_key()):
                self.engine.look(kind, args)

    def _log(self) -> Log:
        settings = self.settings
        for sink in runs_of(settings.run) if self.processes.first else ():
            if isinstance(sink, Sink):
                sink.check()
        return Log(
            settings.run,
            self.engine.in_flight,
            settings.total_steps,
            self.phases,
            self.processes,
            settings.batch_size * settings.accumulate_steps,
            settings.max_dropped,
            on_host=self.engine.devices[0].platform == "cpu",
        )

    def _checkpointer(self) -> Checkpointer | None:
        settings, registry = self.settings, self.settings.registry
        if registry is None:
            return None
        if not isinstance(registry, Registry):
            registry = Registry(registry)
        # Each process may have a run of its own, with an id of its own.
        run = named_run(settings.run)
        path = registry.checkpoints(NAME if run is None else run.id)
        checkpointer = Checkpointer.at(
            self.processes.from_first(str(path)),
            processes=self.processes,
            save_every=settings.save_every,
            checkpoint_every=settings.checkpoint_every,
            max_to_keep=settings.max_checkpoints,
            keep_best=settings.keep_best_checkpoint,
            metric_name=settings.best_metric_name,
            minimize_metric=settings.minimize_metric,
        )
        checkpointer.check_free()
        return checkpointer

    def _hooks(self, traced: checks.Traced) -> Hooks:
        settings, hooks = self.settings, Hooks()
        voice, unwrap = self.processes.voice, self.first["train"].unwrap
        if settings.plot_pipe is not None:
            plot_pipe, plot_model = voice(settings.plot_pipe), voice(settings.plot_model)
            hooks.shows.append(Plotter(settings.plot_every, plot_pipe, plot_model, self.log.voice, unwrap))
        if settings.sample_model is not None and settings.sample_every is not None:
            measure = settings.sample_metrics
            hooks.shows.append(
                Sampler(
                    settings.sample_every,
                    settings.sample_model,
                    sample_params(settings.sample_params),
                    voice(settings.sample_plot),
                    measure and checks.SampleMetrics(measure, traced.metrics),
                    settings.sample_batch_size or min(9, settings.batch_size),
                    settings.seed,
                    self.log.voice,
                    self.engine,
                    self.programs.evaluated,
                    unwrap,
                )
            )
        if self.users:
            self.users.stand_on(self._ground())
            hooks.shows.append(self.users)
        if settings.save_model is not None:
            hooks.saves.append(ModelSaver(settings.save_every, voice(settings.save_model), self.engine))
        if self.checkpointer is not None:
            resume_point = self.progress.resume_point
            hooks.saves.append(StateSaver(self.checkpointer, resume_point))
            hooks.ends.append(BestSaver(self.checkpointer, settings.best_metric_name, self.log.metrics, resume_point))
        return hooks

    def _users(self, traced: checks.Traced, splits: list[str]) -> Users:
        settings = self.settings
        checks.check_watched(settings.hooks, traced.metrics, splits, train_only=settings.train_only)
        return Users(settings.hooks, self.processes, traced.metrics, validates=len(splits) > 1)

    def _ground(self) -> Ground:
        return Ground(
            self.engine,
            self.first["train"].unwrap,
            self.log.voice,
            self.log,
            self.processes,
            self.checkpointer,
            self.stops.ask,
            self.stops.check_asked,
            self.progress.resume_point,
            self.progress.scale_rate,
            self.progress.check_rate,
            self.programs.probe,
        )

    def _profile_folder(self) -> Path:
        folder = Path("learnax-profile") if self.checkpointer is None else self.checkpointer.path.parent / "profile"
        return folder / f"process-{self.processes.index}" if self.processes.count > 1 else folder

    def _settle(self) -> None:
        """Waits for all steps that were dispatched."""
        if not self.stops.at_once:
            jax.block_until_ready(self.progress.live)
