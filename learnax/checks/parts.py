"""What a trainer is given beside numbers: the model's type, functions, the run, the registry, devices."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from learnax.checks.texts import short
from learnax.log import runs_of
from learnax.registry import Registry
from learnax.sinks import Sink

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


def check_run(given: Any, registry: Any) -> None:
    """Checks what metrics are to go to: one place, or a list of several.

    Raises:
        TypeError: one cannot be logged to, or has no id where a registry needs one.
        ValueError: two of them are one file or folder, or the same.
    """
    wanted = "run must be a wandb run (wandb.init()), a learnax.run.Run, or have id, name and log(dict), but"
    runs = runs_of(given)
    for place, run in enumerate(runs):
        it = wanted if run is given else wanted.replace("run must be", f"run[{place}] must be a sink, or")
        if isinstance(run, type):
            raise TypeError(f"{it} is the class {run.__name__}; write {run.__name__}(...)")
        if not callable(getattr(run, "log", None)):
            raise TypeError(f"{it} is {short(run)}, which has no log")
        if registry is not None and not isinstance(run, Sink) and not hasattr(run, "id"):
            raise TypeError(f"{it} is {short(run)}, which has no id; the registry keeps its checkpoints under the id")
        for other in runs[:place]:
            if run is other:
                raise ValueError(f"run[{place}] is {short(run)} a second time; each row would be logged twice")
            if isinstance(run, Sink) and isinstance(other, Sink) and _same_place(run, other):
                raise ValueError(f"{run!r} and {other!r} of run= are one place; give each a path of its own")


def _same_place(one: Sink, other: Sink) -> bool:
    return one.path is not None and other.path is not None and one.path.resolve() == other.path.resolve()


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
