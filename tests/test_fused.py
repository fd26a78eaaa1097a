"""Steps fused into one dispatch: the same bits however they are cut, and nothing that a single step has is lost."""

import logging
import math
import re

import flax.linen as nn
import jax
import numpy as np
import pytest

from learnax.loss import LossPipe
from tests.helpers import (
    Convolution,
    MemoryRun,
    Noisy,
    Poisonable,
    StopAt,
    Streamed,
    assert_trees_close,
    assert_trees_equal,
    host,
    make_data,
    make_trainer,
)

EPOCH = 19
"""Steps of an epoch here: a whole block of 16 and a tail, four of 4 and a tail."""


class Attention(nn.Module):
    """One transformer block on four tokens."""

    @nn.compact
    def __call__(self, x, y=None):
        x = nn.Dense(8)(x.reshape(4, 2))
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return nn.Dense(3)(x.mean(0))


DATA = make_data(8 * EPOCH + 3, seed=5)


def make(**overrides):
    """A trainer of two epochs of 19 steps."""
    return make_trainer(**({"model": Noisy(), "train_dataset": DATA} | overrides))


def trained(**overrides):
    trainer = make(**overrides)
    trainer.train()
    return trainer


def stopped(step, **overrides):
    trainer = make(**overrides)
    trainer.hooks.saves.append(StopAt(step))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer


def calls(trainer, kind="train"):
    return sum(program.calls for program in trainer.engine.programs.values() if program.kind == kind)


def assert_same_run(left, right, splits=("train", "train_epoch", "val", "val_epoch")):
    """Bit for bit, but for the time that steps took."""

    def timeless(trainer):
        return {
            name: values
            for name, values in trainer.metrics.items()
            if name.split("/")[0] in splits and "update_time" not in name
        }

    np.testing.assert_equal(timeless(left), timeless(right))
    assert len(left.metrics["train/update_time"]) == len(right.metrics["train/update_time"])
    assert_trees_equal(left.train_state, right.train_state)
    assert_trees_equal(jax.random.key_data(left.rng_seq), jax.random.key_data(right.rng_seq))


def rows(trainer):
    """What the run was told of each step, but for its time."""
    return [
        {name: value for name, value in row.items() if name != "train/update_time"}
        for row in trainer.run.rows
        if "train/loss" in row
    ]


# ---- the same bits, however it is cut

CELLS = [
    (Noisy, 4, 4),
    (Noisy, 1, 16),
    (Attention, 4, 1),
    (Noisy, 1, 1),
    (Convolution, 1, 4),
    (Convolution, 4, 16),
]
"""Model, devices, steps in a dispatch."""
_PARAMS = [
    pytest.param(cell, marks=mark, id=f"{cell[0].__name__}-{cell[1]}-{cell[2]}")
    for cell, mark in zip(CELLS, [(), *2 * [pytest.mark.thorough], *3 * [pytest.mark.soak]], strict=True)
]


@pytest.fixture(scope="module", params=_PARAMS)
def uncut(request):
    """The options of a run, and the run with nothing that cuts it but its epochs, its list kept on the devices."""
    model, count, room = request.param
    options = {"model": model(), "devices": jax.devices()[:count], "steps_per_execution": room}
    trainer = trained(**options, run=MemoryRun())
    assert trainer.plan.room == room
    assert trainer.loaders["train"]._resident
    assert calls(trainer) == 2 * math.ceil(EPOCH / room)
    return options, trainer


def test_saves_a_streamed_dataset_and_a_resume_change_no_bit(uncut):
    options, expected = uncut
    saved = []
    options = {
        "registry": "saves",
        "run": MemoryRun(),
        "save_model": lambda params: saved.append(host(params)),
        **options,
    }
    trainer = stopped(24, **options, train_dataset=Streamed(DATA), save_every=5)
    assert rows(trainer) == rows(expected)[:24]
    assert len(saved) == 4
    if trainer.plan.room > 1:
        assert calls(trainer) > 24 / trainer.plan.room + 2
    resumed = make(**options, save_every=7, load_checkpoint=20)
    assert int(resumed.train_state.step) == 20
    resumed.train()
    assert_same_run(resumed, expected)
    assert rows(resumed) == [*rows(expected)[:24], *rows(expected)[20:]]
    assert len(saved) == 4 + 3  # at 21, 28 and 35


