"""Optimisers that ask for more than gradients, and several of them by the paths of parameters."""

import jax
import jax.numpy as jnp
import optax
import pytest

from tests import plain
from tests.helpers import MLP, MemoryRun, assert_trees_close, assert_trees_equal, host, make_data, make_trainer


def by_hand(optimizer, epochs=2):
    """The plain loop, with all that optax's optimisers may ask for."""
    params = host(make_trainer().train_state.params)
    optimizer = optax.with_extra_args_support(optimizer)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, x, y):
        def value_fn(params):
            return jnp.mean((MLP().apply({"params": params}, x) - y) ** 2)

        value, grad = jax.value_and_grad(value_fn)(params)
        extra = {"value": value, "grad": grad, "value_fn": value_fn}
        if optimizer.update.__qualname__.startswith("sam"):
            extra = {"grad_fn": lambda params, _: jax.grad(value_fn)(params)}
        updates, opt_state = optimizer.update(grad, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state

    with jax.numpy_dtype_promotion("standard"):
        for x, y in plain.batches(make_data(43), 8, epochs):
            params, opt_state = step(params, opt_state, x, y)
    return params


ASKING = {
    "plateau": optax.chain(optax.sgd(0.05), optax.contrib.reduce_on_plateau(patience=2, factor=0.5)),
    "polyak": optax.polyak_sgd(),
    "momo": optax.contrib.momo(),
    "lbfgs": optax.lbfgs(memory_size=3, linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=4)),
    "sam": optax.contrib.sam(
        optax.sgd(0.05), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)), opaque_mode=True
    ),
}
_NAMES = [pytest.param(name, marks=[pytest.mark.thorough] * (name != "polyak")) for name in ASKING]


@pytest.mark.parametrize("name", _NAMES)
def test_an_optimizer_that_asks_for_more_is_its_plain_loop_on_any_split(name):
    expected = by_hand(ASKING[name])
    for count, accumulate in ((1, 1), (2, 2)):
        options = {"devices": jax.devices()[:count], "batch_size": 8 // accumulate, "accumulate_steps": accumulate}
        trainer = make_trainer(optimizer=ASKING[name], max_grad=1e9, train_dataset=make_data(40), **options)
        trainer.train()
        assert_trees_close(trainer.train_state.params, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.soak
def test_an_optimizer_that_asks_for_the_curvature_trains_alike_on_any_split():
    """Its random directions are of its own state, so that it is compared with itself."""
    ends = []
    for count in (1, 4):
        trainer = make_trainer(optimizer=optax.contrib.sophia(1e-2), devices=jax.devices()[:count], max_grad=1e9)
        trainer.train()
        ends.append(host(trainer.train_state.params))
    assert_trees_close(*ends, rtol=1e-4)


# ---- optimisers by pattern


def test_what_is_frozen_has_no_gradient_no_moments_and_no_part_in_the_clip():
    patterns = {"Dense_1/.*": optax.adam(1e-2), ".*": None}
    trainer = make_trainer(optimizer=patterns, max_grad=0.1)
    before = host(trainer.train_state.params)

    def loss(trained, state, batch):
        return jnp.mean((MLP().apply({"params": before | {"Dense_1": trained}}, batch[0]) - batch[1]) ** 2), state

    expected, _, _ = plain.train(loss, before["Dense_1"], make_data(43), size=8, epochs=2, clip=0.1)
    trainer.train()
    assert_trees_equal(trainer.train_state.params["Dense_0"], before["Dense_0"])
    assert_trees_close(trainer.train_state.params["Dense_1"], expected)
    trained = {leaf.size for leaf in jax.tree.leaves(before["Dense_1"])}
    assert {leaf.size for leaf in jax.tree.leaves(trainer.train_state.opt_state)} == trained | {1}
    _, after, metrics = trainer.update(jax.random.key(0), trainer.train_state, make_data(8))
    assert [name for name in metrics if name.startswith("grads/")] == ["grads/Dense_1/bias", "grads/Dense_1/kernel"]
    assert_trees_equal(after.params["Dense_0"], before["Dense_0"])


@pytest.mark.thorough
def test_each_pattern_has_its_optimizer_on_any_number_of_devices(registry_path):
    patterns = {"Dense_0/.*": optax.sgd(0.05), r"Dense_1/(bias|kernel)": optax.adam(1e-2)}
    tx = optax.multi_transform({"a": optax.sgd(0.05), "b": optax.adam(1e-2)}, {"Dense_0": "a", "Dense_1": "b"})
    loss = lambda params, state, batch: (jnp.mean((MLP().apply({"params": params}, batch[0]) - batch[1]) ** 2), state)  # noqa: E731
    params = host(make_trainer().train_state.params)
    expected, _, _ = plain.train(loss, params, make_data(43), size=8, epochs=2, optimizer=tx)
    for count in (1, 4):
        run = MemoryRun()
        options = {"optimizer": patterns, "devices": jax.devices()[:count], "registry": f"patterns{count}", "run": run}
        make_trainer(**options, num_epochs=1).train()
        resumed = make_trainer(**options, load_checkpoint=True)
        assert resumed.train_state.step == 5
        resumed.train()
        assert_trees_close(resumed.train_state.params, expected)
