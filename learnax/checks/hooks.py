"""Hooks: what is one, what it is called, what it watches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from learnax.checks.names import check_produced
from learnax.checks.texts import name_of, short

_EXAMPLE = "learnax.hooks.Every(100, function) makes one of a function"


def check_hooks(given: Any) -> list[Any]:
    """The hooks as a list.

    Raises:
        TypeError: not a sequence of hooks.
        ValueError: two of one name.
    """
    if given is None:
        return []
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"hooks must be a list, hooks=[...], but is {short(given)}")
    places: dict[str, int] = {}
    for place, hook in enumerate(given):
        what = f"hooks[{place}] must have next_due(step), and be callable with a moment, but"
        if isinstance(hook, type):
            raise TypeError(f"{what} is the class {hook.__name__}; write {hook.__name__}(...)")
        for lacks, there in (("no next_due", getattr(hook, "next_due", None)), ("no __call__", hook)):
            if not callable(there):
                raise TypeError(f"{what} is {short(hook)}, which has {lacks}; {_EXAMPLE}")
        name: Any = hook_name(hook)
        if not isinstance(name, str) or not name.strip():
            raise TypeError(f"hooks[{place}]: its name must be text, but is {short(name)}")
        if name in places:
            raise ValueError(
                f"hooks[{places[name]}] and hooks[{place}] are both called {name!r}, and a checkpoint keeps the state "
                "of each by its name; give one of them another, name='...'"
            )
        places[name] = place
    return list(given)


def hook_name(hook: Any) -> str:
    """What a hook is called."""
    name: str | None = getattr(hook, "name", None)
    return name_of(hook) if name is None else name


def wants_outputs(hook: Any) -> bool:
    """Whether a hook reads the model's outputs."""
    return bool(getattr(hook, "outputs", False))


def check_watched(hooks: Sequence[Any], metrics: Sequence[str], splits: Sequence[str], *, train_only: bool) -> None:
    """Checks that what hooks watch is produced.

    Args:
        hooks: with a name of a metric in `metric`, or not.
        metrics: names of the losses' metrics.
        splits: names of the datasets.
        train_only: whether the script has switched validation off: then nobody waits for its metrics.

    Raises:
        ValueError: no split of the run produces such a metric.
    """
    for hook in hooks:
        name = getattr(hook, "metric", None)
        if name is not None and not (train_only and not str(name).startswith("train")):
            check_produced(f"hook {hook_name(hook)!r}: the metric", name, metrics, splits)
