"""When this package began to be imported, and how long that took."""

import time

BEGAN = time.perf_counter()
import_seconds = 0.0


def imported() -> None:
    """Tells that the import is done."""
    global import_seconds
    import_seconds = time.perf_counter() - BEGAN
