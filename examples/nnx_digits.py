"""A module of flax's NNX, as in its MNIST tutorial, on scikit-learn's digits.

python examples/nnx_digits.py

The module is split once, when the trainer is built: a step does no work on its graph. Dropout is on in training and off
in validation, and after `train()` the module holds the trained values.
"""

from functools import partial

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from learnax.models import NNX
from learnax.trainer import Trainer


class CNN(nnx.Module):
    """Images `(n, 8, 8, 1)` to logits `(n, 10)`."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, kernel_size=(3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.dropout1 = nnx.Dropout(rate=0.025, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, kernel_size=(3, 3), rngs=rngs)
        self.linear1 = nnx.Linear(128, 64, rngs=rngs)
        self.dropout2 = nnx.Dropout(rate=0.1, rngs=rngs)
        self.linear2 = nnx.Linear(64, 10, rngs=rngs)
        self.pool = partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))

    def __call__(self, x):
        """The logits."""
        x = self.pool(nnx.relu(self.norm1(self.dropout1(self.conv1(x)))))
        x = self.pool(nnx.relu(self.conv2(x)))
        x = nnx.relu(self.dropout2(self.linear1(x.reshape(x.shape[0], -1))))
        return self.linear2(x)


def losses(logits, batch):
    """Cross entropy and accuracy, a number for each image of the share."""
    _, labels = batch
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return logits, loss, {"accuracy": (logits.argmax(-1) == labels).astype(jnp.float32)}


def digits():
    """Training and validation data, lists of `[image, label]`."""
    scans = load_digits()
    data = [
        [image[..., None].astype(np.float32) / 16, np.int32(label)]
        for image, label in zip(scans.images, scans.target, strict=True)
    ]
    data = [data[i] for i in np.random.default_rng(0).permutation(len(data))]
    return data[360:], data[:360]


def build(module, **overrides):
    """A trainer of a module."""
    training, held_out = digits()
    options = {
        "model": NNX(module, batched=True),
        "optimizer": optax.adamw(5e-3),
        "losses": losses,
        "seed": 0,
        "train_dataset": training,
        "num_epochs": 5,
        "batch_size": 64,
        "num_workers": 0,
        "val_datasets": {"val": held_out},
    }
    return Trainer(**options | overrides)


if __name__ == "__main__":
    module = CNN(rngs=nnx.Rngs(0))
    trainer = build(module)
    trainer.train()
    print(f"validation accuracy: {trainer.metrics['val/accuracy'][-1]:.2%}")
    module.eval()  # it is trained: use it as any NNX module
    image, label = digits()[1][0]
    print(f"the first one is a {label}, and is read as a {int(module(image[None]).argmax())}")
