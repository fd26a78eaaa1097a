"""How XLA is told to send while it computes, on GPUs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

_PIECE = 16 << 20
"""Bytes that small arrays are gathered or scattered together up to: a layer of a GPT of 124 M parameters."""


def overlapping(devices: Sequence[Any], *, divided: bool) -> dict[str, Any]:
    """Options of the compiler for programs on these devices; none where they have nothing to send.

    By default XLA starts a collective and waits for it, and puts as many into one as fit into memory: compiled for
    eight H100s, the gradients of a divided GPT were scattered in one piece behind the whole backward pass. What the
    user's `XLA_FLAGS` say stays as it is.

    Args:
        devices: that a program is for.
        divided: whether its state is divided over them.
    """
    if len(devices) == 1 or devices[0].platform != "gpu":
        return {}
    options: dict[str, Any] = {"xla_gpu_enable_latency_hiding_scheduler": True}
    if divided:
        options["xla_gpu_all_gather_combine_threshold_bytes"] = _PIECE
        # XLA counts what each device has in the end.
        options["xla_gpu_reduce_scatter_combine_threshold_bytes"] = _PIECE // len(devices)
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in flags}
