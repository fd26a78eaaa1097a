"""What grain and Python's multiprocessing must be told for workers that do not run the user's script again."""

from __future__ import annotations

import functools
import multiprocessing.spawn
from typing import Any

PROCESS_NAME = "grain-process-prefetch-"
"""How the names of grain's processes begin."""


def grain_library() -> Any:
    """grain, ready to be used in a plain script."""
    from absl import flags

    # grain reads absl flags, which only programs started through absl.app have parsed.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    import grain

    return grain


@functools.cache
def keep_main_from_workers() -> None:
    """From now on, workers are told of no main module, so that they do not run the script again.

    The standard library has no setting for this: it sends the script's path to every spawned
    process. Only grain's processes are concerned, by their name; it starts them in threads of its
    own, at a time of its own, so that this is not taken back.
    """
    original = multiprocessing.spawn.get_preparation_data

    def without_main(name: str) -> dict[str, Any]:
        data = original(name)
        if name.startswith(PROCESS_NAME):
            for key in ("init_main_from_path", "init_main_from_name"):
                data.pop(key, None)
        return data

    multiprocessing.spawn.get_preparation_data = without_main
