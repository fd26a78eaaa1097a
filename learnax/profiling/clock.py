"""When this package began to be imported, and how long that took: told once, to the first trainer of a process."""

import time

BEGAN = time.perf_counter()
_import_seconds = 0.0


def imported() -> None:
    """Tells that the import is done."""
    global _import_seconds
    _import_seconds = time.perf_counter() - BEGAN


def take_import_seconds() -> float:
    """Seconds of the import, for the first that asks; 0 after that, for nobody waits for it twice."""
    global _import_seconds
    taken, _import_seconds = _import_seconds, 0.0
    return taken
