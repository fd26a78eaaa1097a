"""What is trained: a model, a loss and data, the same for every contender."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

IN, OUT = 64, 10
"""Features and targets of an MLP's datum."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """One thing to train.

    Attributes:
        name: what it is called on the command line and in results.
        model: what learnax trains: a flax module, which takes one datum or a batch of them, or one in an adapter.
        loss: `(output, datum) -> scalar`, a mean over all there is, so that it takes a batch, too.
        data: a list of data, or a dataset that works for each item.
        batch_size: data per step.
        steps: steps of a round; one pass over the data.
        learning_rate: Adam's.
        keras: makes the same model in Keras, with its loss; None where nobody needs it.
        num_workers: processes that read the data for learnax.
        live: whether a hand-written loop reads the data as it goes, because reading is what is measured.
        flops: multiplications and additions in the matrix products of a step; 0 where they are not counted.
        dtype: what the matrices are multiplied in.
        kind: the idiom of a loop written by hand, see `bench.opponents.HANDS`.
        twin: a workload of the same computation in flax linen, which learnax is measured against.
        optimizer: makes an optimiser of the learning rate; None is Adam. With one, the loop written by hand clips, too.
        fused: steps in learnax's dispatches, as its argument `steps_per_execution` has them.
    """

    name: str
    model: Any
    loss: Callable[[Any, Any], jax.Array]
    data: Any
    batch_size: int
    steps: int
    learning_rate: float = 1e-3
    keras: Callable[[], tuple[Any, str | Any]] | None = None
    num_workers: int = 0
    live: bool = False
    flops: float = 0.0
    dtype: Any = jnp.float32
    kind: str = "linen"
    twin: Callable[[], Workload] | None = None
    optimizer: Callable[[float], optax.GradientTransformation] | None = None
    fused: int | str = "auto"

    def arguments(self, datum: Any) -> list[Any]:
        """A datum or a batch as the model's arguments."""
        return datum if isinstance(datum, list) else [datum]

    def losses(self, output: Any, datum: Any) -> tuple[Any, jax.Array, dict[str, Any]]:
        """The loss as learnax takes it, of one datum that is always a list there."""
        return output, self.loss(output, datum), {}

    def given(self, epochs: int) -> dict[str, Any]:
        """What everybody has to give a `Trainer`, by name."""
        return {
            "model": self.model,
            "learning_rate": self.learning_rate,
            "losses": self.losses,
            "seed": 0,
            "train_dataset": self.data,
            "num_epochs": epochs,
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "steps_per_execution": self.fused,
            "optimizer": None if self.optimizer is None else self.optimizer(self.learning_rate),
        }


# ---- multilayer perceptrons: all dispatch (128) or all memory (2048)


class MLP(nn.Module):
    """Three dense layers, or as many as it is told; the target rides along."""

    width: int
    layers: int = 3

    @nn.compact
    def __call__(self, x: Any, y: Any) -> Any:
        """The prediction."""
        for _ in range(self.layers - 1):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(OUT)(x)


def squared_error(output: Any, datum: Any) -> jax.Array:
    """Mean squared error."""
    return jnp.mean((output - datum[1]) ** 2)


def mlp(width: int, steps: int) -> Workload:
    """A three-layer MLP; its state takes 52 MB at a width of 2048, 205 MB at 4096."""
    rng = np.random.default_rng(0)
    xs = rng.normal(size=(64 * steps, IN)).astype(np.float32)
    ys = np.tanh(xs @ rng.normal(size=(IN, OUT)).astype(np.float32) / 8)
    data = [[x, y] for x, y in zip(xs, ys, strict=True)]

    def in_keras() -> tuple[Any, str]:
        import keras

        hidden = [keras.layers.Dense(width, activation="relu") for _ in range(2)]
        return keras.Sequential([keras.Input((IN,)), *hidden, keras.layers.Dense(OUT)]), "mse"

    return Workload(f"mlp-{width}", MLP(width), squared_error, data, 64, steps, keras=in_keras)


