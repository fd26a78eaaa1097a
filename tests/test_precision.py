"""Parameters and metrics that are not float32: what a step and a validation make of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learnax.step.state import TrainState
from tests.helpers import make_data, make_trainer

HALVES = [jnp.bfloat16, jnp.float16]


class Half(nn.Module):
    dtype: object

    @nn.compact
    def __call__(self, x, y=None):
        dense = nn.Dense(3, param_dtype=self.dtype, dtype=self.dtype)
        return dense(x.astype(self.dtype)).astype(jnp.float32)


def squared(output, datum):
    return output, jnp.mean((output - datum[1]) ** 2), {}


def by_hand(model, params, data, batch_size, steps, optimizer):
    """Plain optax, one update a batch."""
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, x, y):
        def loss(params):
            return jax.vmap(lambda x, y: squared(model.apply({"params": params}, x), [x, y])[1])(x, y).mean()

        grads = jax.grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

    for number in range(steps):
        rows = data[number * batch_size : (number + 1) * batch_size]
        params, opt_state = step(params, opt_state, *(np.stack(column) for column in zip(*rows, strict=True)))
    return params


@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_half_precision_parameters_train_as_by_adam_in_float32(dtype, accumulate):
    # What float32 parameters come to, half-precision ones come to within what they can tell apart.
    data, options = make_data(64), {"num_epochs": 1, "max_grad": 1e9, "accumulate_steps": accumulate}
    half = make_trainer(model=Half(dtype), losses=squared, train_dataset=data, **options)
    whole = make_trainer(model=Half(jnp.float32), losses=squared, train_dataset=data, **options)
    start = jax.tree.map(lambda x: np.asarray(x, np.float32), half.train_state.params)
    whole.train_state = TrainState(start, whole.train_state.opt_state)
    half.train()
    whole.train()
    assert half.metrics["train/has_nan"] == [0.0] * (8 // accumulate)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.train_state.params)} == {jnp.dtype(dtype).name}
    for left, right in zip(*(jax.tree.leaves(t.train_state.params) for t in (half, whole)), strict=True):
        np.testing.assert_allclose(np.asarray(left, np.float32), right, atol=0.02)
    np.testing.assert_allclose(half.metrics["train/loss"], whole.metrics["train/loss"], rtol=0.03)


def test_half_precision_parameters_end_near_those_of_optax_adam(devices):
    model, data = Half(jnp.bfloat16), make_data(32)
    trainer = make_trainer(model=model, losses=squared, train_dataset=data, num_epochs=1, max_grad=1e9, devices=devices)
    expected = by_hand(model, jax.device_get(trainer.train_state.params), data, 8, 4, optax.adam(1e-2))
    trainer.train()
    for left, right in zip(jax.tree.leaves(trainer.train_state.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(left, np.float32), np.asarray(right, np.float32), atol=0.012)


@pytest.mark.parametrize("dtype", [jnp.float32, *HALVES], ids=["float32", "bfloat16", "float16"])
def test_hyperparameters_are_float32_whatever_the_parameters_are(dtype):
    kept = make_trainer(model=Half(dtype), losses=squared).train_state.opt_state.hyperparams
    assert {name: value.dtype for name, value in kept.items()} == dict.fromkeys(kept, jnp.float32)
    np.testing.assert_allclose(kept["b2"], 0.999, rtol=1e-6)


class Rising(nn.Module):
    """A number that a loss drives up, a hundred a step."""

    @nn.compact
    def __call__(self, x, y=None):
        return self.param("r", lambda key: jnp.full((), 65_000, jnp.float16))


def test_an_update_that_a_half_precision_parameter_cannot_hold_is_dropped():
    rising = lambda output, datum: (output, -100 * output.astype(jnp.float32), {})  # noqa: E731
    trainer = make_trainer(model=Rising(), losses=rising, optimizer=optax.sgd(1.0), learning_rate=1.0, max_grad=1e3)
    trainer.train()
    assert trainer.metrics["train/has_nan"] == [0.0] * 5 + [1.0] * 5
    assert float(trainer.train_state.params["r"]) == 65_472  # the next hundred is beyond the largest, 65504


class Point(nn.Module):
    """A complex number and a real one that are drawn to a target."""

    @nn.compact
    def __call__(self, x, y=None):
        z = self.param("z", lambda key: jnp.zeros((), jnp.complex64))
        return z, self.param("r", nn.initializers.ones, ())


def distance(output, datum):
    z, r = output
    return output, jnp.abs(z - (1 - 2j)) ** 2 + (r - 0.5) ** 2, {}


@pytest.mark.parametrize("optimizer", [None, optax.sgd(0.05)], ids=["adam", "sgd"])
def test_complex_parameters_descend(optimizer, one_device):
    trainer = make_trainer(
        model=Point(), losses=distance, optimizer=optimizer, learning_rate=0.05, num_epochs=40, max_grad=10.0
    )
    trainer.train()
    np.testing.assert_allclose(trainer.train_state.params["z"], 1 - 2j, atol=0.05)
    np.testing.assert_allclose(trainer.train_state.params["r"], 0.5, atol=0.05)


def test_a_gradient_by_hand_of_a_complex_parameter_points_up():
    trainer = make_trainer(model=Point(), losses=distance)
    keys = jax.random.split(jax.random.key(0), (1, 2))
    batch = [np.zeros((1, 2, 8), np.float32), np.zeros((1, 2, 3), np.float32)]
    grads, _ = trainer.grad(trainer.train_state.params, keys, batch)
    np.testing.assert_allclose(grads["z"][0], 2 * (0 - (1 - 2j)), rtol=1e-6)


def values(output, datum):
    number = datum[1][0].astype(jnp.int32)
    return (
        output,
        jnp.mean(output**2),
        {
            "tokens": number + 16_777_217,
            "negative": -number - 2_000_000_000,
            "many": jnp.uint32(4_000_000_001),
            "right": number > 0,
            "small": jnp.int8(-100),
            "half": jnp.float16(600),
            "brain": jnp.bfloat16(2.0**100),
        },
    )


def test_validation_means_are_exact_for_whole_numbers_and_do_not_overflow(devices):
    data = make_data(43)
    for place, datum in enumerate(data):
        datum[1] = np.full(3, place % 3, np.float32)
    trainer = make_trainer(losses=values, val_datasets={"val": data}, num_epochs=1, devices=devices)
    trainer.train()
    numbers = [place % 3 for place in range(43)]
    got = {name: trainer.metrics[f"val/{name}"][0] for name in ("tokens", "negative", "many", "right", "small", "half")}
    assert got == {
        "tokens": sum(n + 16_777_217 for n in numbers) / 43,
        "negative": sum(-n - 2_000_000_000 for n in numbers) / 43,
        "many": 4_000_000_001.0,
        "right": sum(n > 0 for n in numbers) / 43,
        "small": -100.0,
        "half": 600.0,
    }
    np.testing.assert_allclose(trainer.metrics["val/brain"][0], 2.0**100, rtol=1e-6)
