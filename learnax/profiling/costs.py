"""What a program costs by the compiler's own count, and what devices can do at most."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax

_T = 1e12
PEAKS = {
    "B200": 2250 * _T,
    "GH200": 989 * _T,
    "H200 NVL": 835 * _T,
    "H200": 989 * _T,
    "H100 PCIe": 756 * _T,
    "H100 NVL": 835 * _T,
    "H100": 989 * _T,
    "A100": 312 * _T,
    "L40S": 362 * _T,
    "L4": 121 * _T,
    "V100": 125 * _T,
    "TPU v4": 275 * _T,
    "TPU v5 lite": 197 * _T,
    "TPU v5": 459 * _T,
    "TPU v6 lite": 918 * _T,
}
"""FLOP/s of one device in dense matrix products of bfloat16 (float16 on V100); the first name that `device_kind` holds.

Sources: https://www.nvidia.com/en-us/data-center/ and there hgx (B200: an eighth of the board),
grace-hopper-superchip, h200, h100, a100, l40s, l4 and v100, half of a figure that is given with sparsity;
https://cloud.google.com/tpu/docs/ and there v4, v5e, v5p and v6e, peak compute per chip.
"""


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one call of a program costs, on one device; a loop whose count is an argument counts as one turn.

    Attributes:
        flops: floating-point operations.
        bytes: read and written, by the compiler's estimate.
        memory: bytes that are taken while it runs: arguments, results and scratch.
        reused: bytes of arguments whose memory the results take over.
    """

    flops: float
    bytes: float
    memory: int
    reused: int

    def __str__(self) -> str:
        return (
            f"{amount(self.flops, 'FLOP')} a batch, {amount(self.bytes, 'B')} read and written; "
            f"{amount(self.memory, 'B')} of memory, {amount(self.reused, 'B')} of it updated in place"
        )


def amount(value: float, unit: str) -> str:
    """A number with three digits and a prefix: `1.21 GB`, `15 ms`."""
    if value == 0:
        return f"0 {unit}"
    for prefix, factor in (("µ", 1e-6), ("m", 1e-3), ("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12)):
        # Only a time has parts of its unit, and nobody counts it in thousands.
        if unit == "s" and factor > 1:
            break
        if (unit == "s" or factor >= 1) and abs(value) < 999.5 * factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:,.0f} {unit}" if unit == "s" else f"{value / 1e15:.3g} P{unit}"


def costs_of(compiled: jax.stages.Compiled) -> Costs:
    """Asks the compiler; what a backend does not tell is 0."""
    try:
        analysis: Any = compiled.cost_analysis() or {}
        memory: Any = compiled.memory_analysis()
    except (jax.errors.JaxRuntimeError, NotImplementedError):
        analysis, memory = {}, None

    def size(name: str) -> int:
        return int(getattr(memory, f"{name}_size_in_bytes", 0))

    return Costs(
        flops=max(float(analysis.get("flops", 0.0)), 0.0),
        bytes=max(float(analysis.get("bytes accessed", 0.0)), 0.0),
        memory=size("argument") + size("output") - size("alias") + size("temp"),
        reused=size("alias"),
    )


def peak_of(device: jax.Device) -> tuple[str, float] | None:
    """A device's name in `PEAKS` and its peak, or None where it is not known."""
    return next(((name, peak) for name, peak in PEAKS.items() if name in device.device_kind), None)


def memory_of(device: jax.Device) -> int | None:
    """Bytes that a device's programs may take; of a CPU, its share of the machine's; None where it is not told."""
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return int(statistics["bytes_limit"])
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count("cpu")
    return None
