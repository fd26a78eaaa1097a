"""Gradients averaged over batches before an update: the same as one large batch, counted and cut as updates."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learnax.loss import LossPipe
from tests.helpers import MemoryRun, Poisonable, StopAt, assert_trees_close, assert_trees_equal, make_data, make_trainer

DATA = make_data(32 * 6 + 20, seed=3)


def losses(output, datum):
    error = jnp.mean((output - datum[1]) ** 2)
    return output, error, {"rmse": jnp.sqrt(error), "hits": jnp.sum(output > 0)}


def make(**overrides):
    """Six updates of four batches of eight an epoch, two epochs; 20 data are left over."""
    return make_trainer(**({"losses": losses, "train_dataset": DATA, "accumulate_steps": 4} | overrides))


def trained(**overrides):
    trainer = make(**overrides)
    trainer.train()
    return trainer


def assert_same_run(left, right):
    def timeless(trainer):
        return {name: values for name, values in trainer.metrics.items() if "update_time" not in name}

    np.testing.assert_equal(timeless(left), timeless(right))
    assert_trees_equal(left.train_state, right.train_state)
    assert_trees_equal(jax.random.key_data(left.rng_seq), jax.random.key_data(right.rng_seq))


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("room", [1, 4])
def test_four_batches_of_eight_are_one_of_thirty_two(count, room):
    devices = jax.devices()[:count]
    small = trained(devices=devices, steps_per_execution=room)
    large = trained(devices=devices, batch_size=32, accumulate_steps=1)
    assert sorted(small.metrics) == sorted(large.metrics)
    for name, values in large.metrics.items():
        if "update_time" not in name:
            np.testing.assert_allclose(small.metrics[name], values, rtol=1e-4, atol=1e-6, err_msg=name)
    assert_trees_close(small.train_state, large.train_state, rtol=1e-4, atol=1e-6)


def test_a_step_is_an_update_and_its_metrics_are_means_over_its_batches():
    run = MemoryRun()
    trainer = trained(run=run, num_epochs=1)
    assert int(trainer.train_state.step) == 6
    assert {len(values) for name, values in trainer.metrics.items() if name.startswith("train/")} == {6}
    assert [row["step"] for row in run.rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    # The batches of the first update, each by itself, on the parameters that all of them see.
    fresh = make()
    key = jax.random.key(0)
    means = [fresh.loss(fresh.train_state.params, jax.random.split(key, 8), _stacked(i))[1] for i in range(4)]
    for name, values in {
        "loss": [loss for _, loss, _ in means],
        "rmse": [metrics["rmse"] for _, _, metrics in means],
        "hits": [metrics["hits"] for _, _, metrics in means],
    }.items():
        assert trainer.metrics[f"train/{name}"][0] == pytest.approx(np.mean(values), rel=1e-5)


def _stacked(batch):
    return [np.stack(column) for column in zip(*DATA[8 * batch : 8 * batch + 8], strict=True)]


class Watched:
    """A dataset that is read anew each epoch, and keeps which data were asked for."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return len(DATA)

    def __getitem__(self, index):
        self.read.append(index)
        return DATA[index]


def test_an_epoch_skips_the_group_that_is_not_whole_and_does_not_read_it():
    dataset = Watched()
    trainer = make(train_dataset=dataset)
    assert len(trainer.loaders["train"]) == 24  # 26 full batches, the last two of no update
    dataset.read.clear()
    trainer.train()
    assert dataset.read == [*range(192), *range(192)]
    assert_same_run(trainer, trained())


