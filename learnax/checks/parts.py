"""What a trainer is given beside numbers: the model's type, functions, the run, the registry, devices."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from learnax.checks.texts import short
from learnax.registry import Registry

_FUNCTIONS = ("losses", "save_model", "plot_pipe", "plot_model", "sample_model", "sample_plot", "sample_metrics")


def check_functions(given: Mapping[str, Any]) -> None:
    """Raises TypeError for an argument that is to be called and cannot be."""
    for name in _FUNCTIONS:
        if callable(given[name]) or (given[name] is None and name != "losses"):
            continue
        hint = ""
        if name == "losses" and isinstance(given[name], (list, tuple)):
            hint = "; several become one by LossPipe([...]) of learnax.loss"
        raise TypeError(f"{name} must be callable, but is {short(given[name])}{hint}")
    if isinstance(given["losses"], type):
        raise TypeError(
            f"losses must be an object to call, but is the class {given['losses'].__name__}; write "
            f"{given['losses'].__name__}()"
        )


def check_run(run: Any, registry: Any) -> None:
    """Raises TypeError for a run that cannot be logged to, or has no id where a registry needs one."""
    if run is None:
        return
    wanted = "run must be a wandb run (wandb.init()), a learnax.run.Run, or have id, name and log(dict), but"
    if not callable(getattr(run, "log", None)):
        raise TypeError(f"{wanted} is {short(run)}, which has no log")
    if registry is not None and not hasattr(run, "id"):
        raise TypeError(f"{wanted} is {short(run)}, which has no id; the registry keeps its checkpoints under the id")


def check_registry(registry: Any) -> None:
    """Raises TypeError for what names no project."""
    if registry is not None and not isinstance(registry, (str, os.PathLike, Registry)):
        raise TypeError(
            f"registry must be the name of a project, registry='digits' for instance, or a learnax.registry.Registry, "
            f"but is {short(registry)}"
        )


def check_devices(given: Any) -> list[jax.Device]:
    """The devices as a list.

    Raises:
        TypeError: not a sequence of JAX's devices.
        ValueError: none, or one twice.
    """
    wanted = "devices must be a list of JAX devices, devices=jax.devices()[:1] for instance,"
    if isinstance(given, str):
        raise TypeError(f"{wanted} but is {given!r}; devices=jax.devices({given!r}) are those of a platform")
    if isinstance(given, jax.Device):
        raise TypeError(f"{wanted} but is one device, {given}; write a list, [device]")
    if isinstance(given, int):
        raise TypeError(f"{wanted} but is {given!r}; devices=jax.devices()[:{given}] are the first {given}")
    if isinstance(given, np.ndarray):
        given = given.flatten()
    try:
        devices = list(given)
    except TypeError:
        raise TypeError(f"{wanted} but is {short(given)}") from None
    for place, device in enumerate(devices):
        if not isinstance(device, jax.Device):
            raise TypeError(f"{wanted} but devices[{place}] is {short(device)}")
    if not devices:
        raise ValueError(f"{wanted} but is empty; leave it out, or write None, for all devices")
    twice = [str(device) for device, count in Counter(devices).items() if count > 1]
    if twice:
        raise ValueError(f"devices must be different ones, but {', '.join(twice)} is there more than once")
    return devices
