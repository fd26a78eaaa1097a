"""Each documented argument, attribute and method of the trainer, by its effect."""

import inspect
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import learnax
from learnax.loss import LossPipe
from learnax.trainer import Trainer, TrainState, in_notebook, libcudart
from tests.helpers import (
    MLP,
    MemoryRun,
    Squared,
    assert_trees_close,
    assert_trees_equal,
    host,
    make_data,
    make_trainer,
)

DOCUMENTED = """model learning_rate losses seed train_dataset num_epochs batch_size num_workers max_grad=1.0
save_every=300
checkpoint_every=5000 max_checkpoints=None keep_best_checkpoint=False best_metric_name='val/loss' minimize_metric=True
load_checkpoint=None val_every=None val_datasets=None save_model=None run=None registry=None compile=False
single_datum=False single_batch=False train_only=False plot_pipe=None plot_every=1000 plot_model=None
load_weights=False sample_every=None sample_model=None sample_params=None sample_plot=None sample_batch_size=None
sample_metrics=None"""


def test_the_signature_is_the_documented_one_and_new_options_are_keywords():
    parameters = list(inspect.signature(Trainer).parameters.values())
    documented = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert " ".join(f"{p.name}={p.default!r}" if p.default is not p.empty else p.name for p in documented) == " ".join(
        DOCUMENTED.split()
    )
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters if p not in documented)


def test_every_documented_attribute_says_what_the_trainer_was_given():
    run, data = MemoryRun(), make_data(16)
    model, losses = MLP(), LossPipe([Squared()])
    callbacks = {"plot_pipe": print, "plot_model": abs, "save_model": print}
    trainer = make_trainer(
        model=model, losses=losses, train_dataset=data, run=run, val_every=2, val_datasets=[data], **callbacks
    )
    given = {
        "model": model,
        "transform": model,
        "losses": losses,
        "train_dataset": data,
        "num_epochs": 2,
        "seed": 0,
        "checkpointer": None,
        "load_checkpoint": None,
        "batch_size": 8,
        "num_workers": 0,
        "run": run,
        "name": "trainer",
        "max_grad": 1.0,
        "train_only": False,
        "single_batch": False,
        "single_datum": False,
        "plot_every": 1000,
        "val_every": 2,
        "load_weights": False,
        "sample_every": None,
        "device_count": 1,
        **callbacks,
    }
    assert {name: getattr(trainer, name) for name in given} == given
    assert list(trainer.loaders) == ["train", "val"]
    assert [len(loader) for loader in trainer.loaders.values()] == [2, 2]
    assert isinstance(trainer.optimizer, optax.GradientTransformation)
    assert trainer.metrics == {}
    assert not in_notebook()
    assert libcudart is learnax.profiling.cudart.libcudart


def test_the_random_sequence_is_live():
    trainer = make_trainer()
    seq, _ = jax.random.split(jax.random.key(0))
    assert_trees_equal(jax.random.key_data(trainer.rng_seq), jax.random.key_data(seq))
    trainer.train()
    for _ in range(10):
        seq, _ = jax.random.split(seq)
    assert_trees_equal(jax.random.key_data(trainer.rng_seq), jax.random.key_data(seq))


def test_initialisation_is_that_of_the_seed():
    trainer = make_trainer(seed=3)
    key = jax.random.split(jax.random.split(jax.random.key(3))[1])[0]
    assert_trees_close(trainer.train_state.params, MLP().init(key, *make_data(1)[0])["params"])
    assert_trees_equal(trainer.init_train_state(), trainer.train_state)
    state = trainer.train_state
    trainer.maybe_init()
    assert trainer.train_state is state
    assert isinstance(state, TrainState)
    assert int(state.step) == 0
    assert TrainState(1, 2) == (1, 2, 0, None, None)


def test_seeds_differ():
    params = [make_trainer(seed=seed).train_state.params for seed in (0, 1)]
    assert not np.allclose(*(p["Dense_0"]["kernel"] for p in params))


def test_training_returns_the_run_and_counts_its_steps():
    run = MemoryRun()
    trainer = make_trainer(run=run)
    assert trainer.train() is run
    assert int(trainer.train_state.step) == 10
    assert len(trainer.metrics["train/loss"]) == 10
    assert trainer.metrics["train/loss"][-1] < trainer.metrics["train/loss"][0]


