"""Kills runs at random instants and compares their ends with those of runs that were left alone: `make soak`.

Each run has a form of its own: steps in a dispatch, devices, workers, where its data are. It is killed with SIGKILL,
half of the times at any instant and half of the times when it is seen to do something that takes little of its time: a
save, a cleanup, a validation, its start-up. Then the same command is given again, until it has been killed often
enough and may come to its end.
"""

import argparse
import collections
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.victim import PHASES, WRITING, Diary

ROOT = Path(__file__).parent.parent
SAVE_EVERY = 10
FORMS = {
    "one step a dispatch": {"trainer": {"steps_per_execution": 1}, "seconds": 2e-4},
    "fused": {"trainer": {"steps_per_execution": 16}, "seconds": 2e-4},
    "two workers": {"workers": 2, "seconds": 1e-3},
    "four devices": {"devices": 4, "seconds": 2e-4},
    "accumulated": {"trainer": {"accumulate_steps": 2}, "seconds": 2e-4},
    "hooks and a probe": {"hooks": True, "seconds": 2e-4},
    "data on the devices, wide": {"width": 4096, "size": 192},
    "shuffled on the devices": {"trainer": {"shuffle": True}, "size": 99},
    "shuffled, two workers": {"trainer": {"shuffle": True}, "size": 99, "workers": 2, "seconds": 1e-3},
    "a stream, validated by steps": {"stream": True, "trainer": {"val_every_steps": 7}, "seconds": 2e-4},
    "half precision": {"dtype": "bfloat16", "seconds": 2e-4},
    "an optimizer with keys and masks": {"optimizer": "keys and masks", "seconds": 2e-4},
    "statistics, weights, an average, float16": {"model": "nnx", "trainer": {"ema": 0.9}, "seconds": 2e-4},
}
COMMON = {"epochs": 60, "save_every": SAVE_EVERY}


class Life(NamedTuple):
    """One start, until a kill.

    Attributes:
        where: what it did then.
        resumed: the step that it went on from; None where it was killed before it knew.
        reached: the last step that it made.
        start: seconds from the command to its first new step, without those that reading the checkpoint took; 0
            where it made none.
    """

    where: str
    resumed: int | None
    reached: int
    start: float


class Report(NamedTuple):
    """What came of one form of run.

    Attributes:
        lives: all that ended by a kill, a list for each run from its beginning.
        differences: "state", and the metrics, that differ from those of the untouched run.
        damaged: checkpoints that were found to be damaged.
        fresh: seconds of a fresh start to its first step; NaN where none was timed.
    """

    lives: list[list[Life]]
    differences: list[str]
    damaged: int
    fresh: float

    @property
    def kills(self) -> int:
        """How often it was killed."""
        return sum(map(len, self.lives))

    @property
    def lost(self) -> list[int]:
        """Steps that each later start had to make again."""
        losses = []
        for lives in self.lives:
            reached = 0
            for life in lives:
                if life.resumed is not None:
                    losses.append(max(reached - life.resumed, 0))
                    reached = life.reached
        return losses


def start(folder: Path, options: dict) -> subprocess.Popen:
    """Starts the run, or starts it again."""
    count = options.get("devices", 1)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
        "TQDM_DISABLE": "1",
        "LEARNAX_COMPILATION_CACHE": str(folder.parent / "cache"),
    }
    command = [sys.executable, "-m", "tests.victim", str(folder), json.dumps(COMMON | options)]
    with (folder / "output").open("a") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )


def finish(process: subprocess.Popen, folder: Path) -> dict:
    """Waits for the end of a run; its result."""
    process.wait(timeout=300)
    if process.returncode:
        raise RuntimeError(f"a run ended with {process.returncode}:\n{(folder / 'output').read_text()[-4000:]}")
    return json.loads((folder / "result.json").read_text())


def kill(process: subprocess.Popen, diary: Diary, chance: random.Random, usual: float) -> str | None:
    """Kills a run at some instant; says what it did then, or None where it came to its end before."""
    wanted = chance.choice([None, None, None, "start-up", "validation", "save", "cleanup"])
    deadline = time.monotonic() + (chance.uniform(0.1, usual) if wanted in (None, "start-up") else 30)
    passes, before, later = chance.randrange(1, 5), False, chance.choice([0, 0, 1e-3, 5e-3, 2e-2])
    while process.poll() is None:
        doing = {PHASES[diary["phase"]], WRITING[diary["writing"]]}
        seen = wanted in doing and wanted != "start-up"
        passes -= seen and not before
        before = seen
        if time.monotonic() > deadline or not passes:
            time.sleep(later)
            phase, writing = PHASES[diary["phase"]], WRITING[diary["writing"]]
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return phase if writing == "nothing" else writing
        time.sleep(2e-4)
    return None