@pytest.mark.thorough
def test_epochs_of_another_length_change_no_bit(uncut):
    """The same data in the same order as one long epoch: other tails, other blocks."""
    options, expected = uncut
    data = DATA[: 8 * EPOCH]
    assert_same_run(trained(**options, train_dataset=[*data, *data], num_epochs=1), expected, splits=["train"])


@pytest.mark.thorough
def test_an_interrupt_on_a_list_over_its_budget_changes_no_bit(uncut, monkeypatch):
    options, expected = uncut
    monkeypatch.setattr("learnax.parts.parts.RESIDENT_BYTES", 1000)
    trainer = stopped(22, **options)
    assert (trainer.position.epoch, trainer.position.batch) == (1, 3)
    trainer.train()
    assert not trainer.loaders["train"]._resident
    assert_same_run(trainer, expected)


@pytest.mark.thorough
def test_the_cadence_of_plots_changes_no_bit():
    options = {"model": Attention(), "steps_per_execution": 16, "plot_pipe": lambda *_: None}
    often, seldom = (trained(**options, plot_every=every) for every in (3, 1000))
    assert_same_run(often, seldom)
    assert calls(often) > calls(seldom)


HELD_OUT = make_data(45, seed=6)
"""Five batches and a tail."""


@pytest.mark.thorough
def test_a_run_with_validation_has_the_same_bits_by_every_way_of_its_data(monkeypatch):
    options = {"devices": jax.devices()[:4], "steps_per_execution": 4}
    lists = {"train_dataset": DATA, "val_datasets": [HELD_OUT]}
    streamed = {"train_dataset": Streamed(DATA), "val_datasets": [Streamed(HELD_OUT)]}
    expected = trained(**options, **lists)
    stopped(21, **options, **lists, registry="ways", save_every=6)
    resumed = trained(**options, **streamed, registry="ways", save_every=1000, load_checkpoint=True)
    assert_same_run(resumed, expected)
    padded = sum(leaf.nbytes for block in expected.loaders["val"].blocks() for leaf in jax.tree.leaves(block.device))
    monkeypatch.setattr("learnax.parts.parts.RESIDENT_BYTES", padded)  # the validation data fit
    over = trained(**options, **lists)
    assert [bool(loader._resident) for loader in over.loaders.values()] == [False, True]
    assert_same_run(over, expected)


@pytest.mark.processes
@pytest.mark.parametrize(("kind", "count", "room"), [(list, 1, 16), (Streamed, 4, 4)])
def test_worker_processes_change_no_bit(kind, count, room):
    options = {"devices": jax.devices()[:count], "steps_per_execution": room}
    expected = trained(**options)
    options |= {"train_dataset": kind(DATA), "num_workers": 2}
    trainer = stopped(22, **options) if kind is Streamed else make(**options)
    trainer.train()
    assert_same_run(trainer, expected)


def test_a_list_is_read_once_and_another_dataset_in_each_epoch():
    class Counted(list):
        pass

    reads = []

    class Counting(Streamed):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    trainer = make(train_dataset=Counting(DATA))
    reads.clear()
    trainer.train()
    assert reads == [*range(8 * EPOCH)] * 2
    assert not trained(train_dataset=Counted(DATA)).loaders["train"]._resident  # its items may be made by its own code
    assert trained(train_dataset=tuple(DATA)).loaders["train"]._resident


