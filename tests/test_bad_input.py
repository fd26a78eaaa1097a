"""What is wrong is said at the earliest moment: the thing by name, what was expected, what came, what to do."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learnax.trainer import Trainer
from tests.helpers import MLP, Squared, make_data, make_trainer


def test_a_batch_that_does_not_divide_over_the_devices():
    text = "batch_size 6 does not divide over 4 devices; use a multiple of 4 (4 or 8), or fewer devices (devices=)"
    with pytest.raises(ValueError, match=re.escape(text)):
        make_trainer(batch_size=6, devices=jax.devices()[:4])
    with pytest.raises(ValueError, match=re.escape("use a multiple of 4 (4), or fewer devices (devices=)")):
        make_trainer(batch_size=3, devices=jax.devices()[:4])


COUNTS = ["num_epochs", "batch_size", "save_every", "checkpoint_every", "max_checkpoints", "val_every", "plot_every"]


@pytest.mark.parametrize("name", [*COUNTS, "sample_every", "sample_batch_size"])
@pytest.mark.parametrize("value", [0, -3])
def test_a_count_below_one(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, but is {value}"):
        make_trainer(**{name: value})


@pytest.mark.parametrize("name", [*COUNTS, "num_workers", "seed"])
@pytest.mark.parametrize("value", [2.5, "4", True])
def test_a_count_that_is_no_whole_number(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a whole number, but is {value!r}"):
        make_trainer(**{name: value})


def test_counts_that_cannot_be_left_out():
    with pytest.raises(ValueError, match="num_epochs and num_steps are both None; one of them says how long to train"):
        make_trainer(num_epochs=None)
    with pytest.raises(ValueError, match="num_workers must be at least 0, but is -1; 0 reads in this process"):
        make_trainer(num_workers=-1)
    assert make_trainer(save_every=None, checkpoint_every=None, plot_every=None) is not None


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"max_grad": 0}, ValueError, "max_grad must be a number above 0, but is 0; float('inf') never scales"),
        ({"max_grad": float("nan")}, ValueError, "max_grad must be a number above 0, but is nan"),
        ({"max_grad": "1"}, ValueError, "max_grad must be a number above 0, but is '1'"),
        ({"learning_rate": "1e-3"}, TypeError, "learning_rate must be a number or an optax schedule, but is '1e-3'"),
        ({"learning_rate": None}, TypeError, "learning_rate must be a number or an optax schedule, but is None"),
        ({"learning_rate": -1}, ValueError, "learning_rate must be finite and at least 0, but is -1.0"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be finite and at least 0, but is nan"),
        ({"model": lambda x: x}, TypeError, "one of these in an adapter of learnax.models, but is <function"),
        ({"model": MLP}, TypeError, "one of these in an adapter of learnax.models, but is the class MLP; write MLP()"),
        ({"losses": [1]}, TypeError, "losses must be callable, but is [1]; several become one by LossPipe([...])"),
        ({"losses": Squared}, TypeError, "losses must be an object to call, but is the class Squared; write Squared()"),
        ({"plot_pipe": "plot"}, TypeError, "plot_pipe must be callable, but is 'plot'"),
        (
            {"sample_batch_size": 9, "sample_every": 1, "sample_model": print},
            ValueError,
            "sample_batch_size 9 is more than the 8 data of a batch",
        ),
        ({"val_datasets": 3}, TypeError, "val_datasets must be a mapping of names to datasets or a list of datasets"),
    ],
)
def test_arguments_of_a_wrong_type_or_range(arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        make_trainer(**arguments)


def test_a_validation_set_named_train():
    with pytest.raises(ValueError, match="a validation set cannot be named 'train'; that is the training split's name"):
        make_trainer(val_datasets={"train": make_data(8)})


def test_a_dataset_that_is_empty_short_or_none_at_all():
    with pytest.raises(ValueError, match="dataset 'train' is empty; expected at least 8 data"):
        make_trainer(train_dataset=[])
    text = "dataset 'train' has 5 data, fewer than one batch of 8: every batch would be skipped; use batch_size <= 5"
    with pytest.raises(ValueError, match=text):
        make_trainer(train_dataset=make_data(5))
    with pytest.raises(ValueError, match="dataset 'val' is empty; expected at least 1 data"):
        make_trainer(val_datasets=[[]])
    with pytest.raises(TypeError, match=r"dataset 'near' must have __len__ and __getitem__, but is generator; a list"):
        make_trainer(val_datasets={"near": (datum for datum in make_data(8))})


def test_a_loss_that_is_no_scalar():
    with pytest.raises(TypeError, match=re.escape("the loss of one datum must be a scalar, but has shape (3,)")):
        make_trainer(losses=lambda output, datum: (output, (output - datum[1]) ** 2, {}))
    with pytest.raises(TypeError, match=re.escape("losses must return (output, loss, metrics), but returned")):
        make_trainer(losses=lambda output, datum: jnp.mean(output))
    with pytest.raises(TypeError, match="the loss of one datum must be a scalar, but has None"):
        make_trainer(losses=lambda output, datum: (output, None, {}))


def test_a_metric_that_is_no_scalar():
    text = "metric 'error' of one datum must be a scalar, but has shape (3,); reduce it, with .mean() for one"
    with pytest.raises(TypeError, match=re.escape(text)):
        make_trainer(losses=lambda output, datum: (output, jnp.mean(output), {"error": output}))


def test_a_model_that_cannot_take_the_datum():
    class OneArgument(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x)

    with pytest.raises(ValueError, match="OneArgument cannot take a datum of 'train'") as caught:
        make_trainer(model=OneArgument())
    text = str(caught.value)
    assert "(2 arguments):\n  [0]: float32[8]\n  [1]: float32[3]\n" in text
    assert "but its __call__ takes 1, (x)\na datum that is a list is spread over the model's arguments" in text
    assert "\n  def __call__(self, x, y=None):\n" in text
    assert len(text.splitlines()) <= 12


def test_a_validation_set_that_the_model_cannot_take_is_told_before_any_training():
    far = [[np.zeros(5, np.float32), np.zeros(3, np.float32)]] * 8
    with pytest.raises(ValueError, match=r"MLP cannot take a datum of 'far'.*\n  \[0\]: float32\[5\]"):
        make_trainer(val_datasets={"far": far})


def test_a_model_with_running_state():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            return nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))

    with pytest.raises(
        ValueError, match="carries on differs between the data of a batch, in batch_stats/BatchNorm_0: it sees one"
    ):
        make_trainer(model=Normed())


def test_best_by_a_metric_that_no_split_produces():
    with pytest.raises(ValueError, match="best_metric_name 'val/los' is produced by no split of this run") as caught:
        make_trainer(registry="r", keep_best_checkpoint=True, best_metric_name="val/los", val_datasets=[make_data(8)])
    for name in ("val/loss", "val_epoch/rmse", "train/gradient norm", "train_epoch/loss"):
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="best_metric_name 'val/loss' is produced by no split"):
        make_trainer(registry="r", keep_best_checkpoint=True)


def test_a_registry_without_a_folder(monkeypatch):
    monkeypatch.delenv("TRAINAX_REGISTRY_PATH")
    with pytest.raises(
        ValueError, match="registry 'molecules': no folder to keep runs in; set the environment variable"
    ):
        make_trainer(registry="molecules")


def test_update_by_hand_with_a_batch_that_is_none():
    trainer = make_trainer()
    text = "expected a batch of 8 data, as a list or stacked, each of this structure:\n  [0]: float32[8]\n"
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        trainer.update(jax.random.key(0), trainer.train_state, make_data(7))
    assert "but got:\n" in str(caught.value)


@pytest.mark.processes
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataset_that_raises(num_workers):
    trainer = make_trainer(train_dataset=Failing(), num_workers=num_workers)
    with pytest.raises(RuntimeError, match="dataset 'train' raised at index 11: KeyError: 'no such file'") as caught:
        trainer.train()
    assert isinstance(caught.value.__cause__, KeyError)
    # What was trained before is there.
    assert len(trainer.metrics["train/loss"]) == 1


class Failing:
    def __len__(self):
        return 16

    def __getitem__(self, index):
        if index == 11:
            raise KeyError("no such file")
        return make_data(16)[index]


def test_data_that_differ_within_a_batch():
    data = make_data(16)
    data[13][0] = np.zeros(9, np.float32)
    text = (
        "dataset 'train': leaf [0] differs within a batch: datum 8 has shape (8,), datum 13 has shape (9,); "
        "pad the data to one shape"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        make_trainer(train_dataset=data).train()
    data[13] = [data[13][0]]
    with pytest.raises(
        ValueError, match="dataset 'train': data differ in structure within a batch:\n datum 8: "
    ) as caught:
        make_trainer(train_dataset=data).train()
    assert "\n datum 13: " in str(caught.value)


def test_a_positional_argument_too_many():
    with pytest.raises(TypeError, match="positional arguments"):
        Trainer(*[MLP()] * 36)