class Deep(nn.Module):
    """Many narrow layers, each behind a norm: a program that is long for what it computes."""

    layers: int

    @nn.compact
    def __call__(self, x: Any, y: Any) -> Any:
        """The prediction."""
        for _ in range(self.layers):
            x = nn.relu(nn.Dense(64)(nn.LayerNorm()(x)))
        return nn.Dense(OUT)(x)


def on_mlp_data(name: str, model: Any, steps: int) -> Workload:
    """A model on the data of the MLP."""
    return dataclasses.replace(mlp(128, steps), name=name, model=model, keras=None)


def deep(layers: int, steps: int) -> Workload:
    """A narrow MLP of many layers."""
    return on_mlp_data(f"deep-{layers}", Deep(layers), steps)


def tiny(leaves: int, steps: int) -> Workload:
    """An MLP of width 8 whose training state has so many leaves, one step a dispatch: all of it is the host."""
    rng = np.random.default_rng(0)
    xs = rng.normal(size=(8 * steps, 8)).astype(np.float32)
    ys = np.tanh(xs @ rng.normal(size=(8, OUT)).astype(np.float32) / 8)
    data = [[x, y] for x, y in zip(xs, ys, strict=True)]
    # A layer has a kernel and a bias, and Adam two moments of each; the other leaves are counts and hyperparameters.
    model = MLP(8, (leaves - 8) // 6)
    return Workload(f"tiny-{leaves}", model, squared_error, data, 8, steps, fused=1)


def nnx_mlp(width: int, steps: int) -> Workload:
    """The same MLP as a module of flax's NNX, which sees batches."""
    from flax import nnx

    from learnax.models import NNX

    class OfNNX(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.first = nnx.Linear(IN, width, rngs=rngs)
            self.second = nnx.Linear(width, width, rngs=rngs)
            self.last = nnx.Linear(width, OUT, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.last(nnx.relu(self.second(nnx.relu(self.first(x)))))

    twin = mlp(width, steps)
    model = NNX(OfNNX(nnx.Rngs(0)), batched=True)
    return Workload("nnx-mlp", model, squared_error, twin.data, 64, steps, kind="nnx", twin=lambda: mlp(width, steps))


def equinox_mlp(width: int, steps: int) -> Workload:
    """The same MLP as an Equinox module, which sees one datum."""
    import equinox

    from learnax.models import Equinox

    twin = mlp(width, steps)
    model = Equinox(equinox.nn.MLP(IN, OUT, width, 2, key=jax.random.key(0)))
    return Workload(
        "equinox-mlp",
        model,
        squared_error,
        twin.data,
        64,
        steps,
        kind="equinox",
        twin=lambda: mlp(width, steps),
    )


OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "adamw": optax.adamw,
    "lion": optax.lion,
    "sgd": functools.partial(optax.sgd, momentum=0.9),
    "adafactor": optax.adafactor,
    "muon": optax.contrib.muon,
}
"""Optimisers that the MLPs are trained with, beside the default one, by name."""


def optimized(optimizer: str, width: int, steps: int) -> Workload:
    """The MLP with another optimiser."""
    workload = mlp(width, steps)
    return dataclasses.replace(workload, name=f"{optimizer}-{width}", optimizer=OPTIMIZERS[optimizer], keras=None)


# ---- a residual net with batch normalisation


class ResNet(nn.Module):
    """Two residual blocks with batch normalisation on images `(n, 8, 8, 1)`."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Ten logits of each."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu(norm()(nn.Conv(16, (3, 3), use_bias=False)(x)))
        for filters, strides in ((16, 1), (32, 2)):
            y = nn.relu(norm()(nn.Conv(filters, (3, 3), strides, use_bias=False)(x)))
            y = norm()(nn.Conv(filters, (3, 3), use_bias=False)(y))
            if x.shape != y.shape:
                x = norm()(nn.Conv(filters, (1, 1), strides, use_bias=False)(x))
            x = nn.relu(x + y)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


def resnet(passes: int) -> Workload:
    """A small ResNet on scikit-learn's digits, whose batch statistics are carried from step to step."""
    from learnax.models import Linen

    scans = digits(passes)
    model = Linen(ResNet(), batched=True, train={"train": True}, eval={"train": False})
    return Workload("resnet", model, cross_entropy, scans.data, 64, scans.steps, kind="statistics")


# ---- a convolutional net on real scans


class ConvNet(nn.Module):
    """Two convolutions and two dense layers on an image `(8, 8, 1)`; the label rides along."""

    @nn.compact
    def __call__(self, image: Any, label: Any) -> Any:
        """Ten logits."""
        x = nn.relu(nn.Conv(32, (3, 3))(image))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(64, (3, 3))(x))
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x.reshape(*x.shape[:-3], -1))))