def test_data_that_make_no_update_are_said_when_the_trainer_is_built():
    with pytest.raises(ValueError, match="fewer than") as error:
        make(train_dataset=DATA[:31])
    assert str(error.value) == (
        "dataset 'train' has 31 data, fewer than the 4 batches of 8 of one update: every batch would be skipped; "
        "use batch_size <= 7"
    )
    with pytest.raises(ValueError, match="fewer than") as error:
        make(train_dataset=DATA[:3], batch_size=1)
    assert str(error.value) == (
        "dataset 'train' has 3 data, fewer than the 4 batches of 1 of one update: every batch would be skipped; "
        "use accumulate_steps <= 3"
    )
    assert make(train_dataset=DATA[:32], val_datasets=[DATA[:3]]) is not None  # validation has no groups


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0, ValueError, "accumulate_steps must be at least 1, but is 0"),
        (-1, ValueError, "accumulate_steps must be at least 1, but is -1"),
        (2.5, TypeError, "accumulate_steps must be a whole number, but is 2.5"),
        (None, TypeError, "accumulate_steps must be a whole number, but is None"),
    ],
)
def test_a_number_of_batches_that_is_none(value, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        make(accumulate_steps=value)


@pytest.mark.parametrize("count", [1, 4])
def test_a_nan_in_one_of_the_batches_drops_the_whole_update(count, caplog):
    data = make_data(192, seed=3)
    data[32 * 2 + 11][1][0] = 7  # in the second batch of the third update
    options = {"losses": LossPipe([Poisonable()]), "num_epochs": 1, "devices": jax.devices()[:count]}
    trainer = trained(train_dataset=data, **options)
    assert trainer.metrics["train/has_nan"] == [0, 0, 1, 0, 0, 0]
    assert int(trainer.train_state.step) == 5
    assert caplog.messages == [
        "step 3: the update would put NaN into the parameters and was dropped (1 so far): the gradient is not finite "
        "in Dense_0/bias, Dense_0/kernel, Dense_1/bias, Dense_1/kernel"
    ]
    # MLPs draw no random numbers, so a run that never saw the four batches ends the same.
    without = trained(train_dataset=data[:64] + data[96:], **options)
    assert_trees_close(trainer.train_state, without.train_state)


@pytest.mark.thorough
def test_accumulated_updates_have_the_same_bits_however_they_are_cut():
    class Streamed(Watched):
        pass

    options = {"steps_per_execution": 4, "val_datasets": [make_data(9, 1)]}
    uncut = trained(**options)
    calls = []
    saved = trained(save_every=3, registry="accumulated", save_model=lambda params: calls.append(params), **options)
    assert_same_run(saved, uncut)
    assert len(calls) == 4
    assert_same_run(trained(train_dataset=Streamed(), **options), uncut)


@pytest.mark.thorough
@pytest.mark.parametrize("again", ["a new trainer", "the same trainer"])
def test_a_run_stopped_in_mid_epoch_goes_on_at_its_update(again):
    options = {"steps_per_execution": 4, "registry": "stopped", "save_every": 4}
    uncut = trained(**options | {"registry": None})
    trainer = make(**options)
    trainer.hooks.saves.append(StopAt(9))
    trainer.loop.session.save_stopped = lambda why: None
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    if again == "a new trainer":
        trainer = make(load_checkpoint=True, **options)
        assert int(trainer.train_state.step) == 8
        assert (trainer.position.epoch, trainer.position.batch) == (1, 8)
    trainer.train()
    assert_same_run(trainer, uncut)


@pytest.mark.thorough
@pytest.mark.parametrize("room", [1, 4])
def test_plots_get_the_last_batch_of_their_update_and_its_outputs(room):
    plots = []
    options = {"steps_per_execution": room, "num_epochs": 1}
    trainer = trained(plot_every=4, plot_pipe=lambda run, *args: plots.append(args), **options)
    ((outputs, batch),) = plots
    assert_trees_equal(batch, DATA[8 * 15 : 8 * 16])
    before = trained(**options | {"train_dataset": DATA[: 32 * 3]})
    expected = [trainer.model.apply({"params": before.train_state.params}, x) for x, _ in batch]
    assert_trees_close(outputs, expected, rtol=1e-4)


@pytest.mark.thorough
def test_a_single_batch_is_every_batch_of_every_update():
    trainer = make(single_batch=True, num_epochs=1)
    other = make_trainer(losses=losses, train_dataset=DATA, single_batch=True, num_epochs=1)
    for each in (trainer, other):
        each.train()
    assert int(trainer.train_state.step) == 1000
    np.testing.assert_allclose(
        trainer.metrics["train/loss"][:50], other.metrics["train/loss"][:50], rtol=1e-4, atol=1e-6
    )


def test_batches_of_one_update_must_be_of_one_shape():
    class Pooled(type(make().model)):
        def __call__(self, x, y):
            return super().__call__(x.reshape(-1, 8).mean(0))

    data = [[np.tile(x, 1 + i // 48), y] for i, (x, y) in enumerate(DATA[:96])]
    with pytest.raises(ValueError, match="must be of one shape") as error:
        trained(model=Pooled(), train_dataset=data)
    assert str(error.value).startswith(
        "dataset 'train': the 4 batches of one update must be of one shape, but that of data 48 to 55 is\n"
    )
    assert "and the one before it\n" in str(error.value)
