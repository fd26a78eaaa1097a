"""Any optax transformation in place of Adam: the same as by hand, its rate told, its NaN kept out."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learnax.loss import LossPipe
from tests.helpers import Squared, assert_trees_close, assert_trees_equal, host, make_data, make_trainer

SCHEDULE = optax.linear_schedule(1e-2, 1e-3, 10)
OPTIMIZERS = {
    # name: the optimiser, the argument `learning_rate`, the rates of ten updates
    "sgd": (optax.sgd(0.1, momentum=0.9), 0.1, [0.1] * 10),
    "adamw": (optax.adamw(SCHEDULE, weight_decay=0.1), SCHEDULE, [SCHEDULE(k) for k in range(10)]),
    "lion": (optax.inject_hyperparams(optax.lion)(learning_rate=SCHEDULE), 5.0, [SCHEDULE(k) for k in range(10)]),
    "kept": (optax.inject_hyperparams(optax.sgd)(learning_rate=0.05), 5.0, [0.05] * 10),
    "chain": (
        optax.chain(optax.add_decayed_weights(0.1), optax.scale_by_rms(), optax.scale_by_learning_rate(3e-3)),
        3e-3,
        [3e-3] * 10,
    ),
}


def by_hand(model, optimizer, params, data, max_grad=1.0):
    """A plain loop over batches of 8."""

    def loss_of(params, xs, ys):
        return jnp.mean((jax.vmap(lambda x: model.apply({"params": params}, x))(xs) - ys) ** 2)

    losses, state = [], optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):
        clip = optax.clip_by_global_norm(max_grad)

        @jax.jit
        def update(params, state, xs, ys):
            loss, grads = jax.value_and_grad(loss_of)(params, xs, ys)
            grads, _ = clip.update(grads, clip.init(params))
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        for start in range(0, len(data) - 7, 8):
            xs, ys = (np.stack(column) for column in zip(*data[start : start + 8], strict=True))
            params, state, loss = update(params, state, xs, ys)
            losses.append(float(loss))
    return params, losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_is_a_plain_optax_loop_and_tells_the_rate(name):
    seed = int(np.random.default_rng().integers(1 << 30))
    optimizer, rate, rates = OPTIMIZERS[name]
    data = make_data(83, seed)
    trainer = make_trainer(optimizer=optimizer, learning_rate=rate, train_dataset=data, num_epochs=1)
    assert trainer.optimizer is optimizer
    params, losses = by_hand(trainer.model, optimizer, host(trainer.train_state.params), data)
    trainer.train()
    np.testing.assert_allclose(trainer.metrics["train/loss"], losses, rtol=1e-5, err_msg=f"seed {seed}")
    assert_trees_close(trainer.train_state.params, params)
    np.testing.assert_allclose(trainer.metrics["train/learning_rate"], rates, rtol=1e-6)
    assert trainer.metrics["train/has_nan"] == [0] * 10


@pytest.mark.parametrize("count", [1, 4])
def test_an_optimizer_trains_alike_on_any_number_of_devices_and_however_it_is_dispatched(count):
    optimizer, rate, _ = OPTIMIZERS["adamw"]
    reference = make_trainer(optimizer=optimizer, learning_rate=rate, steps_per_execution=1)
    other = make_trainer(optimizer=optimizer, learning_rate=rate, steps_per_execution=3, devices=jax.devices()[:count])
    reference.train()
    other.train()
    assert_trees_close(other.train_state, reference.train_state)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["adamw", "lion", "kept"])
def test_an_optimizers_state_goes_through_a_checkpoint(name):
    optimizer, rate, rates = OPTIMIZERS[name]
    options = {"optimizer": optimizer, "learning_rate": rate}
    untouched = make_trainer(**options)
    untouched.train()
    make_trainer(registry="optimizers", **options | {"num_epochs": 1}).train()
    resumed = make_trainer(registry="optimizers", load_checkpoint=True, **options)
    assert int(resumed.train_state.step) == 5
    resumed.train()
    assert_trees_equal(resumed.train_state, untouched.train_state)
    assert resumed.metrics["train/loss"] == untouched.metrics["train/loss"]
    np.testing.assert_allclose(resumed.metrics["train/learning_rate"], rates, rtol=1e-6)


def finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(host(tree)))


def divides_by_zero_at(update):
    """Plain descent, but for one update that is 0 / 0 in one leaf."""

    def step(grads, count, params=None):
        bias = jnp.where(count == update, jnp.nan, 1.0)
        updates = jax.tree.map(lambda g: -0.1 * g, grads)
        updates["Dense_1"]["bias"] *= bias
        return updates, count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), step)


@pytest.mark.parametrize("count", [1, 4])
def test_an_optimizer_that_makes_nan_by_itself_never_puts_it_into_the_parameters(count, caplog):
    devices = jax.devices()[:count]
    with caplog.at_level(logging.WARNING, "learnax"):
        trainer = make_trainer(optimizer=divides_by_zero_at(3), num_epochs=1, devices=devices)
        trainer.train()
    # Its own count stands still with all the rest of the state, so the fifth batch meets the same update.
    assert trainer.metrics["train/has_nan"] == [0, 0, 0, 1, 1]
    assert (int(trainer.train_state.step), int(trainer.train_state.opt_state)) == (3, 3)
    assert finite(trainer.train_state)
    assert caplog.messages == [
        f"step 4: the update would put NaN into the parameters and was dropped ({n} so far): "
        "the optimizer's update is not finite, though the gradient is"
        for n in (1, 2)
    ]
    before = make_trainer(optimizer=optax.sgd(0.1), train_dataset=make_data(43)[:24], num_epochs=1, devices=devices)
    before.train()
    assert_trees_close(trainer.train_state.params, before.train_state.params)


def test_a_run_goes_on_after_an_update_that_only_its_optimizer_made_nan():
    """An optimiser that divides by the gradient's norm, and a batch whose gradient is zero."""

    def normalised(grads, state, params=None):
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
        return jax.tree.map(lambda g: -0.01 * g / norm, grads), state

    class Weighted(nn.Module):
        @nn.compact
        def __call__(self, x, y, weight):
            return nn.Dense(3)(x)

    def losses(output, datum):
        return output, datum[2] * jnp.mean((output - datum[1]) ** 2), {}

    data = [[x, y, np.float32(not 16 <= i < 24)] for i, (x, y) in enumerate(make_data(40))]
    optimizer = optax.GradientTransformation(lambda params: (), normalised)
    trainer = make_trainer(model=Weighted(), losses=losses, optimizer=optimizer, train_dataset=data, num_epochs=1)
    trainer.train()
    assert trainer.metrics["train/has_nan"] == [0, 0, 1, 0, 0]
    assert int(trainer.train_state.step) == 4
    assert finite(trainer.train_state)


