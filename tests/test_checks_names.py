"""Names of metrics that are the trainer's own, or taken."""

import re

import jax.numpy as jnp
import pytest

from learnax.checks.names import STEP_METRICS
from learnax.loss import LossPipe
from tests.helpers import make_data, make_trainer


def naming(name):
    def losses(output, datum):
        return output, jnp.mean((output - datum[1]) ** 2), {name: jnp.float32(1)}

    return losses


def sampling(metrics, **options):
    sampler = {"sample_model": lambda params, key, datum: datum[0], "sample_every": 2}
    return make_trainer(**sampler, sample_metrics=metrics, num_epochs=1, steps_per_execution=1, **options)


@pytest.mark.parametrize("name", STEP_METRICS)
def test_a_metric_of_the_losses_with_a_name_of_the_trainer(name):
    other = f"own_{name}".replace(" ", "_")
    text = (
        f"losses return a metric called {name!r}; that name is the trainer's own, which it would replace. "
        f"Call it {other!r} for instance"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        make_trainer(losses=LossPipe([naming(name)]))


def test_a_metric_where_the_gradients_go_and_names_that_are_free():
    text = "losses return a metric called 'grads/x'; that name is where the gradients' norms go. Call it 'own_grads_x'"
    with pytest.raises(ValueError, match=re.escape(text)):
        make_trainer(losses=naming("grads/x"))
    for name in ("Loss", "loss/mse", "graded"):
        assert make_trainer(losses=naming(name)) is not None


def test_a_step_reports_nothing_of_its_own_under_a_name_that_is_not_kept_free():
    trainer = sampling(lambda sample, datum: {"drawn": 1.0}, losses=naming("mse"), val_datasets=[make_data(3)])
    trainer.train()
    made = {name.removeprefix("train/") for name in trainer.metrics if name.startswith("train/")}
    assert made - {"mse", "drawn"} <= set(STEP_METRICS)
    assert trainer.metrics["train/drawn"] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("metrics", "error", "text"),
    [
        (
            {"has_nan": 1.0},
            ValueError,
            "sample_metrics returns a metric called 'has_nan'; that name is the trainer's own",
        ),
        ({"grads/x": 1.0}, ValueError, "sample_metrics returns a metric called 'grads/x'; that name is where the grad"),
        (
            {"mse": 1.0},
            ValueError,
            "sample_metrics returns a metric called 'mse'; that name is that of a metric of the losses, which it would "
            "replace. Call it 'sample_mse' for instance",
        ),
        ({0: 1.0}, TypeError, "sample_metrics returns a metric whose name must be text, but is 0; write '0'"),
        (
            None,
            TypeError,
            'sample_metrics must return a dict of scalars, {"error": error} for instance, but returned None',
        ),
        (1.0, TypeError, "but returned 1.0"),
    ],
)
def test_metrics_of_samples_are_looked_at_when_they_are_first_made(metrics, error, text):
    trainer = sampling(lambda sample, datum: metrics, losses=naming("mse"))
    with pytest.raises(error, match=re.escape(text)):
        trainer.train()
    # What was trained before is there, as the losses made it.
    assert trainer.metrics["train/mse"] == [1.0, 1.0]
    assert trainer.metrics["train/has_nan"] == [0.0, 0.0]


def test_samples_with_metrics_of_different_names():
    rows = iter([{"a": 1.0}, {"b": 1.0}])
    trainer = sampling(lambda sample, datum: next(rows), sample_batch_size=2)
    with pytest.raises(ValueError, match="must return the same names for each sample, but not for all: a, b"):
        trainer.train()
