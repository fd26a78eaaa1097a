"""What XLA is told beside a program."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

_PIECE = 16 << 20
"""Bytes that small arrays are gathered or scattered together up to: a layer of a GPT of 124 M parameters."""
_GRAPHED = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"
"""What goes into CUDA graphs: XLA's default, and loops."""


def compiler_options(devices: Sequence[Any], *, divided: bool) -> dict[str, Any]:
    """Options of the compiler for programs that run many times on these devices; none on a CPU.

    By default XLA reads on the host, in each turn, whether a loop goes on. In a CUDA graph the GPU knows it by itself:
    on an H100, 16 steps of an MLP of width 128 in a dispatch took 56 µs a step so, and 91 by default
    (`python -m bench.fusing`).

    By default XLA starts a collective and waits for it, and puts as many into one as fit into memory: compiled for
    eight H100s, the gradients of a divided GPT were scattered in one piece behind the whole backward pass.

    What the user's `XLA_FLAGS` say stays as it is.

    Args:
        devices: that a program is for.
        divided: whether its state is divided over them.
    """
    if devices[0].platform != "gpu":
        return {}
    options: dict[str, Any] = {"xla_gpu_enable_command_buffer": _GRAPHED}
    if len(devices) > 1:
        options["xla_gpu_enable_latency_hiding_scheduler"] = True
    if divided and len(devices) > 1:
        options["xla_gpu_all_gather_combine_threshold_bytes"] = _PIECE
        # XLA counts what each device has in the end.
        options["xla_gpu_reduce_scatter_combine_threshold_bytes"] = _PIECE // len(devices)
    return _unless_given(options)


def options_once(devices: Sequence[Any]) -> dict[str, Any]:
    """Options of the compiler for a program that runs once; none on other devices than a CPU.

    The program that draws the parameters of a 3-layer MLP was compiled in 0.5 s so, by default in 0.95, that of a GPT
    of 10 M in 1.75 and 2.2 (2-core CPU, jax 0.10.2): the same bits.

    Args:
        devices: that it is for.
    """
    return _unless_given({"xla_backend_optimization_level": 2}) if devices[0].platform == "cpu" else {}


def _unless_given(options: dict[str, Any]) -> dict[str, Any]:
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in flags}
