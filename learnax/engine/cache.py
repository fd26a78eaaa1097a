"""The compilation cache on disk: a second start of a script finds its programs compiled."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from learnax.utils.names import expanded

_logger = logging.getLogger("learnax")
VARIABLE = "LEARNAX_COMPILATION_CACHE"
OFF = ("", "0", "off", "false", "no")
_CHECKED = "checked"
"""An empty file in the folder: entries that are older were looked at."""
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
    named = VARIABLE if asked is None or isinstance(asked, bool) else "compilation_cache"
    try:
        folder = default_folder() if given is None else expanded(given, named)
        _make_private(folder)
    except OSError as error:
        if given is not None:
            raise
        _logger.info("no compilation cache: %s", error)
        return None
    if _ours != str(folder):
        _remove_damaged(folder)
    if (theirs or _ours) not in (None, str(folder)):
        reset_cache()  # JAX opens its cache once, and would go on with that of the folder before
    jax.config.update("jax_compilation_cache_dir", str(folder))
    _ours = str(folder)
    # By default JAX keeps only programs that took a second to compile. Here all are kept: small models gain as well,
    # and which programs are there does not depend on a clock.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """No compiled program is kept or found inside: those for devices that are not here cannot be read again."""
    on = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # JAX asks once whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", on)
        reset_cache()


def _remove_damaged(folder: Path) -> None:
    """Removes entries that are cut short or changed, so that they are written anew.

    JAX writes an entry in place, so one that is stopped leaves a part; it warns of that at every start, compiles again,
    and never overwrites it. Each entry is looked at once after it was written: a start costs no more for a large cache.
    One that another process is writing just now may be taken from it: it is then compiled once more.
    """
    mark, now = folder / _CHECKED, folder / f"{_CHECKED}-{os.getpid()}"
    try:
        from jax._src.compilation_cache import decompress_executable  # JAX's own reader says what it can read

        now.touch()  # by the clock of the storage
        since = mark.stat().st_mtime_ns if mark.exists() else 0
        damaged = [path for path in folder.glob("*-cache") if not _is_whole(path, since, decompress_executable)]
        for path in damaged:
            path.unlink(missing_ok=True)
        now.replace(mark)
    except (OSError, ImportError) as error:  # a run does not stop for its cache
        _logger.info("the compilation cache %s was not looked through: %s", folder, error)
        return
    if damaged:
        names = ", ".join(sorted(path.name.split("-")[0] for path in damaged))
        _logger.info("damaged entries of the compilation cache were removed, and will be written anew: %s", names)


def _is_whole(path: Path, since: int, decompress: Callable[[bytes], bytes]) -> bool:
    """Whether an entry can be decompressed, which its checksum is part of; or was not touched since it could be."""
    try:
        # The time of a change, not the date of the content: a copy may keep that.
        if path.stat().st_ctime_ns < since:
            return True
        decompress(path.read_bytes())
    except FileNotFoundError:  # another process removes what is damaged, too
        return True
    except OSError:
        raise
    except Exception:  # each compressor raises an error of its own
        return False
    return True


def planned_folder() -> Path | None:
    """The folder that a trainer keeps compiled programs in where it is not told otherwise; None for none.

    It is neither made nor looked at.

    Raises:
        FileNotFoundError: no folder is named, and the user has no home.
        ValueError: what the variable says names no folder.
    """
    given = os.environ.get(VARIABLE)
    if given is not None:
        return None if given.lower() in OFF else expanded(given, VARIABLE)
    theirs = getattr(jax.config, "jax_compilation_cache_dir", None)
    return Path(theirs) if theirs else default_folder()


def default_folder() -> Path:
    """A folder among the user's caches, for this kind of processor.

    Raises:
        FileNotFoundError: the user has no home.
    """
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise FileNotFoundError(
            f"the user has no home folder: set {VARIABLE} to a folder for compiled programs"
        ) from None
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