def test_an_epoch_can_be_run_by_hand():
    by_hand, whole = make_trainer(), make_trainer()
    by_hand.epoch(0)
    assert len(by_hand.metrics["train/loss"]) == 5
    by_hand.epoch(1)
    whole.train()
    assert_trees_equal(by_hand.train_state.params, whole.train_state.params)


def test_the_rate_is_a_number_or_a_schedule_of_the_updates():
    constant = make_trainer(learning_rate=0.02)
    constant.train()
    np.testing.assert_allclose(constant.metrics["train/learning_rate"], [0.02] * 10)
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    scheduled = make_trainer(learning_rate=schedule)
    scheduled.train()
    np.testing.assert_allclose(scheduled.metrics["train/learning_rate"], [schedule(i) for i in range(10)], rtol=1e-6)


def test_a_gradient_is_scaled_down_to_max_grad():
    """Adam forgets the scale of its gradients, so the clip shows in its first moment."""
    trainer = make_trainer(max_grad=1e-3, train_dataset=make_data(8), num_epochs=1)
    trainer.train()
    moment = trainer.train_state.opt_state.inner_state[0].mu
    assert trainer.metrics["train/gradient norm"][0] > 0.1
    np.testing.assert_allclose(
        np.linalg.norm(np.concatenate([m.ravel() for m in jax.tree.leaves(host(moment))])), 0.1 * 1e-3, rtol=1e-4
    )


def test_validation_runs_every_val_every_epochs_on_every_set():
    sets = {"near": make_data(8, 1), "far": make_data(11, 2)}
    trainer = make_trainer(num_epochs=5, val_every=2, val_datasets=sets)
    trainer.train()
    assert [len(trainer.metrics[f"{name}/loss"]) for name in sets] == [3, 3]
    assert trainer.metrics["near/rmse"] == trainer.metrics["near_epoch/rmse"]
    assert len(trainer.metrics["train_epoch/loss"]) == 5


def test_validation_sets_in_a_list_are_named():
    trainer = make_trainer(val_datasets=[make_data(8), make_data(8), make_data(8)], num_epochs=1)
    trainer.train()
    assert {"val/loss", "val_1/loss", "val_2/loss"} <= set(trainer.metrics)


def test_validation_is_the_mean_over_each_datum_once_and_leaves_the_state_alone(devices):
    held_out = make_data(21, 5)
    trainer = make_trainer(num_epochs=1, val_datasets=[held_out], devices=devices)
    trainer.train()
    params = host(trainer.train_state.params)
    losses = [float(jnp.mean((MLP().apply({"params": params}, x) - y) ** 2)) for x, y in held_out]
    np.testing.assert_allclose(trainer.metrics["val/loss"], [np.mean(losses)], rtol=1e-5)
    alone = make_trainer(num_epochs=1, devices=devices)
    alone.train()
    assert_trees_equal(alone.train_state.params, params)


def test_train_only_leaves_validation_out():
    trainer = make_trainer(val_datasets=[make_data(8)], train_only=True, num_epochs=1)
    trainer.train()
    assert list(trainer.loaders) == ["train"]
    assert "val/loss" not in trainer.metrics


@pytest.mark.parametrize("option", ["single_batch", "single_datum"])
def test_a_single_batch_or_datum_makes_every_step(option):
    data = make_data(24)
    trainer = make_trainer(train_dataset=data, num_epochs=1, val_datasets=[data], **{option: True})
    first = data[:8] if option == "single_batch" else data[:1] * 8
    trainer.train()
    assert list(trainer.loaders) == ["train"]
    assert len(trainer.metrics["train/loss"]) == 1000
    again = make_trainer(train_dataset=first * 1000, num_epochs=1)
    again.train()
    assert again.metrics["train/loss"] == trainer.metrics["train/loss"]


def test_save_model_gets_the_parameters_of_its_step_on_the_host():
    saved, steps = [], []

    def save_model(params):
        saved.append(params)
        steps.append(int(trainer.train_state.step))

    trainer = make_trainer(save_every=3, save_model=save_model)
    trainer.train()
    assert steps == [3, 6, 9]
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(saved))
    untouched = make_trainer(train_dataset=make_data(43)[:24], num_epochs=1)
    untouched.train()
    assert_trees_equal(saved[0], untouched.train_state.params)


