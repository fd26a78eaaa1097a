"""Contrastive learning (SimCLR, Chen et al. 2020, https://arxiv.org/abs/2002.05709) over all devices.

python examples/simclr.py

Each image is to be near its own other view, and far from those of all others: also those on other devices, which
`jax.lax.all_gather(x, "devices")` brings together inside the loss. The run is the same on one device and on several.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from learnax.models import Linen
from learnax.trainer import Trainer


class Encoder(nn.Module):
    """Two views `(n, 64)` to their directions `(n, 2, 16)`."""

    @nn.compact
    def __call__(self, first, second):
        """Unit vectors."""
        views = jnp.stack([first, second], axis=1)
        x = nn.Dense(16)(nn.relu(nn.Dense(64)(views)))
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def losses(output, batch, temperature=0.5):
    """How well each view finds its partner among all of the batch's views, a number for each image of the share."""
    everywhere = jax.lax.all_gather(output, "devices", tiled=True)  # (all, 2, 16)
    own = jax.lax.axis_index("devices") * len(output) + jnp.arange(len(output), dtype=jnp.int32)
    rows = []
    for view in (0, 1):
        near = output[:, view] @ everywhere[:, 1 - view].T / temperature  # the other view of each image
        alike = output[:, view] @ everywhere[:, view].T / temperature  # the same view of the other images
        alike = jnp.where(own[:, None] == jnp.arange(len(everywhere), dtype=jnp.int32), -jnp.inf, alike)
        logits = jnp.concatenate([near, alike], axis=1)
        rows.append((optax.softmax_cross_entropy_with_integer_labels(logits, own), near.argmax(-1) == own))
    loss = sum(entropy for entropy, _ in rows) / 2
    found = sum(right.astype(jnp.float32) for _, right in rows) / 2
    return output, loss, {"found": found}


def views(seed=0):
    """Lists of two views of each digit: pixels that are left out, and noise."""
    rng = np.random.default_rng(seed)
    images = load_digits().data.astype(np.float32) / 16

    def view(image):
        return (image * (rng.random(64) > 0.2) + 0.1 * rng.normal(size=64)).astype(np.float32)

    return [[view(image), view(image)] for image in images[rng.permutation(len(images))]]


def build(**overrides):
    """A trainer of it."""
    data = views()
    options = {
        "model": Linen(Encoder(), batched=True),
        "learning_rate": 3e-3,
        "losses": losses,
        "seed": 0,
        "train_dataset": data[256:],
        "num_epochs": 10,
        "batch_size": 128,
        "num_workers": 0,
        "val_datasets": {"val": data[:256]},
    }
    return Trainer(**options | overrides)


if __name__ == "__main__":
    trainer = build()
    trainer.train()
    found = trainer.metrics["val/found"]
    print(f"the other view is found among 256: {found[0]:.1%} after one epoch, {found[-1]:.1%} at the end")
