"""Random streams: those that lifted transforms split, and those of 0.1.0."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learnax.models import Linen
from learnax.models.streams import rngs_of
from tests.helpers import MLP, Noisy, make_data, make_trainer


class Cell(nn.RNNCellBase):
    num_feature_axes = 1

    @nn.compact
    def __call__(self, carry, x):
        return carry, nn.Dropout(0.5, deterministic=False)(jnp.ones(32))

    def initialize_carry(self, rng, shape):
        return 0.0


class Recurrent(nn.Module):
    split: bool = True

    @nn.compact
    def __call__(self, x, y=None):
        return nn.RNN(Cell(), split_rngs={"params": False, "dropout": self.split})(jnp.ones((6, 4)))


class Drop(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(32)(x) * 0 + 1)


class Rows(nn.Module):
    @nn.compact
    def __call__(self, x, y=None):
        rows = nn.vmap(Drop, variable_axes={"params": None}, split_rngs={"params": False, "dropout": True})
        return rows()(jnp.ones((6, 4)))


class Renamed(nn.Module):
    """A stream of another name, drawn from by hand."""

    @nn.compact
    def __call__(self, x, y=None):
        def row(module, x):
            return x + jax.random.normal(module.make_rng("noise"), x.shape)

        return nn.vmap(row, split_rngs={"noise": True}, variable_axes={})(self, jnp.ones((6, 32)))


class Looped(nn.Module):
    """A loop that lets in its own stream alone: without it flax has no key inside."""

    @nn.compact
    def __call__(self, x, y=None):
        def body(module, carry):
            number, rows = carry
            row = jax.random.normal(module.make_rng("dropout"), (32,))
            return number + 1, rows.at[number].set(row)

        start = (0, jnp.zeros((6, 32)))
        return nn.while_loop(lambda _, carry: carry[0] < 6, body, self, start, split_rngs={"dropout": True})[1]


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x, y=None):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, carry, _):
                return carry, Drop()(carry)

        split = {"params": True, "dropout": True}
        return nn.scan(Layer, variable_axes={"params": 0}, split_rngs=split, length=6)()(jnp.ones(4), None)[1]


def streams_of(module):
    """Its parameters, the streams that it asks for, and the model that knows which of them need a key of their own."""
    datum, model = make_data(1)[0], Linen(module, inputs="all")
    params, _ = model.init(jax.random.key(0), *datum)
    known, asked, _ = model.ready(params, None, *datum)
    return params, asked, known


def applied(model, params, key):
    return model.apply(params, None, key, *make_data(1)[0], training=True)[0]


@pytest.mark.parametrize(
    ("model", "stream"),
    [(Recurrent(), "dropout"), (Rows(), "dropout"), (Renamed(), "noise"), (Looped(), "dropout"), (Layers(), "dropout")],
    ids=["RNN", "vmap", "another name", "while_loop", "scan"],
)
def test_a_stream_that_a_lift_splits_differs_between_its_rows(model, stream):
    params, asked, known = streams_of(model)
    assert (asked, known.streams) == ((stream,), (stream,))
    rows = applied(known, params, jax.random.key(3))
    assert len(np.unique(rows, axis=0)) == 6
    other = applied(known, params, jax.random.key(4))
    assert not np.array_equal(rows, other)


def test_a_lift_that_is_told_not_to_split_does_not():
    params, _, known = streams_of(Recurrent(split=False))
    assert known.streams == ()
    rows = applied(known, params, jax.random.key(3))
    assert len(np.unique(rows, axis=0)) == 1


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x, y=None):
        x = x + jax.random.normal(jax.random.split(self.make_rng("params"))[0], x.shape)
        return nn.remat(Drop)()(nn.jit(Drop)()(x))


@pytest.mark.parametrize("model", [MLP(), Noisy(), Remat()], ids=["none", "dropout and noise", "remat and jit"])
def test_without_a_split_all_is_drawn_from_the_one_key_of_0_1_0(model):
    params, asked, known = streams_of(model)
    datum, key = make_data(1)[0], jax.random.key(5)
    assert known.streams == ()
    assert set(asked) == (set() if isinstance(model, MLP) else {"params", "dropout"})
    expected = model.apply({"params": params}, *datum, rngs={"params": key})
    np.testing.assert_array_equal(applied(known, params, key), expected)
    np.testing.assert_array_equal(applied(Linen(model, inputs="all"), params, key), expected)


def test_an_own_stream_does_not_depend_on_the_others():
    key = jax.random.key(0)
    assert rngs_of(key, ("a", "b"))["b"] == rngs_of(key, ("b",))["b"]
    assert rngs_of(key, ("a",))["params"] == key


def rows_differ(output, datum):
    first = output[:1]
    return output, jnp.mean(output) * 0.0, {"alike": (output == first).all().astype(jnp.float32)}


@pytest.mark.parametrize("count", [1, 4])
def test_a_run_draws_by_the_split_streams_in_training_and_validation(count):
    options = {"model": Recurrent(), "losses": rows_differ, "devices": jax.devices()[:count]}
    trainer = make_trainer(val_datasets={"val": make_data(9)}, num_epochs=1, **options)
    trainer.train()
    assert trainer.metrics["train/alike"] == [0.0] * 5
    assert trainer.metrics["val/alike"] == [0.0]
    outputs, _, _ = trainer.update(jax.random.key(1), trainer.train_state, make_data(8))
    assert len(np.unique(np.asarray(outputs)[0], axis=0)) == 6


@pytest.mark.parametrize(
    ("model", "names"), [(Noisy(), "'params', 'dropout'"), (Recurrent(), "'dropout'"), (MLP(), None)]
)
def test_randomness_in_validation_is_told_once_by_stream(model, names, caplog):
    losses = rows_differ if isinstance(model, Recurrent) else {}
    options = {"losses": losses} if losses else {}
    make_trainer(model=model, val_datasets={"a": make_data(8), "b": make_data(8)}, **options)
    told = [line for line in caplog.messages if "random numbers in validation" in line]
    assert [f"from {names}:" in line and "deterministic=not train" in line for line in told] == [True] * bool(names)


def test_without_validation_nothing_is_told(caplog):
    make_trainer(model=Noisy())
    assert not caplog.messages
