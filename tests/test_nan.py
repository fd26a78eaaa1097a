"""NaN: in losses of training and of validation, in "best", and a run that comes to nothing."""

import logging
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learnax.log import NoProgressError
from learnax.loss import LossPipe
from tests.helpers import MLP, Poisonable, Streamed, make_data, make_trainer


def nan_where_marked(output, datum):
    """A target that begins with 7 has a loss of NaN, whose gradient is 0."""
    return output, jnp.where(datum[1][0] == 7, jnp.nan, jnp.mean((output - datum[1]) ** 2)), {"error": datum[1][0] / 7}


def marked(places, n=43):
    data = make_data(n)
    for place in places:
        data[place][1] = np.full(3, 7, np.float32)
    return data


@pytest.mark.parametrize("accumulate", [1, 2])
def test_nan_data_of_a_step_are_counted_and_told_once(devices, accumulate, caplog):
    trainer = make_trainer(
        losses=nan_where_marked,
        train_dataset=marked([0, 9, 10, 30]),
        num_epochs=1,
        accumulate_steps=accumulate,
        devices=devices,
    )
    trainer.train()
    assert trainer.metrics["train/nan_data"] == {1: [1, 2, 0, 1, 0], 2: [3, 1]}[accumulate]
    assert trainer.metrics["train/has_nan"] == [0.0] * (5 // accumulate)
    told = [line for line in caplog.messages if "is NaN and counts as 0" in line]
    assert len(told) == 1
    assert told[0].startswith(f"step 1: the loss of {(1, 3)[accumulate - 1]} of {8 * accumulate} data is NaN")


def test_a_nan_in_training_stays_0_in_the_mean():
    good = make_trainer(losses=nan_where_marked, num_epochs=1, train_dataset=marked([]), batch_size=8)
    bad = make_trainer(losses=nan_where_marked, num_epochs=1, train_dataset=marked([0]), batch_size=8)
    params = good.train_state.params
    first = [good.losses(MLP().apply({"params": params}, *datum), datum)[1] for datum in make_data(8)]
    bad.train()
    np.testing.assert_allclose(bad.metrics["train/loss"][0], sum(first[1:]) / 8, rtol=1e-5)


@pytest.mark.parametrize("places", [[3], [42], range(16)], ids=["one", "in the tail", "many"])
def test_a_nan_in_validation_is_reported(places, devices):
    trainer = make_trainer(losses=nan_where_marked, val_datasets={"val": marked(places)}, devices=devices)
    trainer.train()
    assert all(map(math.isnan, trainer.metrics["val/loss"]))
    assert not any(map(math.isnan, trainer.metrics["val/error"]))


def test_padding_of_a_tail_makes_no_nan():
    data = make_data(43)  # the last batch is filled up with the last datum: 3 of 8 are real
    trainer = make_trainer(losses=nan_where_marked, val_datasets={"val": data}, batch_size=8, num_epochs=1)
    trainer.train()
    assert math.isfinite(trainer.metrics["val/loss"][0])


@pytest.mark.parametrize("minimize", [True, False])
def test_a_model_whose_validation_is_nan_is_never_best(minimize):
    def late(output, datum, step):
        return output, jnp.where(step >= 9, jnp.nan, jnp.mean((output - datum[1]) ** 2)), {}

    trainer = make_trainer(
        losses=late,
        val_datasets={"val": make_data(8)},
        keep_best_checkpoint=True,
        minimize_metric=minimize,
        registry="r",
        num_epochs=3,
    )
    trainer.train()
    assert [math.isnan(value) for value in trainer.metrics["val/loss"]] == [False, True, True]
    assert trainer.checkpointer.load_best()["step"] == 5


def poisoned(n=400):
    data = make_data(n)
    for datum in data[16:]:
        datum[1] = np.full(3, 7, np.float32)
    return data


@pytest.mark.parametrize("fused", [1, 16])
@pytest.mark.parametrize("data", [poisoned(), Streamed(poisoned())], ids=["resident", "streamed"])
def test_a_run_without_progress_ends_with_an_error_and_is_saved(fused, data):
    trainer = make_trainer(
        losses=LossPipe([Poisonable()]),
        train_dataset=data,
        num_epochs=5,
        registry="r",
        max_dropped=20,
        steps_per_execution=fused,
    )
    with pytest.raises(NoProgressError) as raised:
        trainer.train()
    text = str(raised.value)
    assert "updates were all dropped, after step 2: the gradient is not finite in Dense_0/bias, Dense_0/kernel" in text
    assert "max_dropped=None" in text
    assert trainer.log.step == 2
    dropped = sum(trainer.metrics["train/has_nan"])
    assert 20 <= dropped < 48 * 5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(trainer.train_state.params)))
    assert trainer.checkpointer.load_latest()["step"] == 2
    assert 50 * trainer.position.epoch + trainer.position.batch == len(trainer.metrics["train/has_nan"])


def test_dropped_updates_that_are_not_in_a_row_end_nothing():
    data = make_data(400)
    for datum in data[::16]:  # every other batch
        datum[1] = np.full(3, 7, np.float32)
    trainer = make_trainer(losses=LossPipe([Poisonable()]), train_dataset=data, num_epochs=2, max_dropped=2)
    trainer.train()
    assert sum(trainer.metrics["train/has_nan"]) == 50


def test_without_a_limit_all_is_tried_and_told(caplog):
    data = [[x, np.full(3, 7, np.float32)] for x, _ in make_data(43)]
    trainer = make_trainer(losses=LossPipe([Poisonable()]), train_dataset=data, max_dropped=None, num_epochs=30)
    trainer.train()
    assert trainer.log.step == 0
    assert "all 150 updates were dropped: nothing was trained, the step is still 0" in caplog.messages


@pytest.mark.parametrize(("given", "error"), [(0, ValueError), (1.5, TypeError), ("many", TypeError)])
def test_a_limit_that_is_none(given, error):
    with pytest.raises(error, match="max_dropped"):
        make_trainer(max_dropped=given)


def test_the_line_of_a_dropped_update_names_a_few_parameters(caplog):
    caplog.set_level(logging.WARNING)
    data = [[x, np.full(3, 7, np.float32)] for x, _ in make_data(8)]
    deep = make_trainer(model=Deep(), losses=LossPipe([Poisonable()]), train_dataset=data, num_epochs=1)
    deep.train()
    (line,) = [line for line in caplog.messages if "was dropped" in line]
    assert "the gradient is not finite in any of the 12 parameters, " in line
    assert len(line) < 300


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x, y=None):
        for _ in range(6):
            x = nn.Dense(3)(x)
        return x


def test_an_optimizer_that_divides_by_zero_counts_as_dropped():
    trainer = make_trainer(optimizer=optax.scale(jnp.inf), max_dropped=5, num_epochs=4)
    with pytest.raises(NoProgressError, match="the optimizer's update is not finite, though the gradient is"):
        trainer.train()
