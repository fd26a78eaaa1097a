"""`python -m learnax report a/ b/ --out compare.html`: two runs or more on one page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from learnax.sinks.compare import compare

TEXT = """\
Each run is the page that run=learnax.sinks.Report(folder) or trainer.report(path) has written, or the folder that it is
in. The page shows their curves over each other, arguments that differ, speed, and where the time went.

example:
  python -m learnax report runs/a runs/b --out compare.html
"""


def main(arguments: Sequence[str]) -> int:
    """Writes the page; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m learnax report",
        description="Writes one page of several runs.",
        epilog=TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a page, or the folder that it is in")
    parser.add_argument("--out", required=True, metavar="FILE", help="where the page goes, compare.html for one")
    args = parser.parse_args(arguments)
    try:
        print(compare(args.runs, args.out))
    except (OSError, ValueError) as error:
        print(f"python -m learnax report: {error}", file=sys.stderr)
        return 2
    return 0
