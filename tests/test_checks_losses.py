"""Losses that fail, or return something else than they are to: what they got, and what to write."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learnax.checks.losses import check_signature
from learnax.loss import LossFunction, LossPipe
from tests.helpers import make_data, make_trainer

cross_entropy = optax.softmax_cross_entropy_with_integer_labels
PAIRS = [(x, np.int32(x[0] > 0)) for x, _ in make_data(8)]
DICTS = [{"image": x, "label": label} for x, label in PAIRS]


class Whole(nn.Module):
    """Takes a datum of any structure as one argument, and looks at its first array."""

    @nn.compact
    def __call__(self, datum):
        return nn.Dense(2)(jax.tree.leaves(datum)[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Example:
    image: object
    label: object


def unpacks(output, datum):
    _x, label = datum
    return output, cross_entropy(output, label), {}


def reads_a_key(output, datum):
    return output, cross_entropy(output, datum["label"]), {}


def forgets_the_list(output, datum):
    return output, ((output - datum) ** 2).mean(), {}


def text_of(error=ValueError, **arguments):
    """The error's text when a trainer is built: short, and naming the losses first."""
    with pytest.raises(error) as caught:
        make_trainer(**arguments)
    text = str(caught.value)
    assert text.startswith("losses")
    assert len(text.splitlines()) <= 12
    return text


@pytest.mark.parametrize(
    ("data", "losses", "shown", "line", "source"),
    [
        (PAIRS, unpacks, "datum[0][0]: float32[8]\n  datum[0][1]: int32[]", "x, y = datum[0]", "_x, label = datum"),
        (
            DICTS,
            reads_a_key,
            "datum[0]['image']: float32[8]\n  datum[0]['label']: int32[]",
            'image, label = datum[0]["image"], datum[0]["label"]',
            'return output, cross_entropy(output, datum["label"]), {}',
        ),
        (
            [x for x, _ in PAIRS],
            forgets_the_list,
            "datum[0]: float32[8]",
            "x = datum[0]",
            "return output, ((output - datum) ** 2).mean(), {}",
        ),
        (
            [Example(x, label) for x, label in PAIRS],
            reads_a_key,
            "datum[0].image: float32[8]\n  datum[0].label: int32[]",
            "image, label = datum[0].image, datum[0].label",
            'return output, cross_entropy(output, datum["label"]), {}',
        ),
    ],
    ids=["unpacked", "by key", "as an array", "a dataclass"],
)
def test_a_loss_that_does_not_take_the_datum_for_a_list(data, losses, shown, line, source):
    with pytest.raises(ValueError, match="losses failed on a datum of 'train': ") as caught:
        make_trainer(model=Whole(), train_dataset=data, losses=losses)
    text = str(caught.value)
    assert f"where datum is always a list, that of the model's arguments:\n  {shown}\n  output: float32[2]\n" in text
    assert text.endswith(f"\ntake it apart by: {line}")
    assert f"in test_checks_losses.py, line {losses.__code__.co_firstlineno + 1}: {source}\n" in text
    assert len(text.splitlines()) <= 12
    assert caught.value.__cause__ is not None


def test_of_a_pipe_the_loss_that_fails_is_named_and_sees_what_it_was_handed():
    def halves(output, datum):
        return {"half": output[:1]}, jnp.mean(output), {}

    pipe = LossPipe([LossPipe([halves, reads_a_key])])
    text = text_of(model=Whole(), train_dataset=DICTS, losses=pipe)
    assert text.startswith("losses.loss_list[0] (LossPipe).loss_list[1] (reads_a_key) failed on a datum of 'train'")
    assert "\n  output['half']: float32[1]\n" in text
    assert len(pipe.loss_list) == 1
    assert pipe.loss_list[0].loss_list == [halves, reads_a_key]


def test_a_loss_of_a_validation_set_names_it():
    def losses(output, datum):
        return output, cross_entropy(output, datum[0]["label"]), {}

    text = text_of(
        model=Whole(), losses=losses, train_dataset=DICTS, val_datasets={"far": [{"image": x} for x, _ in PAIRS]}
    )
    assert text.startswith("losses failed on a datum of 'far': KeyError: 'label'")


