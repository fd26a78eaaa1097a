"""Models that cannot take a datum, or are none: what the datum is, and what to write, before any compiling."""

import flax.linen as nn
import flax.nnx as nnx
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import MLP, make_data, make_trainer

ONE_DATUM = "a model sees one datum at a time, without a batch axis: x.reshape(-1), not x.reshape(x.shape[0], -1)"


def of(call):
    """A module with this function as its `__call__`."""
    return type("Model", (nn.Module,), {"__call__": nn.compact(call)})()


def text_of(error=ValueError, **arguments):
    with pytest.raises(error) as caught:
        make_trainer(**arguments)
    text = str(caught.value)
    assert len(text.splitlines()) <= 12
    return text


def test_a_datum_with_more_arguments_than_the_model_has():
    text = text_of(model=of(lambda self, x: nn.Dense(3)(x)))
    assert text == (
        "the model Model cannot take a datum of 'train', of this structure (2 arguments):\n"
        "  [0]: float32[8]\n"
        "  [1]: float32[3]\n"
        "but its __call__ takes 1, (x)\n"
        "a datum that is a list is spread over the model's arguments, so the label goes there as well; write\n"
        "  def __call__(self, x, y=None):\n"
        'or make each datum a dict, {"image": x, "label": y}: the model then takes that as one argument'
    )
    data = [[*datum, np.float32(1)] for datum in make_data(8)]
    text = text_of(model=of(lambda self, x, train=True: nn.Dense(3)(x)), train_dataset=data)
    assert "but its __call__ takes 2, (x, train=True)\n" in text
    assert "\n  def __call__(self, x, train=True, y=None):\n" in text


def test_a_datum_with_fewer_arguments_than_the_model_has():
    pairs = [tuple(datum) for datum in make_data(8)]
    text = text_of(model=of(lambda self, x, y: nn.Dense(3)(x)), train_dataset=pairs)
    assert "(1 argument):\n  [0][0]: float32[8]\n  [0][1]: float32[3]\nbut its __call__ takes 2, (x, y)\n" in text
    assert "so y is missing: a datum that is a list, [x, y], is spread over the arguments" in text
    text = text_of(model=of(lambda self, x, y, deterministic: x))
    assert text.endswith(
        "the model gets the datum alone, so deterministic needs a default, deterministic=True for instance, or "
        "model=learnax.models.Linen(module, train={'deterministic': ...}, eval={'deterministic': ...}) says what it is"
    )
    text = text_of(model=of(lambda self, x, train: nn.Dense(3)(x) if train else x))
    assert text.endswith("its argument train gets [1] of the datum: give it a place behind, and a default")


def test_a_datum_that_is_one_argument():
    model = of(lambda self, x: nn.Dense(3)(x))
    text = text_of(model=model, train_dataset=[tuple(datum) for datum in make_data(8)])
    assert "a datum that is a tuple is one argument: write x, y = datum in the model; a list, [x, y], is spread" in text
    text = text_of(model=model, train_dataset=[{"image": x, "label": y} for x, y in make_data(8)])
    assert "\n  [0]['image']: float32[8]\n  [0]['label']: float32[3]\n" in text
    assert "a datum that is a dict is one argument: the model gets it whole, and reads x['image'] of it" in text
    assert text.endswith(ONE_DATUM)


def test_a_model_that_counts_on_a_batch_axis():
    images = [np.zeros((6, 6), np.float32)] * 8
    text = text_of(model=of(lambda self, x: nn.Dense(3)(x.transpose(0, 2, 1))), train_dataset=images)
    assert "(1 argument):\n  [0]: float32[6, 6]\nValueError: " in text
    assert "\n  in test_checks_model.py, line " in text
    assert text.endswith(ONE_DATUM)
    text = text_of(model=of(lambda self, x: nn.Conv(4, (3, 3))(x)), train_dataset=images)
    assert "Conv takes an image of (height, width, channels): of one channel, give it x[..., None]\n" in text
    assert text.endswith(ONE_DATUM)


def test_a_model_that_asks_for_a_value():
    text = text_of(model=of(lambda self, x, y: x if x[0] > 0 else -x))
    assert "the model is compiled, so no if, for, float(), int() or numpy can ask for the value of an array" in text
    assert "lambda self, x, y: x if x[0] > 0 else -x" in text


def test_what_has_no_array_in_a_datum_reaches_the_model_as_none():
    text = text_of(model=of(lambda self, name, x: nn.Dense(3)(name)), train_dataset=[["a", x] for x, _ in make_data(8)])
    assert "what has no array in it, text for instance, is kept from the model: it gets None" in text


def test_a_validation_datum_of_another_shape_is_shown_beside_that_of_the_training():
    text = text_of(val_datasets={"far": [[np.zeros(5, np.float32), np.zeros(3, np.float32)]] * 8})
    assert text.startswith(
        "the model MLP cannot take a datum of 'far', of this structure (2 arguments):\n  [0]: float32[5]"
    )
    assert text.endswith("while it takes a datum of 'train':\n  [0]: float32[8]\n  [1]: float32[3]")


def test_a_large_datum_is_cut_short():
    data = [{f"field {i}": np.zeros(i, np.float32) for i in range(40)}] * 8
    text = text_of(model=of(lambda self, x: x["image"]), train_dataset=data)
    assert "\n  ... and 36 more\nKeyError: 'image'\n" in text


def test_parameters_that_have_no_gradient():
    def call(self, x, y):
        table = self.param("table", lambda key: jnp.arange(3))
        mask = self.param("mask", lambda key: jnp.ones(3, bool))
        return nn.Dense(3)(x) + jnp.where(mask, table, 0).astype(jnp.float32)

    text = text_of(TypeError, model=of(call))
    assert text.startswith(
        "the model's parameters must be floats, to have a gradient, but these are not:\n"
        "  mask: bool[3]\n  table: int32[3]\n"
    )
    assert "make it a constant in the module" in text


def test_running_state_of_one_datum_names_the_layer_and_both_ways_out():
    text = text_of(model=of(lambda self, x, y: nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))))
    assert text == (
        "what the model carries on differs between the data of a batch, in batch_stats/BatchNorm_0: it sees one datum "
        "at a time, so statistics of a batch need its axis. Either let the layers take their means over it, "
        "nn.BatchNorm(..., axis_name='batch'), or let the model see whole batches, "
        "model=learnax.models.Linen(module, batched=True), with losses that do so, too"
    )


def test_models_of_other_libraries():
    # What others need an adapter for, flax's newer modules do not.
    assert make_trainer(model=nnx.Linear(8, 3, rngs=nnx.Rngs(0))).train_state.params["kernel"].shape == (8, 3)
    data = [x for x, _ in make_data(8)]
    losses = lambda output, datum: (output, jnp.mean(output**2), {})  # noqa: E731
    trainer = make_trainer(model=nnx.bridge.to_linen(nnx.Linear, 8, 3), train_dataset=data, losses=losses)
    assert trainer.train_state.params["kernel"].shape == (8, 3)
    torch_like = type("Linear", (), {"__module__": "torch.nn.modules.linear"})()
    assert "but is a torch module; write its layers as" in text_of(TypeError, model=torch_like)
    assert "but is the class Linear; write Linear(rngs=nnx.Rngs(0)), with" in text_of(TypeError, model=nnx.Linear)
    assert text_of(TypeError, model=MLP).endswith(
        "but is the class MLP; write MLP(), with its fields in the parentheses"
    )
