"""wandb sessions: rows that belong to a step of the training, whatever wandb itself counts.

wandb numbers its rows, one for each `log`, and drops a row that is logged to a number which it has passed. A run has
more rows than steps (validations have their own), so a plot that logs with `step=` of the training would come too
late. So the training's step is a column of the rows, `step`, and wandb is told that it is the axis to plot over.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from learnax.sinks import Histogram, Image

_logger = logging.getLogger("learnax")
STEP = "step"
"""The column."""


def plot_over_steps(session: Any) -> None:
    """Tells a wandb session to plot all of its metrics over `step`; anything else is left alone."""
    if is_session(session):
        try:
            session.define_metric("*", step_metric=STEP)
        except Exception as error:
            _logger.warning("wandb's charts are not over the steps: %s: %s", type(error).__name__, error)


def with_step(row: Mapping[str, Any], step: int | None) -> dict[str, Any]:
    """A row with the step that it belongs to; one that it has itself stays."""
    return dict(row) if step is None else {STEP: step, **row}


def for_wandb(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its images and histograms as wandb has them."""
    if not any(isinstance(value, (Image, Histogram)) for value in row.values()):
        return dict(row)
    import wandb

    def made(value: Any) -> Any:
        if isinstance(value, Image):
            return wandb.Image(value.array())
        return wandb.Histogram(value.array().tolist(), num_bins=value.bins) if isinstance(value, Histogram) else value

    return {name: made(value) for name, value in row.items()}


class ByStep:
    """A wandb session whose `log` keeps what is logged with a step of the training; all else is the session's own.

    Args:
        session: a wandb run.
    """

    def __init__(self, session: Any):
        object.__setattr__(self, "_session", session)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """That of the session, so that `isinstance` knows it."""
        return type(self._session)

    def log(self, data: Mapping[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        """Logs a row; `step` becomes its column `step`."""
        options = {} if commit is None else {"commit": commit}
        self._session.log(for_wandb(with_step(data, step)), **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._session, name, value)


def by_step(run: Any) -> Any:
    """A run for a user's plots: a wandb session as `ByStep`, any other as it is."""
    return ByStep(run) if is_session(run) else run


def is_session(run: Any) -> bool:
    """Whether this is a wandb session."""
    return callable(getattr(run, "define_metric", None))
