"""A program on a command line: a script, or `-m` and a module, each with its own arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

NO_PROGRAM = "no program: expected a script, or -m and a module, at the end"


def is_program(words: Sequence[str]) -> bool:
    """Whether there is a script, or a module behind `-m`."""
    return bool(words) and list(words) != ["-m"]


def missing_script(words: Sequence[str]) -> str | None:
    """What to say of a script that there is not; None where it is there, or a module is asked for."""
    script = words[0]
    if script == "-m" or Path(script).exists():
        return None
    return f"there is no script {script} in {Path.cwd()}; expected a script, or -m and a module"