def cross_entropy(logits: Any, datum: Any) -> jax.Array:
    """Mean cross entropy of integer labels."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, datum[1]).mean()


def digits(passes: int) -> Workload:
    """A small convolutional net on scikit-learn's digits, each scan seen `passes` times in a round."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = scans.images[..., None].astype(np.float32) / 16
    order = np.random.default_rng(0).permutation(len(images))[:1024]
    data = [[images[i], np.int32(scans.target[i])] for i in order] * passes

    def in_keras() -> tuple[Any, Any]:
        import keras

        layers = keras.layers
        model = keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                layers.Conv2D(32, 3, padding="same", activation="relu"),
                layers.MaxPooling2D(),
                layers.Conv2D(64, 3, padding="same", activation="relu"),
                layers.Flatten(),
                layers.Dense(128, activation="relu"),
                layers.Dense(10),
            ]
        )
        return model, keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    return Workload("digits", ConvNet(), cross_entropy, data, 64, 16 * passes, keras=in_keras)


# ---- a transformer


class Size(NamedTuple):
    """How large a GPT is, and what it is fed."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    context: int
    batch_size: int
    dtype: Any


SIZES = {
    "10m": Size(6, 368, 8, 256, 64, 4, jnp.float32),
    "124m": Size(12, 768, 12, 32_768, 1024, 16, jnp.bfloat16),
    "1b": Size(20, 2048, 16, 32_768, 1024, 8, jnp.bfloat16),
}
"""What `--scale` offers; the first is for a CPU, the last for a large GPU."""


class Layer(nn.Module):
    """Causal attention and a two-layer perceptron, each behind a norm and around a shortcut."""

    size: Size

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """The same shape, `(..., context, width)`."""
        size = self.size
        dense = functools.partial(nn.Dense, use_bias=False, dtype=size.dtype)
        heads = (*x.shape[:-1], 3, size.heads, size.width // size.heads)
        qkv = dense(3 * size.width)(nn.LayerNorm(dtype=size.dtype)(x)).reshape(heads)
        mixed = jax.nn.dot_product_attention(*(qkv[..., i, :, :] for i in range(3)), is_causal=True)
        x = x + dense(size.width)(mixed.reshape(x.shape))
        hidden = nn.gelu(dense(4 * size.width)(nn.LayerNorm(dtype=size.dtype)(x)))
        return x + dense(size.width)(hidden)


class GPT(nn.Module):
    """A decoder-only transformer; the tokens that are to come ride along."""

    size: Size

    @nn.compact
    def __call__(self, tokens: Any, following: Any) -> Any:
        """Logits of each next token, in float32."""
        size = self.size
        embed = nn.Embed(size.vocabulary, size.width, dtype=size.dtype)
        places = self.param("places", nn.initializers.normal(0.02), (size.context, size.width))
        x = embed(tokens) + places.astype(size.dtype)
        for _ in range(size.layers):
            x = Layer(size)(x)
        return embed.attend(nn.LayerNorm(dtype=size.dtype)(x)).astype(jnp.float32)


def gpt(scale: str, steps: int) -> Workload:
    """A GPT of about the size that its scale says, on tokens with something to learn: each tends to follow its last."""
    return _gpt(SIZES[scale], steps)


def gpt_124m() -> Workload:
    """One of 124 M parameters with a short context and little data in a step: all state."""
    return _gpt(SIZES["124m"]._replace(context=128, batch_size=8), 1)


def _gpt(size: Size, steps: int) -> Workload:
    rng = np.random.default_rng(0)
    jumps = rng.choice(4, size=(size.batch_size * steps, size.context + 1), p=[0.7, 0.1, 0.1, 0.1])
    tokens = (np.cumsum(jumps, axis=1) % size.vocabulary).astype(np.int32)
    data = [[row[:-1], row[1:]] for row in tokens]
    matrices = 12 * size.layers * size.width**2 + size.vocabulary * size.width
    attention = size.layers * size.context * size.width  # half of the square is masked
    flops = 6.0 * size.batch_size * size.context * (matrices + attention)
    model = GPT(size)
    return Workload("gpt", model, cross_entropy, data, size.batch_size, steps, 3e-4, flops=flops, dtype=size.dtype)


# ---- nested data with Python work for each item


class Records:
    """A dataset that makes each datum anew: text to numbers, in Python, into nested containers."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        words = [f"{index * 7 + place:08d}"[::-1] for place in range(24)]
        values = np.array([sum(map(ord, word)) / 400 - 1 for word in words], np.float32)
        return {"words": {"values": values, "count": np.float32(len(words))}, "target": np.tanh(values[:OUT])}


