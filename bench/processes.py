"""Start-up and memory: what only a process of its own can show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.results import Results

START, MEMORY, DEVICE_MEMORY = "start to first step", "peak host memory", "peak device memory"


def startup(results: Results, workload: str, scale: str, pairs: int) -> None:
    """From the start of a process to the end of its first step, with an empty compilation cache, then a filled one.

    The step is made by the program that trains. A hand-written loop without a cache starts beside it.
    """
    first, second, hand = [], [], []
    for _ in range(pairs):
        with tempfile.TemporaryDirectory(prefix="learnax-bench-") as cache:
            first.append(_child(workload, "learnax", scale, "step", cache))
            second.append(_child(workload, "learnax", scale, "step", cache))
        hand.append(_child(workload, "hand", scale, "step", "off"))
    for name, answers in (("learnax, first start", first), ("learnax, second start", second), ("hand", hand)):
        parts = [answer["parts"] for answer in answers if "parts" in answer]
        more = {part: sorted(p[part] for p in parts)[len(parts) // 2] for part in (parts[0] if parts else ())}
        results.add(workload, name, START, "s", [answer["start"] for answer in answers], **more)
    results.compare(workload, START, "learnax, second start", "learnax, first start")
    results.compare(workload, START, "learnax, first start", "hand")


def memory(results: Results, workload: str, contenders: list[str], scale: str) -> None:
    """The most memory that a process takes that trains one round."""
    for name in contenders:
        answer = _child(workload, name, scale, "round", "off")
        results.add(workload, name, MEMORY, "B", [answer["host_bytes"]])
        if answer["device_bytes"] is not None:
            results.add(workload, name, DEVICE_MEMORY, "B", [answer["device_bytes"]])


def _child(workload: str, contender: str, scale: str, what: str, cache: str) -> dict[str, Any]:
    environment = {**os.environ, "LEARNAX_COMPILATION_CACHE": cache, "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "bench.child", workload, contender, scale, what, repr(time.time())]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])
