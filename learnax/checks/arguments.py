"""A trainer's arguments: checked one by one, numbers turned into Python's."""

from __future__ import annotations

import functools
import inspect
import logging
import operator
import os
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

import jax
import numpy as np

from learnax.checks.hooks import check_hooks
from learnax.checks.parts import check_devices, check_functions, check_registry, check_run
from learnax.checks.rates import check_ema, check_optimizer_type, checked_rate, number_of
from learnax.checks.texts import short
from learnax.engine import check_compiling
from learnax.profiling.windows import VARIABLE, Window, parse
from learnax.step import AXIS

_logger = logging.getLogger("learnax")

_COUNTS = ("batch_size", "accumulate_steps")
_LENGTHS = ("num_epochs", "num_steps")
_CADENCES = ("save_every", "checkpoint_every", "plot_every", "val_every", "val_every_steps", "sample_every")
_LIMITS = ("max_checkpoints", "max_dropped", "sample_batch_size", "val_steps")
_FLAGS = (
    *("keep_best_checkpoint", "minimize_metric", "compile", "single_datum", "single_batch"),
    *("train_only", "shard_state", "ema_eval", "shuffle"),
)
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

P = ParamSpec("P")


def checked(build: Callable[P, None]) -> Callable[P, None]:
    """Lets a trainer's `__init__` see its arguments only once they are checked, numbers as Python's own."""
    signature = inspect.signature(build)

    @functools.wraps(build)
    def init(*args: P.args, **kwargs: P.kwargs) -> None:
        # They have places among the first arguments, and may be left out where another one stands for them.
        if kwargs.get("optimizer") is not None and len(args) < 3:
            kwargs.setdefault("learning_rate", None)
        if kwargs.get("num_steps") is not None and len(args) < 7:
            kwargs.setdefault("num_epochs", None)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return build(*args, **kwargs)  # Python's own text says what is missing or too many
        bound.apply_defaults()
        bound.arguments.update(check_arguments(bound.arguments))
        # Transfers are meant here, even where the script forbids implicit ones (`jax.transfer_guard`).
        with jax.transfer_guard("allow"):
            return build(*bound.args, **bound.kwargs)

    return init


