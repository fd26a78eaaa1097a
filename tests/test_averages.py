"""Averages of parameters beside them, and the parameters that optimisers mean for evaluation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import plain
from tests.helpers import (
    MLP,
    MemoryRun,
    Poisonable,
    StopAt,
    assert_trees_close,
    assert_trees_equal,
    host,
    make_data,
    make_trainer,
)

HELD_OUT = make_data(11, 1)


def make(**overrides):
    options = {"ema": 0.8, "val_datasets": [HELD_OUT], "optimizer": optax.sgd(0.05), "max_grad": 1e9}
    return make_trainer(**options | overrides)


def loss_of(params):
    x, y = (np.stack(part) for part in zip(*HELD_OUT, strict=True))
    return np.mean((MLP().apply({"params": params}, x) - y) ** 2)


def averaged(params, decay, epochs=2):
    """The plain loop's parameters after each update, averaged."""
    tx, average = optax.sgd(0.05), params
    opt_state = tx.init(params)
    for number, batch in enumerate(plain.batches(make_data(43), 8, epochs)):
        grads = jax.grad(lambda p, x, y: jnp.mean((MLP().apply({"params": p}, x) - y) ** 2))(params, *batch)
        updates, opt_state = tx.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        own = decay(np.float32(number)) if callable(decay) else decay
        average = jax.tree.map(lambda a, p, own=own: own * a + (1 - own) * p, average, params)
    return params, average


@pytest.mark.parametrize("decay", [0.8, lambda step: jnp.minimum(0.9, (1.0 + step) / (10.0 + step))])
@pytest.mark.parametrize(("count", "room"), [(1, 5), pytest.param(4, 1, marks=pytest.mark.thorough)])
def test_an_average_is_that_of_the_plain_loop_and_is_what_validation_sees(decay, count, room):
    trainer = make(ema=decay, devices=jax.devices()[:count], steps_per_execution=room)
    params, average = averaged(host(trainer.train_state.params), decay)
    trainer.train()
    assert_trees_close(trainer.train_state.params, params)
    assert_trees_close(trainer.train_state.ema, average)
    np.testing.assert_allclose(trainer.metrics["val/loss"][-1], loss_of(average), rtol=1e-4)
    beside = make(ema=decay, ema_eval=False, devices=jax.devices()[:count], steps_per_execution=room)
    beside.train()
    assert_trees_equal(beside.train_state.ema, trainer.train_state.ema)
    np.testing.assert_allclose(beside.metrics["val/loss"][-1], loss_of(params), rtol=1e-4)


@pytest.mark.thorough
def test_samples_see_the_average_and_save_model_the_parameters():
    drawn, saved = [], []
    trainer = make(
        num_epochs=1,
        sample_model=lambda params, key, datum: params["Dense_0"]["bias"],
        sample_plot=lambda run, samples, nothing: drawn.append(samples[0]),
        sample_every=5,
        save_model=saved.append,
        save_every=5,
    )
    trainer.train()
    np.testing.assert_array_equal(drawn[0], trainer.train_state.ema["Dense_0"]["bias"])
    np.testing.assert_array_equal(saved[0]["Dense_0"]["bias"], trainer.train_state.params["Dense_0"]["bias"])
    assert not np.allclose(drawn[0], saved[0]["Dense_0"]["bias"])


def test_a_dropped_update_leaves_the_average():
    data = make_data(16)
    data[3][1] = np.full(3, 7, np.float32)
    trainer = make(train_dataset=data, losses=Poisonable(), num_epochs=1, val_datasets=None)
    params, average = host(trainer.train_state.params), host(trainer.train_state.ema)
    trainer.train()
    assert trainer.metrics["train/has_nan"] == [1, 0]
    expected = jax.tree.map(lambda a, p: 0.8 * a + 0.2 * p, average, host(trainer.train_state.params))
    assert_trees_close(trainer.train_state.ema, expected)
    assert not np.allclose(trainer.train_state.params["Dense_0"]["bias"], params["Dense_0"]["bias"])


