"""`python -m learnax preflight --target h100:8 train.py`: would this script's run fit GPUs that are not here?"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import jax

from learnax.engine.targets import target_of
from learnax.loop import Loop
from learnax.parts import Parts
from learnax.profiling.program import NO_PROGRAM, is_program, missing_script

TEXT = """\
The script runs as it stands, with its own arguments, up to its first train(): what it does before that, it does. Then
its programs are compiled for the GPUs that are named, on this machine's CPU, and it ends. The status is 0 where the run
fits, 1 where it does not, 2 where that was not found out.

example:
  python -m learnax preflight --target h100:8 train.py --epochs 3
"""


class _ReachedError(SystemExit):
    """The script has come to its training; no script catches this with what may go wrong in it."""

    def __init__(self, parts: Parts):
        super().__init__(0)
        self.parts = parts


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line: `target`, and `program` with its arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m learnax preflight",
        description="Finds out whether a script's run fits GPUs that are not here.",
        epilog=TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", required=True, metavar="GPU[:COUNT]", help="a100, h100, h200, b200; h100:8")
    parser.add_argument("-m", nargs=argparse.REMAINDER, metavar="MODULE", help="a module in place of a script")
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="SCRIPT [ARGS ...]")
    args = parser.parse_args(arguments)
    args.program = ["-m", *args.m] if args.m is not None else args.program
    if not is_program(args.program):
        parser.error(NO_PROGRAM)
    try:
        target_of(args.target)
    except ValueError as error:
        parser.error(f"--{error}")
    missing = missing_script(args.program)
    if missing is not None:
        parser.error(missing)
    return args


def main(arguments: Sequence[str]) -> int:
    """Runs the command; its exit status.

    Args:
        arguments: the words behind the command's name.
    """
    args = parse(arguments)
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # all is compiled here, and a GPU's driver is not looked for
    parts = run_of(args.program)
    if parts is None:
        words = " ".join(args.program[:2] if args.program[0] == "-m" else args.program[:1])
        return _failed(f"{words} ended without a call of train(): there was no run to look at")
    try:
        fit = parts.fit(args.target)
    except (RuntimeError, ValueError) as error:
        return _failed(str(error))
    print(fit)
    return 0 if fit.fits else 1


def run_of(program: Sequence[str]) -> Parts | None:
    """Runs a program up to its first training; what that run is made of, or None where the program comes to none."""
    with _as_main(program), _stopped_at_training():
        try:
            if program[0] == "-m":
                runpy.run_module(program[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(program[0], run_name="__main__")
        except _ReachedError as reached:
            return reached.parts
        except SystemExit as ended:
            if ended.code not in (None, 0):
                raise
    return None


@contextmanager
def _stopped_at_training() -> Iterator[None]:
    """Inside, a run that would begin raises `_ReachedError`, whichever method of the trainer begins it."""

    def reached(loop: Loop, *args: Any) -> NoReturn:
        del args
        raise _ReachedError(loop.parts)

    with mock.patch.object(Loop, "run", reached), mock.patch.object(Loop, "epoch", reached):
        yield


@contextmanager
def _as_main(program: Sequence[str]) -> Iterator[None]:
    """The arguments and the import path that the program has when Python runs it."""
    module = program[0] == "-m"
    argv = list(program[1:] if module else program)
    folder = os.getcwd() if module else str(Path(program[0]).resolve().parent)
    with mock.patch.object(sys, "argv", argv), mock.patch.object(sys, "path", [folder, *sys.path[1:]]):
        yield


def _failed(text: str) -> int:
    print(f"python -m learnax preflight: {text}", file=sys.stderr)
    return 2
