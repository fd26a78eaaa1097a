"""`python -m learnax`: versions, devices, what is installed, where folders are, and what to try."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import jax

from learnax.engine.cache import VARIABLE, planned_folder
from learnax.registry import PATH_VARIABLE
from learnax.utils.extras import EXTRAS, version_of
from learnax.utils.names import expanded

_CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "wandb")
_TRY = (
    ("python -m learnax.profiling train.py", "where the host's time goes in a script"),
    ("LEARNAX_PROFILE=trace:100-110 python train.py", "ten steps as a trace, for Perfetto and XProf"),
    ("python -m learnax preflight --target h100:8 train.py", "would it fit eight H100s?"),
)
_DRIVER = Path("/proc/driver/nvidia/version")
_CUDA_13 = 580
"""The first driver that runs CUDA 13."""


def text(version: str) -> str:
    """What there is to say, in lines; it looks only, and what cannot be found out is said in its place.

    Args:
        version: that of learnax.
    """
    core = ", ".join(f"{name} {version_of(name) or 'not installed'}" for name in _CORE)
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    lines = [f"learnax {version}", f"  {system}", f"  {core}", "", "devices", *_devices(), ""]
    installed, absent = _extras()
    lines += ["installed", *(installed or ["  no extras"]), "", *(["not installed", *absent, ""] if absent else [])]
    lines += ["folders", *_folders(), "", "to try"]
    lines += [f"  {command:54}{what}" for command, what in _TRY]
    return "\n".join(lines)


def _devices() -> Iterator[str]:
    """The devices by kind, and a GPU that JAX does not see."""
    try:
        kinds = [device.device_kind for device in jax.devices()]
    except Exception as error:  # whatever a plugin raises
        kinds = []
        asked = os.environ.get("JAX_PLATFORMS")
        where = f" with JAX_PLATFORMS={asked}" if asked else ""
        yield f"  none: JAX finds no device{where} ({(str(error).splitlines() or [type(error).__name__])[0]})"
    for kind in dict.fromkeys(kinds):
        yield f"  {kinds.count(kind)} x {kind}"
    if kinds and jax.default_backend() == "cpu" and _DRIVER.exists():
        yield f"  an NVIDIA GPU is here that JAX does not use; {EXTRAS[_cuda(_DRIVER.read_text())].install}"


def _cuda(driver: str) -> str:
    """The extra for a driver, by what the driver says of itself."""
    found = re.search(r"\s([0-9]{3})\.[0-9]+", driver)
    return "cuda13" if found and int(found[1]) >= _CUDA_13 else "cuda12"


def _extras() -> tuple[list[str], list[str]]:
    """Lines of the extras that are installed, and of those that are not."""
    installed, absent = [], []
    for extra in EXTRAS.values():
        versions = extra.versions()
        if None not in versions.values():
            has = ", ".join(f"{name} {version}" for name, version in versions.items())
            installed.append(f"  {extra.name:14}{extra.feature:42}{has}")
        else:
            absent.append(f"  {extra.name:14}{extra.feature:42}{extra.install}")
    return installed, absent


def _folders() -> Iterator[str]:
    """Where compiled programs and runs are kept."""
    try:
        programs = planned_folder()
        said = f"off, by {VARIABLE}" if programs is None else _described(programs)
    except (OSError, ValueError) as error:
        said = f"none: {error}"
    yield f"  {'programs':14}{said}"
    base = os.environ.get(PATH_VARIABLE)
    said = f"where a Registry is told to; {PATH_VARIABLE} is not set"
    try:
        if base:
            said = _described(expanded(base, PATH_VARIABLE))
    except ValueError as error:
        said = f"none: {error}"
    yield f"  {'runs':14}{said}"


def _described(folder: Path) -> str:
    """A folder, with what is in it."""
    try:
        entries = sum(not entry.name.startswith(".") for entry in os.scandir(folder))
    except FileNotFoundError:
        return f"{folder} (not made yet)"
    except OSError as error:
        return f"{folder} ({error.strerror})"
    return f"{folder} ({entries} {'entry' if entries == 1 else 'entries'})"
