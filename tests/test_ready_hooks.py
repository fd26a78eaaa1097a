"""The hooks that are there to be used, each by its effect on a run."""

import math

import jax
import numpy as np
import optax
import pytest

from learnax.hooks import (
    AfterValidation,
    At,
    EarlyStop,
    Every,
    GradientHistogram,
    HookError,
    LossSpike,
    SaveBest,
    ScaleRateOnPlateau,
    Timer,
    UpdateRatio,
)
from learnax.loss import LossPipe
from learnax.utils import leaves_by_path
from tests.helpers import (
    MemoryRun,
    Poisonable,
    Streamed,
    assert_trees_close,
    assert_trees_equal,
    make_data,
    make_trainer,
)

HELD_OUT = {"val_datasets": [make_data(16, 1)]}
RISING = {"learning_rate": 0.1, "num_epochs": 8, **HELD_OUT}
"""A rate at which the loss of validation is best after the second epoch."""


def stopped_by(values, patience, min_delta=0.0, mode="min"):
    """After how many validations a run of such values is to end."""
    best, since = math.inf, 0
    for number, value in enumerate(values, 1):
        value = value if mode == "min" else -value
        best, since = (value, 0) if value < best - min_delta else (best, since + 1)
        if since >= patience:
            return number
    return len(values)


@pytest.mark.parametrize(("patience", "min_delta", "mode"), [(1, 0.0, "min"), (2, 0.05, "max")])
def test_early_stop_ends_a_run_that_gets_no_better(caplog, patience, min_delta, mode):
    whole = make_trainer(**RISING)
    whole.train()
    losses = whole.metrics["val/loss"]
    wanted = stopped_by(losses, patience, min_delta, mode)
    assert 1 < wanted < 8
    trainer = make_trainer(hooks=[EarlyStop("val/loss", patience, min_delta, mode)], **RISING)
    trainer.train()
    assert trainer.metrics["val/loss"] == losses[:wanted]
    assert trainer.train_state.step == 5 * wanted
    assert f"stopped at step {5 * wanted} by hook 'EarlyStop': val/loss has got no better than " in caplog.text


def test_early_stop_counts_on_after_a_resume():
    whole = make_trainer(**RISING)
    whole.train()
    wanted = stopped_by(whole.metrics["val/loss"], 3)
    hook = AfterValidation(lambda m: m.stop("first") if m.step == 5 * (wanted - 1) else None)
    options = RISING | {"registry": "r"}
    make_trainer(hooks=[EarlyStop("val/loss", 3), hook], **options).train()
    again = make_trainer(hooks=[EarlyStop("val/loss", 3)], load_checkpoint=True, **options)
    assert again.log.step == 5 * (wanted - 1)
    again.train()
    assert again.metrics["val/loss"] == whole.metrics["val/loss"][:wanted]


def test_the_rate_is_scaled_where_a_metric_gets_no_better():
    trainer = make_trainer(hooks=[ScaleRateOnPlateau("val/loss", 1, 0.5)], **RISING)
    trainer.train()
    rates, losses, best = [0.1], trainer.metrics["val/loss"], math.inf
    for loss in losses[:-1]:
        rates.append(rates[-1] if loss < best else rates[-1] * 0.5)
        best = min(best, loss)
    assert rates[-1] < 0.5
    np.testing.assert_allclose(trainer.metrics["train/learning_rate"], np.repeat(rates, 5), rtol=1e-5)


