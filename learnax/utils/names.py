"""Paths and names that users give: what they stand for, and which are refused."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")
_LONGEST = 255
"""Bytes of a name that a file system takes."""


def expanded(path: str | os.PathLike[str], what: str = "the path") -> Path:
    """A path as its user means it, absolute: with `~` and variables (`$HOME`, `${SCRATCH}`) put in.

    An absolute path that is there as it stands is taken as it stands.

    Args:
        path: what was given.
        what: its name in an error.

    Raises:
        ValueError: it is empty, or names a variable that is not set, or a user that there is not.
    """
    given = os.fspath(path)
    if not given or "\0" in given:
        raise ValueError(f"{what} is {given!r}, which names no folder")
    if os.path.isabs(given) and os.path.exists(given):
        return Path(given)
    text = os.path.expandvars(given)
    unset = _VARIABLE.search(text)
    if unset:
        raise ValueError(f"{what} is {given!r}, but the variable {unset[1] or unset[2]} is not set")
    home = os.path.expanduser(text)
    if home.startswith("~"):
        raise ValueError(f"{what} is {given!r}, but there is no such user; a folder of that name is './{home}'")
    return Path(home).absolute()


def folder_name(name: Any, what: str, *, nested: bool = False) -> str:
    """A name that becomes a folder's, as text.

    Args:
        name: what was given; a whole number is taken as its digits, a `Path` as its text.
        what: the name of the thing in an error.
        nested: whether `/` may part it into folders within folders.

    Raises:
        TypeError: it is no text.
        ValueError: it would be no folder of its own below the one that it is in.
    """
    if hasattr(name, "__index__") and not isinstance(name, bool):
        name = str(int(name))
    elif isinstance(name, os.PathLike):
        name = os.fspath(name)
    if not isinstance(name, str):
        raise TypeError(f"{what} must be text, but is {name!r}")
    for part in name.split("/") if nested else [name]:
        if part in ("", ".", "..") or "/" in part or "\0" in part or len(os.fsencode(part)) > _LONGEST:
            allowed = "any text but '', '.' and '..', of at most 255 bytes, without NUL"
            slash = ", also with '/' between such" if nested else " and without '/'"
            raise ValueError(f"{what} becomes the name of a folder and cannot be {name!r}; allowed is {allowed}{slash}")
    return name
