"""A process of its own that starts a contender, makes its first step or a whole round, and says what that took.

python -m bench.child WORKLOAD CONTENDER SCALE step BEGAN
python -m bench.child WORKLOAD CONTENDER SCALE round

`BEGAN` is when the process was asked for, in seconds since 1970; the answer is a line of JSON: the seconds to the first
step, or the most memory that a round takes. A step by itself works on a copy of the state, so it is not made there.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Starts, steps, tells."""
    workload_name, contender_name, scale, what, *began = sys.argv[1:]
    # First, so that its own report holds all that importing it costs.
    import learnax.trainer  # noqa: F401, I001
    import jax

    from bench.opponents import OPPONENTS, Learnax
    from bench.workloads import makers

    workload = makers(scale, quick=False)[workload_name]()
    compiles = {"compile": True} if what == "step" else {}
    contender = Learnax(workload, **compiles) if contender_name == "learnax" else OPPONENTS[contender_name](workload)
    answer: dict[str, Any] = {}
    if what == "step":
        stepped = time.perf_counter()
        contender.step()
        now = time.perf_counter()
        answer["start"] = time.time() - float(began[0])
        if isinstance(contender, Learnax):
            answer["parts"] = {**contender.trainer.startup, "first step": now - stepped}
    else:
        contender.round()
        answer["host_bytes"] = peak_memory()
        # A CPU has no such statistics.
        statistics = jax.local_devices()[0].memory_stats() or {}
        answer["device_bytes"] = statistics.get("peak_bytes_in_use")
    contender.close()
    print(json.dumps(answer))


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # what `getrusage` says begins at the size of the process that started this one
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