def test_the_best_checkpoints_are_kept():
    run = MemoryRun()
    options = RISING | {"registry": "r", "run": run, "save_every": 100, "checkpoint_every": 100}
    trainer = make_trainer(hooks=[SaveBest(2, "val/loss")], **options)
    trainer.train()
    losses = trainer.metrics["val/loss"]
    best = set(np.argsort(losses, kind="stable")[:2])
    there = trainer.checkpointer.list_available_checkpoints()
    assert {name for name in there if isinstance(name, str)} == {"latest", "SaveBest-1", "SaveBest-2"}
    kept = [trainer.checkpointer.load(f"SaveBest-{place}") for place in (1, 2)]
    assert {save["step"] // 5 - 1 for save in kept} == best
    for save in kept:
        assert save["metrics"]["val/loss"] == losses[save["step"] // 5 - 1]
    # A run that goes on from one of them validates to the same.
    again = make_trainer(load_checkpoint="SaveBest-1", hooks=[SaveBest(2, "val/loss")], **options)
    assert again.log.step == kept[0]["step"]
    assert_trees_equal(again.train_state.params, kept[0]["state"].params)


@pytest.mark.parametrize("count", [1, 4])
def test_the_ratio_of_updates_is_that_of_the_step(count):
    params = {}
    hooks = [UpdateRatio(5), At([4, 5], lambda m: params.update({m.step: leaves_by_path(m.params)}))]
    trainer = make_trainer(hooks=hooks, devices=jax.devices()[:count])
    trainer.train()
    assert len(params[4]) == 4
    for path, before in params[4].items():
        ratio = np.linalg.norm(params[5][path] - before) / np.linalg.norm(before)
        values = trainer.metrics[f"train/UpdateRatio/{path}"]
        assert len(values) == 2
        np.testing.assert_allclose(values[0], ratio, rtol=1e-2)


def test_histograms_of_gradients_go_to_the_run():
    run = MemoryRun()
    make_trainer(hooks=[GradientHistogram(5, bins=32)], run=run).train()
    rows = [row for row in run.rows if "GradientHistogram/Dense_0/kernel" in row]
    assert [row["step"] for row in rows] == [5, 10]
    norms = {row["step"]: row for row in run.rows if "grads/Dense_0/bias" in row}
    for row in rows:
        counts, edges = row["GradientHistogram/Dense_0/kernel"]
        assert (counts.sum(), len(counts), len(edges)) == (16 * 3, 32, 33)
        counts, edges = row["GradientHistogram/Dense_0/bias"]
        assert counts.sum() == 3
        # The norm lies between those that the edges of the bins say.
        low, high = (np.sqrt((counts * 10.0 ** (2 * side)).sum()) for side in (edges[:-1], edges[1:]))
        assert low <= norms[row["step"]]["grads/Dense_0/bias"] <= high


def test_the_timer_tells_seconds_per_step():
    trainer = make_trainer(hooks=[Timer(4)])
    trainer.train()
    assert len(trainer.metrics["train/seconds per step"]) == 2
    assert all(value > 0 for value in trainer.metrics["train/seconds per step"])


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: EarlyStop("val/loss", 0), "^EarlyStop: patience must be a whole number above 0, but is 0$"),
        (lambda: EarlyStop("val/loss", 1, mode="least"), "^mode must be 'min' or 'max', but is 'least'$"),
        (lambda: EarlyStop("val/loss", 1, -1.0), "^min_delta must be 0 or more, but is -1.0$"),
        (
            lambda: ScaleRateOnPlateau("val/loss", 1, 1.5),
            "^ScaleRateOnPlateau: factor must be above 0 and below 1, but",
        ),
        (lambda: SaveBest(0, "val/loss"), "^SaveBest: k must be a whole number above 0, but is 0$"),
        (lambda: LossSpike(1.0, "spikes"), "^LossSpike: factor must be above 1, but is 1.0$"),
        (lambda: Timer(None), "^Timer: every must be a whole number above 0, but is None$"),
    ],
)
def test_what_makes_no_hook_is_an_error(make, wanted):
    with pytest.raises((TypeError, ValueError), match=wanted):
        make()


def test_a_metric_that_nothing_produces_is_named_with_what_there_is():
    wanted = r"^hook 'EarlyStop': the metric 'val/los' is produced by no split of this run; there are: .*, val/loss, "
    with pytest.raises(ValueError, match=wanted):
        make_trainer(hooks=[EarlyStop("val/los", 2)], **HELD_OUT)


# ---- spikes


def spiky(count=1):
    """Data of 8 batches of 8, the sixth of which is far off."""
    data = make_data(8 * 8 * count)
    for datum in data[8 * 5 * count : 8 * 6 * count]:
        datum[1][:] = 100
    return data


SPIKY = {"learning_rate": 1e-4, "num_epochs": 2}


@pytest.mark.parametrize(("accumulate", "kind"), [(1, list), (2, Streamed)])
def test_a_spike_ends_the_run_and_its_batch_is_kept(tmp_path, caplog, accumulate, kind):
    data = spiky(accumulate)
    # The first epoch has none: they come in the second one, whose losses are compared with those before.
    calm = make_data(8 * 8 * accumulate, 1)
    options = SPIKY | {"accumulate_steps": accumulate, "train_dataset": kind(calm + data), "num_epochs": 1}
    trainer = make_trainer(hooks=[LossSpike(10, tmp_path / "spikes", every=5)], **options)
    trainer.train()
    assert trainer.train_state.step == 15  # looked at after the steps 5, 10 and 15
    losses = trainer.metrics["train/loss"]
    usual = np.median(losses[:13])
    file = tmp_path / "spikes" / "step-14.npz"
    wanted = f"the loss of step 14 is {losses[13]:.6g}, and {usual:.6g} the median before it; its batch is in {file}"
    assert f"stopped at step 15 by hook 'LossSpike': {wanted}" in caplog.messages
    assert [path.name for path in file.parent.iterdir()] == ["step-14.npz"]
    with np.load(file) as kept:
        assert (kept["step"], kept["loss"]) == (14, losses[13])
        batch = data[8 * 5 * accumulate : 8 * 6 * accumulate]
        for part in (0, 1):
            np.testing.assert_array_equal(kept[f"batch/{part}"], np.stack([datum[part] for datum in batch]))


