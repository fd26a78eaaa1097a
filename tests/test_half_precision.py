"""Half-precision computation from float32 parameters, the scale of its loss, and what the backward pass keeps."""

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learnax.models import Functions, Linen
from learnax.step.scaling import Scaled
from tests import plain
from tests.helpers import (
    MLP,
    MemoryRun,
    StopAt,
    assert_trees_close,
    assert_trees_equal,
    host,
    make_data,
    make_trainer,
)

TYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16}


def make(precision, **overrides):
    options = {"model": Linen(MLP(), precision=precision), "optimizer": optax.sgd(0.01), "max_grad": 1e9}
    return make_trainer(**options | overrides)


def halved(precision):
    """The plain loop's loss: halves inside, float32 around."""
    half = TYPES[precision]

    def loss(params, state, batch):
        narrow = jax.tree.map(lambda leaf: leaf.astype(half), params)
        output = MLP().apply({"params": narrow}, batch[0].astype(half)).astype(jnp.float32)
        return jnp.mean((output - batch[1]) ** 2), state

    return loss


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.soak), 4])
def test_a_run_in_halves_is_the_plain_loop_in_halves(precision, count, monkeypatch):
    monkeypatch.setattr("learnax.step.scaling.START", 2.0**10)  # nothing overflows
    trainer = make(precision, devices=jax.devices()[:count], num_epochs=1, val_datasets=[make_data(11, 1)])
    params = host(trainer.train_state.params)
    options = {"size": 8, "epochs": 1, "optimizer": optax.sgd(0.01), "clip": 1e9}
    expected, _, losses = plain.train(halved(precision), params, make_data(43), **options)
    trainer.train()
    np.testing.assert_allclose(trainer.metrics["train/loss"], losses, rtol=2e-2)
    assert_trees_close(trainer.train_state.params, expected, rtol=2e-2, atol=2e-3)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(trainer.train_state.params)} == {"float32"}
    exact = make(None, num_epochs=1)
    exact.train()
    assert trainer.metrics["train/loss"] != exact.metrics["train/loss"]


def test_the_program_multiplies_halves():
    seen = []

    class Looking(nn.Module):
        @nn.compact
        def __call__(self, x, y=None):
            x = nn.Dense(3)(x)
            seen.append((str(x.dtype), str(y.dtype)))
            return x

    make("bf16", model=Linen(Looking(), precision="bf16"), num_epochs=1).train()
    assert set(seen) == {("bfloat16", "bfloat16"), ("float32", "float32")}  # the latter while it initialises


def overflowing(at):
    """A loss whose gradient is beyond float16 while its scale is large: the gradients of outputs are halves."""

    def losses(output, datum):
        return output, jnp.mean((output - datum[1]) ** 2) * at, {}

    return losses


def test_overflows_lower_the_scale_and_count_apart_from_nan(caplog):
    # 2**15 times 64 times a gradient of about 1 is beyond 65504, the largest of float16.
    trainer = make("fp16", losses=overflowing(64.0), optimizer=optax.sgd(1e-4), max_dropped=3)
    trainer.train()
    overflow = trainer.metrics["train/overflow"]
    assert 1 <= sum(overflow) < 10
    assert overflow[0] == 1
    assert trainer.metrics["train/has_nan"] == [0] * 10
    assert int(trainer.train_state.step) == 10 - sum(overflow)
    scales = trainer.metrics["train/loss_scale"]
    assert scales[0] == 2.0**15
    assert scales[-1] == 2.0 ** (15 - sum(overflow[:-1]))
    assert not [line for line in caplog.messages if "NaN" in line]
    exact = make(None, losses=overflowing(64.0), optimizer=optax.sgd(1e-4))
    exact.train()
    np.testing.assert_allclose(trainer.metrics["train/loss"], exact.metrics["train/loss"], rtol=0.1)


def test_a_nan_at_the_smallest_scale_is_a_nan(caplog):
    def losses(output, datum):
        return output, jnp.sqrt(jnp.sum(output) * 0), {}  # the gradient is NaN, whatever the scale

    trainer = make("fp16", losses=losses, num_epochs=4)
    trainer.train()
    overflow = trainer.metrics["train/overflow"]
    assert overflow == [1] * 15 + [0] * 5  # down to 1
    assert trainer.metrics["train/has_nan"] == [0] * 15 + [1] * 5
    assert trainer.train_state.step == 0
    assert any("would put NaN into the parameters" in line for line in caplog.messages)


@pytest.mark.thorough
def test_the_scale_grows_again_and_goes_through_a_checkpoint(registry_path, monkeypatch):
    monkeypatch.setattr("learnax.step.scaling.PATIENCE", 4)
    options = {"losses": overflowing(64.0), "optimizer": optax.sgd(1e-4), "num_epochs": 3}
    straight = make("fp16", **options)
    straight.train()
    scales = straight.metrics["train/loss_scale"]
    assert max(np.diff(scales)) > 0 > min(np.diff(scales))
    kept = {"registry": "scales", "run": MemoryRun(), "save_every": 2}
    stopped = make("fp16", **options, **kept)
    stopped.hooks.saves.append(StopAt(6))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make("fp16", **options, **kept, load_checkpoint=True)
    assert isinstance(resumed.train_state.model_state, Scaled)
    resumed.train()
    assert_trees_equal(resumed.train_state, straight.train_state)
    assert resumed.metrics["train/loss_scale"] == scales


def test_integer_parameters_are_refused_as_ever():
    model = Functions(lambda key: {"w": jnp.ones((8, 3)), "table": jnp.arange(3)}, lambda p, x: x @ p["w"])
    for given in (model, Functions(model, precision="bf16")):
        with pytest.raises(TypeError, match="the model's parameters must be floats, to have a gradient, but these are"):
            make_trainer(model=given)


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x, y=None):
        for _ in range(8):
            x = jnp.tanh(nn.Dense(16)(x))
        return nn.Dense(3)(x)


def counted(jaxpr, name):
    own = sum(equation.primitive.name == name for equation in jaxpr.eqns)
    return own + sum(counted(inner, name) for inner in jax.extend.core.subjaxprs(jaxpr))


@pytest.mark.thorough
def test_what_a_policy_does_not_keep_is_computed_again():
    losses = lambda output, batch: (output, jnp.mean((output - batch[1]) ** 2, axis=-1), {})  # noqa: E731
    batch = [np.stack(part) for part in zip(*make_data(8), strict=True)]
    ends, tanh = {}, {}
    for remat in (None, "dots_saveable", "everything_saveable", jax.checkpoint_policies.nothing_saveable):
        model = Linen(Deep(), batched=True, remat=remat)
        trainer = make(None, model=model, losses=losses)

        def loss(params, model=model):
            return jnp.mean(model.apply(params, None, jax.random.key(0), *batch, training=True)[0])

        tanh[remat] = counted(jax.make_jaxpr(jax.grad(loss))(trainer.train_state.params).jaxpr, "tanh")
        trainer.train()
        ends[remat] = host(trainer.train_state.params)
        assert_trees_close(ends[remat], ends[None])
    assert list(tanh.values()) == [8, 16, 8, 16]