def test_plots_get_the_outputs_and_the_data_of_their_step(devices):
    calls = []
    run, data = MemoryRun(), make_data(43)
    trainer = make_trainer(
        train_dataset=data,
        num_epochs=1,
        run=run,
        plot_pipe=lambda *args: calls.append(args),
        plot_model=lambda output: {"doubled": 2 * output},
        plot_every=2,
        devices=devices,
    )
    one = make_trainer(train_dataset=data[:8], num_epochs=1, devices=devices)
    one.train()
    trainer.train()
    assert len(calls) == 2
    given, outputs, batch = calls[0]
    assert given is run
    assert_trees_equal(batch, data[8:16])
    # The outputs of step 2 are those of the parameters before its update.
    expected = [{"doubled": 2 * MLP().apply({"params": one.train_state.params}, x)} for x, _ in data[8:16]]
    assert_trees_close(outputs, expected)


def test_plots_see_data_as_the_dataset_gives_them():
    seen = []
    data = [(x, y) for x, y in make_data(16)]

    class OnPairs(nn.Module):
        @nn.compact
        def __call__(self, pair):
            return nn.Dense(3)(pair[0])

    def losses(output, datum):
        assert isinstance(datum, list)
        return output, jnp.mean((output - datum[0][1]) ** 2), {}

    trainer = make_trainer(
        model=OnPairs(),
        losses=losses,
        train_dataset=data,
        num_epochs=1,
        plot_every=1,
        plot_pipe=lambda run, outputs, batch: seen.append(batch),
    )
    trainer.train()
    assert_trees_equal(seen, [data[:8], data[8:]])


def sampling(**overrides):
    calls = []

    def sample_model(params, key, datum):
        return {
            "guess": MLP().apply({"params": {n: p for n, p in params.items() if n != "extra"}}, datum[0]),
            "key": jax.random.key_data(key),
            "extra": params.get("extra", jnp.zeros(())),
        }

    arguments = {
        "num_epochs": 1,
        "sample_every": 2,
        "sample_model": sample_model,
        "sample_plot": lambda *args: calls.append(args),
        "sample_metrics": lambda sample, datum: {"off by": float(np.abs(sample["guess"] - datum[1]).mean())},
    }
    return make_trainer(**(arguments | overrides)), calls


def test_samples_are_of_the_first_data_with_fresh_keys_and_join_the_metrics(devices):
    run, data = MemoryRun(), make_data(43)
    trainer, calls = sampling(run=run, sample_batch_size=3, train_dataset=data, devices=devices)
    trainer.train()
    assert len(calls) == 2
    for given, samples, nothing in calls:
        assert given is run
        assert nothing is None
        assert len(samples) == 3
    keys = {tuple(sample["key"].tolist()) for _, samples, _ in calls for sample in samples}
    assert len(keys) == 6
    off_by = [np.abs(s["guess"] - y).mean() for s, (_, y) in zip(calls[1][1], data[24:27], strict=True)]
    assert trainer.metrics["train/off by"][1] == pytest.approx(np.mean(off_by))
    rows = [row for row in run.rows if "train/loss" in row]
    assert ["train/off by" in row for row in rows] == [False, True, False, True, False]


def test_samples_are_of_the_parameters_of_their_step():
    trainer, calls = sampling(train_dataset=make_data(16))
    trainer.train()
    (_, samples, _), x = calls[0], make_data(16)[8][0]
    assert_trees_close(samples[0]["guess"], MLP().apply({"params": trainer.train_state.params}, x))


def test_nine_data_are_sampled_on_or_as_many_as_there_are():
    few, calls = sampling()
    few.train()
    assert [len(samples) for _, samples, _ in calls] == [8, 8]
    many, calls = sampling(batch_size=16, sample_every=1)
    many.train()
    assert [len(samples) for _, samples, _ in calls] == [9, 9]


def test_sample_params_are_merged_over_the_parameters():
    bias = np.full(3, 7, np.float32)
    trainer, calls = sampling(sample_params={"extra": np.float32(5), "Dense_0": {"bias": bias}})
    trainer.train()
    _, samples, _ = calls[0]
    assert samples[0]["extra"] == 5
    assert abs(samples[0]["guess"] - 7).max() < 5
    assert abs(host(trainer.train_state.params["Dense_0"]["bias"]) - 7).min() > 6


@pytest.mark.thorough
def test_sample_params_may_be_a_folder_of_checkpoints():
    saved = make_trainer(registry="saved", model=MLP(), seed=5)
    saved.train()
    trainer, calls = sampling(sample_params=str(saved.checkpointer.path))
    trainer.train()
    _, samples, _ = calls[0]
    guess = MLP().apply({"params": saved.train_state.params}, make_data(43)[8][0])
    assert_trees_close(samples[0]["guess"], guess)


