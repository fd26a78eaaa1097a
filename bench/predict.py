"""What `trainer.predict` takes beside a hand-written fused forward loop: `python -m bench.predict`.

100,000 data of the size of a scan of a digit, in a list: stacked outputs by learnax and by hand, and learnax's outputs
one by one, in turns. Each contender reads the list anew, and gives the same numbers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bench.machine import describe_machine
from bench.stats import bootstrap_ratio
from learnax.trainer import Trainer

BATCH, FUSED = 64, 16


class Net(nn.Module):
    """Two layers on an image of 8 by 8."""

    @nn.compact
    def __call__(self, image: Any) -> Any:
        """The scores of ten classes."""
        return nn.Dense(10)(nn.relu(nn.Dense(128)(image.reshape(-1))))


def losses(output: Any, datum: Any) -> Any:
    """There has to be one."""
    return output, (output**2).mean(), {}


def by_hand(params: Any, data: list[Any]) -> np.ndarray:
    """The outputs of all data, by as many batches a dispatch."""
    found, size = [], BATCH * FUSED
    for start in range(0, len(data), size):
        rows = np.stack(data[start : start + size])
        padded = np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), 0)]) if len(rows) < size else rows
        blocks = jax.device_put(padded.reshape(FUSED, BATCH, *rows.shape[1:]))
        found.append((_forward(params, blocks), len(rows)))
    return np.concatenate([np.asarray(outputs).reshape(-1, outputs.shape[-1])[:count] for outputs, count in found])


@jax.jit
def _forward(params: Any, blocks: jax.Array) -> jax.Array:
    one = jax.vmap(lambda image: Net().apply({"params": params}, image))
    outputs: jax.Array = jax.lax.map(one, blocks)
    return outputs


def measure(size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each, a number a round."""
    images = np.random.default_rng(0).normal(size=(size, 8, 8)).astype(np.float32)
    data = list(images)
    trainer = Trainer(Net(), 1e-3, losses, 0, data[: BATCH * FUSED], 1, BATCH, 0, devices=jax.devices()[:1])
    params = jax.tree.map(jnp.array, trainer.train_state.params)
    contenders: dict[str, Callable[[], Any]] = {
        "learnax, stacked": lambda: trainer.predict(data, stacked=True),
        "learnax, one by one": lambda: list(trainer.predict(data)),
        "by hand": lambda: by_hand(params, data),
    }
    results = [np.stack(contender()) for contender in contenders.values()]  # and all is compiled
    for result in results:
        np.testing.assert_allclose(result, results[-1], rtol=1e-5, atol=1e-6)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            began = time.perf_counter()
            contenders[name]()
            taken[name].append(time.perf_counter() - began)
    return taken


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints it."""
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=100_000, help="data; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each; default: %(default)s")
    args = parser.parse_args(arguments)
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['devices']}, jax {machine['jax']}; {args.size} data, {args.rounds} rounds")
    taken = measure(args.size, args.rounds)
    for name, seconds in taken.items():
        ratio = bootstrap_ratio(seconds, taken["by hand"], paired=True)
        print(f"{name:20} {np.median(seconds):7.3f} s  {np.median(seconds) / args.size * 1e6:6.2f} us a datum  {ratio}")


if __name__ == "__main__":
    main()
