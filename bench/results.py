"""What was measured, as it is kept: figures with all their samples, and ratios of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.stats import Ratio, bootstrap_ratio

TARGETS = {
    ("tiny-26", "learnax", "hand"): 1.25,
    ("tiny-86", "learnax", "hand"): 1.25,
    ("mlp-128", "learnax", "hand"): 0.60,
    ("mlp-128", "learnax", "hand-fused"): 1.10,
    ("mlp-128", "learnax", "keras-16"): 0.65,
    ("mlp", "learnax", "hand"): 1.15,
    ("deep", "learnax", "hand"): 1.15,
    ("adamw-128", "learnax", "hand-fused"): 1.05,
    ("adamw-2048", "learnax", "hand-fused"): 1.05,
    ("mlp-2048", "learnax", "hand"): 1.05,
    ("mlp-2048", "learnax", "keras-16"): 1.05,
    ("mlp-2048", "learnax, wandb", "learnax"): 1.03,
    ("mlp-2048", "learnax, files", "learnax"): 1.02,
    ("nnx-mlp", "learnax", "hand"): 1.02,
    ("nnx-mlp", "learnax", "linen"): 1.02,
    ("equinox-mlp", "learnax", "hand"): 1.02,
    ("equinox-mlp", "learnax", "linen"): 1.02,
    ("digits", "learnax", "hand"): 1.02,
    ("resnet", "learnax", "hand"): 1.02,
    ("gpt", "learnax", "hand"): 1.02,
    ("gpt", "learnax, second start", "learnax, first start"): 0.50,
}
"""The largest ratios aimed at on one device, by workload, contender and opponent."""


@dataclasses.dataclass
class Figure:
    """One measured quantity; less of it is better.

    Attributes:
        workload: what was trained.
        contender: who trained it.
        measure: what was measured.
        unit: of the samples: "s", "B", or "" for a share.
        samples: as they came.
        more: what else a reader needs, by name.
    """

    workload: str
    contender: str
    measure: str
    unit: str
    samples: list[float]
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def median(self) -> float:
        """The samples' median."""
        return float(np.median(self.samples))


@dataclasses.dataclass
class Compared:
    """How two figures of one measure compare.

    Attributes:
        workload: what was trained.
        measure: what was measured.
        contender: whose figure stands above.
        opponent: whose stands below.
        ratio: of the medians.
        target: what is aimed at, at most.
    """

    workload: str
    measure: str
    contender: str
    opponent: str
    ratio: Ratio
    target: float | None = None


@dataclasses.dataclass
class Results:
    """A whole measurement.

    Attributes:
        machine: where it was made, and with which versions.
        settings: what was asked for.
        figures: in the order they were taken.
        ratios: of some of them.
        notes: what was left out, and why.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    figures: list[Figure] = dataclasses.field(default_factory=list)
    ratios: list[Compared] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(
        self, workload: str, contender: str, measure: str, unit: str, samples: Sequence[float], **more: Any
    ) -> None:
        """Keeps a figure."""
        self.figures.append(Figure(workload, contender, measure, unit, [float(value) for value in samples], more))

    def find(self, workload: str, contender: str, measure: str) -> Figure | None:
        """The figure, or None."""
        key = (workload, contender, measure)
        return next((f for f in self.figures if (f.workload, f.contender, f.measure) == key), None)

    def compare(self, workload: str, measure: str, contender: str, opponent: str) -> None:
        """Keeps the ratio of two figures that were taken in turns, where both are there."""
        above, below = (self.find(workload, name, measure) for name in (contender, opponent))
        if above is not None and below is not None:
            ratio = bootstrap_ratio(above.samples, below.samples, paired=True)
            aimed_at = self.machine.get("devices", "").startswith("1 ")
            target = TARGETS.get((workload, contender, opponent)) if aimed_at else None
            self.ratios.append(Compared(workload, measure, contender, opponent, ratio, target))

    def write(self, path: Path) -> None:
        """Writes a JSON file, of which a reader never finds half."""
        whole = dataclasses.asdict(self)
        for kept, figure in zip(whole["figures"], self.figures, strict=True):
            kept["median"] = figure.median
        for kept, compared in zip(whole["ratios"], self.ratios, strict=True):
            kept["ratio"] = compared.ratio._asdict()
        part = path.with_suffix(".part")
        part.write_text(json.dumps(whole, indent=1) + "\n")
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> Results:
        """The inverse.

        Raises:
            ValueError: the file is no result of this benchmark.
        """
        try:
            whole = json.loads(path.read_text())
            figures = [Figure(**{k: v for k, v in figure.items() if k != "median"}) for figure in whole["figures"]]
            ratios = [Compared(**{**compared, "ratio": Ratio(**compared["ratio"])}) for compared in whole["ratios"]]
            return cls(whole["machine"], whole["settings"], figures, ratios, whole["notes"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no result of `python -m bench`: {error}") from error