def test_sampling_and_plotting_leave_the_run_as_it_is():
    plain = make_trainer(num_epochs=1)
    shown, _ = sampling(plot_pipe=lambda *args: None, plot_every=1)
    plain.train()
    shown.train()
    assert_trees_close(plain.train_state.params, shown.train_state.params, rtol=1e-6)
    np.testing.assert_allclose(plain.metrics["train/loss"], shown.metrics["train/loss"], rtol=1e-6)


def test_loss_is_a_mean_over_the_data_with_a_nan_counted_as_zero():
    data = make_data(8)
    trainer = make_trainer()
    keys = jax.random.split(jax.random.key(1), 8)
    batch = [np.stack([x for x, _ in data]), np.stack([y for _, y in data])]
    params = trainer.train_state.params
    losses = [float(jnp.mean((MLP().apply({"params": params}, x) - y) ** 2)) for x, y in data]
    loss, (outputs, same, metrics) = trainer.loss(params, keys, batch)
    np.testing.assert_allclose([loss, same], [np.mean(losses)] * 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["rmse"], np.mean(np.sqrt(losses)), rtol=1e-5)
    assert outputs.shape == (8, 3)
    batch[1][2] = np.nan
    loss, _ = trainer.loss(params, keys, batch)
    np.testing.assert_allclose(loss, (sum(losses) - losses[2]) / 8, rtol=1e-5)


