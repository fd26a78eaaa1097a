"""`python -m learnax`: what is here, and what can be asked for.

A command is a function of the words behind its name, which returns the exit status; it stands in `COMMANDS`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import learnax
from learnax.commands import overview, preflight, report

COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "preflight": ("would a script's run fit GPUs that are not here?", preflight.main),
    "report": ("two runs or more on one page", report.main),
}
"""Name -> what `--help` says of it, and the function."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command, or says what is here; the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        print(overview.text(learnax.__version__))
        return 0
    if words[0] in COMMANDS:
        return COMMANDS[words[0]][1](words[1:])
    lines = [f"  {name:14}{text}" for name, (text, _) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m learnax",
        description="Without a command: versions, devices, what is installed, where folders are.",
        epilog="\n".join(["commands (each has a --help):", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=learnax.__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="and its arguments")
    parser.parse_args(words[:1])
    return 2  # one of these two options, or no command, ends the parsing


if __name__ == "__main__":
    sys.exit(main())
