"""Models of any kind, in their modes, by the datum and by the batch: the plain loop's results, resumed bit for bit."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from learnax.models import NNX, Equinox, Functions, Linen, Model
from tests import plain
from tests.helpers import (
    MemoryRun,
    StopAt,
    assert_trees_close,
    assert_trees_equal,
    host,
    make_data,
    make_trainer,
)

EPOCHS = 6
"""Of five steps: 30 in all."""
HELD_OUT = 11


class Normed(nn.Module):
    """No bias before the normalisation: its gradient is nothing but rounding, and Adam makes steps of it."""

    axis: str | tuple[str, ...] | None = None
    drop: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.Dense(16, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, axis_name=self.axis)(x))
        return nn.Dense(3)(nn.Dropout(self.drop, deterministic=not train)(x))


class OfNNX(nnx.Module):
    def __init__(self, rngs, drop=0.0):
        self.first = nnx.Linear(8, 16, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(drop, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(16, 3, rngs=rngs)])

    def __call__(self, x):
        return self.layers[0](self.drop(nnx.relu(self.norm(self.first(x)))))


class OfEquinox(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    last: eqx.nn.Linear

    def __init__(self, key, drop=0.0):
        one, two = jax.random.split(key)
        self.first = eqx.nn.Linear(8, 16, use_bias=False, key=one)
        self.norm = eqx.nn.BatchNorm(16, axis_name="batch", mode="batch")
        self.drop = eqx.nn.Dropout(drop)
        self.last = eqx.nn.Linear(16, 3, key=two)

    def __call__(self, x, state, *, key=None):
        x, state = self.norm(self.first(x), state)
        return self.last(self.drop(jax.nn.relu(x), key=key)), state


def init_functions(key):
    one, two = jax.random.split(key)
    shape = jax.random.normal
    return {"first": shape(one, (8, 16)) / 3, "last": shape(two, (16, 3)) / 4}, {"seen": jnp.zeros((), jnp.int32)}


def apply_functions(params, state, key, x, *, noise=0.0):
    x = x + noise * jax.random.normal(key, x.shape)
    return jax.nn.relu(x @ params["first"]) @ params["last"], {"seen": state["seen"] + 1}


MODES = {"train": {"train": True}, "eval": {"train": False}}


def linen(drop=0.0, batched=True):
    return Linen(Normed(None if batched else "batch", drop), batched=batched, **MODES)


def of_nnx(drop=0.0):
    return NNX(OfNNX(nnx.Rngs(0), drop), batched=True)


def of_equinox(drop=0.0):
    module, state = eqx.nn.make_with_state(OfEquinox)(jax.random.key(0), drop)
    return Equinox(module, state=state)


def functions(drop=0.0):
    return Functions(init_functions, apply_functions, stateful=True, batched=True, train={"noise": drop})


KINDS = {"linen": linen, "nnx": of_nnx, "equinox": of_equinox, "functions": functions}


def by_datum(output, batch):
    """For a datum as for a batch: the error along the last axis."""
    loss = jnp.mean((output - batch[1]) ** 2, axis=-1)
    return output, loss, {"far": loss * 2}


def whole(output, batch):
    """One number for all that it sees."""
    output, loss, metrics = by_datum(output, batch)
    return output, loss.mean(), {"far": metrics["far"].mean()}


def make(model, **overrides):
    options = {"losses": by_datum, "val_datasets": [make_data(HELD_OUT, 1)], "num_epochs": EPOCHS}
    return make_trainer(model=model, **options | overrides)


def called(model, params, state, x, training):
    """A batch through a model, as one would write it by hand."""
    key = jax.random.key(0)
    if model.batched:
        return model.apply(params, state, key, x, training=training)
    one = lambda x: model.apply(params, state, key, x, training=training)  # noqa: E731
    return jax.vmap(one, out_axes=(0, None), axis_name="batch")(x)


def by_hand(model, params, state, **options):
    def loss(params, state, batch):
        output, state = called(model, params, state, batch[0], True)
        return jnp.mean((output - batch[1]) ** 2), state

    return plain.train(loss, params, make_data(43), size=8, epochs=EPOCHS, state=state, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_its_plain_loop_and_validates_in_its_other_mode(kind):
    trainer = make(KINDS[kind]())
    model, before = trainer.parts.model, host(trainer.train_state)
    params, state, losses = by_hand(model, before.params, before.model_state)
    trainer.train()
    np.testing.assert_allclose(trainer.metrics["train/loss"], losses, rtol=1e-4)
    assert_trees_close(trainer.train_state.params, params, atol=1e-5)
    assert_trees_close(trainer.train_state.model_state, state, atol=1e-5)
    x, y = (np.stack(part) for part in zip(*make_data(HELD_OUT, 1), strict=True))
    output, after = called(model, params, state, x, False)
    assert_trees_equal(after, state)  # nothing is written in evaluation
    np.testing.assert_allclose(trainer.metrics["val/loss"][-1], np.mean((output - y) ** 2), rtol=1e-4)


_IN_FULL = [pytest.param(kind, marks=[pytest.mark.soak] * (kind in ("equinox", "functions"))) for kind in KINDS]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", _IN_FULL)
def test_a_run_is_the_same_however_it_is_cut_stopped_and_resumed(kind, registry_path):
    """With dropout, fused or not, on one device and on four."""
    options = {"num_epochs": 2, "train_dataset": make_data(43)}
    for count, room in ((1, 5), (4, 1)):
        placed = {"devices": jax.devices()[:count], "steps_per_execution": room}
        straight = make(KINDS[kind](0.3), **options, **placed)
        straight.train()
        kept = {"registry": f"{kind}{count}", "run": MemoryRun(), "save_every": 3}
        stopped = make(KINDS[kind](0.3), **options, **placed, **kept)
        stopped.hooks.saves.append(StopAt(7))
        with pytest.raises(KeyboardInterrupt):
            stopped.train()
        other = {**placed, "steps_per_execution": 2 if room > 1 else 1}
        resumed = make(KINDS[kind](0.3), **options, **other, **kept, load_checkpoint=True)
        assert resumed.train_state.step == 7
        resumed.train()
        if room == 1:
            assert_trees_equal(resumed.train_state, straight.train_state)
        else:
            assert_trees_close(resumed.train_state, straight.train_state, rtol=1e-6)
        np.testing.assert_allclose(resumed.metrics["val/loss"], straight.metrics["val/loss"], rtol=1e-6)
        state = straight.train_state.model_state
        for leaf in jax.tree.leaves(state):  # equal on all devices
            parts = [np.asarray(shard.data) for shard in leaf.addressable_shards]
            assert all(np.array_equal(part, parts[0]) for part in parts)


def test_dropout_is_on_in_training_and_off_in_validation(caplog):
    trainer = make(linen(0.9), num_epochs=1)
    trainer.train()
    params, state = trainer.train_state.params, trainer.train_state.model_state
    x, y = (np.stack(part) for part in zip(*make_data(HELD_OUT, 1), strict=True))
    output, _ = called(trainer.parts.model, params, state, x, False)
    np.testing.assert_allclose(trainer.metrics["val/loss"], [np.mean((output - y) ** 2)], rtol=1e-5)
    _, loss, _ = by_datum(called(trainer.parts.model, params, state, x, True)[0], [x, y])
    assert abs(float(loss.mean()) - trainer.metrics["val/loss"][0]) > 1e-3
    assert not [line for line in caplog.messages if "random numbers in validation" in line]


# ---- batch normalisation on devices, in groups, under the guard


@pytest.mark.thorough
@pytest.mark.parametrize("batched", [True, False])
def test_statistics_over_all_devices_are_those_of_one(batched):
    axes = "devices" if batched else ("batch", "devices")
    one = make(Linen(Normed(None if batched else "batch"), batched=batched, **MODES))
    four = make(Linen(Normed(axes), batched=batched, **MODES), devices=jax.devices()[:4])
    one.train()
    four.train()
    assert_trees_close(four.train_state.params, one.train_state.params, rtol=1e-4, atol=1e-5)
    assert_trees_close(four.train_state.model_state, one.train_state.model_state, rtol=1e-4)
    np.testing.assert_allclose(four.metrics["val/far"], one.metrics["val/far"], rtol=1e-4)


def test_statistics_of_shares_are_their_means_over_the_devices():
    trainer = make(linen(), devices=jax.devices()[:2], num_epochs=1, train_dataset=make_data(8))
    params, state = host(trainer.train_state.params), host(trainer.train_state.model_state)
    trainer.train()
    x = np.stack([x for x, _ in make_data(8)])
    after = [called(trainer.parts.model, params, state, x[part], True)[1] for part in (slice(4), slice(4, 8))]
    assert_trees_close(trainer.train_state.model_state, jax.tree.map(lambda a, b: (a + b) / 2, *after))


@pytest.mark.thorough
@pytest.mark.parametrize("kind", _IN_FULL)
def test_accumulated_batches_take_what_is_carried_in_turn(kind):
    """One update from two batches: the mean of their gradients, the statistics of one after the other."""
    options = {"accumulate_steps": 2, "num_epochs": 1, "train_dataset": make_data(16), "optimizer": optax.sgd(0.1)}
    trainer = make(KINDS[kind](), max_grad=1e9, **options)
    params, state = host(trainer.train_state.params), host(trainer.train_state.model_state)
    grads = []
    for part in (slice(8), slice(8, 16)):
        x, y = (np.stack(column)[part] for column in zip(*make_data(16), strict=True))

        def loss(params, x=x, y=y, state=state):
            output, after = called(trainer.parts.model, params, state, x, True)
            return jnp.mean((output - y) ** 2), after

        own, state = jax.grad(loss, has_aux=True)(params)
        grads.append(own)
    trainer.train()
    assert trainer.train_state.step == 1
    expected = jax.tree.map(lambda p, a, b: p - 0.05 * (a + b), params, *grads)
    assert_trees_close(trainer.train_state.params, expected)
    assert_trees_close(trainer.train_state.model_state, state)


def test_a_dropped_update_drops_its_statistics():
    data = make_data(8)
    data[3][0] = np.full(8, np.nan, np.float32)
    trainer = make(linen(), num_epochs=2, train_dataset=data, train_only=True)
    before = host(trainer.train_state)
    trainer.train()
    assert trainer.metrics["train/has_nan"] == [1, 1]
    assert_trees_equal(trainer.train_state, before)


@pytest.mark.thorough
def test_a_divided_state_has_the_statistics_of_the_whole_batch():
    whole_state = make(linen())
    whole_state.train()
    divided = make(linen(), devices=jax.devices()[:4], shard_state=True)
    divided.train()
    assert_trees_close(divided.train_state.params, whole_state.train_state.params, rtol=1e-4, atol=1e-5)
    assert_trees_close(divided.train_state.model_state, whole_state.train_state.model_state, rtol=1e-4)


# ---- losses of whole batches


@pytest.mark.parametrize("count", [1, 4])
def test_a_loss_of_a_whole_share_validates_each_datum_once_tail_and_all(count):
    devices = jax.devices()[:count]
    one, other = (make(linen(), losses=losses, devices=devices, compile=True) for losses in (by_datum, whole))
    one.train()
    other.train()
    assert_trees_close(other.train_state.params, one.train_state.params, atol=1e-5)
    np.testing.assert_allclose(other.metrics["val/far"], one.metrics["val/far"], rtol=1e-5)
    kinds = sorted(program.kind for program in other.engine.programs.values())
    assert kinds == ["evaluate", "evaluate a tail of 3", "train"]
    assert sorted(program.kind for program in one.engine.programs.values()) == ["evaluate", "train"]


@pytest.mark.thorough
def test_plots_samples_and_updates_by_hand_see_single_data():
    plots, samples = [], []
    trainer = make(
        linen(),
        losses=lambda output, batch: ({"rows": output, "mean": output.mean()}, *by_datum(output, batch)[1:]),
        plot_pipe=lambda run, outputs, batch: plots.append((outputs, batch)),
        plot_every=5,
        sample_model=lambda params, key, datum, model_state: Normed().apply(
            {"params": params, **model_state}, datum[0], train=False
        ),
        sample_plot=lambda run, drawn, nothing: samples.append(drawn),
        sample_every=5,
        sample_batch_size=3,
        num_epochs=1,
        devices=jax.devices()[:2],
    )
    trainer.train()
    ((outputs, batch),), (drawn,) = plots, samples
    assert [output["rows"].shape for output in outputs] == [(3,)] * 8
    assert [np.shape(output["mean"]) for output in outputs] == [()] * 8
    assert [x.shape for x, _ in batch] == [(8,)] * 8
    assert [sample.shape for sample in drawn] == [(3,)] * 3
    state = trainer.train_state
    outputs, after, metrics = trainer.update(jax.random.key(0), state, make_data(8))
    assert outputs["rows"].shape == (8, 3)
    assert after.step == state.step + 1
    assert np.abs(after.model_state["batch_stats"]["BatchNorm_0"]["mean"]).sum() > 0
    keys = jax.random.split(jax.random.key(0), 8)
    stacked = jax.tree.map(lambda *rows: np.stack(rows), *make_data(8))
    np.testing.assert_allclose(trainer.loss(state.params, keys, stacked)[0], metrics["loss"], rtol=0.5)
    grads, _ = trainer.grad(
        state.params,
        keys.reshape(2, 4),
        jax.tree.map(lambda leaf: leaf.reshape(2, 4, *leaf.shape[1:]), stacked),
    )
    assert_trees_close(jax.tree.map(lambda g: g[0], grads), jax.tree.map(lambda g: g[1], grads))


# ---- what each kind takes and gives


def test_an_nnx_module_holds_the_trained_values_afterwards():
    module = OfNNX(nnx.Rngs(0))
    before = np.array(module.first.kernel[...])
    trainer = make(NNX(module, batched=True), num_epochs=1)
    np.testing.assert_array_equal(trainer.train_state.params["first"]["kernel"], before)
    trainer.epoch(0)
    np.testing.assert_array_equal(module.first.kernel[...], before)
    trainer.sync_model()
    np.testing.assert_array_equal(module.first.kernel[...], trainer.train_state.params["first"]["kernel"])
    np.testing.assert_array_equal(module.norm.mean[...], trainer.train_state.model_state["norm"]["mean"])
    trainer.train()
    np.testing.assert_array_equal(module.first.kernel[...], trainer.train_state.params["first"]["kernel"])
    np.testing.assert_array_equal(trainer.init_train_state().params["first"]["kernel"], before)
    trainer.update(jax.random.key(0), trainer.train_state, make_data(8))  # its values are its own
    assert np.isfinite(module.first.kernel[...]).all()


def test_an_equinox_module_is_given_back_with_the_trained_values():
    module = eqx.nn.MLP(8, 3, 16, 1, key=jax.random.key(0))
    trainer = make(module, num_epochs=1, val_datasets=None)
    trainer.train()
    merged = trainer.parts.model.merged(trainer.train_state.params)
    x = make_data(1)[0][0]
    assert not np.allclose(merged(x), module(x))
    assert merged.activation is module.activation


def test_a_model_of_ones_own():
    class Affine(Model):
        batched = True

        def init(self, key, x, y):
            return {"w": jax.random.normal(key, (x.shape[1], y.shape[1]))}, None

        def apply(self, params, model_state, key, x, y, *, training):
            return x @ params["w"], None

    trainer = make(Affine(), num_epochs=2)
    trainer.train()
    assert np.mean(trainer.metrics["train/loss"][5:]) < np.mean(trainer.metrics["train/loss"][:5])


def test_a_pair_of_functions_and_an_object_that_has_both():
    init = lambda key, x: {"w": jax.random.normal(key, (x.shape[-1], 3))}  # noqa: E731
    apply = lambda params, x: x @ params["w"]  # noqa: E731
    object_of_both = type("Both", (), {"init": staticmethod(init), "apply": staticmethod(apply)})()
    trainers = [make(model, num_epochs=1) for model in ((init, apply), object_of_both, Functions(init, apply))]
    for trainer in trainers:
        trainer.train()
        assert_trees_equal(trainer.train_state.params, trainers[0].train_state.params)


def test_a_model_gets_the_parts_of_a_datum_that_it_has_places_for():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, mask, train: bool):
            return nn.Dense(3)(x * mask)

    data = [[x, np.ones(8, np.float32), y] for x, y in make_data(43)]
    losses = lambda output, batch: by_datum(output, [None, batch[2]])  # noqa: E731
    trainer = make(Linen(Masked(), **MODES), train_dataset=data, losses=losses, val_datasets=None, num_epochs=1)
    trainer.train()
    first = make(Linen(nn.Dense(3), inputs=1), num_epochs=1)
    assert first.train_state.params["kernel"].shape == (8, 3)


# ---- bad input


def text_of(error=ValueError, **options):
    with pytest.raises(error) as caught:
        make(**options)
    return str(caught.value)


def test_a_mode_that_the_model_does_not_take_shows_its_signature():
    text = text_of(model=Linen(Normed(), batched=True, train={"training": True}))
    assert text.endswith("train={'training': True} gives it training, but its __call__ takes (x, train=True)")
    with pytest.raises(TypeError, match="Linen: train must be keyword arguments of the model's call"):
        Linen(Normed(), train=True)


def test_a_model_that_writes_in_evaluation_is_told_how_to_say_its_modes():
    text = text_of(model=Linen(Normed(), batched=True))
    assert "in evaluation the module writes to batch_stats: say how it is called, " in text
    assert "Linen(module, train={'train': True}, eval={'train': False})" in text


def test_a_loss_of_two_axes():
    losses = lambda output, batch: (output, (output - batch[1]) ** 2, {})  # noqa: E731
    text = text_of(TypeError, model=linen(), losses=losses)
    assert text == (
        "losses: the loss of a batch must be (8,), a number for each datum, or one for all of them, but has shape "
        "(8, 3); reduce what is of one datum, with .mean(axis=-1) for one"
    )
    metrics = lambda output, batch: (*by_datum(output, batch)[:2], {"all": output})  # noqa: E731
    assert "losses: metric 'all' of a batch must be (8,)" in text_of(TypeError, model=linen(), losses=metrics)


def test_a_collection_that_grows():
    class Sowing(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("kept", "mean", x.mean())
            return nn.Dense(3)(x)

    text = text_of(model=Linen(Sowing(), batched=True))
    assert "Sowing: what it carries from step to step must keep its structure and shapes, but 'kept' was" in text


def test_an_nnx_module_that_changes_while_it_trains():
    class Counting(OfNNX):
        def __call__(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            return super().__call__(x)

    text = text_of(model=NNX(Counting(nnx.Rngs(0)), batched=True))
    assert "Counting: its call changes the module's structure (an attribute that is no variable" in text


def test_an_equinox_module_with_a_python_float_is_told(caplog):
    class Scaled(eqx.Module):
        layer: eqx.nn.Linear
        scale: float = 2.0

        def __call__(self, x):
            return self.scale * self.layer(x)

    make(Scaled(eqx.nn.Linear(8, 3, key=jax.random.key(0))), num_epochs=1)
    (line,) = [line for line in caplog.messages if "Python number" in line]
    assert line.startswith("Scaled: scale: a Python number, which is no array, and is not trained; jnp.asarray(...)")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"precision": "fp8"}, "Linen: precision must be None, 'bf16' or 'fp16', but is 'fp8'"),
        ({"remat": "dots"}, "Linen: remat must name a policy of jax.checkpoint_policies, one of checkpoint_dots"),
        ({"inputs": 0}, "Linen: inputs must be a number of a datum's parts, 'all' or None, but is 0"),
    ],
)
def test_options_that_are_none(options, text):
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        Linen(Normed(), **options)


def test_adapters_take_their_own_kind_alone():
    for adapter in (Linen, NNX, Equinox):
        with pytest.raises(TypeError, match=f"{adapter.__name__} takes a"):
            adapter(lambda x: x)
    with pytest.raises(TypeError, match="Functions takes init and apply, or an object that has both"):
        Functions(optax.sgd)


def test_arrays_that_a_module_brings_are_read_when_the_trainer_is_built():
    class Linear(eqx.Module):
        weight: np.ndarray

        def __call__(self, x, y):
            return x @ self.weight

    weight = np.ones((8, 3), np.float32)
    trainer = make_trainer(model=Linear(weight))
    weight[:] = 0
    np.testing.assert_array_equal(trainer.train_state.params.weight, np.ones((8, 3)))
