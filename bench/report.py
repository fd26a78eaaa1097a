"""Results for a person: a table with units in every number."""

from __future__ import annotations

from collections.abc import Iterator

from bench.measure import HOST, LATENCY, SLOWED, STALL, STEP, WAITED
from bench.processes import DEVICE_MEMORY, MEMORY, START
from bench.results import Figure, Results


def seconds(value: float) -> str:
    """Seconds in the unit that suits them, three digits."""
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if abs(value) < limit:
            return f"{_digits(value * factor)} {unit}"
    return f"{_digits(value)} s"


def size(value: float) -> str:
    """Bytes in the unit that suits them."""
    return f"{_digits(value / 1e9)} GB" if value >= 1e9 else f"{_digits(value / 1e6)} MB"


def rate(value: float) -> str:
    """A number for a second, three digits."""
    return f"{value:,.0f}" if value >= 100 else _digits(value)


def amount(figure: Figure) -> str:
    """A figure's median with its unit."""
    return {"s": seconds, "B": size, "n": lambda count: f"{count:.0f}", "": lambda share: f"{share:.1%}"}[figure.unit](
        figure.median
    )


def table(results: Results) -> str:
    """Everything that was measured, as text."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Results) -> Iterator[str]:
    machine = results.machine
    names = [name for name in ("python", "jax", "flax", "optax", "keras") if machine[name]]
    versions = ", ".join(f"{name} {machine[name]}" for name in names)
    yield f"{machine['cpu']}, {machine['cores']} cores; devices: {machine['devices']}; {versions}"
    for name in dict.fromkeys(figure.workload for figure in results.figures):
        yield ""
        yield from _steps(results, name)
        yield from _others(results, name)
    if results.notes:
        yield ""
        yield from results.notes


def _steps(results: Results, name: str) -> Iterator[str]:
    yield f"{name:<24}{'a step':>10}{'steps/s':>14}{'items/s':>16}    learnax / this, 95 % interval"
    for figure in results.figures:
        if (figure.workload, figure.measure) == (name, STEP) and "," not in figure.contender:
            against = _ratio(results, name, STEP, "learnax", figure.contender)
            rates = [f"{rate(figure.more[f'{each}_per_s'])} /s" for each in ("steps", "items")]
            yield f"  {figure.contender:<22}{amount(figure):>10}{rates[0]:>14}{rates[1]:>16}    {against}".rstrip()


def _others(results: Results, name: str) -> Iterator[str]:
    for figure in results.figures:
        if figure.workload != name:
            continue
        who, more = figure.contender, figure.more
        if figure.measure == LATENCY:
            tail = f"p90 {seconds(more['p90'])}, p99 {seconds(more['p99'])}"
            yield f"  {LATENCY}, {who}: median {amount(figure)}, {tail}"
        elif figure.measure == HOST:
            dispatch = f"{seconds(more['per_dispatch_s'])} a dispatch of {more['steps_per_dispatch']:.0f}"
            yield f"  {HOST}: {amount(figure)} ({dispatch})"
        elif figure.measure == START:
            parts = ", ".join(f"{part} {seconds(value)}" for part, value in more.items())
            yield f"  {START}, {who}: {amount(figure)}" + (f" ({parts})" if parts else "")
        elif figure.measure in (WAITED, MEMORY, DEVICE_MEMORY, STALL):
            state = f" (state of {size(more['state_bytes'])})" if "state_bytes" in more else ""
            yield f"  {figure.measure}, {who}: {amount(figure)}{state}"
        elif figure.measure == SLOWED:
            yield f"  {figure.measure}, {who}: {amount(figure)} (for {seconds(more['write_s'])})"
        elif figure.measure == STEP and "share_of_matrix_rate" in more:
            yield f"  matrix products at {more['share_of_matrix_rate']:.0%} of the rate measured for them alone"
    for c in results.ratios:
        if c.workload == name and c.measure != STEP:
            ratio = _ratio(results, name, c.measure, c.contender, c.opponent)
            yield f"  {c.measure}, {c.contender} / {c.opponent}: {ratio}"


def _ratio(results: Results, workload: str, measure: str, contender: str, opponent: str) -> str:
    for c in results.ratios:
        if (c.workload, c.measure, c.contender, c.opponent) == (workload, measure, contender, opponent):
            if c.target is None:
                return str(c.ratio)
            return f"{c.ratio}, aim {c.target:.2f}: {'met' if c.ratio.value <= c.target else 'missed'}"
    return ""


def _digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