# ---- between settings


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("model", "count", "rooms"),
    [
        (Noisy, 1, (1, 2, 5, "auto")),
        pytest.param(Noisy, 4, (1, 16), marks=pytest.mark.soak),
        (Convolution, 4, ("auto", 4)),
        pytest.param(Attention, 1, (1, "auto"), marks=pytest.mark.soak),
        (Attention, 4, (1, 4)),
    ],
)
def test_every_setting_trains_alike(model, count, rooms):
    seed = int(np.random.default_rng().integers(1 << 30))
    options = {"model": model(), "devices": jax.devices()[:count], "learning_rate": 1e-3, "num_epochs": 1}
    data = make_data(8 * EPOCH, seed)
    runs = {room: trained(**options, train_dataset=data, steps_per_execution=room) for room in rooms}
    assert "auto" not in runs or runs["auto"].plan.room == (1 if model is Convolution else 16)
    for room, run in runs.items():
        for name, values in runs[rooms[0]].metrics.items():
            if "update_time" not in name:
                said = f"{name}, {room} steps, seed {seed}"
                np.testing.assert_allclose(run.metrics[name], values, rtol=1e-5, atol=1e-7, err_msg=said)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("room", "save_every", "dispatches"),
    [
        (500, 1000, 1),
        ("auto", 1000, 2),
        (16, 5, 5),
        (4, 2, 10),
    ],
)
def test_an_epoch_takes_as_many_dispatches_as_its_blocks_and_what_is_due_ask_for(room, save_every, dispatches):
    trainer = trained(num_epochs=1, steps_per_execution=room, save_every=save_every, save_model=lambda params: None)
    assert calls(trainer) == dispatches
    assert [p.kind for p in trainer.engine.programs.values()] == ["train"]
    assert len(trainer.metrics["train/loss"]) == int(trainer.train_state.step) == EPOCH


# ---- what a single step has


@pytest.mark.parametrize("count", [1, 4])
def test_the_guard_works_on_each_step_of_a_dispatch(count, caplog):
    data = make_data(160, seed=5)
    data[8 * 4 + 3][1][0] = data[8 * 11 + 7][1][0] = data[8 * 12][1][0] = 7  # in the 5th, 12th and 13th batch
    run = MemoryRun()
    options = {"train_dataset": data, "losses": LossPipe([Poisonable()]), "num_epochs": 1}
    options["devices"] = jax.devices()[:count]
    with caplog.at_level(logging.WARNING, "learnax"):
        trainer = trained(**options, steps_per_execution=16, run=run)
    bad = [4, 11, 12]
    assert np.flatnonzero(trainer.metrics["train/has_nan"]).tolist() == bad
    assert int(trainer.train_state.step) == 17
    made = np.cumsum([batch not in bad for batch in range(20)]).tolist()
    assert [row["step"] for row in run.rows if "train/loss" in row] == made
    where = "the gradient is not finite in Dense_0/bias, Dense_0/kernel, Dense_1/bias, Dense_1/kernel"
    assert caplog.messages == [
        f"step {step}: the update would put NaN into the parameters and was dropped ({number} so far): {where}"
        for number, step in enumerate((5, 11, 11), 1)
    ]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(host(trainer.train_state)))
    single = trained(**options, steps_per_execution=1)
    assert_trees_close(trainer.train_state, single.train_state)
    np.testing.assert_equal(trainer.metrics["train/has_nan"], single.metrics["train/has_nan"])


class Watch:
    """Everything that is due in a run, with its step, and what it got."""

    def __init__(self, room, **overrides):
        self.plots, self.saves, self.samples = [], [], []
        self.trainer = make(
            **overrides,
            steps_per_execution=room,
            plot_every=4,
            plot_pipe=lambda run, outputs, batch: self.plots.append((self.step, outputs, batch)),
            save_every=6,
            save_model=lambda params: self.saves.append((self.step, params)),
            sample_every=5,
            sample_model=lambda params, key, datum: datum[0] * jax.random.normal(key, ()),
            sample_plot=lambda run, samples, _: self.samples.append((self.step, samples)),
            sample_metrics=lambda sample, datum: {"size": np.abs(sample).mean()},
        )
        self.trainer.train()

    @property
    def step(self):
        return int(self.trainer.train_state.step)


