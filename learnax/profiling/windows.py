"""Which steps are profiled: a small grammar, and what follows of it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

VARIABLE = "LEARNAX_PROFILE"
"""Names windows where a script does not."""
_ITEM = re.compile(
    r"(?P<tool>cuda|trace)\s*:\s*(?:epoch\s+(?P<epoch>\d+)|(?P<begin>\d+)\s*-\s*(?P<end>\d+))"
    r"(?:\s+every\s+(?P<every>\d+))?"
)
_FORMS = "'cuda:100-110', 'trace:100-110 every 1000' or 'trace:epoch 2', several with commas between, or 'off'"


@dataclasses.dataclass(frozen=True)
class Window:
    """Steps, or an epoch, that a tool looks at.

    Attributes:
        tool: "cuda" or "trace".
        begin: steps made when it begins, or the number of its epoch.
        end: steps made when it ends, or the number of the epoch after it.
        every: steps (or epochs) from one beginning to the next; None for a window that comes once.
        epochs: whether it counts epochs.
    """

    tool: str
    begin: int
    end: int
    every: int | None = None
    epochs: bool = False

    def __str__(self) -> str:
        what = f"epoch {self.begin}" if self.epochs else f"{self.begin}-{self.end}"
        return f"{self.tool}:{what}" + (f" every {self.every}" if self.every else "")

    def covers(self, step: int, epoch: int) -> bool:
        """Whether the step after `step` ones, in this epoch, lies inside."""
        into = (epoch if self.epochs else step) - self.begin
        if self.every and into > 0:
            into %= self.every
        return 0 <= into < self.end - self.begin

    def next_edge(self, step: int) -> float:
        """The first number of steps made, after this one, at which it begins or ends; infinity where none is known."""
        if self.epochs:
            return math.inf
        turn = (step - self.begin) // self.every * self.every if self.every and step > self.begin else 0
        edges = [self.begin + turn, self.end + turn, *([self.begin + turn + self.every] if self.every else [])]
        return min((edge for edge in edges if edge > step), default=math.inf)


def parse(text: str | None, source: str) -> list[Window]:
    """Reads windows.

    `cuda:100-110` begins when 100 steps are made and ends when 110 are: it holds steps 101 to 110. `trace:epoch 2` is
    the whole of that epoch, counted from 0, with its validation. `every N` repeats a window each N steps, or epochs.

    Args:
        text: windows with commas between; empty, "off" or None for none.
        source: where it was written, for errors.

    Raises:
        ValueError: anything else; what was expected is in the text.
    """
    if not text or text.strip().lower() in ("", "off"):
        return []
    return [_window(item.strip(), source) for item in text.split(",")]


def covered(windows: Sequence[Window], tool: str, step: int, epoch: int) -> Window | None:
    """The first window of a tool that the next step lies in."""
    return next((window for window in windows if window.tool == tool and window.covers(step, epoch)), None)


def _window(item: str, source: str) -> Window:
    match = _ITEM.fullmatch(item)
    if match is None:
        raise ValueError(f"{source}: {item!r} is no window of steps; expected for instance {_FORMS}")
    numbers = {name: int(given) for name, given in match.groupdict().items() if given and name != "tool"}
    epochs = "epoch" in numbers
    begin = numbers["epoch"] if epochs else numbers["begin"]
    window = Window(match["tool"], begin, numbers.get("end", begin + 1), numbers.get("every"), epochs)
    if window.end <= window.begin:
        raise ValueError(f"{source}: {item!r} ends before it begins; 'cuda:100-110' holds the steps 101 to 110")
    if window.every is not None and window.every < window.end - window.begin:
        raise ValueError(
            f"{source}: {item!r} begins again before its {window.end - window.begin} steps are over; "
            f"use every {window.end - window.begin} or more"
        )
    return window