class RecordNet(nn.Module):
    """A small MLP on a record."""

    @nn.compact
    def __call__(self, record: Any) -> Any:
        """The prediction."""
        words = record["words"]
        x = nn.relu(nn.Dense(128)(words["values"]))
        return nn.Dense(OUT)(nn.relu(nn.Dense(128)(x + words["count"][..., None] / 24)))


def record_error(output: Any, datum: Any) -> jax.Array:
    """Mean squared error of a record, alone or in a list."""
    record = datum[0] if isinstance(datum, list) else datum
    return jnp.mean((output - record["target"]) ** 2)


def nested(num_workers: int, steps: int) -> Workload:
    """Records, read by so many processes."""
    return Workload(
        f"nested-{num_workers}",
        RecordNet(),
        record_error,
        Records(64 * steps),
        64,
        steps,
        num_workers=num_workers,
        live=True,
    )


# ---- all of them


def makers(scale: str, quick: bool) -> dict[str, Callable[[], Workload]]:
    """How each workload is made, by name, with rounds of a second or less on two cores.

    Args:
        scale: the size of the GPT.
        quick: whether rounds are shorter, to see that all works.
    """
    narrow, wide = (128, 16) if quick else (1024, 64)
    others = {
        f"{name}-{width}": functools.partial(optimized, name, width, steps)
        for name in OPTIMIZERS
        for width, steps in ((128, narrow), (2048, wide))
    }
    return {
        **others,
        "tiny-26": functools.partial(tiny, 26, 128 if quick else 2048),
        "tiny-86": functools.partial(tiny, 86, 128 if quick else 2048),
        "mlp-128": functools.partial(mlp, 128, narrow),
        "mlp-2048": functools.partial(mlp, 2048, wide),
        "deep-60": functools.partial(deep, 60, 16 if quick else 64),
        "mlp-4096": functools.partial(mlp, 4096, 32 if quick else 64),
        "nnx-mlp": functools.partial(nnx_mlp, 128, narrow),
        "equinox-mlp": functools.partial(equinox_mlp, 128, narrow),
        "digits": functools.partial(digits, 1 if quick else 6),
        "resnet": functools.partial(resnet, 1 if quick else 2),
        "gpt": functools.partial(gpt, scale, 16),
        "nested-0": functools.partial(nested, 0, 32 if quick else 128),
        "nested-2": functools.partial(nested, 2, 32 if quick else 128),
    }
