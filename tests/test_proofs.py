"""What is known of optax's parts: their updates are made once, and are as finite as they are said to be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from learnax.step.proofs import conditions_of
from tests.helpers import assert_trees_close, host, make_data, make_trainer

SCHEDULE = optax.cosine_decay_schedule(1e-2, 100)
KNOWN = {
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(SCHEDULE, weight_decay=0.1),
    "adamw with a mask": optax.adamw(1e-2, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    "lion": optax.lion(1e-3),
    "sgd": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "rmsprop": optax.rmsprop(1e-2),
    "a chain": optax.chain(optax.clip_by_global_norm(1.0), optax.clip(0.5), optax.adamw(SCHEDULE)),
}
MODERATE = {
    "adafactor": optax.adafactor(1e-2),
    "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "muon": optax.contrib.muon(1e-2),
    "amsgrad": optax.amsgrad(1e-2),
    "adamax": optax.adamax(1e-2),
    "adan": optax.adan(1e-2),
    "nadamw": optax.nadamw(1e-2),
    "radam": optax.radam(1e-2),
    "adagrad": optax.adagrad(1e-2),
    "adabelief": optax.adabelief(1e-2),
    "novograd": optax.novograd(1e-2),
    "lamb": optax.lamb(1e-2),
    "lars": optax.lars(1e-2),
    "sign_sgd": optax.sign_sgd(1e-2),
    "parts": optax.partition({"w": optax.adamw(1e-2), "b": optax.sgd(1e-2)}, {"w": "w", "b": "b"}),
}
"""Known behind a clip that is not extreme."""
KNOWN_NOT = optax.stateless(lambda updates, params: updates)
UNKNOWN = {
    "no eps": optax.adam(1e-2, eps=0.0),
    "a decay that is 1 in float32": optax.adam(1e-2, b2=0.999999999),
    "halves": optax.adam(1e-2, mu_dtype=jnp.bfloat16),
    "momentum that grows": optax.sgd(1e-2, momentum=1.0),
    "a rate that is none": optax.sgd(float("nan")),
    "a part of ones own": optax.chain(optax.stateless(lambda updates, params: updates), optax.adam(1e-2)),
    "a part of ones own for some": optax.partition({"w": optax.adamw(1e-2), "b": KNOWN_NOT}, {"w": "w", "b": "b"}),
    "a variance that may be negative": optax.rmsprop(1e-2, centered=True),
    "a start below 0": optax.rmsprop(1e-2, initial_scale=-1.0),
    "a decay of ones own": optax.scale_by_factored_rms(decay_rate_fn=lambda step, rate: 1.0),
    "a count that starts below 0": optax.adafactor(1e-2, decay_offset=100),
    "other polynomials": optax.contrib.muon(1e-2, ns_coeffs="dion"),
    "the updates' own scale": optax.contrib.muon(1e-2, adaptive=True),
    "a root below 0": optax.radam(1e-2, threshold=3.0),
    "an inner part of ones own": optax.inject_hyperparams(lambda learning_rate: KNOWN_NOT)(learning_rate=1e-2),
}
PARAMS = {"w": np.ones((3, 2), np.float32), "b": np.zeros(2, np.float32)}


def clipped(grads, most):
    norm = float(np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in grads.values())))
    return {name: (leaf * min(1, most / max(norm, 1e-300))).astype(np.float32) for name, leaf in grads.items()}


@pytest.mark.parametrize(
    ("name", "most"),
    [
        *((name, 1e18) for name in KNOWN),
        *((name, 1.0) for name in MODERATE),
        *(pytest.param(name, 100.0, marks=pytest.mark.thorough) for name in MODERATE),
    ],
)
def test_a_known_optimizer_makes_finite_updates_of_any_finite_gradients(name, most):
    tx = {**KNOWN, **MODERATE}[name]
    state = tx.init(PARAMS)
    rng = np.random.default_rng()
    params, held = PARAMS, 0
    for _ in range(60):  # of all sizes up to what the clip lets through, zeros among them
        sizes = 10.0 ** rng.uniform(-45, np.log10(most) + 1, 8) * rng.integers(0, 2, 8) * rng.choice([-1, 1], 8)
        grads = clipped({"w": sizes[:6].reshape(3, 2), "b": sizes[6:]}, most)
        conditions = conditions_of(tx, state, params, most)
        assert conditions is not None
        holds = all(map(bool, [*conditions.needed, *conditions.enough]))
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        held += holds
        if not holds:  # it would be looked at
            state, params = tx.init(PARAMS), PARAMS
            continue
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))
    assert held > 30


@pytest.mark.parametrize("name", UNKNOWN)
def test_of_another_one_nothing_is_known(name):
    tx = UNKNOWN[name]
    assert conditions_of(tx, tx.init(PARAMS), PARAMS, 1.0) is None


def test_a_setting_that_is_injected_is_looked_at_when_the_update_is_made():
    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2)
    state = tx.init(PARAMS)
    for name, value, which in (("learning_rate", np.nan, "needed"), ("eps", 0.0, "enough"), ("b2", 1.0, "enough")):
        broken = state._replace(hyperparams={**state.hyperparams, name: jnp.float32(value)})
        conditions = conditions_of(tx, broken, PARAMS, 1.0)
        assert not all(map(bool, getattr(conditions, which))), name
    assert all(
        map(bool, [*conditions_of(tx, state, PARAMS, 1.0).needed, *conditions_of(tx, state, PARAMS, 1.0).enough])
    )


def hold(conditions):
    return all(map(bool, [*conditions.needed, *conditions.enough]))


@pytest.mark.parametrize(
    "tx",
    [optax.lamb(1e-2), optax.adafactor(1e-2), optax.chain(optax.add_decayed_weights(0.1), optax.adam(1e-2))],
    ids=["lamb", "adafactor", "decayed before"],
)
def test_parameters_whose_squares_overflow_are_looked_at(tx):
    state = tx.init(PARAMS)
    assert hold(conditions_of(tx, state, PARAMS, 1.0))
    for large in (1e10, 1e20, np.inf, np.nan):
        params = PARAMS | {"b": np.array([large, 0], np.float32)}
        assert not hold(conditions_of(tx, state, params, 1.0))


def test_a_count_at_its_end_is_looked_at():
    tx = optax.adafactor(1e-2)
    first, *others = tx.init(PARAMS)
    last = first._replace(count=jnp.int32(np.iinfo(np.int32).max))
    assert not hold(conditions_of(tx, (last, *others), PARAMS, 1.0))


def test_what_is_not_sure_is_looked_at_and_kept_where_it_is_finite():
    settings = {"learning_rate": 1e-2, "eps": 1e-21}
    tx = optax.inject_hyperparams(optax.rmsprop)(**settings)
    assert not hold(conditions_of(tx, tx.init(PARAMS), PARAMS, 1.0))
    trainer = make_trainer(optimizer=tx)
    trainer.train()
    assert trainer.metrics["train/has_nan"] == [0] * 10
    assert_trees_close(trainer.train_state.params, make_trained(optax.rmsprop(**settings)).train_state.params)


def make_trained(tx):
    """The same with a part that nothing is known of: its updates are looked at."""
    trainer = make_trainer(optimizer=optax.chain(tx, optax.stateless(lambda updates, params: updates)))
    trainer.train()
    return trainer


def square_roots(trainer):
    (program,) = [program for program in trainer.engine.programs.values() if program.kind == "train"]
    return program.compiled.as_text().count(" sqrt(")


def test_a_known_optimizers_update_is_made_once():
    known, other = (make_trainer(optimizer=KNOWN["adam"], max_grad=clip, compile=True) for clip in (1.0, 1e30))
    assert square_roots(known) < square_roots(other)
    known.train()
    assert_trees_close(known.train_state.params, make_trained(KNOWN["adam"]).train_state.params)


@pytest.mark.parametrize("count", [1, 4])
def test_a_schedule_that_breaks_drops_its_updates(count):
    schedule = lambda step: jnp.where(step == 3, jnp.nan, 1e-2)  # noqa: E731
    tx = optax.adamw(schedule)
    trainer = make_trainer(optimizer=tx, learning_rate=schedule, devices=jax.devices()[:count], num_epochs=1)
    trainer.train()
    assert trainer.metrics["train/has_nan"] == [0, 0, 0, 1, 1]  # the state stays, and its count with it
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(host(trainer.train_state.params)))
    assert trainer.train_state.step == 3


def test_a_gradient_that_is_none_is_dropped():
    data = make_data(16)
    data[3][1] = np.full(3, np.inf, np.float32)
    trainer = make_trainer(optimizer=KNOWN["adamw"], train_dataset=data, num_epochs=1)
    trainer.train()
    assert trainer.metrics["train/has_nan"] == [1, 0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(host(trainer.train_state)))
