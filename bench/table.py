"""Writes the performance table of the page on speed from a result: `python -m bench.table FILE.json`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from bench.measure import HOST, SLOWED, STALL, STEP
from bench.processes import START
from bench.report import seconds
from bench.results import Results

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
WORKLOADS = {
    "mlp-128": "MLP, width 128",
    "nnx-mlp": "the same in NNX",
    "equinox-mlp": "the same in Equinox",
    "mlp-2048": "MLP, width 2048",
    "digits": "convolutional net, digits",
    "resnet": "ResNet with batch statistics, digits",
    "gpt": "GPT, {scale} parameters",
    "nested-0": "records made in Python",
    "nested-2": "the same, `num_workers=2`",
}
OPPONENTS = {
    "hand": "hand-written",
    "hand-fused": "the same, fused",
    "linen": "learnax on flax linen",
    "keras-1": "Keras",
    "keras-16": "Keras, 16 steps",
}


def markdown(results: Results) -> str:
    """The table: a step of each workload by each contender, and how many times as long it takes as with learnax."""
    return "\n".join(_lines(results))


def _lines(results: Results) -> Iterator[str]:
    machine = results.machine
    found = {figure.contender for figure in results.figures if figure.measure == STEP}
    columns = {name: title for name, title in OPPONENTS.items() if name in found}
    yield "| a step of | learnax | " + " | ".join(columns.values()) + " |"
    yield "|---|---|" + "---|" * len(columns)
    for name, title in WORKLOADS.items():
        own = results.find(name, "learnax", STEP)
        if own is None:
            continue
        cells = [f"{title.format(scale=_count(results.settings['scale']))}", f"**{seconds(own.median)}**"]
        for other in columns:
            figure = results.find(name, other, STEP)
            cells.append("" if figure is None else f"{seconds(figure.median)} ({figure.median / own.median:.2f}x)")
        yield "| " + " | ".join(cells) + " |"
    yield ""
    yield from _sentences(results)
    versions = ", ".join(f"{name} {machine[name]}" for name in ("jax", "flax", "optax", "keras") if machine.get(name))
    where = f"{machine['cores']} cores of {machine['cpu']}; {machine['devices']}"
    yield f"Medians, on {where}; Python {machine['python']}, {versions}; {machine['date'][:10]}."


def _count(scale: str) -> str:
    return f"{scale[:-1]} {scale[-1].upper()}"


def _sentences(results: Results) -> Iterator[str]:
    start = [results.find("gpt", f"learnax, {number} start", START) for number in ("first", "second")]
    if all(start):
        first, second = (seconds(figure.median) for figure in start if figure)
        yield f"From the command to the end of the GPT's first step: {first}, and {second} when it is started again."
    logged = next((r for r in results.ratios if r.contender == "learnax, wandb"), None)
    if logged:
        yield f"Logging every step of the wide MLP to an offline wandb run takes {logged.ratio.value:.2f} of the time"
        files = next((r for r in results.ratios if r.contender == "learnax, files"), None)
        yield f"without; to TensorBoard and JSON lines together {files.ratio.value:.2f}." if files else "without."
    stall, slowed = (results.find("mlp-4096", "learnax, saves", measure) for measure in (STALL, SLOWED))
    if stall and slowed:
        yield f"A checkpoint of an MLP twice as wide ({stall.more['state_bytes'] / 1e6:.0f} MB) holds the loop for"
        written, longer = seconds(slowed.more["write_s"]), f"{slowed.median:.0%}"
        yield f"{seconds(stall.median)}; for the {written} in which it is written, steps take {longer} longer."
    host = results.find("mlp-128", "learnax", HOST)
    if host:
        yield f"The loop's own work on the host is {seconds(host.median)} a step of the narrow MLP."


def write(page: Path, results: Results) -> None:
    """Puts the table between the page's markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{page} must have the lines {BEGIN} and {END}, once each and in this order")
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{markdown(results)}\n{END}{rest.split(END)[1]}")


def main(arguments: list[str] | None = None) -> None:
    """Reads a result, and writes the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--page", type=Path, default=Path("docs/speed.md"))
    args = parser.parse_args(arguments)
    write(args.page, Results.read(args.result))
    print(f"{args.page}: the table of {args.result}")


if __name__ == "__main__":
    main()
