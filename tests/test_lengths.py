"""How long a run is and how often it validates, in steps: exact, however it is cut, stopped and resumed."""

import logging
import re

import jax
import pytest

from learnax.cluster.stops import Stops
from learnax.loss import LossPipe
from tests.helpers import MemoryRun, Noisy, Poisonable, StopAt, Streamed, assert_trees_equal, make_data, make_trainer

HELD_OUT = {"val": make_data(21, seed=1), "other": make_data(8, seed=2)}
TIMES = ("train/update_time", "train_epoch/update_time")


def make(**options):
    """A run by steps, 5 of an epoch."""
    if "num_steps" in options:
        options["num_epochs"] = None
    return make_trainer(**({"model": Noisy(), "val_datasets": HELD_OUT} | options))


def trained(**options):
    trainer = make(**options)
    trainer.train()
    return trainer


def assert_same_run(left, right):
    names = set(left.metrics) - set(TIMES)
    assert names == set(right.metrics) - set(TIMES)
    assert {name: left.metrics[name] for name in names} == {name: right.metrics[name] for name in names}
    assert_trees_equal(left.train_state, right.train_state)
    assert_trees_equal(jax.random.key_data(left.rng_seq), jax.random.key_data(right.rng_seq))


def test_so_many_steps_of_whole_epochs_are_those_epochs():
    by_steps, by_epochs = trained(num_steps=10), trained(num_epochs=2)
    assert_same_run(by_steps, by_epochs)
    assert (by_steps.position.epoch, by_steps.position.batch, by_steps.position.steps) == (2, 0, 10)


@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 1}, {"train_dataset": Streamed(make_data(43))}])
def test_a_run_ends_amid_an_epoch_with_its_last_state_validated(options):
    run = MemoryRun()
    trainer = trained(num_steps=7, run=run, **options)
    assert trainer.train_state.step == len(trainer.metrics["train/loss"]) == 7
    assert len(trainer.metrics["val/loss"]) == 2  # after the epoch, and at the end
    assert len(trainer.metrics["train_epoch/loss"]) == 1
    assert (trainer.position.epoch, trainer.position.batch) == (1, 2)
    assert [row["step"] for row in run.rows if "val/loss" in row] == [5, 7]


def test_no_batch_is_read_beyond_the_last_step_but_those_of_its_block():
    dataset = Streamed(make_data(43))
    trained(num_steps=7, train_dataset=dataset, steps_per_execution=1, train_only=True)
    assert dataset.reads == [0, *range(40), *range(16)]


@pytest.mark.parametrize("first", [5, 7])
def test_a_longer_run_goes_on_as_if_it_had_been_that_long(first, caplog):
    whole = trained(num_steps=12)
    trained(num_steps=first, registry="r")
    trainer = trained(num_steps=12, registry="r", load_checkpoint=True)
    extra = first == 7  # it was validated there as well
    for name in ("val/loss", "val_epoch/loss"):
        kept = trainer.metrics[name]
        assert [*kept[:1], *kept[1 + extra :]] == whole.metrics[name]
    assert trainer.metrics["train/loss"] == whole.metrics["train/loss"]
    assert_trees_equal(trainer.train_state, whole.train_state)
    with caplog.at_level(logging.WARNING, "learnax"):
        again = trained(num_steps=12, registry="r", load_checkpoint=True)
    assert "this run is complete: 12 of 12 steps; train() makes no step. A larger num_steps trains on" in caplog.text
    assert again.metrics["val/loss"] == trainer.metrics["val/loss"]


def test_validation_comes_at_exact_steps_through_fused_dispatches():
    run = MemoryRun()
    trainer = trained(num_epochs=3, val_every_steps=4, run=run)
    assert [row["step"] for row in run.rows if "val/loss" in row] == [4, 8, 12, 15]
    assert [row["epoch"] for row in run.rows if "val/loss" in row] == [0, 1, 2, 2]
    assert len(trainer.metrics["train_epoch/loss"]) == 3
    by_one = trained(num_epochs=3, val_every_steps=4, steps_per_execution=1)
    assert by_one.metrics["val/loss"] == trainer.metrics["val/loss"]
    at_end = trained(num_epochs=3, val_every_steps=5)
    assert len(at_end.metrics["val/loss"]) == 3  # not twice at the end


