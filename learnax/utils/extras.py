"""What is installed beside learnax for some features, and how to get it."""

from __future__ import annotations

import dataclasses
import importlib.metadata


@dataclasses.dataclass(frozen=True)
class Extra:
    """An extra of the package: `pip install 'learnax[name]'`.

    Attributes:
        name: as pip is told it.
        feature: what it is for.
        packages: what is needed for that, by the names of their distributions.
    """

    name: str
    feature: str
    packages: tuple[str, ...]

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install 'learnax[{self.name}]'"

    def versions(self) -> dict[str, str | None]:
        """Its packages with the version that is installed; None where one is not."""
        return {package: version_of(package) for package in self.packages}


EXTRAS = {
    extra.name: extra
    for extra in (
        Extra("cuda12", "training on NVIDIA GPUs by CUDA 12", ("jax-cuda12-plugin",)),
        Extra("cuda13", "training on NVIDIA GPUs by CUDA 13", ("jax-cuda13-plugin",)),
        Extra("equinox", "training models of Equinox", ("equinox",)),
        Extra("profiling", "profiling by py-spy and Nsight", ("py-spy", "nvtx")),
        Extra("gpu-compile", "compiling for GPUs that are not here", ("jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")),
        Extra("tensorboard", "logging to TensorBoard", ("tensorboardX",)),
        Extra("bench", "measuring beside Keras", ("keras",)),
        Extra("examples", "running the examples", ("matplotlib", "scikit-learn")),
    )
}
"""The extras for users, by name."""


def version_of(package: str) -> str | None:
    """The version of a distribution that is installed; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing(name: str, package: str) -> str:
    """What to say where a feature lacks a package of its extra: all three, and the command that installs it."""
    extra = EXTRAS[name]
    return f"{extra.feature} needs {package}, which is not installed; {extra.install}"
