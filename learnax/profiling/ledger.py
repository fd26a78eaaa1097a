"""Where the wall time of a run went, and in a sentence what holds it back."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from learnax.profiling.costs import Costs, amount

START = ("import", "init", "trace", "lower", "compile", "first step")
TITLES = {
    "import": "start: import",
    "init": "start: init",
    "trace": "start: trace",
    "lower": "start: lower",
    "compile": "start: compile",
    "first step": "start: first step",
    "data": "waiting for data",
    "dispatch": "dispatch",
    "drain": "waiting for the device",
    "log": "logging",
    "save": "checkpoints",
    "validate": "validation",
    "validate, data": "validation: waiting for data",
    "plot": "plots and samples",
    "profile": "profiler",
    "other": "other",
}
"""What each phase is called in the table, in its order."""
_NOTABLE = 0.1
"""A share of the time that is worth a word."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the words depend on, beside the seconds.

    Attributes:
        platform: of the devices, "cpu" for one.
        room: steps in a dispatch at most.
        batches: batches of an update that a loop goes over; the compiler counts a loop once.
        num_workers: processes that read.
        overlaps: whether the host may go on while the devices compute.
        peak: the device's name and its peak in FLOP/s, where that is known.
    """

    platform: str
    room: int
    batches: int
    num_workers: int
    overlaps: bool
    peak: tuple[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Where the wall time of a run went. Printed, it is a table with a verdict.

    Attributes:
        seconds: each phase's own time, by its name in `TITLES`; they sum to `wall`.
        steps: training steps that were made.
        programs: what each program costs, by kind; of several of a kind, the one used most.
        setting: what the words depend on.
    """

    seconds: Mapping[str, float]
    steps: int
    programs: Mapping[str, Costs]
    setting: Setting

    @property
    def wall(self) -> float:
        """Seconds in all: import, the trainer's construction, and training."""
        return sum(self.seconds.values())

    @property
    def training(self) -> float:
        """Seconds that went into training steps: data, dispatch, waiting, logging and the loop itself."""
        return sum(self.seconds[name] for name in ("data", "dispatch", "drain", "log", "other"))

    @property
    def flops_per_second(self) -> float:
        """Floating-point operations a second of one device, over `training`; 0 where they are not counted."""
        if not self.steps or "train" not in self.programs:
            return 0.0
        return self.programs["train"].flops * self.setting.batches * self.steps / max(self.training, 1e-9)

    @property
    def utilisation(self) -> float | None:
        """`flops_per_second` as a share of the device's peak; None where that is not known."""
        return None if self.setting.peak is None else self.flops_per_second / self.setting.peak[1]

    @property
    def verdict(self) -> str:
        """What holds the run back, and what may help."""
        held = self._held()
        name = max(held, key=lambda name: held[name])
        if held[name] < _NOTABLE * self.wall:
            device = self.seconds["drain"] + (self.seconds["dispatch"] if self.setting.platform == "cpu" else 0.0)
            return f"nothing on the host holds this run back: {self._share(device)} of the time is the devices' own"
        return f"{self._share(held[name])} of the time {self._advice(name)}"

    def summary(self) -> dict[str, float]:
        """Numbers for a run's summary, by name: seconds of each phase, FLOP/s, utilisation."""
        values = {f"ledger/{name}": seconds for name, seconds in self.seconds.items()}
        values |= {"ledger/wall": self.wall, "ledger/steps": self.steps}
        for kind, costs in self.programs.items():
            values |= {f"ledger/{kind} {name}": value for name, value in dataclasses.asdict(costs).items()}
        if self.flops_per_second:
            values["ledger/flops_per_second"] = self.flops_per_second
        if self.utilisation:
            values["ledger/utilisation"] = self.utilisation
        return values

    def __str__(self) -> str:
        rows = [(TITLES[name], self.seconds[name]) for name in TITLES if self.seconds.get(name, 0.0) > 0]
        width = max(len(title) for title, _ in rows)
        lines = [f"{title:<{width}}  {seconds:9.3f} s  {self._share(seconds):>5}" for title, seconds in rows]
        lines.append(f"{'in all':<{width}}  {self.wall:9.3f} s  {self.steps} steps")
        lines += [f"{kind}: {costs}" for kind, costs in self.programs.items()]
        if self.flops_per_second:
            rate = f"while training, each device makes {amount(self.flops_per_second, 'FLOP/s')}"
            if self.setting.peak and self.utilisation:
                name, peak = self.setting.peak
                rate += f", {self.utilisation:.1%} of what a {name} can at most, {amount(peak, 'FLOP/s')} in bfloat16"
            lines.append(rate)
        return "\n".join([*lines, self.verdict])

    def _held(self) -> dict[str, float]:
        """Seconds that the devices had nothing to do for, by what for."""
        seconds = self.seconds
        held = {
            "start": sum(seconds[name] for name in START),
            "data": seconds["data"],
            "host": seconds["other"] + (0.0 if self.setting.platform == "cpu" else seconds["dispatch"]),
            "log": seconds["log"],
            "save": seconds["save"],
            "validate": seconds["validate"] + seconds["validate, data"],
            "plot": seconds["plot"],
        }
        if self.setting.overlaps and seconds["drain"] > _NOTABLE * self.wall:
            # The devices are behind the host: whatever it does between two dispatches, they go on meanwhile.
            for name in ("data", "host", "log"):
                del held[name]
        return held

    def _advice(self, name: str) -> str:
        workers, cores = self.setting.num_workers, os.cpu_count() or 1
        more = min(4, max(cores, 2)) if workers == 0 else 2 * workers
        read = f"try num_workers={more}" if more <= max(cores, 2) else "make reading a datum cheaper"
        slowest = max(START, key=lambda part: self.seconds[part])
        fused = "try steps_per_execution=16" if self.setting.room == 1 else "the host's own work is the limit"
        later = (
            "a second start finds its programs compiled" if slowest == "compile" else "a longer run has it once, too"
        )
        on_data = self.seconds["validate, data"] > self.seconds["validate"]
        return {
            "start": f"is the start, most of it {slowest}: {later}",
            "data": f"waits for data: {read}",
            "host": f"is the host's, between dispatches: {fused}",
            "log": "is logging: the run takes longer to log a step than to make it",
            "save": "is held by checkpoints: save less often (save_every, checkpoint_every)",
            "validate": "is validation: " + (read if on_data else "validate less often (val_every)"),
            "plot": "goes into plots and samples: make them less often (plot_every, sample_every)",
        }[name]

    def _share(self, seconds: float) -> str:
        return f"{seconds / max(self.wall, 1e-9):.0%}"
