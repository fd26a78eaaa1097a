"""What got slower beyond noise between two results: `python -m bench.compare BASE.json NEW.json`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench.report import amount
from bench.results import Figure, Results
from bench.stats import Ratio, bootstrap_ratio

MARGIN = 0.05
"""How far the interval of new / base must lie beyond 1 for a change to be named."""
FLOOR = {"s": 1e-6, "B": 1e6, "": 0.02, "n": 0.5}
"""Changes of a median smaller than these are nobody's concern, whatever their ratio: by unit."""


class Change(NamedTuple):
    """A figure of learnax in two results."""

    base: Figure
    new: Figure
    ratio: Ratio

    @property
    def slower(self) -> bool:
        """Whether more is used now, beyond noise."""
        return self.ratio.low > 1 + MARGIN and self._counts

    @property
    def faster(self) -> bool:
        """Whether less is."""
        return self.ratio.high < 1 - MARGIN and self._counts

    @property
    def _counts(self) -> bool:
        enough = min(len(self.base.samples), len(self.new.samples)) >= 3 or self.base.unit in ("B", "n")
        return enough and abs(self.new.median - self.base.median) >= FLOOR[self.base.unit]


def changes(base: Results, new: Results, contender: str = "learnax") -> Iterator[Change]:
    """Every figure of a contender (and of its variants) that both results have."""
    for figure in new.figures:
        if figure.contender.split(",")[0] != contender:
            continue
        old = base.find(figure.workload, figure.contender, figure.measure)
        if old is None:
            continue
        if old.median > 0 and figure.median > 0:
            yield Change(old, figure, bootstrap_ratio(figure.samples, old.samples, paired=False))
        elif figure.unit == "n" and old.median != figure.median:  # a count that was none, or is none now
            yield Change(old, figure, Ratio(*[math.inf if figure.median else 0.0] * 3))


def main(arguments: list[str] | None = None) -> int:
    """Prints what changed; 1 where something got slower, else 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args(arguments)
    base, new = Results.read(args.base), Results.read(args.new)
    for name in ("cpu", "cores", "devices", "jax"):
        if base.machine.get(name) != new.machine.get(name):
            print(f"not the same {name}: {base.machine.get(name)} and {new.machine.get(name)}")
    found = list(changes(base, new))
    slower = [change for change in found if change.slower]
    for word, some in (("faster", [change for change in found if change.faster]), ("slower", slower)):
        for change in some:
            print(f"{word}: {_text(change)}{_beside(base, new, change)}")
    verdict = f"{len(slower)} of {len(found)} figures got slower" if found else "the results have no figure in common"
    print(f"{verdict} (95 % interval of new / base beyond {1 + MARGIN:.2f})")
    return 1 if slower else 0


def _text(change: Change) -> str:
    new = change.new
    return f"{new.workload}, {new.contender}, {new.measure}: {amount(change.base)} to {amount(new)}, {change.ratio}"


def _beside(base: Results, new: Results, change: Change) -> str:
    """How the hand-written loop changed meanwhile: if it did alike, the machine may be what changed."""
    beside = (result.find(change.new.workload, "hand", change.new.measure) for result in (base, new))
    old, now = beside
    if old is None or now is None:
        return ""
    return f"; the hand-written loop meanwhile {bootstrap_ratio(now.samples, old.samples, paired=False)}"


if __name__ == "__main__":
    raise SystemExit(main())
