"""The user's hooks: when one of them is due, what they are given, what becomes of what they return and ask for."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from learnax import checks
from learnax.cluster.processes import Processes
from learnax.cluster.stops import EndError
from learnax.data import Block, copied
from learnax.engine import Kind
from learnax.hooks.due import Point
from learnax.hooks.given import Hook, HookError
from learnax.hooks.moment import Asked, Ground, Moment, Trained
from learnax.hooks.plain import plain
from learnax.hooks.probe import Probe
from learnax.log import full_name
from learnax.step import View
from learnax.utils import tree_unstack

_logger = logging.getLogger("learnax")
Seen = Callable[[], dict[str, float]]
"""Gives what probes have seen of a step, once its own metrics are there."""
VALIDATION = "validation/"
"""What the values that hooks return after a validation are kept under."""


class _Known:
    """A hook, with the defaults of what it lacks.

    Args:
        hook: with `next_due`, and callable.
        name: see `learnax.checks.hook_name`.
    """

    def __init__(self, hook: Any, name: str):
        self.hook, self.name = hook, name
        self.everywhere, self.outputs = bool(getattr(hook, "everywhere", False)), checks.wants_outputs(hook)
        self.kept: Any = None
        self.recent: list[tuple[Block, list[int]]] | None = [] if getattr(hook, "recent", False) else None
        self.late = isinstance(hook, Probe) and hook.late

    def has(self, method: str) -> bool:
        """Whether it does something of its own there."""
        own = getattr(type(self.hook), method, None)
        return own is not None and own is not getattr(Hook, method)

    @property
    def text(self) -> str:
        """What errors call it."""
        return f"hook {self.name!r}"


class Users:
    """Calls the user's hooks. Of several processes all go through it alike, whichever of them call a hook.

    Args:
        hooks: checked.
        processes: of the run.
        metrics: names of the losses' metrics.
        validates: whether there is anything to validate.

    Attributes:
        probes: programs of the probes among them, by the hooks' names.
        look: whether some look at what is about to be trained on.
        asked: what hooks have asked for since `act` was called.
    """

    def __init__(self, hooks: Sequence[Any], processes: Processes, metrics: Collection[str], *, validates: bool):
        self._known = [_Known(hook, checks.hook_name(hook)) for hook in hooks]
        self.look = False
        self.probes: dict[str, Kind] = {}
        self._probed: dict[str, dict[str, jax.Array]] = {}
        self._processes = processes
        self._taken = metrics
        self._broken: set[str] = set()
        self._from, self._until = 0, -math.inf
        self._answers: list[float] = []
        self._held: Ground | None = None
        self.asked = Asked()
        self._metrics: Mapping[str, float] = {}
        if not validates:
            for known in self._known:
                if known.has("after_validation"):
                    _logger.warning("%s waits for validations, but this run has none", known.text)
        self.state()  # what is no plain data is told of before anything is trained

    def __len__(self) -> int:
        return len(self._known)

    def stand_on(self, ground: Ground) -> None:
        """Tells what they act on; nothing is called before."""
        self._held = ground
        self.probes = {
            known.name: ground.probe(known.name, functools.partial(self._look, known))
            for known in self._known
            if isinstance(known.hook, Probe)
        }
        self.look = bool(self.probes) or any(known.recent is not None for known in self._known)

    def _look(self, known: _Known, view: View) -> dict[str, jax.Array]:
        """What a probe looks at, while its program is traced: its metrics are wrong then, or never."""
        values: dict[str, jax.Array] = known.hook.look(view)
        for name in known.hook.metrics_of(jax.tree.map(lambda value: np.zeros(value.shape), values)):
            self._check_metric(f"{known.text} returned", known, name)
        return values

    # ---- at steps

    def next_due(self, step: int) -> float:
        """The first step after this one at which something is to be done; hooks are asked where that is not known."""
        if not self._from <= step < self._until:
            self._ask(step)
        return self._until

    def count(self, step: int, steps: int, count: int) -> int:
        """How many of so many steps the next dispatch makes: a step that a probe looks into is the first of one.

        Nothing is waited for before it. Where an update turns out to have been dropped, it was another step than that
        which is due, which comes later then, and is looked into again.

        Args:
            step: updates made, at most.
            steps: training steps made, dropped updates included.
            count: steps at most.
        """
        for known, answer in self._answered():
            if known.late:
                due = known.hook.next_due(steps)
                # One that is due at the next step is looked into by this dispatch, which goes on to the next but one.
                count = min(count, (known.hook.next_due(due) if due == steps + 1 else due) - 1 - steps)
            elif known.name in self.probes and step < answer - 1:
                count = int(min(count, answer - 1 - step))
        return count

    def probe(self, step: int, steps: int, dispatch: Callable[[Kind], dict[str, jax.Array]]) -> Seen | None:
        """Dispatches the probes that look into the next step.

        Args:
            step: as for `count`.
            steps: as for `count`.
            dispatch: dispatches one.

        Returns:
            What gives the metrics of those that nothing waits for; None where there are none.
        """
        due = [known for known, answer in self._answered() if answer == step + 1 and known.name in self.probes]
        self._probed = {known.name: dispatch(self.probes[known.name]) for known in due}
        late = [known for known in self._known if known.late and known.hook.next_due(steps) == steps + 1]
        values = [(known.hook.metrics_of, dispatch(self.probes[known.name])) for known in late]

        def seen() -> dict[str, float]:
            host_copy = self._ground.engine.host_copy
            return {name: x for of, seen in values for name, x in of(jax.tree.map(host_copy, seen)).items()}

        return seen if values else None

    def remember(self, block: Block, first: int, count: int, accumulate: int) -> None:
        """Keeps what a dispatch trains on, until the hooks that ask for it are called.

        Args:
            block: batches.
            first: the first step's batch (the first of `accumulate`) among the n.
            count: steps.
            accumulate: batches of a step.
        """
        for known, answer in self._answered():
            if known.recent is not None and answer < math.inf:
                starts = range(first, first + count * accumulate, accumulate)
                known.recent += [(block, [start + number for number in range(accumulate)]) for start in starts]

    def __call__(self, point: Point) -> dict[str, float]:
        """Calls the hooks that are due at this step; returns what joins its metrics."""
        due = [known for known, answer in self._answered() if answer == point.step]
        self._until = -math.inf  # whatever a call may have changed
        metrics = {full_name(name): value for name, value in point.metrics.items()}
        return self._agreed(due, "step", point, metrics)

    # ---- at other places

    def validated(self, point: Point) -> dict[str, float]:
        """Calls the hooks after a validation; returns what is kept beside its metrics, by full names."""
        due = [known for known in self._known if known.has("after_validation")]
        if not due:
            return {}
        self._until = -math.inf
        values = self._agreed(due, "validation", point, point.metrics)
        for name in values:
            if f"{VALIDATION}{name}" in point.metrics:
                raise HookError(f"after step {point.step}, a hook returned {name!r}, as the set 'validation' reports")
        return {f"{VALIDATION}{name}": value for name, value in values.items()}

    @contextlib.contextmanager
    def framing(self, here: Callable[[], Point]) -> Iterator[None]:
        """Calls the hooks' `begin`, and their `end` where what is inside ends well, or by a stop of a hook or the time.

        Args:
            here: gives the place in the run, with all of its metrics.
        """
        self._at("begin", here)
        if self._known:
            self._ground.check_stop()
        try:
            yield
        except EndError:
            self._at("end", here)
            raise
        self._at("end", here)

    def _at(self, kind: str, here: Callable[[], Point]) -> None:
        due = [known for known in self._known if known.has(kind)]
        if due:
            self._until = -math.inf
            point = here()
            self._agreed(due, kind, point, point.metrics)
            self.act(point)

    # ---- what comes of it

    def act(self, point: Point) -> None:
        """Does what hooks have asked for: first the rate, so that a checkpoint has it, last the stop."""
        asked, self.asked = self.asked, Asked()
        if not asked:
            return
        ground = self._ground
        if asked.factor != 1:
            ground.scale_rate(asked.factor)
        for name in asked.saves:
            assert ground.checkpointer is not None  # `Moment.save` has looked
            if name is None:
                ground.checkpointer.save_latest(point.state, point.step, resume=ground.resume_point())
            else:
                resume = ground.resume_point()
                ground.checkpointer.save_checkpoint(point.state, point.step, self._metrics, suffix=name, resume=resume)
        if asked.stop is not None:
            ground.stop(asked.stop)

    def state(self) -> dict[str, Any]:
        """What the hooks keep in a checkpoint, by their names.

        Raises:
            HookError: something that is no plain data. After that, the last that was is kept: the run can be saved.
        """
        for known in self._known:
            if known.name not in self._broken:
                try:
                    own = known.hook.state() if known.has("state") else None
                    known.kept = plain(own)
                except Exception as error:
                    self._broken.add(known.name)
                    raise HookError(f"{known.text}: its state() cannot be kept in a checkpoint: {error}") from error
        return {known.name: known.kept for known in self._known if known.kept is not None}

    def restore(self, step: int, kept: Mapping[str, Any]) -> None:
        """Gives hooks the state that a checkpoint has of them; tells of each that goes on without.

        Args:
            step: of the checkpoint.
            kept: what `state` returned.
        """
        left = dict(kept)
        for known in self._known:
            if known.name not in left:
                if known.kept is not None:
                    _logger.warning("%s has no state in the checkpoint of step %d: it begins anew", known.text, step)
                continue
            try:
                known.hook.restore(left.pop(known.name))
            except Exception as error:
                _logger.warning(
                    "%s could not take its state from the checkpoint of step %d, and begins anew: %s: %s",
                    *(known.text, step, type(error).__name__, error),
                )
        for name in left:
            _logger.warning("the checkpoint of step %d has a state of hook %r, which this run has not", step, name)

    # ---- details

    @property
    def _ground(self) -> Ground:
        assert self._held is not None
        return self._held

    def _answered(self) -> Iterator[tuple[_Known, float]]:
        return zip(self._known, self._answers, strict=True)

    def _ask(self, step: int) -> None:
        """Asks each hook; of several processes the first one's answers count, for they are cut alike."""
        answers, failure = list[float](), None
        try:
            answers = [self._answer(known, step) for known in self._known] if self._processes.first else []
        except HookError as error:
            failure = error
        answers, *texts = json.loads(self._processes.from_first(json.dumps([answers, *_texts(failure)])))
        _raise_together(failure, texts)
        self._answers = answers
        self._from, self._until = step, min(self._answers, default=math.inf)

    def _answer(self, known: _Known, step: int) -> float:
        if known.late:
            return math.inf  # it is asked for each dispatch, by another count
        with self._raised(known, "next_due()", step):
            answer = known.hook.next_due(step)
        number: Any = answer.item() if isinstance(answer, np.generic) else answer
        right = isinstance(number, (int, float)) and not isinstance(number, bool) and number > step
        if not right or not (number == math.inf or number == int(number)):
            raise HookError(
                f"{known.text}: next_due({step}) must be a step after {step}, as a whole number, or infinity for none, "
                f"but is {answer!r}"
            )
        return float(number)

    def _agreed(self, due: Sequence[_Known], kind: str, point: Point, metrics: Mapping[str, float]) -> dict[str, float]:
        """Calls hooks, and has all processes know what came of it."""
        asked, values, failure = Asked(), dict[str, float](), None
        try:
            for known in due:
                if known.everywhere or self._processes.first:
                    values |= self._values(known, kind, point, self._call(known, kind, point, metrics, asked), values)
                if kind == "step" and known.recent:
                    known.recent = []
        except HookError as error:
            if self._processes.count == 1:
                raise
            failure = error
        if self._processes.count > 1:
            told = json.dumps([values, dataclasses.asdict(asked), *_texts(failure)])
            all_told = [json.loads(text) for text in self._processes.exchange("what hooks gave", told)]
            _raise_together(failure, [text for _, _, *texts in all_told for text in texts])
            values, asked = all_told[0][0], Asked(**all_told[0][1])
            for _, more in all_told[1:]:
                asked.add(Asked(**more))
        self.asked, self._metrics = asked, metrics
        return values

    def _call(self, known: _Known, kind: str, point: Point, metrics: Mapping[str, float], asked: Asked) -> Any:
        moment = Moment(
            *(point, self._ground, known.name, kind, metrics, asked),
            everywhere=known.everywhere,
            outputs=known.outputs,
            recent=None if known.recent is None else lambda: self._trained(known, point, metrics),
        )
        # What a hook keeps of the moment must not keep the next step from updating the state in place.
        method = {"step": "__call__", "validation": "after_validation"}.get(kind, kind)
        try:
            with self._raised(known, f"{method}()", point.step):
                if kind == "step" and known.name in self.probes:
                    values = self._probed[known.name]
                    return known.hook.seen(moment, jax.tree.map(self._ground.engine.host_copy, values))
                return getattr(known.hook, method)(moment)
        finally:
            moment.over()

    def _trained(self, known: _Known, point: Point, newest: Mapping[str, float]) -> list[Trained]:
        """What a hook was not called for yet: the steps' metrics are kept, but for the newest one's."""
        assert known.recent is not None
        log, unwrap, step = self._ground.log, self._ground.unwrap, point.step
        rows: list[Trained] = []
        for back, (block, numbers) in enumerate(reversed(known.recent)):
            metrics = dict(newest)
            if back:
                names = [name for name in newest if name.startswith("train/")]
                metrics = {name: log.metrics[name][-back] for name in names}
            rows.append(Trained(step, metrics, functools.partial(_data, unwrap, block, numbers)))
            step -= not (metrics["train/has_nan"] or metrics.get("train/overflow"))
        return rows[::-1]

    @contextlib.contextmanager
    def _raised(self, known: _Known, what: str, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise HookError(f"{known.text} failed in {what} at step {step}: {checks.raised(error)}") from error

    def _values(
        self, known: _Known, kind: str, point: Point, returned: Any, others: Mapping[str, float]
    ) -> dict[str, float]:
        """The metrics that a hook returned, as numbers."""
        if returned is None:
            return {}
        who = f"{known.text}, at step {point.step}, returned"
        wanted = "a hook returns a dict of numbers, which join the metrics, or None"
        if not isinstance(returned, Mapping):
            raise HookError(f"{who} {checks.what_is(returned)}, but {wanted}")
        if kind in ("begin", "end"):
            raise HookError(f"{who} metrics in {kind}(), where no step is that they could join; moment.log takes a row")
        values = {}
        for name, value in returned.items():
            self._check_metric(who, known, name)
            if name in others:
                raise HookError(f"{who} a metric {name!r}, as another hook did at that step; rename one of them")
            if name in point.metrics and kind == "step":
                raise HookError(f"{who} a metric {name!r}, which the step has already; rename it")
            number = _number(value)
            if number is None:
                raise HookError(f"{who} for {name!r} {checks.what_is(value)}, but {wanted}; moment.log takes a row")
            values[name] = number
        return values

    def _check_metric(self, who: str, known: _Known, name: Any) -> None:
        try:
            checks.check_metric(who, known.name, name, self._taken)
        except (TypeError, ValueError) as error:
            raise HookError(str(error)) from None


def _texts(failure: HookError | None) -> list[str]:
    return [] if failure is None else [str(failure)]


def _raise_together(failure: HookError | None, texts: Sequence[str]) -> None:
    """Raises this process's failure, or that of another one, of which it has the text: all raise, and save together."""
    if texts:
        failure = failure or HookError(f"on another process, {texts[0]}")
        failure.agreed = True
        raise failure


def _data(unwrap: Callable[[list[Any]], Any], block: Block, numbers: Sequence[int]) -> list[Any]:
    """The data of some batches, copied."""
    data: list[Any] = []
    for number in numbers:
        data += tree_unstack(copied(unwrap(block.batch(number))))
    return data


def _number(value: Any) -> float | None:
    """A scalar as a float; None for anything else."""
    try:
        if value is None or isinstance(value, str) or np.ndim(value):
            return None
        return float(value)
    except (TypeError, ValueError):
        return None
