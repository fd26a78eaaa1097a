"""Errors at the earliest moment: what can be known to be wrong before anything is compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from learnax.loss import Losses
from learnax.state import PyTree
from learnax.step import AXIS, apply_model, datum_loss, with_axis
from learnax.utils import describe


def check_counts(**counts: int | None) -> None:
    """Raises ValueError for a count that is no positive whole number; None stands for "not asked for"."""
    for name, value in counts.items():
        if value is None:
            continue
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be a whole number, but is {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but is {value}")


def check_ranges(num_workers: int, max_grad: float, sample: int | None, batch: int) -> None:
    """Raises ValueError for numbers out of their range."""
    if num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, but is {num_workers}; 0 reads in this process")
    if not max_grad > 0:
        raise ValueError(f"max_grad must be above 0, but is {max_grad}; float('inf') never scales a gradient")
    if sample is not None and sample > batch:
        raise ValueError(f"sample_batch_size {sample} is more than the {batch} data of a batch")


def idle_arguments(given: Mapping[str, Any], needs: Mapping[str, str]) -> list[str]:
    """A line for each argument that was given and does nothing without another one.

    Args:
        given: arguments by name; falsy ones were not given.
        needs: argument -> the one without which it does nothing.
    """
    return [
        f"{name} is given, but does nothing without {other}"
        for name, other in needs.items()
        if given[name] and not given[other]
    ]


def check_split(batch_size: int, devices: int) -> None:
    """Raises ValueError for a batch that does not divide over the devices."""
    if batch_size % devices:
        near = f"{batch_size - batch_size % devices} or {batch_size + devices - batch_size % devices}"
        near = near.removeprefix("0 or ")
        raise ValueError(
            f"batch_size {batch_size} does not divide over {devices} devices; use a multiple of {devices} ({near}), "
            "or fewer devices (devices=)"
        )


def named_splits(val_datasets: Any) -> dict[str, Any]:
    """Validation sets by name: a mapping as it is, a list as `val`, `val_1`, and so on.

    Raises:
        TypeError: neither a mapping nor a list or tuple.
        ValueError: a set named `train`.
    """
    if val_datasets is None:
        return {}
    if isinstance(val_datasets, (list, tuple)):
        return {f"val_{i}" if i else "val": dataset for i, dataset in enumerate(val_datasets)}
    if not isinstance(val_datasets, Mapping):
        raise TypeError(
            f"val_datasets must be a mapping of names to datasets or a list of datasets, but is "
            f"{type(val_datasets).__name__}"
        )
    if "train" in val_datasets:
        raise ValueError("val_datasets: a validation set cannot be named 'train'; that is the training split's name")
    return {str(name): dataset for name, dataset in val_datasets.items()}


def check_model(model: Any, losses: Losses, key: jax.Array, datum: list[Any]) -> tuple[list[str], bool]:
    """Traces model and losses on one datum, without computing anything.

    Args:
        model: the flax module.
        losses: the losses of one datum.
        key: a random key.
        datum: the first datum, as a list.

    Returns:
        The names of the metrics, and whether user code names the mapped axis `"devices"`.

    Raises:
        ValueError: the model cannot take the datum; the datum's structure is in the text.
        TypeError: a loss or a metric that is no scalar.
    """
    names: list[str] = []

    def trace() -> jax.Array:
        params = _model_shapes(lambda: model.init(key, *datum)["params"], model, datum)
        _model_shapes(lambda p: apply_model(model, p, key, datum), model, datum, params)
        step = jnp.zeros((), jnp.int32)
        names[:] = jax.eval_shape(lambda p: datum_loss(model, losses, p, key, datum, step)[2], params)
        return step

    try:
        trace()
        return names, False
    except NameError as error:
        if AXIS not in str(error):
            raise
    with_axis(trace)
    return names, True


def _model_shapes(function: Callable[..., PyTree], model: Any, datum: list[Any], *args: PyTree) -> PyTree:
    try:
        return jax.eval_shape(function, *args)
    except Exception as error:
        if isinstance(error, NameError) and AXIS in str(error):
            raise
        raise ValueError(
            f"the model {type(model).__name__} cannot take a datum of this structure "
            f"({len(datum)} argument{'s' * (len(datum) != 1)}):\n{describe(datum)}\n"
            f"{type(error).__name__}: {error}\n"
            "a datum that is a list is splatted into arguments, anything else is one argument"
        ) from error


def check_best(name: str, metrics: Sequence[str], splits: Sequence[str]) -> None:
    """Raises ValueError where no split produces the metric that "best" is judged by."""
    produced = []
    for split in splits:
        own = ["gradient norm", "has_nan", "learning_rate", "update_time"] if split == "train" else []
        produced += [f"{split}{kind}/{metric}" for kind in ("", "_epoch") for metric in ("loss", *metrics, *own)]
    if name not in produced:
        raise ValueError(
            f"best_metric_name {name!r} is produced by no split of this run; there are: {', '.join(sorted(set(produced)))}"
        )