@pytest.mark.thorough
def test_an_average_goes_through_a_checkpoint_and_may_be_begun_from(registry_path):
    kept = {"registry": "averages", "run": MemoryRun(), "save_every": 3}
    straight = make()
    straight.train()
    stopped = make(**kept)
    stopped.hooks.saves.append(StopAt(7))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make(**kept, load_checkpoint=True)
    resumed.train()
    assert_trees_equal(resumed.train_state, straight.train_state)
    options = {"registry": "averages", "run": MemoryRun(), "load_checkpoint": True, "ema": None}
    begun = make(**options, load_weights="ema")
    assert_trees_equal(begun.train_state.params, straight.train_state.ema)
    assert begun.train_state.ema is None
    assert begun.train_state.step == 0
    plain_weights = make(**options, load_weights=True)
    assert_trees_equal(plain_weights.train_state.params, straight.train_state.params)
    again = make(**options | {"ema": 0.5}, load_weights="ema")
    assert_trees_equal(again.train_state.ema, straight.train_state.ema)


def test_an_average_of_half_precision_parameters_is_kept_in_float32():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            return nn.Dense(3, param_dtype=jnp.bfloat16, dtype=jnp.float32)(x)

    trainer = make(model=Half())
    trainer.train()
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(trainer.train_state.ema)} == {"float32"}
    seen = trainer.programs.evaluated(trainer.train_state)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(seen.params)} == {"bfloat16"}
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), trainer.train_state.ema)
    assert_trees_equal(jax.tree.map(np.float32, host(seen.params)), jax.tree.map(np.float32, host(expected)))


@pytest.mark.thorough
def test_a_divided_state_has_a_divided_average():
    whole, divided = make(), make(devices=jax.devices()[:4], shard_state=True)
    whole.train()
    divided.train()
    assert_trees_close(divided.train_state.ema, whole.train_state.ema)


@pytest.mark.parametrize(
    ("ema", "error", "text"),
    [
        (1.5, ValueError, "ema must be a decay from 0 to 1, 0.999 for instance, or a schedule .* but is 1.5"),
        (-0.1, ValueError, "but is -0.1"),
        ("0.9", TypeError, "but is '0.9'"),
        (lambda step: 2.0, ValueError, "but returns 2"),
        (lambda: 0.5, TypeError, r"\(0\) failed: TypeError"),
    ],
)
def test_a_decay_that_is_none(ema, error, text):
    with pytest.raises(error, match=text):
        make(ema=ema)
    with pytest.raises(TypeError, match="load_weights must be True, False, or 'ema' for the average"):
        make(load_weights="average")


# ---- optimisers that keep parameters of their own for evaluation


def test_lookahead_is_optax_by_hand_and_its_slow_parameters_are_evaluated():
    lookahead = optax.lookahead(optax.sgd(0.05), sync_period=3, slow_step_size=0.5)
    trainer = make(ema=None, optimizer=lookahead)
    pairs = optax.LookaheadParams.init_synced(host(trainer.train_state.params))
    opt_state = lookahead.init(pairs)
    for batch in plain.batches(make_data(43), 8, 2):
        grads = jax.grad(lambda p, x, y: jnp.mean((MLP().apply({"params": p}, x) - y) ** 2))(pairs.fast, *batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = lookahead.update(grads, opt_state, pairs)
        pairs = optax.apply_updates(pairs, updates)
    trainer.train()
    assert_trees_close(trainer.train_state.params, pairs.fast)
    np.testing.assert_allclose(trainer.metrics["val/loss"][-1], loss_of(pairs.slow), rtol=1e-4)


def test_schedule_free_is_optax_by_hand_and_evaluates_its_own_parameters():
    free = optax.contrib.schedule_free_sgd(0.1)
    trainer = make(ema=None, optimizer=optax.chain(optax.identity(), free))
    params = host(trainer.train_state.params)
    opt_state = free.init(params)
    for batch in plain.batches(make_data(43), 8, 2):
        grads = jax.grad(lambda p, x, y: jnp.mean((MLP().apply({"params": p}, x) - y) ** 2))(params, *batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = free.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    trainer.train()
    assert_trees_close(trainer.train_state.params, params)
    expected = loss_of(optax.contrib.schedule_free_eval_params(opt_state, params))
    np.testing.assert_allclose(trainer.metrics["val/loss"][-1], expected, rtol=1e-4)
    assert abs(expected - loss_of(params)) > 1e-6
