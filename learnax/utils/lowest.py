"""The oldest JAX that learnax works with: an older one is told of in one line, before what it lacks is imported.

This is looked at when the package is imported, and reads what is installed without importing it.
"""

from __future__ import annotations

import importlib.metadata
import re

JAX = "0.10.0"


def check_jax() -> None:
    """Raises ImportError where an older JAX is installed; what to do is in the text."""
    try:
        installed = importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:  # none at all, or one without metadata: its import will say
        return
    if _numbers(installed) < _numbers(JAX):
        raise ImportError(
            f"learnax needs jax {JAX} or newer, but jax {installed} is installed: pip install --upgrade 'jax>={JAX}'"
        )


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


check_jax()
