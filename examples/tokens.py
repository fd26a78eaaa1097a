"""A small language model on lines of text of any length: the loss is a mean over tokens, not over lines.

python examples/tokens.py

Lines are padded to one length, and padding has the weight 0: `Mean(total, weight)` adds both over the data, devices and
accumulated batches, and divides once. Perplexity is right for a validation set of any size.
"""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from learnax.metrics import Mean, Sum
from learnax.models import Linen
from learnax.trainer import Trainer

LENGTH = 64
"""Characters of a line at most, and one more for where it begins."""


class Transformer(nn.Module):
    """Tokens `(n, LENGTH)` to logits of the next ones `(n, LENGTH, 128)`."""

    width: int = 32
    layers: int = 2

    @nn.compact
    def __call__(self, tokens, train: bool):
        """The logits."""
        places = self.param("places", nn.initializers.normal(0.02), (LENGTH, self.width))
        x = nn.Embed(128, self.width)(tokens) + places
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            attend = nn.MultiHeadDotProductAttention(4, dropout_rate=0.1, deterministic=not train)
            x = x + attend(nn.LayerNorm()(x), mask=mask)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(128)(nn.LayerNorm()(x))


def losses(logits, batch):
    """Cross entropy and accuracy over the tokens that are there; and how many these are."""
    _, following = batch
    there = (following > 0).astype(jnp.float32)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, following)
    right = (logits.argmax(-1) == following).astype(jnp.float32)
    counts = there.sum(-1)
    return (
        logits,
        Mean((entropy * there).sum(-1), counts),
        {"accuracy": Mean((right * there).sum(-1), counts), "tokens": Sum(counts)},
    )


def lines(path=Path(__file__).parents[1] / "LICENSE"):
    """Lists of `[tokens, the ones that follow]`, a line each, padded with 0; every fifth is held out."""
    data = []
    for line in filter(None, map(str.strip, path.read_text().splitlines())):
        codes = np.frombuffer(line.encode("ascii", "replace")[:LENGTH].ljust(LENGTH, b"\0"), np.uint8)
        data.append([np.concatenate([[1], codes[:-1]]).astype(np.int32), codes.astype(np.int32)])
    return [datum for i, datum in enumerate(data) if i % 5], data[::5]


def build(**overrides):
    """A trainer of it."""
    training, held_out = lines()
    options = {
        "model": Linen(Transformer(), batched=True, train={"train": True}, eval={"train": False}),
        "learning_rate": 3e-3,
        "losses": losses,
        "seed": 0,
        "train_dataset": training,
        "num_epochs": 20,
        "batch_size": 16,
        "num_workers": 0,
        "val_datasets": {"val": held_out},
    }
    return Trainer(**options | overrides)


if __name__ == "__main__":
    trainer = build()
    trainer.train()
    perplexity = np.exp(trainer.metrics["val/loss"])
    print(f"perplexity of a character: {perplexity[0]:.1f} after one epoch, {perplexity[-1]:.1f} at the end")
    print(f"accuracy: {trainer.metrics['val/accuracy'][-1]:.1%} of {trainer.metrics['val/tokens'][-1]:.0f} characters")
    print(f"devices: {jax.device_count()}")
