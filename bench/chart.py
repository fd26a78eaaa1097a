"""Results as a picture: who needs how long for a step, and where a start's time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.measure import HOST, SLOWED, STALL, STEP, WAITED
from bench.processes import MEMORY, START
from bench.report import amount, seconds
from bench.results import Results

COLOURS = {
    "learnax": "#d1495b",
    "hand": "#30638e",
    "hand-fused": "#7ea8cc",
    "linen": "#e8a0a9",
    "keras-1": "#8d8d8d",
    "keras-16": "#bdbdbd",
}
PARTS = ("import", "init", "trace", "lower", "compile", "first step")


def draw(results: Results, path: Path) -> None:
    """Writes a PNG: a panel for each workload, and one for the start."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in dict.fromkeys(f.workload for f in results.figures) if results.find(name, "learnax", STEP)]
    starts = [f for f in results.figures if f.measure == START]
    panels = len(names) + bool(starts)
    columns = min(panels, 2)
    rows = -(-panels // columns)
    size = (6.6 * columns, 0.9 + 2.5 * rows)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax, name in zip(axes.flat, names, strict=False):
        _steps(ax, results, name)
    if starts:
        _start(axes.flat[len(names)], starts)
    for ax in axes.flat[panels:]:
        ax.set_axis_off()
        _numbers(ax, results)
    machine = results.machine
    fig.suptitle(
        "Time of a training step. Bars are medians, dots are rounds; x is how many times as long as learnax takes",
        fontsize=13,
    )
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['devices']}"
    fig.supxlabel(f"{where}; jax {machine['jax']}, {machine['date'][:10]}", fontsize=8, color="dimgray")
    part = path.with_suffix(".part.png")
    fig.savefig(part, dpi=120)
    part.replace(path)
    plt.close(fig)


def _steps(ax: Any, results: Results, name: str) -> None:
    figures = [f for f in results.figures if (f.workload, f.measure) == (name, STEP) and f.contender in COLOURS]
    own = figures[0].median
    factor, unit = (1e6, "µs") if max(f.median for f in figures) < 1e-3 else (1e3, "ms")
    # One that takes many times as long is cut, and its number says so.
    limit = 1.1 * factor * max(f.median for f in figures if f.median < 4 * own)
    for row, figure in enumerate(figures):
        bold = "bold" if row == 0 else "normal"
        ax.barh(row, min(figure.median * factor, limit), height=0.66, color=COLOURS[figure.contender])
        dots = [sample * factor for sample in figure.samples if sample * factor < limit]
        ax.plot(dots, [row] * len(dots), "o", ms=3, color="black", alpha=0.35)
        ax.text(1.14 * limit, row, seconds(figure.median), va="center", ha="right", weight=bold)
        ax.text(1.29 * limit, row, f"{figure.median / own:.2f}x", va="center", ha="right", weight=bold)
    ax.set_yticks(range(len(figures)), [f.contender for f in figures])
    ax.set(xlim=(0, limit), ylim=(max(len(figures), 4) - 0.4, -0.6), xlabel=f"{unit} a step")
    ax.set_title(name, loc="left", weight="bold")
    _clean(ax)


def _start(ax: Any, figures: list[Any]) -> None:
    import matplotlib.pyplot as plt

    shades = plt.get_cmap("YlOrRd")
    limit = 1.1 * max(f.median for f in figures)
    for row, figure in enumerate(figures):
        left = 0.0
        for number, part in enumerate(PARTS):
            if part in figure.more:
                label = part if row == 0 else None
                ax.barh(row, figure.more[part], left=left, height=0.66, color=shades(0.15 + 0.14 * number), label=label)
                left += figure.more[part]
        other = max(figure.median - left, 0)
        colour = COLOURS["hand"] if not left else "#dddddd"
        ax.barh(row, other, left=left, height=0.66, color=colour, label="other" if row == 0 else None)
        ax.text(1.25 * limit, row, seconds(figure.median), va="center", ha="right")
    ax.set_yticks(range(len(figures)), [f.contender.replace("learnax, ", "") for f in figures])
    ax.set(xlim=(0, limit), ylim=(3.6, -0.6), xlabel="s from the command to the end of the first step")
    ax.set_title(f"{figures[0].workload}: start", loc="left", weight="bold")
    ax.legend(fontsize=8, ncols=7, loc="lower left", frameon=False, handlelength=1, columnspacing=1)
    _clean(ax)


def _numbers(ax: Any, results: Results) -> None:
    """What is a number and no bar."""
    wanted = {("mlp-128", HOST), ("nested-0", WAITED), ("nested-2", WAITED), ("mlp-2048", MEMORY)}
    figures = [f for f in results.figures if (f.workload, f.measure) in wanted or f.measure in (STALL, SLOWED)]
    lines = [(f"{f.measure}, {f.workload}, {f.contender}", amount(f)) for f in figures]
    lines += [(f"{r.measure}: {r.contender} / {r.opponent}", str(r.ratio)) for r in results.ratios if r.measure != STEP]
    for row, (name, number) in enumerate(lines):
        place = 0.98 - row / max(len(lines), 12)
        ax.text(0, place, name, transform=ax.transAxes, va="top", fontsize=8)
        ax.text(1.29, place, number, transform=ax.transAxes, va="top", ha="right", fontsize=8, weight="bold")


def _clean(ax: Any) -> None:
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", alpha=0.25)
    ax.set_axisbelow(True)
