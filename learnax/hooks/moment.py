"""The moment that a hook is called at: what it can read of the run, and what it can ask for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from learnax.checkpoint import Checkpointer
from learnax.checkpoint.names import RESERVED
from learnax.cluster.processes import Processes
from learnax.data import copied
from learnax.engine import Engine, Kind
from learnax.hooks.due import Point, to_host
from learnax.log import Log
from learnax.log.axis import by_step, with_step
from learnax.utils import PyTree, tree_unstack

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Ground:
    """What of a run hooks see and act on.

    Attributes:
        engine: brings arrays to the host.
        unwrap: turns stacked arguments into stacked data as the dataset gives them.
        run: the user's.
        log: hands rows to it.
        processes: of the run.
        checkpointer: saves; or None.
        stop: ends the run for a reason, where that is next looked for.
        check_stop: looks for one, and raises it.
        resume_point: what a checkpoint holds beside the state.
        scale_rate: multiplies the learning rate that the optimiser keeps.
        check_rate: raises ValueError where it keeps none.
        probe: makes a program of a probe, by its name and its function.
    """

    engine: Engine
    unwrap: Callable[[list[Any]], PyTree]
    run: Any
    log: Log
    processes: Processes
    checkpointer: Checkpointer | None
    stop: Callable[[str], None]
    check_stop: Callable[[], None]
    resume_point: Callable[[], dict[str, Any]]
    scale_rate: Callable[[float], None]
    check_rate: Callable[[], None]
    probe: Callable[[str, Callable[[Any], PyTree]], Kind]


@dataclasses.dataclass
class Asked:
    """What hooks have asked for at a moment, to be done once all of them were called.

    Attributes:
        stop: why the run is to end; None where it is not.
        saves: names of checkpoints, None for the latest.
        factor: what the learning rate is multiplied by.
    """

    stop: str | None = None
    saves: list[str | None] = dataclasses.field(default_factory=list)
    factor: float = 1.0

    def __bool__(self) -> bool:
        return self != Asked()

    def add(self, other: Asked) -> None:
        """Joins what another process's hooks have asked for; of its factor nothing: all would have it twice."""
        self.stop = self.stop or other.stop
        self.saves += [name for name in other.saves if name not in self.saves]


class Trained(NamedTuple):
    """What was trained on in one step; see `Moment.recent`.

    Attributes:
        step: updates made, this one included; one that was dropped has the step of the one before it.
        metrics: the step's, by their names in `trainer.metrics`; what hooks and samples have added is not there.
        read: gives the data, as `Moment.batch` does, of all accumulated batches: copies of this process's part of them.
    """

    step: int
    metrics: dict[str, float]
    read: Callable[[], list[Any]]


