"""Profiles a program from outside. It runs once, as it stands, and with its own arguments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from learnax.profiling import nsight, spy, windows
from learnax.profiling.program import NO_PROGRAM, is_program, missing_script

TOOLS = ("py-spy", "nsys", "ncu")
"""What can look at a program; the first is the default."""

STEPS = "100-110"
"""Steps that nsys and ncu look at by default: compiling is over by then, and ten make no large report."""

USAGE = "python -m learnax.profiling [py-spy|nsys|ncu] [options] [--] SCRIPT|-m MODULE [ARGS ...]"

TEXT = f"""\
tools:
  py-spy         where the host's time goes, by sampling; needs no privileges (the default)
                 writes flame.svg and speedscope.json, prints the {spy.ROWS} hottest functions
  nsys           a timeline of kernels and phases in some steps; for Nsight Systems
  ncu            counters of each kernel in some steps; for Nsight Compute

examples:
  python -m learnax.profiling train.py --epochs 3
  python -m learnax.profiling nsys --steps 500-505 -m mypackage.train
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line: `tool`, `out`, `rate`, `steps`, and `program` with its arguments, which nobody else reads."""
    parser = argparse.ArgumentParser(
        prog="python -m learnax.profiling",
        usage=USAGE,
        description=__doc__,
        epilog=TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("out/profile"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--rate", type=int, metavar="N", help=f"py-spy: samples a second; default: {spy.RATE}")
    parser.add_argument("--steps", metavar="A-B", help=f"nsys, ncu: after A steps, until B are made; default: {STEPS}")
    tool, own, program = _split(arguments)
    args = parser.parse_args(own)
    args.tool, args.program = tool, program
    if not is_program(program):
        parser.error(NO_PROGRAM)
    if args.rate is not None and (tool != "py-spy" or args.rate < 1):
        parser.error(
            f"--rate {args.rate}: " + ("expected 1 or more" if tool == "py-spy" else f"{tool} does not sample")
        )
    if args.steps is not None and tool == "py-spy":
        parser.error("--steps: py-spy looks at the whole run; nsys and ncu look at steps")
    try:
        args.windows = ",".join(f"cuda:{part.strip()}" for part in (args.steps or STEPS).split(","))
        windows.parse(args.windows, "--steps")
    except ValueError as error:
        parser.error(str(error))
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program under the tool; its exit status.

    Raises:
        SystemExit: something is missing; what, and what to do, is in the text. The status is 1, or 2 for a command line
            that is wrong.
    """
    args = parse(sys.argv[1:] if arguments is None else arguments)
    missing = missing_script(args.program)
    if missing is not None:
        raise SystemExit(missing)
    command = [sys.executable, *args.program]
    if args.tool == "py-spy":
        return spy.profile(command, args.out, args.rate or spy.RATE)
    return nsight.profile(args.tool, command, args.out, args.windows)


def _split(arguments: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """The tool, this command's own options, and the program: it begins with the first word that is none of both."""
    tool, own, rest = TOOLS[0], [], list(arguments)
    if rest and rest[0] in TOOLS:
        tool = rest.pop(0)
    while rest and rest[0].startswith("-") and rest[0] not in ("--", "-m"):
        own.append(rest.pop(0))
        if own[-1] not in ("-h", "--help") and "=" not in own[-1] and rest:  # each other one has a value
            own.append(rest.pop(0))
    return tool, own, rest[1:] if rest[:1] == ["--"] else rest


if __name__ == "__main__":
    sys.exit(main())
