"""Metrics and their pipes."""

import jax.numpy as jnp
import pytest

from learnax.loss import LossFunction
from learnax.metrics import Metric, MetricPipe
from tests.helpers import make_data, make_trainer


class Largest(Metric):
    def __call__(self, output, batch):
        return {"largest": output.max()}


class Smallest(Metric):
    def __call__(self, output, batch):
        return {"smallest": output.min(), "largest": -output.min()}


def test_a_pipe_merges_and_the_later_metric_wins():
    assert MetricPipe([Smallest(), Largest()])(jnp.array([1.0, 4.0]), []) == {"smallest": 1, "largest": 4}


class Doubled(Metric):
    def _call(self, output, batch, *, scale=1):
        return {"doubled": 2 * output * scale}


class Own(Metric):
    def __init__(self):
        pass  # never calls `super().__init__`, as scripts do

    def __call__(self, sample):
        assert self.transform is None
        return {"own": sample}


def test_metrics_are_called_with_what_the_pipe_is():
    pipe = MetricPipe(metrics_list=[Doubled(), Doubled(transform=lambda output: output + 1)])
    assert pipe(3, [], scale=10) == {"doubled": 80}
    assert MetricPipe([Own(), lambda sample: {"other": sample}])(3) == {"own": 3, "other": 3}
    assert Doubled(lambda output: -output)(3, batch=[]) == {"doubled": -6}


def test_a_metric_that_implements_nothing_says_what_to_implement():
    with pytest.raises(NotImplementedError, match=r"Metric must implement _call\(output, batch\) or override __call__"):
        Metric()(0, [])


def test_metrics_ride_in_a_loss():
    class Measured(LossFunction):
        def _call(self, output, batch):
            return output, jnp.mean(output**2), MetricPipe([Largest(), Smallest()])(output, batch)

    trainer = make_trainer(losses=Measured(), num_epochs=1, val_datasets=[make_data(9)])
    trainer.train()
    assert len(trainer.metrics["train/smallest"]) == 5
    assert trainer.metrics["val/largest"] == [-trainer.metrics["val/smallest"][0]]