def check_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Checks a trainer's arguments, as far as they can be without data.

    Warns of each that is given and does nothing without another one: scripts keep such arguments
    beside a registry or a sampler that is switched off.

    Args:
        given: arguments by name.

    Returns:
        Those that a run goes by in another form: numbers of numpy or JAX as Python's, devices as a list.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number out of its range.
    """
    check_profile(given["profile"])
    check_compiling()
    values: dict[str, Any] = {}
    for name in (*_COUNTS, *_LENGTHS, *_CADENCES, *_LIMITS):
        if given[name] is not None or name in _COUNTS:
            values[name] = _whole(name, given[name], least=1)
    _check_lengths(given)
    if not isinstance(given["steps_per_execution"], str) or given["steps_per_execution"] != "auto":
        values["steps_per_execution"] = _whole(
            "steps_per_execution", given["steps_per_execution"], least=1, hint='; or "auto"'
        )
    values["num_workers"] = _whole("num_workers", given["num_workers"], least=0, hint="; 0 reads in this process")
    values["seed"] = _seed(given["seed"])
    if given["learning_rate"] is not None or given["optimizer"] is None:
        values["learning_rate"] = checked_rate(given["learning_rate"])
    values["max_grad"] = _above_zero(
        "max_grad", given["max_grad"], "a number above 0", "; float('inf') never scales a gradient"
    )
    if given["max_seconds"] is not None:
        wanted = "a number of seconds above 0, or None for no limit"
        values["max_seconds"] = _above_zero("max_seconds", given["max_seconds"], wanted)
    for name in _FLAGS:
        if isinstance(given[name], str):
            raise TypeError(f"{name} must be True or False, but is the text {given[name]!r}, which counts as True")
    sample, batch = values.get("sample_batch_size"), values["batch_size"]
    if sample is not None and sample > batch:
        raise ValueError(f"sample_batch_size {sample} is more than the {batch} data of a batch")
    check_optimizer_type(given["optimizer"])
    if given["load_weights"] not in (True, False, None, "ema"):
        raise TypeError(
            f"load_weights must be True, False, or 'ema' for the average of the parameters, but is "
            f"{short(given['load_weights'])}"
        )
    check_ema(given["ema"])
    check_functions(given)
    check_run(given["run"], given["registry"])
    check_registry(given["registry"])
    values["hooks"] = check_hooks(given["hooks"])
    if given["devices"] is not None:
        values["devices"] = check_devices(given["devices"])
    for name, other in _NEEDS.items():
        if given[name] and not given[other]:
            _logger.warning("%s is given, but does nothing without %s", name, other)
    return values


def _check_lengths(given: Mapping[str, Any]) -> None:
    """Raises ValueError where it is not said how long to train or how often to validate, or is said twice."""
    epochs, steps = (given[name] for name in _LENGTHS)
    if epochs is None and steps is None:
        raise ValueError(
            "num_epochs and num_steps are both None; one of them says how long to train: num_epochs=10 for passes over "
            "the data, or num_steps=10000 for training steps"
        )
    if epochs is not None and steps is not None:
        raise ValueError(f"num_epochs={epochs} and num_steps={steps} both say how long to train; leave one of them out")
    if given["val_every"] is not None and given["val_every_steps"] is not None:
        raise ValueError(
            f"val_every={given['val_every']} (epochs) and val_every_steps={given['val_every_steps']} (steps) both say "
            "how often to validate; leave one of them out"
        )


def _seed(given: Any) -> int:
    seed = _whole("seed", given)
    # JAX would keep only the lowest 32 bits of any other number, and the run would be that of another seed.
    most = 2**63 if jax.config.jax_enable_x64 else 2**32  # type: ignore[attr-defined]
    if not 0 <= seed < most:
        raise ValueError(f"seed must be from 0 to {most - 1}, so that each seed is a run of its own, but is {seed}")
    return seed


def _whole(name: str, value: Any, least: int | None = None, hint: str = "") -> int:
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, but is {_nearly_whole(name, value)}") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, but is {number}{hint}")
    return number


def _nearly_whole(name: str, value: Any) -> str:
    """Something that is no whole number, and what to write where it is nearly one."""
    if isinstance(value, jax.Array) and _is_key(value):
        return f"a random key; write the number that it is made from, {name}=0 for instance"
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return f"{short(value)}; write {name}={int(value)}"
    if isinstance(value, str) and value.strip().lstrip("-").isdigit():
        return f"{short(value)}, which is text; write {name}={int(value)}, or int(...) around it"
    return short(value)


def _is_key(value: jax.Array) -> bool:
    """Whether an array is a random key: a typed one, or two words as `jax.random.PRNGKey` makes them."""
    return bool(jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key)) or (
        value.shape == (2,) and value.dtype == np.uint32
    )


def _above_zero(name: str, value: Any, wanted: str, hint: str = "") -> float:
    number = number_of(value)
    if number is None or not number > 0:
        raise ValueError(f"{name} must be {wanted}, but is {short(value)}{hint}")
    return number


def check_profile(given: Any) -> list[Window]:
    """The windows that `profile` names, or else the variable LEARNAX_PROFILE.

    Raises:
        TypeError, ValueError: they cannot be read.
    """
    if given is not None and not isinstance(given, str):
        raise TypeError(f"profile must be text, 'cuda:100-110' for instance, or None, but is {given!r}")
    return parse(os.environ.get(VARIABLE), VARIABLE) if given is None else parse(given, "profile")


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


def check_split(batch_size: int, devices: int, fewer: str = "or fewer devices (devices=)") -> None:
    """Raises ValueError for a batch that does not divide over the devices; `fewer` says how to take fewer of them."""
    if batch_size % devices:
        near = f"{batch_size - batch_size % devices} or {batch_size + devices - batch_size % devices}"
        near = near.removeprefix("0 or ")
        raise ValueError(
            f"batch_size {batch_size} does not divide over {devices} devices; use a multiple of {devices} ({near}), "
            f"{fewer}"
        )
