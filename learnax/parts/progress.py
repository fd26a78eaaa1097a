"""Where a run stands: its state on the devices, its random sequence, its place in the data; begun or loaded."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from learnax import checks
from learnax.checkpoint import Checkpointer
from learnax.checks.settings import Settings
from learnax.data import Flow
from learnax.engine import SAME, Engine
from learnax.engine.programs import Programs
from learnax.hooks import Users
from learnax.log import Log
from learnax.parts.origin import Coming, Origin
from learnax.step import (
    LearningRate,
    Packed,
    hyperparams,
    key_pair,
    scaled_rates,
    wide,
    with_rate,
)
from learnax.step.state import TrainState, as_train_state
from learnax.utils import PyTree

_logger = logging.getLogger("learnax")


@dataclasses.dataclass
class Position:
    """Where a run stands in its data.

    Attributes:
        epoch: the epoch that runs, from 0.
        batch: training batches of it that were trained on.
        marks: length of each metric's history when the epoch began.
        steps: training steps of all epochs, those included whose update was dropped.
        validated: the step of the last validation that came amid an epoch; None where there was none.
    """

    epoch: int = 0
    batch: int = 0
    marks: dict[str, int] = dataclasses.field(default_factory=dict)
    steps: int = 0
    validated: int | None = None


class Progress:
    """Where a run stands.

    Args:
        settings: of the run.
        origin: what it begins with.
        engine: lays the state out.
        programs: pack the state.
        log: has the step, and the metrics.
        checkpointer: has what a run goes on from; or None.
        users: the user's hooks, whose state goes on, too.
        flow: the stream of the training data; None where they have numbers.

    Attributes:
        position: the place in the data.
        rate_factor: what hooks have multiplied the learning rate by.
        places: where the state's arrays lie, until the first dispatch on it has shown which it updates in place.
    """

    def __init__(
        self,
        settings: Settings,
        origin: Origin,
        engine: Engine,
        programs: Programs,
        log: Log,
        checkpointer: Checkpointer | None,
        users: Users,
        flow: Flow | None = None,
    ):
        self._flow = flow
        self._settings = settings
        self._programs = programs
        self._origin = origin
        self._engine = engine
        self._log = log
        self._checkpointer = checkpointer
        self._users = users
        self._live: TrainState | Packed | None = None
        self._coming: Coming | None = None  # the fresh state, until someone needs it
        self._seen: TrainState | None = None  # what the live state came to when it was looked at
        self._seq_data: jax.Array | None = None
        self.position = Position()
        self.rate_factor = 1.0
        self.places: dict[str, list[int]] = {}

    @property
    def live(self) -> TrainState | Packed:
        """The state as training takes it."""
        if self._live is None:
            self.settle()
            assert self._live is not None
        return self._live

    @property
    def state(self) -> TrainState:
        """The live state, made of what is packed the first time that it is looked at."""
        if self._seen is None:
            self._seen = self._programs.state(self.live)
        return self._seen

    @state.setter
    def state(self, given: Any) -> None:
        given = as_train_state(given)
        self._take(given._replace(step=np.int32(given.step)), ours=False)

    def _take(self, state: TrainState, *, ours: bool) -> None:
        self._seen = self._coming = None
        self._live = self._programs.live(state, ours=ours)
        self.places = self._programs.places(self._live)

    def look(self) -> TrainState:
        """`state`."""
        return self.state

    @property
    def shapes(self) -> TrainState:
        """Those of the live state: to ask for them dispatches nothing, and waits for nothing."""
        return self._programs.shapes(self.live) if self._coming is None else self._coming.shapes

    @property
    def live_shapes(self) -> TrainState | Packed:
        """`live`, or its shapes: to ask for them waits for nothing."""
        return self.live if self._coming is None else self._programs.live_shapes(self._coming.shapes)

    @property
    def seq(self) -> jax.Array:
        """The random sequence."""
        return jax.random.wrap_key_data(self.seq_data)

    @seq.setter
    def seq(self, seq: jax.Array) -> None:
        self._seq_data = jax.random.key_data(seq)

    @property
    def seq_data(self) -> jax.Array:
        """The numbers of the random sequence."""
        if self._seq_data is None:
            self.settle()
        if self._seq_data is None:
            self.seq = self._engine.put(key_pair(self._settings.seed)[0], SAME)
        assert self._seq_data is not None
        return self._seq_data

    def advance(self, live: TrainState | Packed, seq_data: jax.Array, batches: int) -> None:
        """Takes over what a dispatch has made of the state, from so many batches."""
        self._live, self._seq_data, self._seen = live, seq_data, None
        self.position.batch += batches
        self.position.steps += batches // self._settings.accumulate_steps

    def begin_epoch(self, epoch: int) -> None:
        """Stands at the beginning of an epoch."""
        steps = self.position.steps
        if epoch != self.position.epoch + 1:
            steps = epoch * (self._settings.epoch_steps or 0)
        self.position = Position(epoch, 0, self._log.lengths(), steps, self.position.validated)

    def validated(self, seq: jax.Array) -> None:
        """Stands after a validation amid an epoch; `seq` is the random sequence after it."""
        self.seq = seq
        self.position.validated = self._log.step

    @property
    def left(self) -> float:
        """Training steps that the run has left, where its length is given in steps; else infinity."""
        steps = self._settings.num_steps
        return math.inf if steps is None else steps - self.position.steps

    @property
    def is_whole(self) -> bool:
        """Whether all of the epoch was trained on."""
        steps = self._settings.epoch_steps
        return steps is not None and self.position.batch >= steps * self._settings.accumulate_steps

    @property
    def is_complete(self) -> bool:
        """Whether the run is at its end, and its last state was validated."""
        if self.position.epoch >= self._settings.epochs:
            return True
        if self.left > 0 or self.is_whole:
            return False
        return self.position.batch == 0 or self.position.validated == self._log.step

    def end_epoch(self, epoch: int, seq: jax.Array) -> None:
        """Stands after an epoch; `seq` is the random sequence after its validation."""
        self.seq = seq
        self.begin_epoch(epoch + 1)

    def check_first(self) -> None:
        """Waits for the first dispatch on a state, and says which of its arrays were not updated in place."""
        jax.block_until_ready(self.live)
        before, self.places = self.places, {}
        after = self._programs.places(self.live)
        moved = [name for name in before if before[name] != after[name]]
        if moved:
            _logger.warning(
                "the step did not reuse the memory of %d of the state's %d arrays, and copies them: %s",
                len(moved),
                len(before),
                ", ".join([*moved[:10], *(["and others"] if len(moved) > 10 else [])]),
            )

    def scale_rate(self, factor: float) -> None:
        """Multiplies the learning rate that the optimiser keeps.

        Raises:
            ValueError: it keeps none, or one that follows a schedule.
        """
        state, rate = self.state, self._settings.learning_rate
        opt_state = scaled_rates(state.opt_state, factor)
        self.rate_factor *= factor
        if self._settings.own_optimizer:  # by one product, as a run does that goes on from a checkpoint
            opt_state = with_rate(_scaled(rate, self.rate_factor), opt_state)
        self.state = state._replace(opt_state=opt_state)
        self.places = {}  # that the next step updates it in place was seen before

    def check_rate(self) -> None:
        """Raises ValueError where `scale_rate` would; nothing is computed."""
        jax.eval_shape(lambda opt_state: scaled_rates(opt_state, 1.0), self.shapes.opt_state)

    def begin(self, state: Any = None) -> None:
        """Makes the state where there is none: from the checkpoint asked for, or fresh.

        Args:
            state: taken in place of the one there is, with its step; the run begins its epochs from the first.
        """
        if state is not None:
            self.state = state
            self._log.step = int(as_train_state(state).step)
            self.position = Position(marks=self._log.lengths())
        if self._live is None and self._coming is None and not self._load():
            self._coming = self._origin.begin()
            if not self._origin.makes_all:
                self.settle()  # arrays of the user's own, who may change them after this

    def settle(self) -> None:
        """Waits for the fresh state, where it is on its way."""
        if self._coming is not None:
            state, seq = self._coming.made()
            self._take(state, ours=self._origin.makes_all)
            self.seq = self._engine.put(seq, SAME)

    def resume_point(self) -> dict[str, Any]:
        """What a checkpoint holds beside the state, for a run to go on as if it had not stopped."""
        return {
            "rng": np.asarray(jax.random.key_data(self.seq)),
            "position": dataclasses.asdict(self.position) | self._stream(),
            "history": self._log.metrics,
            "script": self._settings.script(),
            "hooks": self._users.state(),
            "rate_factor": self.rate_factor,
        }

    def _stream(self) -> dict[str, Any]:
        """Where a stream of training data stands."""
        if self._flow is None:
            return {}
        return {"stream": self._flow.state(self.position.epoch, self.position.batch)}

    def _load(self) -> bool:
        """Takes over the checkpoint that `load_checkpoint` asks for; False where there is none to take."""
        if self._checkpointer is None:
            return False
        weights, loaded = self._settings.load_weights, None
        if self._settings.load_checkpoint:
            target = self._origin.shapes()
            target = _of_weights(target, weights == "ema") if weights else target
            loaded = self._checkpointer.load(self._settings.load_checkpoint, target=target, resume=not weights)
            if loaded is None:
                _logger.warning("no checkpoint in %s yet: starting fresh", self._checkpointer.path)
        self._checkpointer.leave_behind(loaded["number"] if loaded and not weights else None)
        if loaded is None:
            return False
        if weights:
            self._begin_from(loaded["state"], average=weights == "ema")
        else:
            self._go_on(loaded["state"], loaded["step"], loaded["resume"])
        return True

    def _begin_from(self, loaded: TrainState, *, average: bool) -> None:
        """A fresh state with the parameters of a checkpoint, or with their average, and what its model carried on."""
        fresh = self._origin.state()
        params = loaded.params
        if average:
            params = jax.tree.map(lambda own, like: own.astype(like.dtype), loaded.ema, fresh.params)
        ema = None if fresh.ema is None else jax.tree.map(lambda own, like: own.astype(like.dtype), params, fresh.ema)
        carried = fresh.model_state if loaded.model_state is None else loaded.model_state
        self.state = fresh._replace(params=params, model_state=carried, ema=ema)

    def _go_on(self, state: TrainState, step: int, resume: Any) -> None:
        self.rate_factor = resume.get("rate_factor", 1.0) if resume else 1.0
        if self._settings.own_optimizer:  # only of that one the rate is sure to be the argument `learning_rate`
            rate = _scaled(self._settings.learning_rate, self.rate_factor)
            state = state._replace(opt_state=with_rate(rate, state.opt_state))
        else:
            self._tell_kept(state.opt_state)
        self.state = state
        self._log.resume(step, resume["history"] if resume else {})
        if resume:
            checks.check_same_script(step, resume.get("script"), self._settings.script())
            names = {field.name for field in dataclasses.fields(Position)}
            self.position = Position(**{name: at for name, at in resume["position"].items() if name in names})
            if "steps" not in resume["position"]:  # of an older version
                position, settings = self.position, self._settings
                before = position.epoch * (settings.epoch_steps or 0)
                position.steps = before + position.batch // settings.accumulate_steps
            if self._flow is not None:
                self._flow.go_on(resume["position"].get("stream"), self.position.epoch, self.position.batch)
            self.seq = self._engine.put(jax.random.wrap_key_data(jnp.asarray(resume["rng"])), SAME)
            self._users.restore(step, resume.get("hooks", {}))

    def _tell_kept(self, opt_state: PyTree) -> None:
        """Names the hyperparameters that the script gives otherwise than the state that was read."""
        kept = hyperparams(opt_state)
        if not kept:
            return
        given = self._origin.hyperparams()
        if self.rate_factor != 1:
            given = {name: value for name, value in given.items() if not name.startswith("learning_rate")}
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


def _scaled(rate: LearningRate | None, factor: float) -> LearningRate | None:
    """A rate times a factor; a schedule as it is, for none is scaled."""
    return rate if rate is None or callable(rate) else rate * factor


def _of_weights(shapes: TrainState, average: bool) -> TrainState:
    """What is read of a checkpoint for a run that begins with its weights."""
    ema = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, wide(x.dtype)), shapes.params) if average else None
    return shapes._replace(opt_state=None, ema=ema)