@pytest.mark.parametrize(("count", "bad"), [(4, []), (1, [2, 3, 7, 16])], ids=["no update dropped", "updates dropped"])
def test_plots_samples_and_saves_come_at_exactly_their_steps(count, bad):
    data = make_data(8 * EPOCH, seed=5)
    for batch in bad:
        data[8 * batch][1][0] = 7
    options = {"train_dataset": data, "losses": LossPipe([Poisonable()]), "devices": jax.devices()[:count]}
    single, fused = Watch(1, **options), Watch(16, **options)
    steps = 2 * (EPOCH - len(bad))
    for watch in (single, fused):
        assert watch.step == steps
        assert [step for step, *_ in watch.plots] == [*range(4, steps + 1, 4)]
        assert [step for step, *_ in watch.saves] == [*range(6, steps + 1, 6)]
        assert [step for step, *_ in watch.samples] == [*range(5, steps + 1, 5)]
    assert_trees_equal([batch for *_, batch in fused.plots], [batch for *_, batch in single.plots])
    good = [batch for batch in range(EPOCH) if batch not in bad] * 2
    expected = [data[8 * good[step - 1] : 8 * good[step - 1] + 8] for step, *_ in fused.plots]
    assert_trees_equal([batch for *_, batch in fused.plots], expected)
    assert_trees_close(
        [outputs for _, outputs, _ in fused.plots], [outputs for _, outputs, _ in single.plots], rtol=1e-4
    )
    assert_trees_close(fused.saves, single.saves, rtol=1e-4)
    assert_trees_close(fused.samples, single.samples)
    assert calls(fused.trainer) < calls(single.trainer) == 2 * EPOCH
    # What sampling measures stands in the row of its step.
    assert len(fused.trainer.metrics["train/size"]) == steps // 5
    np.testing.assert_allclose(fused.trainer.metrics["train/size"], single.trainer.metrics["train/size"], rtol=1e-5)


def test_what_is_measured_at_a_step_joins_that_steps_row_and_no_other():
    run = MemoryRun()
    trained(
        steps_per_execution=16,
        num_epochs=1,
        run=run,
        sample_every=7,
        sample_model=lambda params, key, datum: datum[0],
        sample_metrics=lambda sample, datum: {"size": 1.0},
    )
    assert [row["step"] for row in run.rows if "train/size" in row] == [7, 14]