def test_a_function_of_a_library_in_place_of_losses():
    text = text_of(losses=optax.l2_loss)
    assert "  def losses(output, datum):\n      return output, optax.l2_loss(output, datum[1]).mean(), {}" in text
    text = text_of(losses=optax.sigmoid_binary_cross_entropy)
    assert "return output, optax.sigmoid_binary_cross_entropy(output, datum[1]).mean(), {}" in text


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (lambda o: jnp.mean(o), "but returned an array float32[]; write return output, loss, {}"),
        (lambda o: o, "but returned an array float32[3]; write return output, loss.mean(), {}"),
        (
            lambda o: (jnp.mean(o), {}),
            "but returned a tuple of 2: (float32[], dict); write return output, loss, metrics",
        ),
        (lambda o: [o, jnp.mean(o), {}], "but returned a list of 3: (float32[3], float32[], dict); write a tuple"),
        (lambda o: None, "but returned None; write return output, loss, {} at its end"),
        (lambda o: (o, o, {}), "the loss of one datum must be a scalar, but has shape (3,); reduce it, with .mean()"),
        (lambda o: (o, "low", {}), "the loss of one datum must be a scalar, but is 'low'"),
        (
            lambda o: (o, (o > 0).sum(), {}),
            "the loss of one datum must be a float, to have a gradient, but is int32; a",
        ),
        (lambda o: (o, jnp.mean(o), None), "must be a dict, but is None; write {} where there are none"),
        (lambda o: (o, jnp.mean(o), [o]), "must be a dict, but is a list of 1: (float32[3]); write {"),
        (lambda o: (o, jnp.mean(o), {0: 1.0}), "a metric's name must be text, but is 0; write '0'"),
        (lambda o: (o, jnp.mean(o), {"a": "b"}), "metric 'a' of one datum must be a scalar, but is 'b'"),
    ],
)
@pytest.mark.parametrize("piped", [False, True])
def test_what_losses_return(returned, text, piped):
    def losses(output, datum):
        return returned(output)

    assert text in text_of(TypeError, losses=LossPipe([losses]) if piped else losses)


def test_a_loss_function_whose_call_returns_a_scalar():
    class Scalar(LossFunction):
        def _call(self, output, batch):
            return jnp.mean(output)

    text = text_of(losses=LossPipe([Scalar()]))
    assert text.startswith("losses.loss_list[0] (Scalar) failed on a datum of 'train': TypeError")
    assert text.endswith("a loss returns (output, loss, metrics), and so does its _call: return output, loss, {}")


def test_an_axis_of_the_datum_that_the_model_took_for_a_batch():
    class Flat(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            return nn.Dense(10)(x.reshape(x.shape[0], -1))

    image, label = np.zeros((6, 6), np.float32), np.int32(3)
    hint = (
        "both are of one datum, without a batch axis: if the model has x.reshape(x.shape[0], -1), write x.reshape(-1)"
    )
    text = text_of(model=Flat(), train_dataset=[[image, label]] * 8, losses=unpacks)
    assert text.endswith(f"take it apart by: x, y = datum\n{hint}")

    def one_hot(output, datum):
        return output, optax.softmax_cross_entropy(output, datum[1]), {}

    data = [[image, np.eye(10, dtype=np.float32)[3]]] * 8
    text = text_of(TypeError, model=Flat(), train_dataset=data, losses=one_hot)
    assert "must be a scalar, but has shape (6,)" in text
    assert "\n  output: float32[6, 10]\n  datum[0]: float32[6, 6]\n" in text
    assert text.endswith(hint)


def test_a_loss_that_asks_for_a_value():
    def losses(output, datum):
        loss = jnp.mean(output)
        return output, loss if loss > 0 else -loss, {}

    text = text_of(losses=losses)
    assert ": return output, loss if loss > 0 else -loss, {}" in text
    assert "the losses are compiled, so no if, for, float(), int() or numpy can ask for the value of an array" in text
    text = text_of(losses=lambda output, datum: (output, np.abs(output).mean(), {}))
    assert "the losses are compiled" in text


def softened(output, datum, temperature):
    return output, jnp.mean(output) / temperature, {}


def test_a_third_argument_that_is_not_the_step():
    text = text_of(TypeError, losses=softened)
    assert text == (
        "losses: softened(output, datum, temperature) asks for temperature, but losses are called with "
        "(output, datum), and with the training step where that is called step. If temperature is the step, call it "
        "step; else give it a default, temperature=..., or bind it, functools.partial(softened, temperature=...)"
    )
    text = text_of(TypeError, losses=LossPipe([softened]))
    assert text.startswith("losses.loss_list[0] (softened): softened(output, datum, temperature) asks for temperature")
    assert "asks for labels, but" in text_of(TypeError, losses=lambda output, datum, *, labels: None)
    assert "(params, output, datum) asks for datum" in text_of(TypeError, losses=lambda params, output, datum: None)
    text = text_of(TypeError, losses=lambda key, output, datum, scale: None)
    assert "(key, output, datum, scale) asks for scale" in text
    assert "whose arguments Python does not tell" in text_of(TypeError, losses=max)


def test_names_that_the_step_goes_by():
    for name in ("step", "steps", "i", "it", "t", "count", "train_step", "global_step", "iteration", "_", "_unused"):
        scope = {}
        exec(f"def losses(output, datum, {name}): return output, output.mean() * (2.0 ** {name}), {{}}", scope)
        check_signature(LossPipe([scope["losses"]]))
    with jax.numpy_dtype_promotion("standard"):
        assert make_trainer(losses=scope["losses"]) is not None


@pytest.mark.parametrize(
    "losses",
    [
        functools.partial(softened, temperature=2.0),
        lambda output, datum, temperature=1.0: softened(output, datum, temperature),
        lambda *given: softened(*given[:2], temperature=1.0),
        lambda output, datum, *others: softened(output, datum, 1.0),
        lambda output, datum, **others: softened(output, datum, 1.0),
    ],
)
def test_other_arguments_that_need_no_step(losses):
    assert make_trainer(losses=LossPipe([losses])) is not None
