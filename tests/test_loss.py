"""Losses and their pipes, by hand and inside a run."""

import jax.numpy as jnp
import numpy as np
import pytest

from learnax.loss import LossFunction, LossPipe, call_loss
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
