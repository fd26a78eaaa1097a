"""Errors at the earliest moment: what can be known to be wrong before anything is compiled."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp

from learnax.data import FirstDatum
from learnax.loss import Losses
from learnax.profiling.windows import VARIABLE, Window, parse
from learnax.state import PyTree, init_params
from learnax.step import AXIS, datum_loss, with_axis
from learnax.streams import asked_streams, lifted_streams
from learnax.utils import describe, leaves_by_path

_logger = logging.getLogger("learnax")


_COUNTS = ("num_epochs", "batch_size", "accumulate_steps")
_CADENCES = ("save_every", "checkpoint_every", "plot_every", "val_every", "sample_every")
_LIMITS = ("max_checkpoints", "max_dropped", "sample_batch_size")
_FUNCTIONS = ("losses", "save_model", "plot_pipe", "plot_model", "sample_model", "sample_plot", "sample_metrics")
_NEEDS = {
    "plot_model": "plot_pipe",
    "sample_model": "sample_every",
    "sample_every": "sample_model",
    "sample_params": "sample_model",
    "sample_plot": "sample_model",
    "sample_metrics": "sample_model",
    "sample_batch_size": "sample_model",
    "load_checkpoint": "registry",
    "load_weights": "load_checkpoint",
    "keep_best_checkpoint": "registry",
}
"""Arguments that do nothing without another one."""


def comparable(
    given: Mapping[str, Any], splits: Mapping[str, Any], data: Mapping[str, FirstDatum], state: PyTree
) -> dict[str, str]:
    """What all processes of a run must have alike, in words.

    Args:
        given: the trainer's arguments by name.
        splits: the datasets by name.
        data: the first datum of each.
        state: the training state's shapes.
    """
    plain = (bool, int, float, str, type(None))
    # Each process may have its own run and its own view of the devices.
    facts = {
        name: repr(value) if isinstance(value, plain) else "given"
        for name, value in given.items()
        if name not in ("self", "run", "registry", "devices", "compilation_cache", "num_workers")
    }
    facts |= {f"len({name})": str(len(dataset)) for name, dataset in splits.items()}
    facts |= {f"data of {name}": describe(datum.arguments) for name, datum in data.items()}
    facts["registry"] = "None" if given["registry"] is None else "given"
    facts["profile"] = ", ".join(map(str, check_profile(given["profile"]))) or "None"  # where dispatches are cut
    return facts | {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves_by_path(state).items()}


def check_sharded(mapped: bool) -> None:
    """Checks that a step can be made on a divided state: by XLA's partitioner, which maps over no axis.

    Raises:
        ValueError: the model or the losses name the mapped axis.
    """
    if mapped:
        raise ValueError(
            f"shard_state=True knows no mapped axis, but the model or the losses use {AXIS!r}: there they see the "
            "whole batch, so leave their collectives out"
        )


def check_profile(given: Any) -> list[Window]:
    """The windows that `profile` names, or else the variable LEARNAX_PROFILE.

    Raises:
        TypeError, ValueError: they cannot be read.
    """
    if given is not None and not isinstance(given, str):
        raise TypeError(f"profile must be text, 'cuda:100-110' for instance, or None, but is {given!r}")
    return parse(os.environ.get(VARIABLE), VARIABLE) if given is None else parse(given, "profile")


def check_arguments(given: Mapping[str, Any]) -> None:
    """Checks a trainer's arguments, as far as they can be without data.

    Warns of each that is given and does nothing without another one: scripts keep such arguments
    beside a registry or a sampler that is switched off.

    Args:
        given: arguments by name.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number out of its range.
    """
    for name in (*_COUNTS, *_CADENCES, *_LIMITS):
        if given[name] is not None or name in _COUNTS:
            _check_whole(name, given[name], least=1)
    if given["steps_per_execution"] != "auto":
        _check_whole("steps_per_execution", given["steps_per_execution"], least=1, hint='; or "auto"')
    _check_whole("num_workers", given["num_workers"], least=0, hint="; 0 reads in this process")
    _check_seed(given["seed"])
    _check_rate(given["learning_rate"])
    max_grad = given["max_grad"]
    if not isinstance(max_grad, (int, float)) or not max_grad > 0:
        raise ValueError(
            f"max_grad must be a number above 0, but is {max_grad!r}; float('inf') never scales a gradient"
        )
    seconds = given["max_seconds"]
    if seconds is not None and (isinstance(seconds, (bool, str)) or not seconds > 0):
        raise ValueError(f"max_seconds must be a number of seconds above 0, or None for no limit, but is {seconds!r}")
    optimizer = given["optimizer"]
    if optimizer is not None and not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        raise TypeError(f"optimizer must be an optax transformation, with init and update, but is {optimizer!r}")
    sample, batch = given["sample_batch_size"], given["batch_size"]
    if sample is not None and sample > batch:
        raise ValueError(f"sample_batch_size {sample} is more than the {batch} data of a batch")
    for name in ("init", "apply"):
        if not callable(getattr(given["model"], name, None)):
            raise TypeError(f"model must be a flax linen module, but is {given['model']!r}; it has no {name}")
    for name in _FUNCTIONS:
        if not callable(given[name]) and (given[name] is not None or name == "losses"):
            raise TypeError(f"{name} must be callable, but is {given[name]!r}")
    for name, other in _NEEDS.items():
        if given[name] and not given[other]:
            _logger.warning("%s is given, but does nothing without %s", name, other)


def _check_whole(name: str, value: Any, least: int | None = None, hint: str = "") -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, but is {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, but is {value}{hint}")


def _check_seed(seed: Any) -> None:
    _check_whole("seed", seed)
    # A negative one, or one beyond, would be cut to its lowest bits: the run of another seed.
    most = 2**63 if jax.config.jax_enable_x64 else 2**32  # type: ignore[attr-defined]
    if not 0 <= seed < most:
        raise ValueError(f"seed must be from 0 to {most - 1}, so that each seed is a run of its own, but is {seed}")


def _check_rate(rate: Any) -> None:
    if callable(rate):
        return
    if isinstance(rate, str) or not hasattr(rate, "__float__"):
        raise TypeError(f"learning_rate must be a number or an optax schedule, but is {rate!r}")
    value = float(rate)
    if not 0 <= value < float("inf"):
        raise ValueError(f"learning_rate must be finite and at least 0, but is {value}")


def check_same_script(step: int, saved: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """Checks that a run can go on where a checkpoint was made.

    Args:
        step: of the checkpoint.
        saved: what its position in the data depends on; None where it does not say.
        now: the same of this script.

    Raises:
        ValueError: data would be trained on twice, or not at all; what was changed is named.
    """
    changed = [
        f"{name} was {saved[name]!r} and is {value!r}"
        for name, value in now.items()
        if saved is not None and name in saved and saved[name] != value
    ]
    if changed == [line for line in changed if line.startswith("seed ")]:
        for line in changed:
            _logger.warning("%s: the run goes on with the random sequence of its checkpoint", line)
        return
    raise ValueError(
        f"the checkpoint of step {step} was made by another script: {', '.join(changed)}. From there, data would be "
        "trained on twice or not at all: use what was, or load_weights=True to begin anew with its parameters"
    )


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


class Traced(NamedTuple):
    """What tracing a model and its losses tells.

    Attributes:
        asked: random streams that the model draws from.
        streams: those of them that need a key of their own, see `learnax.streams.lifted_streams`.
        metrics: their names.
        mapped: whether user code names the mapped axis `"devices"`.
        primitives: names of the JAX primitives that it is made of.
    """

    asked: tuple[str, ...]
    streams: tuple[str, ...]
    metrics: tuple[str, ...]
    mapped: bool
    primitives: frozenset[str]


def check_model(model: Any, losses: Losses, seed: int, data: Mapping[str, FirstDatum]) -> Traced:
    """Traces model and losses on the first datum of each split, without computing anything.

    Args:
        model: the flax module.
        losses: the losses of one datum.
        seed: of the run.
        data: split -> its first datum; the model is initialised on that of `train`.

    Raises:
        ValueError: the model cannot take a datum; the datum's structure is in the text.
        TypeError: a loss or a metric that is no scalar.
    """
    names: list[str] = []
    streams: dict[str, tuple[str, ...]] = {}
    primitives: set[str] = set()
    key = jax.random.key(seed)
    first = data["train"].arguments

    def trace() -> jax.Array:
        step = jnp.zeros((), jnp.int32)
        params = _model_fits("train", model, first, lambda: jax.eval_shape(lambda: init_params(model, key, first)))
        for split, (arguments, _) in data.items():
            asked = _model_fits(split, model, arguments, lambda: asked_streams(model, params, arguments))  # noqa: B023
            if split == "train":
                streams["asked"], streams["own"] = asked, lifted_streams(model, params, arguments, asked)
            loss_of = functools.partial(datum_loss, model, losses, streams=streams["own"])
            traced = jax.make_jaxpr(loss_of, return_shape=True)(params, key, arguments, step)
            names.extend(name for name in traced[1][2] if name not in names)
            primitives.update(_primitives(traced[0].jaxpr))
        return step

    try:
        trace()
        return Traced(streams["asked"], streams["own"], tuple(names), False, frozenset(primitives))
    except NameError as error:
        if AXIS not in str(error):
            raise
    with_axis(trace)
    return Traced(streams["asked"], streams["own"], tuple(names), True, frozenset(primitives))


def _primitives(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
    for inner in jax.extend.core.subjaxprs(jaxpr):
        yield from _primitives(inner)


def _model_fits(split: str, model: Any, datum: list[Any], trace: Callable[[], Any]) -> Any:
    try:
        return trace()
    except Exception as error:
        if isinstance(error, NameError) and AXIS in str(error):
            raise
        raise ValueError(
            f"the model {type(model).__name__} cannot take a datum of {split!r}, of this structure "
            f"({len(datum)} argument{'s' * (len(datum) != 1)}):\n{describe(datum)}\n"
            f"{type(error).__name__}: {error}\n"
            "a datum that is a list is splatted into arguments, anything else is one argument"
        ) from error


def check_best(name: str, metrics: Sequence[str], splits: Sequence[str]) -> None:
    """Raises ValueError where no split produces the metric that "best" is judged by."""
    produced = []
    for split in splits:
        own = ["gradient norm", "has_nan", "nan_data", "learning_rate", "update_time"] if split == "train" else []
        produced += [f"{split}{kind}/{metric}" for kind in ("", "_epoch") for metric in ("loss", *metrics, *own)]
    if name not in produced:
        raise ValueError(
            f"best_metric_name {name!r} is produced by no split of this run; there are: "
            + ", ".join(sorted(set(produced)))
        )
