"""NVIDIA's profilers around a program: the command lines of nsys and ncu, and what they need."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from learnax.profiling import cudart
from learnax.profiling.windows import VARIABLE

_PLACES = {
    "nsys": ("/usr/local/cuda*/bin/nsys", "/opt/nvidia/nsight-systems*/*/bin/nsys"),
    "ncu": ("/usr/local/cuda*/bin/ncu", "/opt/nvidia/nsight-compute*/*/ncu"),
}
_PRODUCTS = {"nsys": "nsight-systems", "ncu": "nsight-compute"}


def find(tool: str) -> str | None:
    """Where `nsys` or `ncu` is: on PATH, or where CUDA's installers put it, the last version; None if nowhere."""
    installed = (path for place in _PLACES[tool] for path in sorted(Path("/").glob(place[1:]), reverse=True))
    return shutil.which(tool) or next((str(path) for path in installed if os.access(path, os.X_OK)), None)


def compose(tool: str, executable: str, command: Sequence[str], out: Path) -> list[str]:
    """The command line that runs a program under a tool, which records between cudaProfilerStart and -Stop.

    Args:
        tool: "nsys" or "ncu".
        executable: where it is.
        command: the program with its arguments.
        out: the folder for reports.
    """
    if tool == "ncu":
        # In child processes, too: the program may be what starts the training.
        options = ["--profile-from-start", "off", "--target-processes", "all", "--nvtx"]
        return [executable, *options, "--export", str(out / "ncu"), "--force-overwrite", *command]
    options = [
        "--capture-range=cudaProfilerApi",
        # Each window gets a report of its own, and the program goes on to its end. `stop` would end with the first
        # window, and the default kills the program after it.
        "--capture-range-end=repeat",
        # By default a CUDA graph is one block; its kernels are what is looked for.
        "--cuda-graph-trace=node",
        "--trace=cuda,nvtx",
        f"--output={out / 'nsys'}",
        "--force-overwrite=true",
    ]
    return [executable, "profile", *options, *command]


def missing(tool: str) -> list[str]:
    """What a tool lacks here, in words; nothing where it can run."""
    lacks = []
    if find(tool) is None:
        places = ", ".join(_PLACES[tool])
        lacks.append(f"no {tool} on PATH, nor {places}; it is at https://developer.nvidia.com/{_PRODUCTS[tool]}")
    status = cudart.NO_LIBRARY
    if cudart.libcudart is not None:
        status = cudart.error_text(cudart.libcudart.cudaGetDeviceCount(ctypes.byref(ctypes.c_int())))
    if status != cudart.SUCCESS:
        lacks.append(f"no CUDA device: cudaGetDeviceCount says {status}")
    return lacks


def profile(tool: str, command: Sequence[str], out: Path, windows: str) -> NoReturn:
    """Becomes the tool, so that signals and the exit status are between it and who called.

    Args:
        tool: "nsys" or "ncu".
        command: the program with its arguments.
        out: the folder for reports; it is made.
        windows: which steps, as `LEARNAX_PROFILE` takes them; one that is in the environment goes first.

    Raises:
        SystemExit: the tool, a driver or the folder is missing. The command line is printed all the same, to be run
            elsewhere.
    """
    windows = os.environ.get(VARIABLE, windows)
    composed = compose(tool, find(tool) or tool, command, out)
    print(f"{VARIABLE}={shlex.quote(windows)} {shlex.join(composed)}", flush=True)
    if lacks := missing(tool):
        raise SystemExit("\n".join([*lacks, f"the line above is what to run where {tool} and a CUDA device are"]))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out {out} cannot be written to: {error}") from None
    sys.stderr.flush()
    os.execvpe(composed[0], composed, {**os.environ, VARIABLE: windows})
