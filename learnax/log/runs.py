"""What `run=` was given: one place that metrics go to, or several; and what a user's plots are handed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from learnax.log.axis import by_step, with_step
from learnax.sinks import Sink


def runs_of(given: Any) -> list[Any]:
    """All that rows go to, in the order in which they were given."""
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def named_run(given: Any) -> Any:
    """The first that is a run, and no mere place for rows: its id names the folder of checkpoints. None without one."""
    return next((run for run in runs_of(given) if not isinstance(run, Sink)), None)


class Everyone:
    """The run that a user's plots are handed where `run=` has sinks: what it logs goes to all of them.

    All else is that of the first run that is no sink (`id`, `config`, ...), where there is one.

    Args:
        given: what `run=` was given.
        send: hands a row to all sinks, in its order.
        step: tells the step that a row belongs to that does not say so.
    """

    def __init__(self, given: Any, send: Callable[[Mapping[str, Any]], None], step: Callable[[], int]):
        self._runs = [by_step(run) for run in runs_of(given) if not isinstance(run, Sink)]
        self._send = send
        self._step = step

    def log(self, data: Mapping[str, Any], step: int | None = None) -> None:
        """Logs a row: numbers, `learnax.sinks.Image` and `learnax.sinks.Histogram`.

        Args:
            data: the row.
            step: of the training that it belongs to; by default the newest.
        """
        row = with_step(data, self._step() if step is None else step)
        self._send(row)
        for run in self._runs:
            run.log(row)

    def __getattr__(self, name: str) -> Any:
        runs = self.__dict__.get("_runs")
        if not runs:
            raise AttributeError(f"the run of this training is sinks alone, which have no {name!r}")
        return getattr(runs[0], name)


def voice_of(given: Any, send: Callable[[Mapping[str, Any]], None], step: Callable[[], int]) -> Any:
    """What a user's plots are handed: a run that was given alone as it is, a wandb session so that it takes steps."""
    runs = runs_of(given)
    if any(isinstance(run, Sink) for run in runs) or len(runs) > 1:
        return Everyone(given, send, step)
    return by_step(runs[0]) if runs else None
