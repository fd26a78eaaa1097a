"""Losses and metrics with weights: any split of the data over batches and devices is the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learnax.loss import LossFunction, LossPipe
from learnax.metrics import Max, Mean, Min, Sum
from learnax.models import Functions, Linen
from learnax.step import Recipe, mean_loss
from learnax.step.recipe import keys_of
from tests import plain
from tests.helpers import MLP, assert_trees_close, host, make_data, make_trainer

SIZE, HELD_OUT = 48, 19


def masked(output, batch):
    """Of a datum or a batch: positive targets count, by their size."""
    error, weight = (output - batch[1]) ** 2, jnp.maximum(batch[1], 0)
    metrics = {
        "far": Mean((jnp.abs(output - batch[1]) * weight).sum(axis=-1), weight.sum(axis=-1)),
        "count": Sum((weight > 0).sum(axis=-1)),
        "largest": Max(error.max(axis=-1)),
        "smallest": Min(error.min(axis=-1)),
        "plain": error.mean(axis=-1),
    }
    return output, Mean((error * weight).sum(), weight.sum()), metrics


def by_datum(output, batch):
    output, _, metrics = masked(output, batch)
    error, weight = (output - batch[1]) ** 2, jnp.maximum(batch[1], 0)
    return output, Mean((error * weight).sum(axis=-1), weight.sum(axis=-1)), metrics


class Masked(LossFunction):
    def _call(self, output, batch):
        return masked(output, batch)


class Outputs(LossFunction):
    """A term that has no weights, beside one that has."""

    def _call(self, output, batch):
        return output, jnp.abs(output).mean(), {}


several = LossPipe([Masked(0.5), Outputs(0.1), Masked(0.25, scheduler=lambda step: 1.0 + step / 10)])
sums = lambda output, batch: (output, Sum(((output - batch[1]) ** 2).mean(axis=-1)), {})  # noqa: E731

FORMS = {
    "a datum": (masked, MLP()),
    "several terms": (several, MLP()),
    "a batch": (masked, Linen(MLP(), batched=True)),
    "a batch by datum": (by_datum, Linen(MLP(), batched=True)),
    "a sum": (sums, Linen(MLP(), batched=True)),
}


def trained(form, count=1, accumulate=1, **overrides):
    losses, model = FORMS[form]
    options = {
        "model": model,
        "losses": losses,
        "devices": jax.devices()[:count],
        "batch_size": 16 // accumulate,
        "accumulate_steps": accumulate,
        "train_dataset": make_data(SIZE),
        "val_datasets": [make_data(HELD_OUT, 1)],
        "optimizer": optax.sgd(0.05),
        "max_grad": 1e9,
    }
    trainer = make_trainer(**options | overrides)
    trainer.train()
    return trainer


_MARKS = {"a batch": [], "a datum": [pytest.mark.thorough]}


@pytest.mark.parametrize("form", [pytest.param(form, marks=_MARKS.get(form, [pytest.mark.soak])) for form in FORMS])
def test_any_split_over_batches_and_devices_is_the_whole_batch(form):
    expected = trained(form)
    for count, accumulate in ((4, 1), (1, 4), (2, 2)):
        other = trained(form, count, accumulate)
        assert_trees_close(other.train_state.params, expected.train_state.params)
        for name, values in expected.metrics.items():
            if not name.endswith("update_time"):
                np.testing.assert_allclose(other.metrics[name], values, rtol=2e-4, atol=1e-5, err_msg=name)


def loss_by_hand(params, state, batch):
    output = MLP().apply({"params": params}, batch[0])
    weight = jnp.maximum(batch[1], 0)
    return ((output - batch[1]) ** 2 * weight).sum() / weight.sum(), state


@pytest.mark.parametrize("form", ["a datum", "a batch", "a batch by datum"])
def test_a_weighted_run_is_its_plain_loop_and_validates_over_all_data(form):
    params = host(make_trainer().train_state.params)
    options = {"size": 16, "epochs": 2, "optimizer": optax.sgd(0.05), "clip": 1e9}
    params, _, losses = plain.train(loss_by_hand, params, make_data(SIZE), **options)
    trainer = trained(form)
    assert_trees_close(trainer.train_state.params, params)
    np.testing.assert_allclose(trainer.metrics["train/loss"], losses, rtol=1e-4)
    batch = [np.stack(part) for part in zip(*make_data(HELD_OUT, 1), strict=True)]
    loss, _ = loss_by_hand(params, None, batch)
    np.testing.assert_allclose(trainer.metrics["val/loss"][-1], loss, rtol=1e-4)
    error, weight = np.array(MLP().apply({"params": params}, batch[0]) - batch[1]), np.maximum(batch[1], 0)
    found = {name: trainer.metrics[f"val/{name}"][-1] for name in ("far", "count", "largest", "smallest", "plain")}
    np.testing.assert_allclose(found["far"], (np.abs(error) * weight).sum() / weight.sum(), rtol=1e-4)
    assert found["count"] == (weight > 0).sum()
    np.testing.assert_allclose(found["largest"], (error**2).max(), rtol=1e-4)
    np.testing.assert_allclose(found["smallest"], (error**2).min(), rtol=1e-2, atol=1e-6)
    np.testing.assert_allclose(found["plain"], (error**2).mean(), rtol=1e-4)


@pytest.mark.thorough
def test_a_divided_state_trains_alike():
    expected = trained("several terms")
    divided = trained("several terms", 4, shard_state=True)
    assert_trees_close(divided.train_state.params, expected.train_state.params)


@pytest.mark.thorough
def test_a_weight_of_the_models_own_is_no_way_for_gradients():
    def losses(output, datum):
        weight = jnp.exp(output[0])
        return output, Mean(weight * (output - datum[1]).mean() ** 2, weight), {}

    def loss(params, state, batch):
        output = MLP().apply({"params": params}, batch[0])
        weight = jnp.exp(output[:, 0])
        means = (output - batch[1]).mean(axis=-1)
        return (weight * means**2).sum() / jax.lax.stop_gradient(weight.sum()), state

    params = host(make_trainer().train_state.params)
    options = {"size": 16, "epochs": 2, "optimizer": optax.sgd(0.05), "clip": 1e9}
    params, _, _ = plain.train(loss, params, make_data(SIZE), **options)
    for accumulate in (1, 4):  # what is known of later batches by their outputs alone is asked of them first
        assert_trees_close(trained("a datum", 1, accumulate, losses=losses).train_state.params, params)


def test_the_largest_and_smallest_of_whole_numbers():
    def losses(output, datum):
        number = jnp.round(datum[1].sum() * 1e5).astype(jnp.int32)
        return output, ((output - datum[1]) ** 2).mean(), {"largest": Max(number), "smallest": Min(number)}

    trainer = trained("a datum", accumulate=2, losses=losses, num_epochs=1)
    for split, data in (("train", make_data(SIZE)), ("val", make_data(HELD_OUT, 1))):
        numbers = np.round(np.array([y.sum() for _, y in data]) * 1e5)
        # An epoch's data are in its steps in some order.
        found = max(trainer.metrics[f"{split}/largest"]), min(trainer.metrics[f"{split}/smallest"])
        np.testing.assert_allclose(found, (numbers.max(), numbers.min()), atol=1, err_msg=split)
        assert min(trainer.metrics[f"{split}/largest"]) >= max(trainer.metrics[f"{split}/smallest"])


def test_nothing_that_counts_is_0_and_told_once(caplog):
    def losses(output, datum):
        return output, Mean(((output - datum[1]) ** 2).sum() * 0, jnp.float32(0)), {}

    trainer = trained("a datum", losses=losses)
    assert trainer.metrics["train/loss"] == [0.0] * 6
    assert trainer.metrics["val/loss"] == [0.0] * 2
    assert trainer.metrics["train/has_nan"] == [0] * 6
    assert [line for line in caplog.messages if line.startswith("step")] == [
        "step 1: all weights of loss are 0: it counts as 0, which is told once"
    ]
    assert "validation 'val': all weights of loss are 0: it counts as 0" in caplog.messages


@pytest.mark.parametrize("bad", [-1.0, np.nan])
def test_a_weight_that_makes_no_mean_ends_the_run_with_the_state_as_it_was(bad):
    data = [[x, y, y] for x, y in make_data(SIZE)]

    def loss(output, datum):
        weight = jnp.where(datum[2][0] == 7, bad, 1.0)
        return output, Mean(((output - datum[1]) ** 2).sum(), weight), {}

    data[20][2] = np.full(3, 7, np.float32)
    model = Linen(MLP(), inputs=1)
    with pytest.raises(ValueError, match="step 2: loss has a weight that is negative or NaN; learnax") as caught:
        trained("a datum", model=model, losses=loss, train_dataset=data, val_datasets=None)
    assert "jnp.where(jnp.isnan(label), 0, weight) leaves it out" in str(caught.value)
    with pytest.raises(ValueError, match="validation 'val': loss has a weight that is negative or NaN"):
        trained("a datum", model=model, losses=loss, train_dataset=[data[0]] * 16, val_datasets=[data])


def test_a_weight_that_is_known_to_be_wrong_is_an_error_at_once():
    for weight in (-1.0, np.nan):
        with pytest.raises(TypeError, match=r"losses: the loss has the weight .*, but a weight is 0 or more"):
            make_trainer(losses=lambda output, datum, weight=weight: (output, Mean(jnp.sum(output), weight), {}))


def test_what_is_no_loss():
    for amount, name in ((Max, "Max"), (Min, "Min")):
        with pytest.raises(TypeError, match=f"the loss must be a number, or a Mean or Sum of .*, but is a {name}"):
            make_trainer(losses=lambda output, datum, amount=amount: (output, amount(jnp.sum(output)), {}))
    with pytest.raises(TypeError, match="metric 'both' is a sum of several amounts, which a loss may be"):
        make_trainer(losses=lambda output, datum: (output, output.sum(), {"both": Mean(output.sum()) + 1.0}))
    with pytest.raises(TypeError, match="metric 'rows' of one datum must be a scalar, but has shape"):
        make_trainer(losses=lambda output, datum: (output, output.sum(), {"rows": Mean(output)}))


def test_amounts_are_scaled_and_added_as_numbers_are():
    loss = 2 * Mean(jnp.float32(3), 4.0) + jnp.float32(1) + np.float32(2) * Sum(jnp.float32(5))
    first, second, third = loss.terms
    assert (float(first.total), first.weight, float(second), float(third.total)) == (6, 4, 1, 10)
    assert sum([Mean(1.0), Mean(2.0)]).terms == (Mean(1.0), Mean(2.0))
    scaled = (0.0 + Mean(jnp.float32(2))) * jnp.float32(3)
    assert float(scaled.total) == 6


def test_a_loss_with_weights_keeps_64_bits():
    """Of each kind of term: what float32 would round away is still there."""
    tiny = 1e-12

    def losses(output, batch):
        return output, Mean(1 + tiny * output, jnp.ones_like(output)), {}

    def sums(output, batch):
        return output, Sum(1 + tiny * output), {}

    class Plain(LossFunction):
        def _call(self, output, batch):
            return output, 1 + tiny * output, {}

    class Weighted(LossFunction):
        def _call(self, output, batch):
            return losses(output, batch)

    model = Functions(lambda key: {"w": jnp.ones((), jnp.float64)}, lambda params, x: params["w"] * x)
    with jax.enable_x64(True):
        batch = [np.full(4, 3.0)]
        for loss, whole, factor in (
            (losses, 1, 1),
            (sums, 4, 4),
            (LossPipe([Plain(1.0), Weighted(1.0)]), 2, 2),
        ):
            recipe = Recipe(model, loss, optax.sgd(1.0), None, 1.0, batch_size=4, shards=1, weighted=True)
            keys = keys_of(recipe, jax.random.key(0))
            value, _ = mean_loss(recipe, {"w": jnp.ones((), jnp.float64)}, None, keys, batch, jnp.int32(0))
            assert value.dtype == jnp.float64
            np.testing.assert_allclose(float(value) - whole, factor * 3 * tiny, rtol=1e-3)
