"""What a script hands to `Trainer(hooks=[...])`: a base class, and hooks that are made of a function."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from learnax.hooks.moment import Moment

Returned = Mapping[str, float] | None
"""What a hook may return: metrics by name, which join the step's (or the validation's), or nothing."""


class HookError(RuntimeError):
    """A hook raised, or did what it may not: the hook, the step and what to do are in the text.

    Attributes:
        agreed: whether all processes of the run raise it, so that they save together.
    """

    agreed = False


class Hook:
    """Something of the user's between two training steps.

    A subclass overrides what it needs; any object with `next_due` and `__call__` will do as well. The trainer cuts its
    dispatches where a hook is due, so that it is called at exactly its steps, and costs nothing in between.

    Attributes:
        name: goes into errors, and is what a checkpoint keeps its state by: each hook of a run has another one. By
            default that of the class.
        everywhere: of several processes: whether all of them call it; else the first one alone does. One that reads
            `moment.batch`, `moment.outputs`, or a state that is divided over the processes, needs all of them to.
        outputs: whether it reads `moment.outputs`: only then the training program gives the outputs.
        recent: whether it reads `moment.recent`: then the batches since its last call are kept in the host's memory.
        metric: a metric that it watches, `"val/loss"` for one: a trainer whose run does not produce it is not built.
    """

    name: str | None = None
    everywhere: bool = False
    outputs: bool = False
    recent: bool = False
    metric: str | None = None

    def next_due(self, step: int) -> float:
        """The first step at which it is called, of those after `step`, a whole number; infinity for none.

        Asked at each step that it was called at, not at each step: what it answers stands until then.

        Args:
            step: updates made so far.
        """
        return math.inf

    def __call__(self, moment: Moment) -> Returned:
        """Is called right after the step that was named; an update that was dropped is no step."""
        return None

    def after_validation(self, moment: Moment) -> Returned:
        """Is called after each validation, with its metrics; what it returns is kept as `validation/<name>`."""
        return None

    def begin(self, moment: Moment) -> None:
        """Is called when `train()` begins, before its first step."""

    def end(self, moment: Moment) -> None:
        """Is called when `train()` ends: with the run, by a hook or by `max_seconds`; not by an error or a signal."""

    def state(self) -> Any:
        """What a checkpoint is to keep of it: None, or plain data.

        Those are numbers, text, True, False and None, in lists and in dicts whose keys are text; of numpy, numbers.
        """
        return None

    def restore(self, state: Any) -> None:
        """Takes over what `state` gave when the checkpoint was made that the run goes on from."""


class _Of(Hook):
    """A hook that is made of a function, and has its name."""

    def __init__(self, function: Callable[[Moment], Any], name: str | None, *, everywhere: bool, outputs: bool = False):
        if not callable(function):
            kind = type(self).__name__
            raise TypeError(f"{kind}: function must be callable with a moment, but is {function!r}")
        self._function = function
        self.name = name or getattr(function, "__name__", type(function).__name__)
        self.everywhere, self.outputs = everywhere, outputs


class Every(_Of):
    """Calls a function every `n` steps: at n, 2 n, ...

    Args:
        n: steps from one call to the next, 1 or more.
        function: `moment -> dict of metrics, or None`.
        name: by default the function's.
        everywhere: see `Hook`.
        outputs: see `Hook`.

    Raises:
        TypeError, ValueError: `n` is no whole number above 0, or the function cannot be called.
    """

    def __init__(
        self,
        n: int,
        function: Callable[[Moment], Returned],
        name: str | None = None,
        *,
        everywhere: bool = False,
        outputs: bool = False,
    ):
        super().__init__(function, name, everywhere=everywhere, outputs=outputs)
        self._n = whole_number("Every: n", n)

    def next_due(self, step: int) -> float:
        """The next multiple of n."""
        return step - step % self._n + self._n

    def __call__(self, moment: Moment) -> Returned:
        """Calls the function."""
        return self._function(moment)


class At(_Of):
    """Calls a function at some steps.

    Args:
        steps: whole numbers above 0, in any order.
        function: `moment -> dict of metrics, or None`.
        name: by default the function's.
        everywhere: see `Hook`.
        outputs: see `Hook`.

    Raises:
        TypeError, ValueError: a step that is no whole number above 0, or a function that cannot be called.
    """

    def __init__(
        self,
        steps: Iterable[int],
        function: Callable[[Moment], Returned],
        name: str | None = None,
        *,
        everywhere: bool = False,
        outputs: bool = False,
    ):
        super().__init__(function, name, everywhere=everywhere, outputs=outputs)
        if not isinstance(steps, Iterable) or isinstance(steps, str):
            raise TypeError(f"At: steps must be a list of whole numbers, At([{steps}], ...), but is {steps!r}")
        self._steps = sorted(whole_number("At: a step", step) for step in steps)

    def next_due(self, step: int) -> float:
        """The next of them."""
        return next((own for own in self._steps if own > step), math.inf)

    def __call__(self, moment: Moment) -> Returned:
        """Calls the function."""
        return self._function(moment)


class AfterValidation(_Of):
    """Calls a function after each validation.

    Args:
        function: `moment -> dict of metrics, or None`; `moment.metrics` has what was validated.
        name: by default the function's.
        everywhere: see `Hook`.

    Raises:
        TypeError: the function cannot be called.
    """

    def __init__(self, function: Callable[[Moment], Returned], name: str | None = None, *, everywhere: bool = False):
        super().__init__(function, name, everywhere=everywhere)

    def after_validation(self, moment: Moment) -> Returned:
        """Calls the function."""
        return self._function(moment)


class AtEnd(_Of):
    """Calls a function when `train()` ends; see `Hook.end`.

    Args:
        function: `moment -> None`.
        name: by default the function's.
        everywhere: see `Hook`.

    Raises:
        TypeError: the function cannot be called.
    """

    def __init__(self, function: Callable[[Moment], Any], name: str | None = None, *, everywhere: bool = False):
        super().__init__(function, name, everywhere=everywhere)

    def end(self, moment: Moment) -> None:
        """Calls the function."""
        self._function(moment)


def whole_number(what: str, given: Any) -> int:
    """A number above 0 as Python's.

    Raises:
        TypeError: no whole number.
        ValueError: not above 0.
    """
    try:
        if isinstance(given, (bool, np.bool_)):
            raise TypeError
        number = operator.index(given)
    except TypeError:
        raise TypeError(f"{what} must be a whole number above 0, but is {given!r}") from None
    if number < 1:
        raise ValueError(f"{what} must be a whole number above 0, but is {number}")
    return number
