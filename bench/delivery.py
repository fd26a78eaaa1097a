"""How long batches take to come: `python -m bench.delivery`.

learnax's loader, with its batches stacked and on the devices, beside grain alone with as many worker processes, which
leaves them on the host. Records are nested and made in Python; images of 1 MB are rows of a memory-mapped file.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.stats import bootstrap_ratio
from bench.workloads import Records
from learnax.data import Loader, arrays
from learnax.data.spawning import grain_library

WORKERS = 2


def by_learnax(dataset: Any, batch_size: int) -> Callable[[], Iterator[Any]]:
    """Passes over a dataset by the loader that a trainer has."""
    put = lambda tree: jax.device_put(tree)  # noqa: E731
    loader = Loader("train", dataset, batch_size, tail=False, num_workers=WORKERS, put=put)
    return lambda: (block.device for block in loader.blocks())


def by_grain(dataset: Any, batch_size: int) -> Callable[[], Iterator[Any]]:
    """The same batches by grain's own workers."""
    grain = grain_library()
    data = grain.MapDataset.source(dataset).batch(batch_size, drop_remainder=True)
    read = data.to_iter_dataset().mp_prefetch(grain.MultiprocessingOptions(num_workers=WORKERS))
    return lambda: iter(read)


def seconds(make: Callable[[], Iterator[Any]]) -> float:
    """What a pass takes from its first batch on: workers start before that."""
    batches = make()
    jax.block_until_ready(next(batches))
    began = time.perf_counter()
    last = None
    for batch in batches:
        last = batch
    jax.block_until_ready(jax.tree.map(jnp.asarray, last))
    return time.perf_counter() - began


def measure(dataset: Any, batch_size: int, rounds: int) -> Mapping[str, list[float]]:
    """Passes of both in turns, the first ones for warming up."""
    makers = {"learnax": by_learnax(dataset, batch_size), "grain": by_grain(dataset, batch_size)}
    taken: dict[str, list[float]] = {name: [] for name in makers}
    for number in range(rounds + 1):
        for name in list(makers) if number % 2 else reversed(makers):
            taken[name].append(seconds(makers[name]))
    return {name: values[1:] for name, values in taken.items()}


def main(arguments: list[str] | None = None) -> None:
    """Prints both, and their ratio."""
    parser = argparse.ArgumentParser(prog="python -m bench.delivery", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="passes of each; default: %(default)s")
    parser.add_argument("--images", type=int, default=512, help="images of 1 MB; default: %(default)s")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="learnax-bench-") as folder:
        shape = (args.images, 512, 512, 4)
        path = Path(folder) / "images.npy"
        file = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        for row in file:
            row[:] = np.random.default_rng(0).integers(0, 255, shape[1:], np.uint8)
        file.flush()
        images = arrays(np.lib.format.open_memmap(path, "r"))
        for name, dataset, batch_size in (("records", Records(64 * 256), 64), ("images", images, 16)):
            taken = measure(dataset, batch_size, args.rounds)
            own, other = (float(np.median(values)) for values in taken.values())
            ratio = bootstrap_ratio(taken["learnax"], taken["grain"], paired=True)
            print(f"{name}: learnax {own:.2f} s, grain {other:.2f} s, ratio {ratio}", flush=True)


if __name__ == "__main__":
    main()