@pytest.mark.thorough
@pytest.mark.parametrize(("option", "count"), [("single_batch", 4), ("single_datum", 1)])
def test_a_single_batch_or_datum_is_fused_without_copies_of_it(option, count):
    options = {option: True, "num_epochs": 1, "devices": jax.devices()[:count]}
    single, fused = (trained(**options, steps_per_execution=room) for room in (1, 16))
    assert (calls(single), calls(fused)) == (1000, 63)
    assert int(fused.train_state.step) == len(fused.metrics["train/loss"]) == 1000
    (block,) = fused.loaders["train"].blocks()
    assert {leaf.shape[0] for leaf in jax.tree.leaves(block.device)} == {1}
    np.testing.assert_allclose(fused.metrics["train/loss"][:100], single.metrics["train/loss"][:100], rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(("count", "size"), [(1, 5), (1, 32), (4, 45)])
def test_a_fused_validation_takes_each_datum_once_and_the_same_random_numbers(count, size):
    options = {"val_datasets": [make_data(size, seed=6)], "devices": jax.devices()[:count], "learning_rate": 0.0}
    single, fused = (trained(**options, steps_per_execution=room) for room in (1, 4))
    batches = math.ceil(size / 8)
    assert calls(single, "evaluate") == 2 * batches
    assert calls(fused, "evaluate") == 2 * math.ceil(batches / 4)
    for name in ("val/loss", "val/rmse"):
        np.testing.assert_allclose(fused.metrics[name], single.metrics[name], rtol=1e-6, err_msg=name)
    assert fused.metrics["val/loss"][0] != fused.metrics["val/loss"][1]  # the noise goes on from epoch to epoch
    assert_trees_equal(jax.random.key_data(fused.rng_seq), jax.random.key_data(single.rng_seq))


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [list, pytest.param(Streamed, marks=pytest.mark.soak)])
def test_a_block_is_cut_where_the_shape_of_the_data_changes(kind):
    class Pooled(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            return nn.Dense(3)(x.reshape(-1, 8).mean(0) + 0.1 * jax.random.normal(self.make_rng("params"), (8,)))

    lengths = [1, 1, 1, 2, 2, 1, 1, 1, 1, 1, 2]  # of each batch
    data = [[np.tile(x, lengths[i // 8]), y] for i, (x, y) in enumerate(make_data(8 * len(lengths)))]
    options = {"model": Pooled(), "train_dataset": kind(data), "val_datasets": [kind(data[:37])]}
    single, fused = (trained(**options, steps_per_execution=room) for room in (1, 4))
    assert [program.calls for program in fused.engine.programs.values() if program.kind == "train"] == [6, 4]
    assert calls(single) == 2 * len(lengths)
    for name, values in single.metrics.items():
        if "update_time" not in name:
            np.testing.assert_allclose(fused.metrics[name], values, rtol=1e-5, err_msg=name)
    assert_same_run(trained(**options, steps_per_execution=4, save_model=lambda params: None, save_every=3), fused)


@pytest.mark.thorough
@pytest.mark.parametrize("room", [1, 16])
def test_the_steps_before_a_dataset_raised_are_made_and_logged(room):
    class Broken(Streamed):
        mended = False

        def __getitem__(self, index):
            if index == 8 * 5 + 3 and not self.mended:
                raise OSError("unplugged")
            return super().__getitem__(index)

    run, dataset = MemoryRun(), Broken(DATA)
    trainer = make(train_dataset=dataset, run=run, steps_per_execution=room)
    with pytest.raises(RuntimeError, match=re.escape("dataset 'train'")) as error:
        trainer.train()
    assert "43" in str(error.value)
    assert "unplugged" in str(error.value)
    assert int(trainer.train_state.step) == len(trainer.metrics["train/loss"]) == 5
    assert [row["step"] for row in run.rows if "train/loss" in row] == [1, 2, 3, 4, 5]
    assert (trainer.position.epoch, trainer.position.batch) == (0, 5)
    dataset.mended = True
    trainer.train()
    assert_same_run(trainer, trained(steps_per_execution=room))


# ---- memory


def test_a_fused_program_updates_all_of_the_state_in_place_and_copies_none_of_it(one_device):
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            return nn.Dense(3)(nn.relu(nn.Dense(1408)(nn.relu(nn.Dense(1408)(x)))))

    trainer = make(model=Wide(), steps_per_execution=16, compile=True, devices=one_device)
    (program,) = trainer.engine.programs.values()
    leaves = jax.tree.leaves(trainer.train_state)
    params = jax.tree.leaves(trainer.train_state.params)
    memory = program.compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in leaves)
    # The gradient, and its squares where they are not fused into their sum; a second state would be three times that.
    assert memory.temp_size_in_bytes < 2.25 * sum(leaf.nbytes for leaf in params)
    text = program.compiled.as_text()
    assert "while(" in text
    large = {leaf.shape for leaf in params if leaf.size > 1000}
    assert large == {(8, 1408), (1408,), (1408, 1408), (1408, 3)}
    for shape in large:
        found = re.search(rf"f32\[{','.join(map(str, shape))}\]\S* copy\(", text)
        assert not found, f"a parameter of shape {shape} is copied"
    before = trainer.programs.places(trainer.parts.progress.live)
    trainer.train()
    assert trainer.programs.places(trainer.parts.progress.live) == before
