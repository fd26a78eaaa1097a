"""What a name stands for: the saves that are meant, the one to be taken first."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

from learnax.checkpoint import legacy
from learnax.checkpoint.folder import Folder, best

LATEST, BEST = "latest", "best"
RESERVED = (LATEST, BEST)
_NEAR = 0.7
"""How much of two words is alike where one is a slip of the other: "bset" for "best" has 0.75."""
_STEP = re.compile(r"(?:steps?|state|checkpoint|ckpt|epoch|iter(?:ation)?|number|no|#)?[\s_.:=#-]*(\d+)[\s.]*")


class MissingError(FileNotFoundError):
    """A checkpoint that was asked for by name or step is not there; those there are are in the text."""


def find(folder: Folder, asked: Any) -> list[Path]:
    """The saves that are meant, or files of 0.1.0; none where the latest is asked for and there is none.

    Args:
        folder: of saves.
        asked: "best"; a step, as a number or its name; a name that a save was given; a path; True, -1, this run's id
            or any other text for the latest.

    Raises:
        MissingError: a named one that is not there.
        FileNotFoundError: text that is near a name, but none.
        TypeError: asked for in another way.
    """
    if asked is True or (not isinstance(asked, str) and asked == -1):
        return _latest(folder)
    if isinstance(asked, os.PathLike) or (isinstance(asked, str) and (os.sep in asked or asked.endswith(".pyd"))):
        return _at(Path(asked), folder)
    if isinstance(asked, str):
        return _named(folder, asked)
    if isinstance(asked, bool) or not hasattr(asked, "__index__"):
        raise TypeError(f"load_checkpoint must be True, -1, 'best', a step, a path or a run's id, but is {asked!r}")
    return _of_step(folder, int(asked)) or _missing(folder, asked)


def listed(folder: Folder) -> dict[str | int, Path]:
    """What can be asked for, and where it is: "latest" and "best" where there are such, names, and each step."""
    latest, old = _latest(folder), legacy.find(folder.path)
    entries = folder.entries()
    there: dict[str | int, Path] = {LATEST: latest[0]} if latest else {}
    if best(entries) is not None or BEST in old:
        there[BEST] = _best(folder)[0]
    steps: dict[int, Path] = {step: path for step, path in old.items() if isinstance(step, int)}
    for number, entry in entries.items():
        steps[entry.step] = folder.given / str(number)
        if entry.name is not None:
            there[entry.name] = folder.given / str(number)
    return there | dict(sorted(steps.items()))


def _latest(folder: Folder) -> list[Path]:
    old = legacy.find(folder.path)
    steps = sorted((step for step in old if isinstance(step, int)), reverse=True)
    saves = [folder.given / str(number) for number in reversed(folder.numbers())]
    return [*saves, *(old[name] for name in (LATEST, *steps) if name in old)]


def _best(folder: Folder) -> list[Path]:
    old = legacy.find(folder.path)
    found = [folder.given / str(n) for n, entry in reversed(folder.entries().items()) if entry.best is not None]
    return [*found, *([old[BEST]] if BEST in old else [])]


def _of_step(folder: Folder, step: int) -> list[Path]:
    old = legacy.find(folder.path)
    found = [folder.given / str(n) for n, entry in reversed(folder.entries().items()) if entry.step == step]
    return [*found, *([old[step]] if step in old else [])]


def _at(path: Path, folder: Folder) -> list[Path]:
    # A bare file name may be meant in the folder: that is where 0.1.0 put them.
    for place in (path, folder.path / path):
        if place.exists():
            return [place.absolute()]
    raise MissingError(f"no checkpoint {str(path)!r}; in {folder.given} there are: {_there(folder)}")


def _named(folder: Folder, text: str) -> list[Path]:
    entries = folder.entries()
    found = [folder.given / str(number) for number, entry in reversed(entries.items()) if entry.name == text]
    if found:
        return found
    if text == BEST:
        return _best(folder) or _missing(folder, text)
    if text.isdecimal():
        found = _of_step(folder, int(text))
        if found:
            return found
    if text in ("", "-1", LATEST, folder.given.parent.name):
        return _latest(folder)
    if text.isdecimal():
        return _missing(folder, text)
    near = _near(text, [*RESERVED, *(entry.name for entry in entries.values() if entry.name is not None)])
    if near is not None:
        raise FileNotFoundError(
            f"no checkpoint {text!r} in {folder.given}; there are: {_there(folder)}. Is {near} meant? (This run's id "
            f"would mean the latest, but is {folder.given.parent.name!r})"
        )
    return _latest(folder)  # a run's id


def _near(text: str, names: list[str]) -> str | None:
    """What a text is a slip of, as it would be written; None where of nothing."""
    word = text.strip().casefold()
    step = _STEP.fullmatch(word)
    if step:
        return step[1]
    close = difflib.get_close_matches(word, [name.casefold() for name in names], 1, _NEAR)
    return next((repr(name) for name in names if close and name.casefold() == close[0]), None)


def _missing(folder: Folder, asked: Any) -> list[Path]:
    raise MissingError(f"no checkpoint {str(asked)!r} in {folder.given}; there are: {_there(folder)}")


def _there(folder: Folder) -> str:
    return ", ".join(str(name) for name in listed(folder)) or "none"