class Moment:
    """The moment right after a training step or a validation, or at the begin or end of `train()`.

    What is read of it is fetched from the devices only then, in copies that are the reader's own. Once the hook has
    returned, the next step takes over the state's memory: then nothing but `step` and `epoch` can be asked for.

    Args:
        point: the place in the run.
        ground: the run.
        hook: the hook's name.
        kind: "step", "validation", "begin" or "end".
        metrics: by their names in `trainer.metrics`.
        asked: is told what the hook asks for.
        everywhere: whether all processes call the hook.
        outputs: whether the training program gives the outputs.
        recent: gives what was trained on since the hook was last called; None where that is not kept.

    Attributes:
        step: updates made so far.
        epoch: the epoch that it lies in, from 0.
    """

    def __init__(
        self,
        point: Point,
        ground: Ground,
        hook: str,
        kind: str,
        metrics: Mapping[str, float],
        asked: Asked,
        *,
        everywhere: bool,
        outputs: bool,
        recent: Callable[[], list[Trained]] | None = None,
    ):
        self.step, self.epoch = point.step, point.epoch
        self._point: Point | None = point
        self._ground, self._hook, self._kind, self._asked = ground, hook, kind, asked
        self._metrics = dict(metrics)
        self._everywhere, self._with_outputs, self._recent = everywhere, outputs, recent
        self._fetched: dict[str, Any] = {}

    @property
    def metrics(self) -> dict[str, float]:
        """After a step: its metrics, `train/loss` and so on, and `grads/<path>`, the norm of each gradient.

        After a validation: the last value of each metric that the epoch added to, `val/loss` and `train_epoch/loss`
        among them. At begin and end: the last value of each metric there is.
        """
        self._at("metrics")
        return self._metrics

    @property
    def params(self) -> PyTree:
        """The parameters, numpy arrays."""
        return self._fetch("params", lambda point: self._host("params", point.state.params))

    @property
    def ema(self) -> PyTree:
        """The average of the parameters, numpy arrays; None where the trainer keeps none (`ema=`)."""
        return self._fetch("ema", lambda point: self._host("ema", point.state.ema))

    @property
    def batch(self) -> list[Any]:
        """What the step was trained on: a list of `batch_size` data, as a plot gets it.

        With `accumulate_steps`, the last of its batches.
        """
        return self._fetch("batch", self._batch)

    @property
    def outputs(self) -> list[Any]:
        """The model's outputs for `batch`, one for each datum, on the host; for a hook with `outputs = True`."""
        return self._fetch("outputs", self._outputs)

    @property
    def recent(self) -> list[Trained]:
        """What was trained on since the hook was last called, this step last; for a hook with `recent = True`."""
        return self._fetch("recent", self._since)

    @property
    def run(self) -> Any:
        """The trainer's run, once it has all rows of before; None where there is none."""
        self._at("run")
        self._ground.log.flush()
        return by_step(self._ground.run)

    def log(self, row: Mapping[str, Any]) -> None:
        """Hands a row to the run, behind all that came before; its `step` is this one unless it has one.

        It is what the run takes, images for one, and joins no metric.
        """
        self._at("log()")
        if not isinstance(row, Mapping):
            raise TypeError(f"moment.log takes a dict, but got {type(row).__name__}")
        self._ground.log.send(with_step(row, self.step))

    def stop(self, reason: str) -> None:
        """Ends the run after this step, as `max_seconds` does: it is saved, and `train()` returns.

        Args:
            reason: in a few words, for the line that tells of it.
        """
        self._at("stop()")
        if self._kind == "end":
            raise ValueError("moment.stop() in end(): the run ends already")
        self._asked.stop = self._asked.stop or f"hook {self._hook!r}: {reason}"

    def save(self, name: str | None = None) -> None:
        """Saves a checkpoint of this moment, once all hooks were called and the step's metrics are kept.

        Args:
            name: it is kept under this name, beside all others, until another one of that name is whole on disk;
                `load_checkpoint=name` goes on from it. None saves the latest, as `save_every` does.

        Raises:
            ValueError: the trainer has no registry; or a name that stands for something else.
        """
        self._at("save()")
        if self._ground.checkpointer is None:
            raise ValueError("moment.save() needs a place for checkpoints: give the trainer a registry=")
        if name is not None and (not isinstance(name, str) or not _is_name(name)):
            raise ValueError(
                f"moment.save(name): a name is a word that is no number, no path and none of {', '.join(RESERVED)}, "
                f"'pretrained' for instance, but is {name!r}"
            )
        if name not in self._asked.saves:
            self._asked.saves.append(name)

    def scale_rate(self, factor: float) -> None:
        """Multiplies the learning rate from the next step on; a checkpoint keeps the product of all factors.

        The rate is what the optimiser keeps in its state: the default one does, and `optax.inject_hyperparams`.

        Args:
            factor: above 0.

        Raises:
            ValueError: a factor that is not above 0; the optimiser keeps no rate, or one that follows a schedule.
        """
        self._at("scale_rate()")
        if not isinstance(factor, (int, float, np.number)) or not 0 < factor < float("inf"):
            raise ValueError(f"moment.scale_rate(factor) takes a number above 0, but got {factor!r}")
        self._ground.check_rate()
        self._asked.factor *= float(factor)

    def over(self) -> None:
        """Is called when the hook has returned: what it keeps of the state must not keep the next step waiting."""
        self._point = self._recent = None
        self._fetched = {}

    def _at(self, what: str) -> Point:
        if self._point is None:
            raise RuntimeError(
                f"the moment of step {self.step} is over, and moment.{what} with it: the next step takes over the "
                f"memory of the state. Read it while hook {self._hook!r} is called, and keep what it gives, which is "
                "a copy, not the moment"
            )
        return self._point

    def _fetch(self, what: str, fetch: Callable[[Point], T]) -> T:
        point = self._at(what)
        if what not in self._fetched:
            self._fetched[what] = fetch(point)
        return self._fetched[what]

    def _host(self, what: str, tree: PyTree) -> PyTree:
        divided = any(not leaf.is_fully_addressable and not leaf.is_fully_replicated for leaf in jax.tree.leaves(tree))
        if not divided:
            return jax.tree.map(self._ground.engine.host_copy, tree)
        self._check_everywhere(what, "lie in parts on several processes")
        return to_host(jax.tree.map(self._ground.engine.whole, tree))

    def _batch(self, point: Point) -> list[Any]:
        self._check_step("batch", point)
        return tree_unstack(copied(self._ground.unwrap(point.batch)))

    def _outputs(self, point: Point) -> list[Any]:
        self._check_step("outputs", point)
        if not self._with_outputs:
            raise ValueError(
                f"hook {self._hook!r} reads moment.outputs, which the training program gives only where a hook asks "
                "for it: set the hook's attribute outputs = True, or Every(n, function, outputs=True)"
            )
        return tree_unstack(to_host(point.outputs))

    def _since(self, point: Point) -> list[Trained]:
        self._check_step("recent", point)
        if self._recent is None:
            raise ValueError(
                f"hook {self._hook!r} reads moment.recent, which is kept only where a hook asks for it: set the hook's "
                "attribute recent = True"
            )
        return self._recent()

    def _check_step(self, what: str, point: Point) -> None:
        if not point.has_batch:
            where = "after a validation" if self._kind == "validation" else f"in {self._kind}()"
            raise ValueError(f"there is no moment.{what} {where}: it is that of a step, for a hook that is due at one")
        if self._ground.engine.spans and what != "recent":
            self._check_everywhere(what, "is read by several processes, each its part")

    def _check_everywhere(self, what: str, why: str) -> None:
        if not self._everywhere:
            raise ValueError(
                f"hook {self._hook!r} reads moment.{what}, which {why}, but is called on the first one alone: set the "
                "hook's attribute everywhere = True, and let it read the same on all of them"
            )


@functools.cache
def _is_name(name: str) -> bool:
    """Whether a checkpoint may be kept under it."""
    return (
        bool(name.strip())
        and not name.lstrip("-").isdecimal()
        and not set("/\\") & set(name)
        and not (name.endswith(".pyd") or name in RESERVED)
    )
