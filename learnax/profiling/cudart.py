"""The CUDA runtime's profiler switches, through ctypes.

`nsys profile --capture-range=cudaProfilerApi` and `ncu --profile-from-start off` record what runs
between `profiler_start` and `profiler_stop`. Where there is no CUDA, both say so once and do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

_logger = logging.getLogger(__name__)
_said: set[str] = set()

SUCCESS = "cudaSuccess"
NO_LIBRARY = "no libcudart"


def find() -> list[str]:
    """Where a libcudart may be, best first: in this process, in the pip wheels (13, 12), the system's."""
    return [*_in_process(), *_in_wheels(), *_in_system()]


def load() -> ctypes.CDLL | None:
    """Loads the first libcudart that `find` names and that loads; None where there is none."""
    for name in find():
        try:
            library = ctypes.CDLL(name)
            library.cudaGetErrorName.restype = ctypes.c_char_p
            library.cudaGetErrorString.restype = ctypes.c_char_p
            return library
        except (OSError, AttributeError):
            continue
    return None


def error_text(code: int) -> str:
    """A return code in CUDA's words, `cudaErrorInsufficientDriver (35: CUDA driver version is ...)`."""
    if code == 0:
        return SUCCESS
    if libcudart is None:
        return f"CUDA error {code}"
    name = libcudart.cudaGetErrorName(code).decode()
    return f"{name} ({code}: {libcudart.cudaGetErrorString(code).decode()})"


def profiler_start() -> str:
    """Starts collection in an attached profiler; returns `cudaSuccess` or the error in words."""
    return _call("cudaProfilerStart")


def profiler_stop() -> str:
    """Stops collection in an attached profiler; returns `cudaSuccess` or the error in words."""
    return _call("cudaProfilerStop")


@contextlib.contextmanager
def profiled() -> Iterator[str]:
    """Collects while the block runs, and stops when it ends or raises; yields what the start returned."""
    status = profiler_start()
    try:
        yield status
    finally:
        if status == SUCCESS:
            profiler_stop()


def _call(function: str) -> str:
    status = NO_LIBRARY if libcudart is None else error_text(getattr(libcudart, function)())
    if status != SUCCESS and status not in _said:
        _said.add(status)
        _logger.warning("%s: %s; nothing is collected for a CUDA profiler", function, status)
    return status


def _in_process() -> list[str]:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = (line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "libcudart" in line)
    return list(dict.fromkeys(paths))


def _in_wheels() -> list[str]:
    # The wheels hold no plain libcudart.so: the version is part of the name.
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    patterns = ("cu13/lib/libcudart.so.13", "cuda_runtime/lib/libcudart.so.13", "cuda_runtime/lib/libcudart.so.12")
    return [str(root / pattern) for pattern in patterns for root in roots if (root / pattern).exists()]


def _in_system() -> list[str]:
    if not sys.platform.startswith("linux"):
        return []
    found = ctypes.util.find_library("cudart")
    candidates = [found] if found else []
    candidates += ["libcudart.so.13", "libcudart.so.12", "libcudart.so", "/usr/local/cuda/lib64/libcudart.so"]
    return list(dict.fromkeys(candidates))


libcudart: ctypes.CDLL | None = load()
"""The loaded library, or None where there is none."""
