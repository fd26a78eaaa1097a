"""A small language model on streamed text: read, shuffled, tokenised and packed on the fly by grain, and resumed.

python examples/text.py            # or `make text`; what it draws is in out/text/

The corpus is what every Python installation has: the licences of its packages. Ctrl-C stops the run; the same command
goes on from there, with nothing read again and nothing skipped: grain tells where its stream stands, and a checkpoint
holds that.
"""

import argparse
import importlib.metadata
from pathlib import Path

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from learnax.data import Stream
from learnax.metrics import Mean
from learnax.models import Linen
from learnax.registry import Registry
from learnax.trainer import Trainer

LENGTH = 96
"""Characters of a datum: whole paragraphs side by side, the last one cut."""
VOCABULARY = 128
"""ASCII; 0 begins a paragraph."""


class Transformer(nn.Module):
    """Tokens `(n, LENGTH)`, and the number of each one's paragraph, to logits of the next ones."""

    width: int = 80
    layers: int = 2
    heads: int = 4

    @nn.compact
    def __call__(self, datum):
        """Logits `(n, LENGTH, VOCABULARY)`. A token sees those before it, of its own paragraph."""
        tokens, paragraphs = datum["tokens"], datum["paragraphs"]
        places = self.param("places", nn.initializers.normal(0.02), (LENGTH, self.width))
        x = nn.Embed(VOCABULARY, self.width)(tokens) + places
        mask = nn.combine_masks(nn.make_causal_mask(tokens), nn.make_attention_mask(paragraphs, paragraphs, jnp.equal))
        for _ in range(self.layers):
            x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(VOCABULARY)(nn.LayerNorm()(x))


def losses(logits, batch):
    """Cross entropy and accuracy over the characters; that which begins another paragraph is not to be told."""
    (datum,) = batch
    following, told = datum["following"], datum["told"].astype(jnp.float32)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, following)
    right = (logits.argmax(-1) == following).astype(jnp.float32)
    counts = told.sum(-1)
    return logits, Mean((entropy * told).sum(-1), counts), {"accuracy": Mean((right * told).sum(-1), counts)}


# ---- the text


def paragraphs():
    """The paragraphs of the licences of all installed packages, each once; every twentieth is held out."""
    found = {}
    for package in importlib.metadata.distributions():
        for file in package.files or ():
            if ".dist-info" in str(file) and file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE")):
                path = Path(file.locate())
                if path.is_file():
                    text = path.read_text("ascii", "ignore").replace("\r", "")
                    found |= dict.fromkeys(" ".join(part.split()) for part in text.split("\n\n"))
    whole = sorted(part for part in found if len(part) > 40)
    return [part for i, part in enumerate(whole) if i % 20], whole[::20]


def tokenised(text):
    """A paragraph as tokens, behind the one that begins it."""
    return {"tokens": np.frombuffer(b"\0" + text.encode("ascii"), np.uint8).astype(np.int32)}


def as_datum(packed):
    """Packed paragraphs as what the model takes and what it is to say."""
    tokens, numbers = packed["tokens"], packed["tokens_segment_ids"]
    return {
        "tokens": tokens[:-1],
        "paragraphs": numbers[:-1],
        "following": tokens[1:],
        "told": numbers[:-1] == numbers[1:],
    }


def streamed(texts, seed):
    """Texts in an order of each pass's own, without end, tokenised and packed as they are asked for."""
    data = grain.MapDataset.source(texts).seed(seed).shuffle().repeat().map(tokenised).to_iter_dataset()
    packed = grain.experimental.ConcatThenSplitIterDataset(data, length_struct={"tokens": LENGTH + 1})
    return Stream(packed.map(as_datum))


def stacked(texts):
    """The same as a list, once through the texts in their own order."""
    data = grain.MapDataset.source(texts).map(tokenised).to_iter_dataset()
    packed = grain.experimental.ConcatThenSplitIterDataset(data, length_struct={"tokens": LENGTH + 1})
    return [datum for datum in packed.map(as_datum) if len(datum["tokens"]) == LENGTH]


# ---- what comes of it


def generated(params, prompt, length, seed=0, temperature=0.7):
    """Characters drawn one after another, behind a prompt of at most LENGTH - 1."""

    def say(carry, key):
        tokens, place = carry
        logits = Transformer().apply({"params": params}, {"tokens": tokens, "paragraphs": jnp.ones_like(tokens)})
        said = jax.random.categorical(key, logits[place] / temperature)
        # Where there is no more room, the text moves to the left.
        full = place + 1 == LENGTH
        tokens = jnp.where(full, jnp.roll(tokens, -1), tokens)
        place = jnp.where(full, place, place + 1)
        return (tokens.at[place].set(said), place), said

    codes = tokenised(prompt)["tokens"]
    tokens = jnp.zeros(LENGTH, jnp.int32).at[: len(codes)].set(codes)
    keys = jax.random.split(jax.random.key(seed), length)
    _, said = jax.jit(lambda *carry: jax.lax.scan(say, carry, keys))(tokens, len(codes) - 1)
    return prompt + bytes(np.asarray(said).astype(np.uint8)).decode("ascii").replace("\0", "\n")


def draw(metrics, every, path):
    """Bits of a character over the run, training beside validation."""
    fig, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    bits = {name: np.asarray(metrics[f"{name}/loss"]) / np.log(2) for name in ("train", "val")}
    ax.plot(np.arange(1, len(bits["train"]) + 1), bits["train"], color="tab:blue", alpha=0.4, lw=1, label="training")
    steps = np.minimum(np.arange(1, len(bits["val"]) + 1) * every, len(bits["train"]))
    ax.plot(steps, bits["val"], "o-", ms=4, color="tab:orange", label="paragraphs held out")
    ax.set(xlabel="step", ylabel="bits of a character", ylim=(0, 7), title="Licences, streamed")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def build(steps, registry=None, **overrides):
    """A trainer of it."""
    training, held_out = paragraphs()
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 20, steps)
    options = {
        "model": Linen(Transformer(), batched=True),
        "learning_rate": rate,
        "losses": losses,
        "seed": 0,
        "train_dataset": streamed(training, seed=0),
        "num_steps": steps,
        "val_every_steps": 200,
        "batch_size": 16,
        "num_workers": 0,
        "val_datasets": {"val": stacked(held_out)},
        "optimizer": optax.adamw(rate),
        "registry": registry,
        "load_checkpoint": True,
        "save_every": 200,
    }
    return Trainer(**options | overrides)


def main():
    """Trains, draws, and lets the model speak."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="training steps; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/text"), help="folder for all that it writes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = build(args.steps, Registry("text", args.out))
    trainer.train()
    draw(trainer.metrics, 200, args.out / "loss.png")
    bits = np.asarray(trainer.metrics["val/loss"]) / np.log(2)
    print(f"bits of a character: {bits[0]:.2f} after 200 steps, {bits[-1]:.2f} at the end; {args.out / 'loss.png'}")
    for prompt in ("Permission is hereby granted", "THIS SOFTWARE IS PROVIDED"):
        print("---", generated(jax.device_get(trainer.train_state.params), prompt, 200), sep="\n")


if __name__ == "__main__":
    main()
