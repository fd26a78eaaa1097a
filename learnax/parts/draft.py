"""What a run's step is made of on some devices: how it is cut, how its state lies, and its programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from learnax import checks
from learnax.checks import Settings
from learnax.data import FirstDatum, stays
from learnax.engine import BATCHES, SAME, Engine, Wanted
from learnax.engine.plan import RESIDENT_BYTES, Plan, plan
from learnax.engine.programs import Programs
from learnax.engine.sharding import Gather, divided
from learnax.parts.origin import Origin
from learnax.step import AXIS, Packed, Recipe
from learnax.step.state import TrainState
from learnax.utils import PyTree, tree_bytes
from learnax.utils.permutation import Shuffled, rounds_of


class Draft:
    """A run's step on some devices. They need not be here: nothing is computed.

    Args:
        settings: the trainer's arguments, checked.
        traced: what was found out of model and losses.
        first: each split's first datum.
        engine: of the devices.

    Attributes:
        origin: the state that a run begins with.
        plan: how many steps a dispatch makes.
        recipe: what a step is made of.
        programs: training, evaluation, an update by hand.
        gathers: whether the training data lie on each device, and a step gathers its batch from them.
    """

    def __init__(self, settings: Settings, traced: checks.Traced, first: Mapping[str, FirstDatum], engine: Engine):
        self._settings, self._engine, self._first = settings, engine, first
        engine.mapped = traced.mapped
        datum = first["train"].arguments
        self.origin = Origin(settings, traced.model, traced.init, traced.optimizer, datum, engine)
        gather = self._divide(traced) if settings.shard_state else None
        self.plan = self._plan(traced)
        self.recipe = self._recipe(traced, gather)
        self.gathers = (
            settings.shuffle and not settings.single and stays(settings.train_dataset, first["train"], RESIDENT_BYTES)
        )
        with_outputs = settings.plot_pipe is not None or any(map(checks.wants_outputs, settings.hooks))
        self.programs = Programs(
            engine, self.recipe, self.plan.room, with_outputs, first["train"], settings.ema_eval, self.gathers
        )

    def room(self, split: str) -> int:
        """Batches in a block of a split."""
        if self._settings.single:
            return 1
        return self.plan.room * (self._settings.accumulate_steps if split == "train" else 1)

    def batches(self, *lead: int, split: str = "train") -> list[Any]:
        """The shapes of a split's data, under some leading axes."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype), self._first[split].arguments
        )

    @property
    def lies(self) -> Any:
        """How batches that are gathered lie, where XLA's partitioner divides them."""
        return None if self._engine.layout == SAME else self._engine.sharding(BATCHES)

    def block(self, split: str) -> PyTree:
        """The shapes of a split's blocks."""
        if split != "train" or not self.gathers:
            return self.batches(self.room(split), self._settings.batch_size, split=split)
        size = len(self._settings.train_dataset)
        rounds = jax.eval_shape(lambda: rounds_of(size, 0, 0))
        return Shuffled(self.batches(size), rounds, size, self.lies)

    def wanted(self, live: TrainState | Packed, seq: Any, sizes: Mapping[str, int]) -> list[Wanted]:
        """The programs of a run.

        Args:
            live: the state as training takes it, or its shapes.
            seq: the random sequence, or its shape.
            sizes: split -> its data.
        """
        blocks: dict[str, PyTree] = {name: self.block(name) for name in self._first}
        tails = {name: size % self._settings.batch_size for name, size in sizes.items()}
        return self.programs.wanted(live, seq, blocks, tails)

    def _divide(self, traced: checks.Traced) -> Gather:
        """Lays the state out in parts; returns what gathers the parameters for a loss."""
        engine = self._engine
        checks.check_sharded(engine.mapped)
        shapes = self.origin.shapes()
        engine.layout = divided(shapes, len(engine.devices), AXIS)
        specs = jax.tree.leaves(engine.params_layout, is_leaf=lambda spec: isinstance(spec, PartitionSpec))
        leaves = zip(jax.tree.leaves(shapes.params), specs, strict=True)
        return Gather(engine.mesh, tuple(specs), traced.used, frozenset(leaf.shape for leaf, spec in leaves if spec))

    def _plan(self, traced: checks.Traced) -> Plan:
        settings = self._settings
        step_bytes = settings.accumulate_steps * settings.batch_size * tree_bytes(self._first["train"].arguments)
        platform = self._engine.devices[0].platform
        # On a CPU nobody asks, and to trace the state for it would take a start its time.
        state_bytes = 0 if platform == "cpu" else tree_bytes(self.origin.shapes())
        return plan(
            settings.steps_per_execution, platform, traced.primitives, step_bytes, settings.epoch_steps, state_bytes
        )

    def _recipe(self, traced: checks.Traced, gather: Gather | None) -> Recipe:
        settings = self._settings
        return Recipe(
            traced.model,
            settings.losses,
            traced.optimizer,
            settings.learning_rate,
            settings.max_grad,
            settings.batch_size,
            1 if settings.shard_state else len(self._engine.devices),
            settings.accumulate_steps,
            safe=settings.safe,
            trusted=settings.trusted,
            looped=self.plan.looped,
            selects=self.plan.selects,
            weighted=traced.weighted,
            by_datum=traced.by_datum,
            batch_axis=traced.batch_axis,
            ema=settings.ema,
            gather=gather,
        )
