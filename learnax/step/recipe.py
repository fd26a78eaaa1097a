"""What a step is made of, and the share of it that one device has.

A batch's leaves have a leading axis; in this folder they are the share of one device, `batch_size // shards` data.
Random keys are typed JAX keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from learnax.loss import Losses
from learnax.models import Model
from learnax.step.keys import split_in_two
from learnax.step.optimizers import LearningRate
from learnax.utils import PyTree
from learnax.utils.permutation import Shuffled

AXIS = "devices"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that a step is a function of, beside its arrays.

    Attributes:
        model: what is trained.
        losses: `(output, datum[, step]) -> (output, loss, metrics)`, for one datum or, as the model, for a share.
        optimizer: the optax transformation.
        learning_rate: what it was built from; None where nobody says.
        max_grad: largest global L2 norm of a gradient.
        batch_size: data per batch, over all devices.
        shards: devices that a batch is split over.
        accumulate: batches whose gradients are averaged before an update.
        safe: whether the clip keeps the squares of gradients finite in float32.
        trusted: whether finite gradients and a finite rate make a finite update, as with Adam behind such a clip.
        looped: whether the model is as fast inside a loop as outside.
        selects: whether the guard selects between two states, or makes the update in a loop of one trip or none.
        weighted: whether the loss has weights of its own, see `learnax.metrics.Mean`.
        by_datum: whether losses and metrics are given for each datum, so that padding can be left out of them.
        batch_axis: whether user code names the mapped axis over the data of a share.
        ema: the decay of the parameters' average, a number or a schedule; None where there is none.
        gather: makes a function of whole parameters one of those that the state has; None where it has them whole.
    """

    model: Model
    losses: Losses
    optimizer: optax.GradientTransformation
    learning_rate: LearningRate | None
    max_grad: float
    batch_size: int
    shards: int
    accumulate: int = 1
    safe: bool = True
    trusted: bool = True
    looped: bool = True
    selects: bool = False
    weighted: bool = False
    by_datum: bool = True
    batch_axis: bool = True
    ema: float | Callable[[Any], Any] | None = None
    gather: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None

    def of_one_batch(self) -> Recipe:
        """The same with one batch for each update."""
        return self if self.accumulate == 1 else dataclasses.replace(self, accumulate=1)


def with_axis(function: Callable[[], PyTree], name: str = AXIS) -> PyTree:
    """Calls a function with a mapped axis named around it, one long: for work outside the programs."""
    results = jax.vmap(lambda _: function(), axis_name=name)(jnp.zeros((1,)))
    return jax.tree.map(lambda x: x[0], results)


def batch_of(batches: PyTree, index: Any) -> PyTree:
    """One of n batches; beyond the last it goes on at the first."""

    def take(leaf: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(leaf, index % leaf.shape[0], keepdims=False)

    return jax.tree.map(take, batches)


def shares_of(recipe: Recipe, batches: PyTree, start: Any, room: int) -> tuple[PyTree, Any]:
    """This device's share of n batches, leaves `(n, share, ...)`, and the place of batch `start` among them.

    Of data that are in the order of an epoch, `room` batches are gathered, once for all steps of a program: an MLP of
    width 128 took 12 % longer by a gather in each step than unshuffled, and 5 % so (2-core CPU, `bench.between`).
    """
    if not isinstance(batches, Shuffled):
        return batches, start
    share = recipe.batch_size // recipe.shards
    return batches.batches(start, room, recipe.batch_size, shard_index(recipe) * share, share), 0


def next_keys(seq: jax.Array, count: Any, room: int) -> tuple[jax.Array, jax.Array]:
    """The random sequence after `count` keys were taken from it, and those keys, with room for more.

    All at once, before they are used: on a CPU, a split amid a step's other work cost 10 µs, here 1.5.
    """
    if room == 1:
        seq, key = split_in_two(seq)
        return seq, key[None]

    def split(seq: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        seq, key = split_in_two(seq)
        return seq, (seq, key)

    # As many splits as there is room for, whatever the count: where a loop ends on a GPU, the host would read it.
    _, (seqs, keys) = jax.lax.scan(split, seq, length=room)
    return jax.lax.dynamic_index_in_dim(seqs, count - 1, keepdims=False), keys


def keys_of(recipe: Recipe, key: jax.Array) -> jax.Array:
    """This device's share of one key per datum: the same keys on any number of devices.

    A model that sees the whole share draws from one key, `(1,)`.
    """
    if recipe.model.batched:
        return jax.random.fold_in(key, shard_index(recipe))[None]
    keys = jax.random.split(key, recipe.batch_size)
    if recipe.shards == 1:
        return keys
    return keys.reshape(recipe.shards, -1)[shard_index(recipe)]


def shard_index(recipe: Recipe) -> Any:
    """Which share this device has."""
    return jax.lax.axis_index(AXIS) if recipe.shards > 1 else 0


def mean_over_devices(recipe: Recipe, tree: PyTree) -> PyTree:
    """Means of what the devices have."""
    return jax.lax.pmean(tree, AXIS) if recipe.shards > 1 else tree


def sum_over_devices(recipe: Recipe, tree: PyTree) -> PyTree:
    """Sums of what the devices have."""
    return jax.lax.psum(tree, AXIS) if recipe.shards > 1 else tree


def alike_over_devices(recipe: Recipe, tree: PyTree) -> PyTree:
    """The same on all devices, of what each of them carries on: means of floats, the first one's of all else."""
    if recipe.shards == 1:
        return tree

    def alike(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jax.lax.pmean(leaf, AXIS)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(alike(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        whole = leaf.astype(jnp.int32) if leaf.dtype == bool else leaf
        own = jnp.where(shard_index(recipe) == 0, whole, jnp.zeros_like(whole))
        return jax.lax.psum(own, AXIS).astype(leaf.dtype)

    return jax.tree.map(alike, tree)


def wide(dtype: Any) -> Any:
    """The type that sums of such numbers are kept in: float32 at least."""
    return jnp.float32 if jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4 else dtype