def soak(
    name: str,
    options: dict,
    kills: int,
    chance: random.Random,
    scratch: Path,
    *,
    alone: dict | None = None,
    timed: bool = True,
) -> Report:
    """Kills one form of a run so often, and lets it come to its end.

    Args:
        name: of the form.
        options: of the form.
        kills: how often.
        chance: decides when.
        scratch: a folder.
        alone: options of the run that is left alone, where they are others.
        timed: whether a fresh start is timed, too.
    """
    untouched, folder, again = (scratch / f"{name}, {kind}" for kind in ("untouched", "killed", "fresh"))
    for each in (untouched, folder, again):
        each.mkdir()
    began = time.monotonic()
    expected = finish(start(untouched, alone or options), untouched)
    usual = time.monotonic() - began
    fresh = fresh_start(again, options) if timed else math.nan

    lives: list[list[Life]] = [[]]
    differences: set[str] = set()
    while True:
        diary = Diary(folder / "diary")
        diary.clear()
        process = start(folder, options)
        where = kill(process, diary, chance, usual) if sum(map(len, lives)) < kills else None
        if where is not None:
            first = diary["first_step_us"]
            resumed = diary["resumed"] if diary["known"] else None
            lives[-1].append(Life(where, resumed, diary["step"], first and (first - diary["reading_us"]) / 1e6))
            continue
        differences |= compared(finish(process, folder), expected)
        if sum(map(len, lives)) >= kills:
            break
        shutil.rmtree(folder / "victims")  # it came to its end too early: again, from the beginning
        lives.append([])
    damaged = (folder / "output").read_text().count("is damaged")
    return Report(lives, sorted(differences), damaged, fresh)


def fresh_start(folder: Path, options: dict) -> float:
    """Seconds to the first step of a run from its beginning, its programs compiled before."""
    diary, process = Diary(folder / "diary"), start(folder, options)
    while not diary["first_step_us"] and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return diary["first_step_us"] / 1e6


def compared(result: dict, expected: dict) -> set[str]:
    """What of two results differs, bit for bit."""
    names = {*expected["metrics"], *result["metrics"]}
    differences = {name for name in names if expected["metrics"].get(name) != result["metrics"].get(name)}
    return differences | {name for name in ("state", "step") if expected[name] != result[name]}


def summary(report: Report) -> str:
    """What came of one form of run, in a line."""
    ends = f"DIFFERS in {', '.join(report.differences)}" if report.differences else "the same end bit for bit"
    starts = [life.start for lives in report.lives for life in lives if life.start and life.resumed]
    return (
        f"{report.kills} kills, {ends}; {report.damaged} damaged checkpoints; steps made again: median "
        f"{statistics.median(report.lost):g}, most {max(report.lost)}; start to first new step, without reading the "
        f"checkpoint: {statistics.median(starts or [math.nan]):.2f} s, of a fresh run: {report.fresh:.2f} s"
    )


def main() -> int:
    """Soaks all forms, prints what came of it, and says by its status whether all was well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=102, help="how often, over all forms of a run")
    parser.add_argument("--seed", type=int, default=None, help="decides when; another one each time by default")
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=list(FORMS))
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    each, reports = math.ceil(arguments.kills / len(arguments.forms)), {}
    with tempfile.TemporaryDirectory(prefix="learnax-soak-") as scratch:
        for name in arguments.forms:
            began = time.monotonic()
            report = reports[name] = soak(name, FORMS[name], each, random.Random(f"{seed} {name}"), Path(scratch))
            print(f"{name}: {summary(report)} ({time.monotonic() - began:.0f} s)", flush=True)
    places = collections.Counter(life.where for report in reports.values() for lives in report.lives for life in lives)
    print("where: " + ", ".join(f"{place} {count}" for place, count in places.most_common()))
    good = [not report.differences and not report.damaged for report in reports.values()]
    print(f"{sum(report.kills for report in reports.values())} kills, {sum(good)} of {len(good)} forms as untouched")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
