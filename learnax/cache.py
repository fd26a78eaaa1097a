"""The compilation cache on disk: a second start of a script finds its programs compiled."""

from __future__ import annotations

import logging
import os
import platform
import stat
import zlib
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

_logger = logging.getLogger("learnax")
VARIABLE = "LEARNAX_COMPILATION_CACHE"
OFF = ("", "0", "off", "false", "no")
_ours: str | None = None
"""The folder that was turned on here, and not by the user."""


def use_cache(asked: str | os.PathLike[str] | bool | None) -> Path | None:
    """Turns JAX's persistent compilation cache on, for this process.

    A cache that the user has given to JAX itself stays. A cached program is code that runs with its
    user's rights, so the folder must be that user's alone.

    Args:
        asked: a folder; False for none; None or True for what the variable `LEARNAX_COMPILATION_CACHE` says
            (a folder, or `off`), or else a folder among the user's caches.

    Returns:
        The folder in use, or None.

    Raises:
        PermissionError: a folder was asked for that others own or may write to.
    """
    global _ours
    theirs = getattr(jax.config, "jax_compilation_cache_dir", None)
    if theirs and theirs == _ours:
        theirs = None
    given = os.environ.get(VARIABLE) if asked is None or isinstance(asked, bool) else os.fspath(asked)
    if asked is False or (given is not None and given.lower() in OFF):
        if _ours is not None and not theirs:  # that of an earlier trainer
            jax.config.update("jax_compilation_cache_dir", None)
            reset_cache()
            _ours = None
        return None
    if given is None and theirs:
        return Path(theirs)
    folder = _default() if given is None else Path(given)
    try:
        _make_private(folder)
    except OSError as error:
        if given is not None:
            raise
        _logger.info("no compilation cache: %s", error)
        return None
    if (theirs or _ours) not in (None, str(folder)):
        reset_cache()  # JAX opens its cache once, and would go on with that of the folder before
    jax.config.update("jax_compilation_cache_dir", str(folder))
    _ours = str(folder)
    # JAX keeps what took a second to compile. All is kept here: with a clock to decide, two starts would keep different
    # programs, and those of a small model are as welcome.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def _default() -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "learnax" / f"programs-{platform.machine()}-{_processor():08x}"


def _processor() -> int:
    """A number for what this processor can do: a home that several machines share must not mix their programs."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    features = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return zlib.crc32(features.encode())


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise PermissionError(
            f"the compilation cache {folder} must be its user's alone: it is owned by user {status.st_uid} with mode "
            f"{stat.filemode(status.st_mode)}; cached programs are code. Choose another folder, or `chmod go-w` it"
        )
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"the compilation cache {folder} cannot be written to")
