"""The same data from each kind of source, read here or by workers: what `tests/test_matrix.py` trains on."""

import json
import os
import pickle
import signal
from pathlib import Path

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np

from learnax.data import Batches, Stream
from learnax.data.order import Order
from learnax.hooks import At
from learnax.loss import LossPipe
from learnax.metrics import Max, Mean, Min
from learnax.registry import Registry
from tests.helpers import make_data, make_trainer

EPOCHS, SIZE, SAVE_EVERY = 3, 43, 3
DATA = [[np.float32(number), *datum] for number, datum in enumerate(make_data(SIZE))]


class Small(nn.Module):
    @nn.compact
    def __call__(self, number, x, y):
        return nn.Dense(3)(nn.relu(nn.Dense(16)(x)))


def numbered(output, batch):
    """A loss, and the number of the datum."""
    number, _, wanted = batch
    loss = jnp.sum((output - wanted) ** 2)
    return output, loss, {"lowest": Min(number), "highest": Max(number), "middle": Mean(number)}


class Lazy:
    """A dataset that is read again in each epoch."""

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return DATA[index]


def ordered():
    """The numbers of the data that all epochs train on, in their orders."""
    return [int(number) for epoch in range(EPOCHS) for number in Order(SIZE, 0, epoch)[:40]]


class Told:
    """A stream that tells where it stands, of an order of each epoch's own."""

    def __init__(self, size=None):
        self._size, self._epoch, self._at = size, 0, 0

    def set_epoch(self, epoch):
        self._epoch, self._at = epoch, 0

    def state_dict(self):
        return {"epoch": self._epoch, "at": self._at}

    def load_state_dict(self, state):
        self._epoch, self._at = state["epoch"], state["at"]

    def __iter__(self):
        order, size = Order(SIZE, 0, self._epoch), self._size or 1
        while self._at < SIZE // size:
            data = [DATA[int(number)] for number in order[self._at * size : (self._at + 1) * size]]
            self._at += 1
            yield stacked(data) if self._size else data[0]


def stacked(data):
    return [np.stack(leaves) for leaves in zip(*data, strict=True)]


def of_grain(batched):
    """Read by two processes of grain's; the epochs follow one another."""
    dataset = grain.MapDataset.source([tuple(DATA[number]) for number in ordered()]).map(list)
    dataset = dataset.batch(8, batch_fn=stacked) if batched else dataset  # before: each process has every other item
    return dataset.to_iter_dataset().mp_prefetch(grain.MultiprocessingOptions(num_workers=2))


CELLS = {
    "list": (lambda: DATA, 0),
    "lazy": (Lazy, 0),
    "lazy, two workers": (Lazy, 2),
    "stream": (lambda: Stream(Told()), 0),
    "stream, two workers": (lambda: Stream(iter(of_grain(False)), steps_per_epoch=5), 0),
    "batches": (lambda: Batches(Told(8)), 0),
    "batches, two workers": (lambda: Batches(iter(of_grain(True)), steps_per_epoch=5), 0),
}
"""Kinds of data, and workers of the trainer's. A list has none, and a stream those of its own."""


def cell(name):
    """The trainer's arguments."""
    source, workers = CELLS[name]
    dataset = source()
    return {
        "model": Small(),
        "losses": LossPipe([numbered]),
        "train_dataset": dataset,
        "num_workers": workers,
        "shuffle": not isinstance(dataset, Stream),
        "num_epochs": EPOCHS,
        "save_every": SAVE_EVERY,
    }


def cells(results):
    """Trains all of them, one after the other, each killed once: those that are not at their end yet."""
    asked = json.loads(os.environ["PEERS"])
    results["runs"], trainers = {}, {}
    for name, step in asked["kills"].items():
        folder = Path(asked["registry"]) / name.replace(", ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        done = [folder / f"done-{index}" for index in range(jax.process_count())]
        mine = jax.process_index()
        killed = folder / "killed"  # of all: the first one's death is the end of the others, wherever they are
        if not all(path.exists() for path in done):

            def kill(moment, path=killed, name=name):
                trainers[name].checkpointer.list_available_checkpoints()  # waits: steps are quicker than a save
                path.touch()
                os.kill(os.getpid(), signal.SIGKILL)

            trainer = trainers[name] = make_trainer(
                **cell(name),
                devices=None,
                registry=Registry("tests", str(folder)),
                load_checkpoint=True,
                hooks=[] if killed.exists() or not step else [At([step], kill, everywhere=True)],
            )
            begins = trainer.log.step
            trainer.train()
            state = jax.tree.map(trainer.engine.whole, trainer.train_state)
            done[mine].write_bytes(pickle.dumps((begins, trainer.metrics, state)))
        results["runs"][name] = pickle.loads(done[mine].read_bytes())
