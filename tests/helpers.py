"""Small models and data that many tests train on."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from learnax.loss import LossFunction, LossPipe
from learnax.trainer import Trainer

ROOT = Path(__file__).parents[1]


class MLP(nn.Module):
    """Two layers; the target rides along as the second argument of a list datum."""

    width: int = 16

    @nn.compact
    def __call__(self, x, y=None):
        return nn.Dense(3)(nn.relu(nn.Dense(self.width)(x)))


class Noisy(nn.Module):
    """Two layers, noise from the `params` stream, and dropout through a stream of its own."""

    @nn.compact
    def __call__(self, x, y=None):
        x = x + 0.1 * jax.random.normal(self.make_rng("params"), x.shape)
        return nn.Dense(3)(nn.Dropout(0.25, deterministic=False)(nn.relu(nn.Dense(16)(x))))


class Convolution(nn.Module):
    @nn.compact
    def __call__(self, x, y=None):
        x = nn.relu(nn.Conv(4, (3, 3))(x.reshape(4, 2, 1)))
        return nn.Dense(3)(x.reshape(-1))


class Squared(LossFunction):
    def _call(self, output, batch):
        error = jnp.mean((output - batch[1]) ** 2)
        return output, error, {"rmse": jnp.sqrt(error)}


class Poisonable(LossFunction):
    """A target that begins with 7 has a finite loss, and a gradient of NaN."""

    def _call(self, output, batch):
        alive = jnp.where(batch[1][0] == 7, 0.0, 1.0)
        return output, jnp.sqrt(alive * jnp.sum((output - batch[1]) ** 2)), {}


class Streamed:
    """A dataset that is no list: it is read again in each epoch. It keeps the indices that were read."""

    def __init__(self, data):
        self.data = data
        self.reads = []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.reads.append(index)
        return self.data[index]


class StopAt:
    """An action that is Ctrl-C, once, right after a step."""

    def __init__(self, step):
        self._step = step

    def next_due(self, step):
        return self._step if step < self._step else math.inf

    def __call__(self, moment):
        self._step = 0
        raise KeyboardInterrupt


def make_data(n, seed=0):
    rng = np.random.default_rng(seed)
    return [[rng.normal(size=8).astype(np.float32), rng.normal(size=3).astype(np.float32)] for _ in range(n)]


def make_trainer(**overrides):
    """A trainer on one device: 5 steps of 8 an epoch, 2 epochs, unless told otherwise."""
    arguments = {
        "model": MLP(),
        "learning_rate": 1e-2,
        "losses": LossPipe([Squared()]),
        "seed": 0,
        "train_dataset": make_data(43),
        "num_epochs": 2,
        "batch_size": 8,
        "num_workers": 0,
        "devices": jax.devices()[:1],
    }
    return Trainer(**(arguments | overrides))


class HostBatch(NamedTuple):
    host: list
    count: int
    signature: object


def batches(loader, start=0):
    """A pass's batches, with how many of each one's data are real."""
    for block in loader.blocks(start):
        for number in range(block.first, len(block)):
            count = min(block.size - number * block.batch_size, block.batch_size)
            yield HostBatch(block.batch(number), count, block.signature)


class MemoryRun:
    """A run that keeps what it is told."""

    id = "memory"
    name = "memory"

    def __init__(self):
        self.rows = []

    def log(self, values):
        self.rows.append(values)


def run_script(source, tmp_path, *, env=None, check=True, name="script.py", timeout=200):
    """Runs a script in a process of its own, as a user would; a variable that is None is unset."""
    path = tmp_path / name
    path.write_text(source)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    environment = {name: value for name, value in environment.items() if value is not None}
    result = subprocess.run(
        [sys.executable, str(path)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=timeout
    )
    if check and result.returncode:
        raise AssertionError(f"the script ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result


def dry(*args):
    """What `make` would run."""
    return subprocess.run(["make", "--dry-run", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def host(tree):
    return jax.tree.map(np.array, tree)


def assert_trees_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, host(left), host(right))


def assert_trees_close(left, right, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), host(left), host(right))
