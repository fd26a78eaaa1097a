"""Losses and their pipes, by hand and inside a run."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learnax.loss import LossFunction, LossPipe, call_loss, takes_key
from learnax.step import key_pair
from tests.helpers import make_data, make_trainer


class Constant(LossFunction):
    def _call(self, output, batch):
        return output + 1, jnp.float32(2), {"seen": output}


class Careless(LossFunction):
    """Never calls `super().__init__`, as scripts do."""

    def __init__(self):
        self.mine = 3

    def _call(self, output, batch):
        return output, jnp.float32(self.mine), {}


class WithStep(LossFunction):
    def __call__(self, output, batch, step):
        return output, step * 1.0, {"step": step}


class WithoutStep(LossFunction):
    def __call__(self, output, batch):
        return output, 1.0, {"no step": output}


class WithOption(LossFunction):
    def __call__(self, output, batch, scale=10.0):
        return output, scale, {}


class Forwarding(LossFunction):
    def _call(self, output, batch):
        return output, jnp.float32(1), {}

    def __call__(self, *args, **kwargs):
        output, loss, metrics = super().__call__(*args, **kwargs)
        return output, loss, {**metrics, "forwarded": loss}


def test_a_loss_is_weighted_and_scheduled():
    assert Constant()(0, [])[1] == 2
    assert Constant(weight=3)(0, [])[1] == 6
    assert Constant(3, lambda step: 0.5 * step)(0, [], 4)[1] == 12
    assert Careless()(0, [], 7)[1] == 3
    assert LossFunction().scheduler(3) == Careless().scheduler(3) == 1
    assert Constant(scheduler=None)(0, [], 4)[1] == 2


def test_a_loss_that_implements_nothing_says_what_to_implement():
    with pytest.raises(NotImplementedError, match=r"LossFunction must implement _call\(output, batch\) or override"):
        LossFunction()(0, [])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (WithStep(), 5),
        (WithoutStep(), 1),
        (WithOption(), 10),
        (Forwarding(scheduler=lambda step: step), 5),
        (lambda output, batch: (output, 1, {}), 1),
        (lambda output, batch, t: (output, t, {}), 5),
        (lambda output, batch, *, step: (output, step, {}), 5),
        (lambda *args: (args[0], args[2], {}), 5),
        (lambda output, batch, **named: (output, named["step"], {}), 5),
        (lambda output, batch, step=0: (output, step, {}), 5),
    ],
)
def test_a_loss_gets_the_step_where_it_takes_one(loss, expected):
    assert call_loss(loss, 0, [], 5)[1] == expected
    assert LossPipe([loss])(0, [], 5)[1] == expected


def test_a_pipe_transforms_once_threads_the_output_sums_and_merges():
    transformed = []

    def transform(output):
        transformed.append(output)
        return output * 10

    pipe = LossPipe([Constant(), Constant(weight=2), WithStep()], transform)
    output, loss, metrics = pipe(1, [], 3)
    assert transformed == [1]
    assert output == 12
    assert loss == 2 + 4 + 3
    assert metrics == {"seen": 11, "step": 3}


# ---- losses that draw random numbers


def drawn(key, output, datum):
    return output, jax.random.uniform(key), {}


class Drawn(LossFunction):
    def _call(self, rng_key, output, batch):
        return drawn(rng_key, output, batch)


class DrawnItself(LossFunction):
    def __call__(self, rngs, output, batch, step):
        return output, jax.random.uniform(rngs) + 0 * step, {}


class DrawnByAnybody:
    def __call__(self, rng, *args):
        assert len(args) == 3  # output, datum and step
        return args[0], jax.random.uniform(rng), {}


KEYED = {
    "function": drawn,
    "lambda": lambda rng, output, datum, step: drawn(rng, output, datum),
    "named step": lambda rng_key, output, datum, *, step: drawn(rng_key, output, datum),
    "partial": functools.partial(lambda key, output, datum, scale: drawn(key, output, datum), scale=2),
    "bound by position": functools.partial(lambda scale, key, output, datum: drawn(key, output, datum), 2),
    "jitted": jax.jit(drawn),
    "_call": Drawn(),
    "__call__": DrawnItself(),
    "any object": DrawnByAnybody(),
    "method": DrawnItself().__call__,
    "keyword": lambda output, datum, *, rng_key: drawn(rng_key, output, datum),
    "keyword and step": lambda output, datum, step, *, rng_key=None: drawn(rng_key, output, datum),
}


@pytest.mark.parametrize("name", KEYED)
def test_a_loss_that_begins_with_a_key_gets_one(name):
    loss, key = KEYED[name], jax.random.key(3)
    assert takes_key(loss)
    assert call_loss(loss, 0, [], 5, key)[1] == jax.random.uniform(key)
    first, second = LossPipe([loss]), LossPipe([Constant(), loss, LossPipe([loss])])
    assert takes_key(first)
    assert first(0, [], 5, rng_key=key)[1] == jax.random.uniform(jax.random.fold_in(key, 0))
    places = [jax.random.fold_in(key, 1), jax.random.fold_in(jax.random.fold_in(key, 2), 0)]
    total = second(0, [], 5, rng_key=key)[1]
    np.testing.assert_allclose(total, 2 + sum(float(jax.random.uniform(k)) for k in places), rtol=1e-6)


def test_a_loss_with_another_use_for_the_name_gets_no_key():
    def scored(key, value):
        return key, 1.0, {}

    def picked(output, datum, key="label"):
        return output, {"label": 1.0, "weight": 2.0}[key], {}

    def bound(output, datum, *, rng_key):
        return output, rng_key, {}

    own = functools.partial(bound, rng_key=3)
    for loss, expected in ((scored, 1), (picked, 1), (functools.partial(picked, key="weight"), 2), (own, 3)):
        assert not takes_key(loss)
        assert LossPipe([loss])(0, [], 5)[1] == expected


def test_a_loss_that_is_called_without_its_key_says_how_to_give_it():
    for loss, name in ((LossPipe([drawn]), "LossPipe"), (Drawn(), "Drawn")):
        with pytest.raises(TypeError) as error:
            loss(0, [])
        assert str(error.value) == f"{name} takes a random key, but was called without: give it as rng_key="
    pipe = LossPipe([Drawn(weight=2)])
    wrapped = lambda key, output, datum, step: pipe(output, datum, step, rng_key=key)  # noqa: E731
    for caller in (wrapped, pipe, functools.partial(pipe)):
        assert call_loss(caller, 0, [], 0, jax.random.key(0))[1] == pipe(0, [], rng_key=jax.random.key(0))[1]
    text = "LossPipe takes a random key, but was called without: give it as rng_key="
    with pytest.raises((TypeError, ValueError), match=text):
        make_trainer(losses=lambda output, datum: pipe(output, datum))


def test_each_datum_has_a_key_of_its_own_which_is_not_that_of_the_model():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            return nn.Dense(1)(x)[0] * 0 + jax.random.uniform(self.make_rng("params"))

    def losses(key, output, datum):
        loss = jax.random.uniform(key)
        return output, loss, {"model": output, "square": loss**2}

    options = {"num_epochs": 1, "val_datasets": [make_data(16)], "devices": jax.devices()[:4], "seed": 4}
    trainer = make_trainer(model=Model(), losses=losses, **options)
    trainer.train()
    seq, own = key_pair(4)[0], []
    for _ in range(7):  # five batches of training, two of validation
        seq, sub = jax.random.split(seq)
        keys = jax.random.split(sub, 8)
        own.append(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0x105)))(keys))
    means = [losses.mean() for losses in own]
    np.testing.assert_allclose(trainer.metrics["train/loss"], means[:5], rtol=1e-5)
    np.testing.assert_allclose(trainer.metrics["train/square"], [(losses**2).mean() for losses in own[:5]], rtol=1e-5)
    assert np.abs(np.subtract(trainer.metrics["train/model"], means[:5])).min() > 1e-3
    np.testing.assert_allclose(trainer.metrics["val/loss"], [np.mean(means[5:])], rtol=1e-5)
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *make_data(8))
    np.testing.assert_allclose(trainer.loss(trainer.train_state.params, keys, batch)[0], means[-1], rtol=1e-5)


def test_a_run_hands_the_true_step_to_its_losses():
    """Dropped updates do not count, whatever the number of batches."""
    data = make_data(40)
    data[8][1][:] = np.nan  # one NaN loss: it counts as 0, but its gradient is NaN

    def losses(output, datum, step):
        return output, jnp.mean((output - datum[1]) ** 2), {"step": step}

    trainer = make_trainer(losses=LossPipe([losses]), train_dataset=data, num_epochs=1, val_datasets=[make_data(8)])
    trainer.train()
    assert trainer.metrics["train/has_nan"] == [0, 1, 0, 0, 0]
    assert trainer.metrics["train/step"] == [0, 1, 1, 2, 3]
    assert trainer.metrics["val/step"] == [4]
    assert np.isfinite(trainer.metrics["train/loss"]).all()