def test_grad_is_mapped_over_the_devices_and_a_mean_over_them(devices):
    n = len(devices)
    trainer = make_trainer(devices=devices)
    params = host(trainer.train_state.params)
    data = make_data(8)
    keys = jax.random.split(jax.random.key(1), (n, 8 // n))
    batch = [np.stack(column).reshape(n, 8 // n, -1) for column in zip(*data, strict=True)]
    grads, (outputs, loss, metrics) = trainer.grad(params, keys, batch)

    def loss_of(p):
        return jnp.mean(jnp.stack([jnp.mean((MLP().apply({"params": p}, x) - y) ** 2) for x, y in data]))

    value, expected = jax.value_and_grad(loss_of)(params)
    for i in range(n):
        assert_trees_close(jax.tree.map(lambda g: np.asarray(g)[i], grads), expected)  # noqa: B023
    np.testing.assert_allclose(loss, [value] * n, rtol=1e-5)
    assert outputs.shape == (n, 8 // n, 3)
    assert metrics["rmse"].shape == (n,)


@pytest.mark.parametrize("form", ["list", "stacked", "split"])
def test_update_by_hand_is_a_step_and_leaves_the_callers_state_usable(devices, form):
    data, n = make_data(8), len(devices)
    trainer = make_trainer(train_dataset=data, num_epochs=1, devices=devices)
    state = trainer.train_state
    before = host(state)
    key = jax.random.split(trainer.rng_seq)[1]
    batch = [np.stack(column) for column in zip(*data, strict=True)]
    if form == "list":
        batch = data
    if form == "split":
        batch = [leaf.reshape(n, 8 // n, -1) for leaf in batch]
    outputs, new, metrics = trainer.update(key, state, batch)
    assert_trees_equal(state, before)
    assert outputs.shape == (8, 3)
    assert int(new.step) == 1
    trainer.train()
    assert_trees_close(new, trainer.train_state)
    np.testing.assert_allclose(metrics["loss"], trainer.metrics["train/loss"][0], rtol=1e-6)


def test_update_takes_a_state_and_a_key_of_any_kind():
    trainer = make_trainer()
    plain = TrainState(*host(trainer.train_state))._replace(step=4)
    _, new, _ = trainer.update(jax.random.PRNGKey(0), plain, make_data(8))
    assert int(new.step) == 5


class Three(nn.Module):
    @nn.compact
    def __call__(self, x, y, flag):
        return nn.Dense(3)(x)


def test_an_update_that_would_put_nan_into_the_parameters_is_dropped_whole_and_told(devices, caplog):
    data = [[x, y, np.float32(20 <= i < 22)] for i, (x, y) in enumerate(make_data(40))]
    plots = []
    run = MemoryRun()

    def losses(output, datum):
        # The NaN is in the backward pass alone: the loss itself is finite.
        loss = jnp.mean((output - datum[1]) ** 2)
        inside = jnp.where(datum[2] > 0, output[0] * 0, jnp.ones(()))
        return output, loss + jnp.sqrt(inside), {}

    trainer = make_trainer(
        model=Three(),
        losses=losses,
        train_dataset=data,
        num_epochs=1,
        devices=devices,
        run=run,
        plot_every=2,
        plot_pipe=lambda run, outputs, batch: plots.append((int(trainer.train_state.step), batch)),
    )
    with caplog.at_level(logging.WARNING, "learnax"):
        trainer.train()
    assert trainer.metrics["train/has_nan"] == [0, 0, 1, 0, 0]
    assert int(trainer.train_state.step) == 4
    (line,) = [record.message for record in caplog.records]
    assert line == (
        "step 3: the update would put NaN into the parameters and was dropped (1 so far): "
        "the gradient is not finite in Dense_0/bias, Dense_0/kernel"
    )
    without = make_trainer(model=Three(), losses=losses, train_dataset=data[:16], num_epochs=1, devices=devices)
    without.train()
    # Step 2 is plotted once, though a dropped update follows it; step 4 is made by the last batch.
    assert [step for step, _ in plots] == [2, 4]
    assert_trees_equal([batch for _, batch in plots], [data[8:16], data[32:40]])
    assert [row["step"] for row in run.rows if "train/loss" in row] == [1, 2, 2, 3, 4]
    after = without.train_state
    seq = trainer.engine.put(jax.random.split(jax.random.key(0))[0], jax.sharding.PartitionSpec())
    subs = []
    for _ in range(5):
        seq, sub = jax.random.split(seq)
        subs.append(sub)
    for i in (3, 4):
        _, after, _ = without.update(subs[i], after, data[8 * i : 8 * i + 8])
    assert_trees_close(after, trainer.train_state)


def test_a_rate_that_is_nan_drops_the_update_too():
    trainer = make_trainer(learning_rate=lambda count: jnp.where(count == 2, jnp.nan, 1e-2), num_epochs=1)
    trainer.train()
    assert trainer.metrics["train/has_nan"] == [0, 0, 1, 1, 1]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(host(trainer.train_state.params)))


def test_a_dropout_stream_is_served_and_differs_by_datum():
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            return nn.Dropout(0.5, deterministic=False, rng_collection="dropout")(jnp.ones(64))

    outputs = []
    trainer = make_trainer(
        model=Dropped(),
        losses=lambda output, datum: (output, jnp.mean(output), {}),
        num_epochs=1,
        plot_every=1,
        plot_pipe=lambda run, each, batch: outputs.extend(each),
    )
    trainer.train()
    assert len({tuple(output.tolist()) for output in outputs}) == len(outputs)


def test_the_state_can_be_set():
    trainer = make_trainer(num_epochs=1)
    other = make_trainer(seed=9)
    trainer.train_state = other.train_state
    trainer.train()
    other_trained = make_trainer(seed=9, num_epochs=1)
    other_trained.train()
    assert_trees_equal(trainer.train_state.params, other_trained.train_state.params)
    assert other.train_state.params["Dense_0"]["bias"].is_deleted() is False


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"plot_model": abs}, "plot_model is given, but does nothing without plot_pipe"),
        ({"sample_every": 3}, "sample_every is given, but does nothing without sample_model"),
        ({"sample_plot": print}, "sample_plot is given, but does nothing without sample_model"),
        ({"load_checkpoint": True}, "load_checkpoint is given, but does nothing without registry"),
        ({"keep_best_checkpoint": True}, "keep_best_checkpoint is given, but does nothing without registry"),
    ],
)
def test_an_argument_that_lacks_its_other_half_is_told_of(arguments, line, caplog):
    make_trainer(val_datasets=[make_data(8)], **arguments)
    assert [record.message for record in caplog.records] == [line]


def test_interrupted_training_goes_on_where_it_stopped():
    calls = []

    def interrupt(params):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    stopped, whole = make_trainer(save_every=3, save_model=interrupt), make_trainer()
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert len(stopped.metrics["train/loss"]) == 3
    stopped.train()
    whole.train()
    assert stopped.metrics["train/loss"] == whole.metrics["train/loss"]
    assert_trees_equal(stopped.train_state.params, whole.train_state.params)


def test_a_subclass_may_do_something_around_each_epoch():
    class Counted(Trainer):
        def epoch(self, epoch):
            seen.append(epoch)
            super().epoch(epoch)

    seen = []
    Counted(MLP(), 1e-2, LossPipe([Squared()]), 0, make_data(16), 3, 8, 0).train()
    assert seen == [0, 1, 2]