@pytest.mark.parametrize("options", [{}, {"optimizer": optax.adam(1e-2)}], ids=["default", "given"])
@pytest.mark.parametrize("scale", [1e15, 1e25, 1e38])
def test_huge_gradients_that_are_never_scaled_down_put_no_nan_into_the_parameters(scale, options):
    class Huge(Squared):
        def _call(self, output, batch):
            return output, scale * jnp.mean(output - batch[1]), {}

    trainer = make_trainer(losses=LossPipe([Huge()]), max_grad=float("inf"), num_epochs=1, **options)
    trainer.train()
    assert max(trainer.metrics["train/gradient norm"]) > scale / 10
    assert finite(trainer.train_state.params)
    # An update that is not made is told, and counts as none.
    assert int(trainer.train_state.step) == 5 - sum(trainer.metrics["train/has_nan"])


@pytest.mark.parametrize(
    ("optimizer", "shown"),
    [
        ("adam", "'adam'; optimizer=optax.adamw(1e-3) for instance"),
        (optax.adam, f"{optax.adam!r}; write what it makes, optimizer=optax.adam(1e-3) for instance"),
        (1e-3, "0.001; a rate is given as learning_rate=0.001"),
        ((print,), f"({print!r},); several become one by optax.chain(...)"),
        (np.ones(2), "array([1., 1.])"),
    ],
    ids=["text", "a function that makes one", "a rate", "a tuple", "an array"],
)
def test_what_is_no_optimizer_is_said_when_the_trainer_is_built(optimizer, shown):
    with pytest.raises(TypeError) as error:
        make_trainer(optimizer=optimizer)
    assert str(error.value) == f"optimizer must be an optax transformation, with init and update, but is {shown}"
