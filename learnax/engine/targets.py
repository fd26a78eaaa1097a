"""GPUs that are not here: what is known of them, and as devices that programs can be compiled for."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Iterable
from typing import Any

import jax
import jaxlib.version
import numpy as np
from jax.experimental import topologies

from learnax.engine.cache import without_cache
from learnax.engine.engine import Engine, Wanted
from learnax.profiling.phases import Phases
from learnax.utils.extras import EXTRAS, missing

_T = 1e12
_NODE = 8
"""GPUs of a node; more of them stand in several."""
INSTALL = EXTRAS["gpu-compile"].install
PLUGIN = "jax-cuda12-plugin"


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU in numbers.

    Attributes:
        kind: its name, as its driver says it.
        memory: bytes.
        bandwidth: bytes a second, of its memory.
        cache: bytes of its last cache.
        peaks: FLOP/s in dense products, by the type that is multiplied, in XLA's words. Products of float32 are made
            in TF32, as XLA does by default.
        capability: CUDA's compute capability.
        cores: multiprocessors.
        lanes: float32 units of each.
        clock: GHz.
        shared: bytes of shared memory of a multiprocessor, and what a block of threads may have of them.
    """

    kind: str
    memory: int
    bandwidth: float
    cache: int
    peaks: dict[str, float]
    capability: tuple[int, int]
    cores: int
    lanes: int
    clock: float
    shared: tuple[int, int]

    def description(self) -> str:
        """The same in XLA's words, what it compiles for."""
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024
              threads_per_warp: 32
              shared_memory_per_block: 49152
              threads_per_core_limit: 2048
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              shared_memory_per_core: {self.shared[0]}
              shared_memory_per_block_optin: {self.shared[1]}
              core_count: {self.cores}
              fpus_per_core: {self.lanes}
              memory_bandwidth: {self.bandwidth:.0f}
              l2_cache_size: {self.cache}
              clock_rate_ghz: {self.clock}
              device_memory_size: {self.memory}
              cuda_compute_capability {{ major: {self.capability[0]} minor: {self.capability[1]} }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            runtime_version {{ major: 12 minor: 8 }}
            device_description_str: "{self.kind}"
        """


def _peaks(half: float, tf32: float, double: float, eighth: float) -> dict[str, float]:
    peaks = {"bf16": half, "f16": half, "f32": tf32, "f64": double, "s8": eighth}
    peaks |= dict.fromkeys(("f8e4m3fn", "f8e5m2"), eighth)
    return {name: peak * _T for name, peak in peaks.items()}


_H100 = Card(
    "NVIDIA H100 80GB HBM3",
    84_942_979_072,
    3.35232e12,
    52_428_800,
    _peaks(989, 494, 67, 1979),
    (9, 0),
    132,
    128,
    1.98,
    (233_472, 232_448),
)
CARDS = {
    "a100": Card(
        "NVIDIA A100-SXM4-80GB",
        85_100_068_864,
        2.03904e12,
        41_943_040,
        _peaks(312, 156, 19.5, 624),
        (8, 0),
        108,
        64,
        1.41,
        (167_936, 166_912),
    ),
    "h100": _H100,
    # The same chip with more and faster memory.
    "h200": dataclasses.replace(_H100, kind="NVIDIA H200 141GB HBM3e", memory=151_397_597_184, bandwidth=4.8e12),
    "b200": Card(
        "NVIDIA B200",
        191_514_411_008,
        7.67232e12,
        132_644_864,
        _peaks(2250, 1100, 37, 4500),
        (10, 0),
        148,
        128,
        1.965,
        (233_472, 232_448),
    ),
}
"""The cards that programs can be compiled for, by what they are asked for as.

Sources: OpenXLA's target descriptions, `xla/backends/gpu/target_config/specs` of https://github.com/openxla/xla; peaks
by https://www.nvidia.com/en-us/data-center/ and there a100, h100 (SXM), h200 (SXM) and hgx (B200: an eighth of the
board), half of what is given with sparsity. The A100 has no units for 8-bit floats; its figure is that of int8.
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """So many GPUs of a kind.

    Attributes:
        card: the kind.
        count: how many.
        name: as it was asked for.
    """

    card: Card
    count: int
    name: str

    def devices(self) -> list[Any]:
        """The GPUs, as devices to compile for; they hold no arrays.

        Raises:
            RuntimeError: what compiles for them is not installed, or not of JAX's version, or hidden; what to do is
                in the text.
        """
        _check_plugin()
        nodes, rest = divmod(self.count, _NODE)
        if rest and nodes:
            raise ValueError(f"target {self.name!r}: more than {_NODE} GPUs must be a multiple of {_NODE}, whole nodes")
        shape = f"1x{nodes}x{_NODE}" if nodes else f"1x1x{self.count}"
        try:
            topology = topologies.get_topology_desc(
                platform="cuda", target_config=self.card.description(), topology=shape
            )
        except Exception as error:
            raise RuntimeError(
                f"target {self.name!r}: JAX's CUDA plugin cannot compile for it here ({str(error).splitlines()[0]}); "
                f"reinstall it: {INSTALL}"
            ) from error
        return list(topology.devices)


def target_of(asked: str) -> Target:
    """A target by its name: `"h100"`, `"h100:8"`.

    Raises:
        TypeError: it is no text.
        ValueError: nobody knows it; the known ones are in the text.
    """
    known = ", ".join(CARDS)
    if not isinstance(asked, str):
        raise TypeError(f"target must be a GPU's name, 'h100' or 'h100:8' for instance, but is {asked!r}")
    form = re.fullmatch(r"([a-z0-9]+)(?::([0-9]+))?", asked.strip().lower())
    if form is None or form[1] not in CARDS:
        raise ValueError(f"target {asked!r} is not known: expected one of {known}, or several, 'h100:8' for instance")
    count = int(form[2] or 1)
    if count < 1:
        raise ValueError(f"target {asked!r} has no GPU: expected a number from 1 on behind the colon")
    return Target(CARDS[form[1]], count, asked.strip().lower())


def _check_plugin() -> None:
    """Raises RuntimeError where programs for a GPU cannot be compiled in this process."""
    try:
        version = importlib.metadata.version(PLUGIN)
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(missing("gpu-compile", PLUGIN)) from None
    if version != jaxlib.version.__version__:
        raise RuntimeError(
            f"{PLUGIN} {version} does not fit jaxlib {jaxlib.version.__version__}: both must be of one version; "
            f"pip install {PLUGIN}=={jaxlib.version.__version__} "
            f"{PLUGIN.replace('plugin', 'pjrt')}=={jaxlib.version.__version__}"
        )
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    if platforms and "cpu" not in platforms.split(","):
        raise RuntimeError(
            f"JAX_PLATFORMS={platforms} hides the CPU, on which programs for other devices are compiled: write "
            f"JAX_PLATFORMS={platforms},cpu where there is a GPU, and else JAX_PLATFORMS=cpu"
        )


class Remote(Engine):
    """Compiles for devices that are not here: no array is laid out on them.

    Args:
        target: the devices.

    Raises:
        RuntimeError, ValueError: as `Target.devices`.
    """

    def __init__(self, target: Target):
        super().__init__(target.devices(), Phases(0.0, []))

    def prepare(self, wanted: Iterable[Wanted]) -> None:
        """As `Engine.prepare`."""
        with without_cache():
            super().prepare(wanted)

    def scalar(self, value: int, following: Iterable[int] = ()) -> Any:
        """The shape of a whole number."""
        del value
        return jax.ShapeDtypeStruct((), np.int32)