def test_spikes_are_told_and_nothing_changes_a_bit(tmp_path, caplog):
    options = SPIKY | {"train_dataset": make_data(8 * 8, 1) + spiky()}
    plain = make_trainer(**options)
    plain.train()
    trainer = make_trainer(hooks=[LossSpike(10, tmp_path, every=3, stop=False, most=1)], **options)
    trainer.train()
    assert_trees_equal(trainer.train_state, plain.train_state)
    assert trainer.metrics["train/loss"] == plain.metrics["train/loss"]
    told = [text for text in caplog.messages if text.startswith("the loss of step")]
    assert [text.split()[4] for text in told] == ["14", "30"]
    assert told[1].endswith("its batch is not kept, there are enough")
    assert [path.name for path in tmp_path.glob("*.npz")] == ["step-14.npz"]


@pytest.mark.parametrize(
    ("count", "steps"), [(1, 4), (4, 1), *(pytest.param(*both, marks=pytest.mark.soak) for both in [(1, 1), (4, 4)])]
)
def test_a_spike_is_skipped_and_the_run_is_as_if_it_had_not_come(tmp_path, caplog, count, steps):
    calm, data = make_data(8 * 8, 1), spiky()
    options = {**SPIKY, "steps_per_execution": steps, "devices": jax.devices()[:count], "num_epochs": 1}
    spikes = LossSpike(10, tmp_path / "spikes", every=3, stop=False)
    optimizer = spikes.skipping(optax.adam(1e-2))
    trainer = make_trainer(hooks=[spikes], optimizer=optimizer, **{**options, "train_dataset": calm + data})
    trainer.train()
    assert trainer.train_state.step == 16
    assert trainer.train_state.opt_state.skipped == 1
    (told,) = [text for text in caplog.messages if text.startswith("the loss of step 14 is")]
    assert told.endswith("step-14.npz, its update was left out")
    assert [path.name for path in (tmp_path / "spikes").iterdir()] == ["step-14.npz"]

    without = calm + data[: 8 * 5] + data[8 * 6 :]  # without the batch of step 14
    optimizer = LossSpike(10, tmp_path).skipping(optax.adam(1e-2))
    other = make_trainer(optimizer=optimizer, **{**options, "train_dataset": without})
    other.train()
    assert other.train_state.opt_state.skipped == 0
    assert_trees_equal(trainer.train_state.params, other.train_state.params)
    assert_trees_equal(trainer.train_state.opt_state.inner, other.train_state.opt_state.inner)
    # Of numbers that never jump, it is the optimiser itself.
    plain = make_trainer(optimizer=optax.adam(1e-2), **{**options, "train_dataset": without})
    plain.train()
    assert_trees_close(other.train_state.params, plain.train_state.params)


def test_a_run_that_goes_on_skips_what_it_would_have_skipped(tmp_path):
    options = SPIKY | {"train_dataset": make_data(8 * 8, 1) + spiky(), "num_epochs": 1}
    optimizer = lambda: LossSpike(10, tmp_path).skipping(optax.adam(1e-2))  # noqa: E731
    whole = make_trainer(optimizer=optimizer(), **options)
    whole.train()
    cut = options | {"registry": "r"}
    make_trainer(optimizer=optimizer(), hooks=[At([11], lambda moment: moment.stop("enough"), "s")], **cut).train()
    trainer = make_trainer(optimizer=optimizer(), load_checkpoint=True, **cut)
    assert trainer.train_state.step == 11
    trainer.train()
    assert_trees_equal(trainer.train_state, whole.train_state)
    assert trainer.train_state.opt_state.skipped == 1


def test_what_was_trained_on_is_told_step_by_step():
    seen = []

    class Look(Every):
        recent = True

    def look(moment):
        seen.append([(row.step, row.metrics["train/loss"], row.read()) for row in moment.recent])

    data = make_data(43)
    data[17][1][0] = 7  # in the third batch, whose update is dropped
    trainer = make_trainer(train_dataset=data, losses=LossPipe([Poisonable()]), hooks=[Look(3, look)])
    trainer.train()
    assert [[step for step, _, _ in rows] for rows in seen] == [[1, 2, 2, 3], [4, 5, 6]]
    flat = [row for rows in seen for row in rows]
    assert [loss for _, loss, _ in flat] == trainer.metrics["train/loss"][:7]
    for number, (_, _, batch) in enumerate(flat):
        first = number % 5 * 8
        assert_trees_equal(batch, data[first : first + 8])


def test_a_batch_that_nobody_kept_is_an_error():
    with pytest.raises(HookError, match=r"hook 'look' reads moment.recent, which is kept only where a hook asks"):
        make_trainer(hooks=[At([1], lambda m: m.recent, "look")]).train()
