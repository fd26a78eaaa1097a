"""Denoising diffusion (Ho et al. 2020, https://arxiv.org/abs/2006.11239) of digits, sampled with averaged parameters.

python examples/ddpm.py

The model draws a time and noise for each image from the random key of its datum. An exponential average of the
parameters (`ema=`) is kept beside them: validation and samples use it, checkpoints hold it.
"""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from sklearn.datasets import load_digits

from learnax.trainer import Trainer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TIMES = 50
BETAS = np.linspace(1e-3, 0.2, TIMES, dtype=np.float32)
KEPT = np.cumprod(1 - BETAS)
"""How much of an image's variance is left after so many steps of noise."""


class Denoiser(nn.Module):
    """The noise in an image `(64,)` at a time."""

    @nn.compact
    def __call__(self, noisy, time):
        """The noise."""
        angles = time.astype(jnp.float32) * 2.0 ** -jnp.arange(8, dtype=jnp.float32)
        x = jnp.concatenate([noisy, jnp.sin(angles), jnp.cos(angles)])
        for _ in range(2):
            x = nn.silu(nn.Dense(256)(x))
        return nn.Dense(64)(x)


class Diffusion(nn.Module):
    """What is trained: noise is put into an image, and found again."""

    @nn.compact
    def __call__(self, image):
        """The noise that is there, and the noise that is seen."""
        one, two = jax.random.split(self.make_rng("noise"))
        time = jax.random.randint(one, (), 0, TIMES)
        noise = jax.random.normal(two, image.shape)
        kept = jnp.asarray(KEPT)[time]
        noisy = jnp.sqrt(kept) * image + jnp.sqrt(1 - kept) * noise
        return noise, Denoiser(name="denoiser")(noisy, time)


def losses(output, datum):
    """The squared error of the noise."""
    noise, seen = output
    return output, jnp.mean((noise - seen) ** 2), {}


def draw(params, key, datum):
    """A `sample_model`: from noise to an image, step by step."""

    def denoise(carry, time):
        x, key = carry
        key, own = jax.random.split(key)
        noise = Denoiser().apply({"params": params["denoiser"]}, x, time)
        beta, kept = jnp.asarray(BETAS)[time], jnp.asarray(KEPT)[time]
        x = (x - beta / jnp.sqrt(1 - kept) * noise) / jnp.sqrt(1 - beta)
        return (jnp.where(time > 0, x + jnp.sqrt(beta) * jax.random.normal(own, x.shape), x), key), None

    times = jnp.arange(TIMES, dtype=jnp.int32)[::-1]
    (x, _), _ = jax.lax.scan(denoise, (jax.random.normal(key, datum.shape), key), times)
    return x


def show(path):
    """A `sample_plot`: the images in a row."""

    def plot(run, samples, _):
        fig, axes = plt.subplots(1, len(samples), figsize=(len(samples), 1.2))
        for ax, sample in zip(axes, samples, strict=True):
            ax.imshow(sample.reshape(8, 8), cmap="gray_r", vmin=-1, vmax=1)
            ax.set_axis_off()
        fig.savefig(path, dpi=110)
        plt.close(fig)

    return plot


def images():
    """Digits from -1 to 1, `(64,)` each."""
    data = load_digits().data.astype(np.float32) / 8 - 1
    return list(data[np.random.default_rng(0).permutation(len(data))])


def build(**overrides):
    """A trainer of it."""
    data = images()
    options = {
        "model": Diffusion(),
        "learning_rate": 1e-3,
        "losses": losses,
        "seed": 0,
        "train_dataset": data[256:],
        "num_epochs": 100,
        "batch_size": 128,
        "num_workers": 0,
        "val_datasets": {"val": data[:256]},
        "ema": lambda step: jnp.minimum(0.999, (1 + step) / (10 + step)),
    }
    return Trainer(**options | overrides)


if __name__ == "__main__":
    path = Path("out/ddpm.png")
    path.parent.mkdir(exist_ok=True)
    trainer = build(sample_model=draw, sample_plot=show(path), sample_every=1200)
    trainer.train()
    print(
        f"validation loss: {trainer.metrics['val/loss'][0]:.3f} after one epoch, {trainer.metrics['val/loss'][-1]:.3f}"
    )
    print(f"samples of the averaged parameters: {path}")
