"""Names of metrics and splits: which are the trainer's own, and which go for the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from learnax.checks.texts import short, what_is

STEP_METRICS = ("loss", "gradient norm", "has_nan", "learning_rate", "update_time", "nan_data")
"""What the trainer itself reports of training steps."""
_GRADS = "grads/"
"""What the gradient's norm of each parameter is reported under."""


def check_split_names(names: Sequence[str]) -> None:
    """Checks the names of validation sets, as far as they can be before anything is read.

    Raises:
        ValueError: a name that is the training split's, is used for something else, or is empty.
    """
    for name in names:
        why = None
        if name == "train":
            why = "that is the training split's name"
        elif name == "train_epoch":
            why = "the training split's means go there"
        elif f"{name}/".startswith(_GRADS):
            why = "the gradients' norms go to grads/..."
        elif not name.strip():
            why = "write a word"
        if why is not None:
            raise ValueError(f"val_datasets: a validation set cannot be named {name!r}; {why}")
        if f"{name}_epoch" in names:
            raise ValueError(
                f"val_datasets: {name!r} and '{name}_epoch' go for the same, since the means of {name!r} are reported "
                f"as {name}/... and {name}_epoch/...; rename one of them"
            )


def check_names(metrics: Sequence[Any], splits: Sequence[str]) -> None:
    """Checks that no metric goes under another name that is reported.

    Args:
        metrics: names of what the losses return.
        splits: names of the datasets, `train` first.

    Raises:
        ValueError: one does.
    """
    for metric in metrics:
        check_metric("losses return", "own", metric)
    owners: dict[str, str] = {}
    for name in splits:
        for key in _keys(name, metrics):
            other = owners.setdefault(key, name)
            if other != name:
                raise ValueError(f"val_datasets: {other!r} and {name!r} both report {key!r}; rename one of them")


def check_best(name: str, metrics: Sequence[str], splits: Sequence[str]) -> None:
    """Raises ValueError where no split produces the metric that "best" is judged by."""
    check_produced("best_metric_name", name, metrics, splits)


def check_produced(what: str, name: str, metrics: Sequence[str], splits: Sequence[str]) -> None:
    """Raises ValueError where no split produces a metric; `what` says what asks for it."""
    produced = [key for split in splits for key in _keys(split, metrics)]
    if name not in produced:
        raise ValueError(
            f"{what} {name!r} is produced by no split of this run; there are: " + ", ".join(sorted(set(produced)))
        )


def _keys(split: str, metrics: Sequence[str]) -> list[str]:
    """What a split's metrics are reported as."""
    own = STEP_METRICS if split == "train" else ("loss",)
    return [f"{split}{kind}/{metric}" for kind in ("", "_epoch") for metric in (*own, *metrics)]


def check_metric(who: str, prefix: str, metric: Any, taken: Collection[str] = ()) -> None:
    """Checks the name of a metric that user code returns.

    Args:
        who: returns it, with its verb.
        prefix: of a name that would do.
        metric: the name.
        taken: names of the losses' metrics.

    Raises:
        TypeError: it is no text.
        ValueError: it is the trainer's own, or taken.
    """
    if not isinstance(metric, str):
        raise TypeError(f"{who} a metric whose name must be text, but is {short(metric)}; write {str(metric)!r}")
    if metric in STEP_METRICS:
        whose = "the trainer's own, which it would replace"
    elif metric.startswith(_GRADS):
        whose = "where the gradients' norms go"
    elif metric in taken:
        whose = "that of a metric of the losses, which it would replace"
    else:
        return
    other = f"{prefix}_{metric}".replace("/", "_").replace(" ", "_")
    raise ValueError(f"{who} a metric called {metric!r}; that name is {whose}. Call it {other!r} for instance")


class SampleMetrics:
    """A user's `sample_metrics`, whose names are looked at when they are first known.

    Args:
        measure: `(sample, datum) -> dict of scalars`.
        taken: names of the losses' metrics.
    """

    def __init__(self, measure: Callable[..., Mapping[str, Any]], taken: Collection[str]):
        self._measure = measure
        self._taken = taken
        self._known: set[str] | None = None

    def __call__(self, sample: Any, datum: Any) -> Mapping[str, Any]:
        """Measures one sample.

        Raises:
            TypeError: no dict of scalars.
            ValueError: a name that is taken, or that other samples do not have.
        """
        metrics = self._measure(sample, datum)
        if not isinstance(metrics, Mapping):
            raise TypeError(
                f'sample_metrics must return a dict of scalars, {{"error": error}} for instance, but returned '
                f"{what_is(metrics)}"
            )
        if self._known != set(metrics):
            self._look_at(metrics)
        return metrics

    def _look_at(self, metrics: Mapping[str, Any]) -> None:
        for name in metrics:
            check_metric("sample_metrics returns", "sample", name, self._taken)
        if self._known is not None:
            differing = ", ".join(sorted(self._known ^ set(metrics)))
            raise ValueError(f"sample_metrics must return the same names for each sample, but not for all: {differing}")
        self._known = set(metrics)
