"""A training run, from its first epoch to its last."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from learnax.data import Block, ShuffledBlock
from learnax.hooks import Point, Seen, due
from learnax.hooks.due import Action
from learnax.parts import Parts
from learnax.session import Session
from learnax.utils import PyTree

_logger = logging.getLogger("learnax")


class Loop:
    """Trains: epochs of dispatches, cut where something is due, and what is due there.

    Args:
        parts: of the run.

    Attributes:
        parts: of the run.
        session: frames what is run.
    """

    def __init__(self, parts: Parts):
        self.parts = parts
        self._settings, self._engine, self._phases = parts.settings, parts.engine, parts.phases
        self._progress, self._log, self._hooks = parts.progress, parts.log, parts.hooks
        self._programs, self._profiler, self._users = parts.programs, parts.profiler, parts.users
        self.session = Session(parts)

    def run(self, train_epoch: Callable[[int], None]) -> None:
        """Trains what is left, each epoch by `epoch` or by what a subclass of the trainer has in its place."""
        with self.session():
            if self._progress.is_complete:
                self._tell_complete()
            else:
                self.parts.compile()
            params = jax.tree.leaves(self._progress.shapes.params)
            self._log.send_once({"model/num_params": sum(leaf.size for leaf in params)})
            with self._users.framing(self._here):
                for epoch in itertools.count(self._progress.position.epoch):
                    if epoch >= self._settings.epochs or self._progress.is_complete:
                        break
                    train_epoch(epoch)

    def epoch(self, epoch: int) -> None:
        """Trains one epoch, or what is left of the one that the run stands in, and ends it."""
        if epoch != self._progress.position.epoch:
            self._progress.begin_epoch(epoch)
        with self.session():
            self._log.begin_epoch(epoch, self._settings.epochs)
            self._validate_what_is_owed(epoch)
            for block in self._blocks(epoch):
                self._train_block(block)
            self._log.drain()
            if self._progress.left > 0 or self._progress.is_whole:
                self._end_epoch(epoch)
            elif not self._progress.is_complete:
                self._validate(Point(self._log.step, epoch, self._progress.look), regular=False)
            self.parts.stops.check_asked()

    def _train_block(self, block: Block) -> None:
        """Trains on a block's batches, in dispatches that are cut where something is due."""
        start, end, batches = block.first, len(block), self._settings.accumulate_steps
        while start < end and (left := self._progress.left) > 0:
            step = self._log.step_at_most
            edge = self._next_due(step)
            room = min(self.parts.plan.room, self._profiler.room(step, self._progress.position.epoch))
            count = int(min((end - start) // batches, room, edge - step, left))
            if self._users.probes:
                count = self._users.count(step, self._progress.position.steps, count)
            outputs = self._dispatch(block, start, count)
            start += count * batches
            # Where an update turns out to have been dropped, the step count falls back, and another edge may be next.
            if step + count == edge or step + count != self._log.step_at_most:
                self._between(block, start - 1, outputs)
            self.parts.stops.check()

    def _dispatch(self, block: Block, start: int, count: int) -> PyTree:
        """Makes training steps; returns the outputs of the last, on the devices, where they are plotted."""
        self._log.wait_for_room()
        first = bool(self._progress.places)
        phase = self._phases.first if first else self._phases.dispatch
        seen = self._look(block, start, count) if self._users.look else None
        with self._profiler.steps(self._log.step_at_most, count), phase:
            live, seq, scalars, outputs = self._programs.train(
                self._progress.live, self._progress.seq_data, block, start, count
            )
            self._progress.advance(live, seq, count * self._settings.accumulate_steps)
            if first:
                self._progress.check_first()
        self._log.push(scalars, count, self._progress.position.epoch, seen)
        return outputs

    def _between(self, block: Block, batch: int, outputs: PyTree) -> None:
        """Does what is due at exactly this step.

        Which step it is depends on updates that were dropped and are not known of yet. It is at most
        `step_at_most`, so only where something is due at that one the loop waits to know.
        """
        at_most = self._log.step_at_most
        if self._next_due(at_most - 1) > at_most:
            return
        with self._log.newest() as metrics:
            # First a profiler's windows end, as what follows is no part of the step. Then come plots and hooks, which
            # may add to the step's metrics; these are kept; then it validates; then saves hold all of it.
            self._profiler.leave(self._log.step, self._progress.position.epoch)
            if metrics["has_nan"] or metrics.get("overflow"):
                return  # this update was dropped: what is due at the step before it is done already
            step, epoch = self._log.step, self._progress.position.epoch
            read, fetch = lambda: self._batch(block, batch), lambda: self._engine.whole(outputs)
            point = Point(step, epoch, self._progress.look, metrics, read, fetch)
            for show in due(self._hooks.shows, step):
                metrics |= self._shown(show, point)
        if self.parts.validation.by_steps.next_due(step - 1) == step:
            self._validate(Point(step, epoch, self._progress.look), regular=True)
        self._act(point)
        self._save(due(self._hooks.saves, step), point)

    def _end_epoch(self, epoch: int) -> None:
        """Validates where that is due, keeps the epoch's means, and does what is due after it."""
        validation, position, seq = self.parts.validation, self._progress.position, self._progress.seq
        means = {"train": self._log.training_means(position.marks)}
        # What a validation amid the epoch came to says nothing of the state at its end.
        last = {name: value for name, value in self._log.grown(position.marks).items() if name.startswith("train/")}
        point = Point(self._log.step, epoch, self._progress.look, last)
        if validation.next_due(epoch) == epoch + 1 and position.validated != point.step:
            validated, seq = validation(point, seq, regular=validation.is_regular(epoch))
            means |= validated
        # Only after all validation: an epoch that is interrupted before this validates again, with the same keys.
        self._keep(means, point, lambda: self._progress.end_epoch(epoch, seq))
        self._profiler.leave(self._log.step, epoch + 1)

    def _validate(self, point: Point, *, regular: bool) -> None:
        """Validates amid an epoch, and keeps what came of it."""
        means, seq = self.parts.validation(point, self._progress.seq, regular=regular)
        self._keep(means, point, lambda: self._progress.validated(seq))

    def _validate_what_is_owed(self, epoch: int) -> None:
        """Validates where the run goes on from a step at which that was due, and was stopped."""
        step, position = self._log.step, self._progress.position
        if position.steps and self.parts.validation.by_steps.next_due(step - 1) == step != position.validated:
            self._validate(Point(step, epoch, self._progress.look), regular=True)

    def _keep(self, means: Mapping[str, Mapping[str, float]], point: Point, move: Callable[[], None]) -> None:
        """Keeps the means of splits, moves on to where a checkpoint has them, and does what is due then."""
        before = self._log.lengths()
        rows = self._log.keep_epoch(means)
        move()
        point.metrics = {**point.metrics, **self._log.grown(before)}
        for row in rows:
            self._log.send({**row, "step": point.step, "epoch": point.epoch})
        if self._users and any(split != "train" for split in means):
            self._validated(point)
        self._save(due(self._hooks.ends, point.epoch + 1), point)

    def _shown(self, show: Action, point: Point) -> Mapping[str, float]:
        if show is not self._users:  # its hooks wait for this where they look at the run
            self._log.flush()  # so that plots always find the same rows logged, however fast the run is
        with self._phases.plot:
            return show(point)

    def _look(self, block: Block, start: int, count: int) -> Seen | None:
        """Lets the user's hooks look at what is about to be trained on: probes, before a step takes over the state.

        Returns:
            See `learnax.hooks.Users.probe`.
        """
        self._users.remember(block, start, count, self._settings.accumulate_steps)
        live, seq = self._progress.live, self._progress.seq_data
        dispatch = lambda kind: self._programs.dispatch_probe(kind, live, seq, block, start)  # noqa: E731
        return self._users.probe(self._log.step_at_most, self._progress.position.steps, dispatch)

    def _validated(self, point: Point) -> None:
        """Calls the user's hooks after a validation."""
        with self._phases.plot:
            added = self._users.validated(point)
        if added:
            self._log.send({**self._log.keep(added), "step": point.step, "epoch": point.epoch})
            if not self._progress.position.batch:
                self._progress.position.marks = self._log.lengths()  # it belongs to the epoch that is over
        self._act(point)

    def _blocks(self, epoch: int) -> Iterator[Block]:
        """The blocks of an epoch that are left, up to the one in which the run's last step is."""
        if self._progress.left <= 0:
            return
        blocks = self.parts.loaders["train"].blocks(self._progress.position.batch, epoch)
        for block in self._phases.waiting(self._phases.data, blocks):
            yield block
            if self._progress.left <= 0:
                return

    def _next_due(self, step: int) -> float:
        """The first step after this one at which there is something to do."""
        by_steps = self.parts.validation.by_steps  # one by one: this is asked for each dispatch
        return min(self._profiler.next_due(step), self._hooks.next_due(step), by_steps.next_due(step))

    def _act(self, point: Point) -> None:
        """Does what the user's hooks have asked for."""
        if self._users.asked:
            self._log.settle()
            with self._phases.save:
                self._users.act(point)

    def _save(self, actions: list[Action], point: Point) -> None:
        if actions:
            self._log.settle()  # so that a run that goes on from here finds in its files all that was before
            with self._phases.save:
                for action in actions:
                    action(point)

    def _here(self) -> Point:
        """Where the run stands, between two dispatches, with the last value of each metric."""
        self._log.drain()
        return Point(self._log.step, self._progress.position.epoch, self._progress.look, self._log.grown({}))

    def _batch(self, block: Block, number: int) -> list[Any]:
        """One batch of a block on the host, those parts that other processes have read included."""
        if not self._engine.spans or isinstance(block, ShuffledBlock):  # this process has all of it
            return block.batch(number)
        return self._engine.whole(jax.tree.map(lambda leaf: leaf[number % len(leaf)], block.device))

    def _tell_complete(self) -> None:
        """Says that there is nothing to train: the script may be meant for another run."""
        settings, position = self._settings, self._progress.position
        done = f"{position.epoch} of {settings.num_epochs} epochs, {self._log.step} steps"
        if settings.num_steps is not None:
            done = f"{position.steps} of {settings.num_steps} steps"
        _logger.warning(
            "this run is complete: %s; train() makes no step. A larger %s trains on, another run= (or "
            "load_checkpoint=None, which moves its checkpoints aside) trains anew",
            done,
            "num_epochs" if settings.num_steps is None else "num_steps",
        )
