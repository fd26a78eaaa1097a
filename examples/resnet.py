"""A residual net with batch normalisation, as in Flax's ImageNet example, on scikit-learn's digits.

python examples/resnet.py

The module sees a device's share of the batch at once (`batched=True`), and is called with `train=True` in training and
`train=False` in validation; its batch statistics are carried from step to step, saved and resumed with the rest.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from learnax.models import Linen
from learnax.trainer import Trainer


class Block(nn.Module):
    """Two convolutions around a way past them."""

    filters: int
    strides: int = 1

    @nn.compact
    def __call__(self, x, train: bool):
        """Images `(n, h, w, c)` to `(n, h / strides, w / strides, filters)`."""
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        y = nn.relu(norm()(nn.Conv(self.filters, (3, 3), self.strides, use_bias=False)(x)))
        y = norm(scale_init=nn.initializers.zeros)(nn.Conv(self.filters, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = norm()(nn.Conv(self.filters, (1, 1), self.strides, use_bias=False)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Images `(n, 8, 8, 1)` to logits `(n, 10)`."""

    width: int = 16

    @nn.compact
    def __call__(self, x, train: bool):
        """The logits."""
        x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        for filters, strides in ((self.width, 1), (2 * self.width, 2)):
            x = Block(filters, strides)(x, train)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


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


def build(**overrides):
    """A trainer of it."""
    training, held_out = digits()
    options = {
        "model": Linen(ResNet(), batched=True, train={"train": True}, eval={"train": False}),
        "learning_rate": 3e-3,
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
    trainer = build()
    trainer.train()
    print(f"validation accuracy: {trainer.metrics['val/accuracy'][-1]:.2%}")