def test_steps_whose_update_is_dropped_count_for_the_length_and_not_for_the_cadence():
    data = make_data(43)
    data[10][1][:] = 7  # of the second batch
    options = {"train_dataset": data, "losses": LossPipe([Poisonable()]), "model": make_trainer().model}
    run = MemoryRun()
    trainer = trained(num_steps=5, val_every_steps=2, run=run, **options)
    assert trainer.metrics["train/has_nan"] == [0, 1, 0, 0, 0]
    assert trainer.train_state.step == 4
    assert [row["step"] for row in run.rows if "val/loss" in row] == [2, 4]


@pytest.mark.parametrize(
    "step", [pytest.param(4, marks=pytest.mark.soak), 6, 8, pytest.param(11, marks=pytest.mark.soak)]
)
def test_a_run_stopped_anywhere_validates_what_it_would_have(step):
    options = {"num_steps": 11, "val_every_steps": 4}
    untouched = trained(**options)
    trainer = make(registry="r", save_every=2, **options)
    trainer.hooks.saves.append(StopAt(step))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer = trained(registry="r", load_checkpoint=True, **options)
    assert_same_run(trainer, untouched)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_validation_that_was_stopped_is_made_again(number, monkeypatch):
    options = {"num_steps": 11, "val_every_steps": 4, "val_datasets": {"val": HELD_OUT["val"]}}
    untouched = trained(**options)
    trainer = make(registry="r", **options)
    validations = []
    original, check = trainer.parts.validation._evaluate, Stops.check

    def evaluate(*args):
        validations.append(args)
        return original(*args)

    def stop(stops):
        if len(validations) == number + 1:
            validations.append(None)
            raise KeyboardInterrupt
        check(stops)

    trainer.parts.validation._evaluate = evaluate
    monkeypatch.setattr(Stops, "check", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.log.step == (4, 8, 11)[number]
    trainer = trained(registry="r", load_checkpoint=True, **options)
    assert_same_run(trainer, untouched)


def test_the_best_is_judged_at_each_validation_and_by_no_older_one():
    trainer = make(num_epochs=3, val_every_steps=3, registry="r", keep_best_checkpoint=True, save_every=1000)
    judged = []
    original = trainer.checkpointer.update_best_checkpoint

    def update(state, value, step, **kept):
        judged.append((step, value))
        return original(state, value, step, **kept)

    trainer.checkpointer.update_best_checkpoint = update
    trainer.train()
    assert judged == list(zip((3, 6, 9, 12, 15), trainer.metrics["val/loss"], strict=True))


@pytest.mark.processes
def test_a_validation_takes_so_many_batches_at_most():
    seen = []
    for options in ({}, {"num_workers": 1}):
        dataset = Streamed(HELD_OUT["val"])
        limited = trained(num_epochs=2, val_steps=2, val_datasets=[dataset], **options)
        seen.append(limited.metrics["val/loss"])
        if not options:
            assert dataset.reads == [0, *range(16), *range(16)]
    cut = trained(num_epochs=2, val_datasets=[HELD_OUT["val"][:16]])
    assert seen == [cut.metrics["val/loss"]] * 2
    assert str(limited.loaders["val"]).startswith("val: 16 data in 2 batches")
    whole = trained(num_epochs=2, val_steps=3, val_datasets=[HELD_OUT["val"]])
    assert whole.metrics["val/loss"] == trained(num_epochs=2, val_datasets=[HELD_OUT["val"]]).metrics["val/loss"]


def test_lengths_are_said_once():
    for options, text in (
        ({"num_epochs": 2, "num_steps": 3}, "num_epochs=2 and num_steps=3 both say how long to train; leave one of"),
        (
            {"num_epochs": None},
            "num_epochs and num_steps are both None; one of them says how long to train",
        ),
        ({"val_every": 1, "val_every_steps": 2}, "val_every=1 (epochs) and val_every_steps=2 (steps) both say how oft"),
        ({"num_epochs": None, "num_steps": 0}, "num_steps must be at least 1, but is 0"),
        ({"val_steps": 0}, "val_steps must be at least 1, but is 0"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
            make_trainer(**options)


def test_num_epochs_may_be_left_out():
    from learnax.trainer import Trainer

    given = make_trainer().parts.settings.given
    names = ("model", "learning_rate", "losses", "seed", "train_dataset", "batch_size", "num_workers", "devices")
    trainer = Trainer(**{name: given[name] for name in names}, num_steps=3)
    trainer.train()
    assert len(trainer.metrics["train/loss"]) == 3
    with pytest.raises(TypeError, match="num_epochs"):
        Trainer(**{name: given[name] for name in names})
