"""A save's folder as storage libraries can be given it: under a name of plain letters, and with plain files in it."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_ODD = re.compile(r"[\[\]*?\\\ud800-\udfff]|:/")
"""In a path: some are a pattern to orbax, which then finds nothing; \\\\ is / to tensorstore; x:/ begins a URL."""
_LONGEST = 256 << 20
"""Bytes of a file that is read at once: all but the arrays' data."""


@contextlib.contextmanager
def spelled(folder: Path) -> Iterator[Path]:
    """The folder's path; where that has letters that are taken for others, a path that leads there for a while.

    Raises:
        OSError: there is no other path.
    """
    if not _ODD.search(str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="learnax-") as temporary:
        link = Path(temporary, "checkpoints")
        if _ODD.search(str(link)):
            raise OSError(
                f"{folder} has one of [ ] * ? \\ or :/ in its path, which storage libraries cannot open; so has the "
                f"folder for temporary files, {temporary}, by which they could: set TMPDIR to another one"
            )
        link.symlink_to(folder.parent, target_is_directory=True)
        yield link / folder.name


def memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def look(folder: Path) -> None:
    """Looks at what is in a save before anything of it is opened: whoever opens a pipe waits for ever.

    Raises:
        ValueError: something that is neither a file nor a folder, or a file that is too long to be what it should be.
        OSError: it cannot be looked at.
    """
    with os.scandir(folder) as entries:
        found = list(entries)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            look(Path(entry.path))
            continue
        mode = entry.stat()  # of a link, what it leads to: storage that keeps equal files once is made of links
        if not stat.S_ISREG(mode.st_mode):
            raise ValueError(f"{entry.path} is no file")
        if mode.st_size > _LONGEST and folder.name != "d":
            raise ValueError(f"{entry.path} has {mode.st_size} bytes, more than a file of its kind can have")
