"""Each epoch in an order of its own, a function of seed and epoch alone, wherever and however data are read."""

import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learnax.data import Order
from learnax.utils.permutation import permuted, rounds_of
from tests.helpers import StopAt, Streamed, assert_trees_close, assert_trees_equal, make_data, make_trainer

SIZE, BATCH, STEPS = 43, 8, 5
DATA = make_data(SIZE)
NUMBERS = {x.tobytes(): number for number, (x, _) in enumerate(DATA)}


class Epochs(Streamed):
    """Is told each epoch, and gives it in the place of the first of each datum's targets."""

    def __init__(self, data):
        super().__init__(data)
        self.told = []

    def set_epoch(self, epoch):
        self.told.append(epoch)

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return [x, np.array([self.told[-1], *y[1:]], np.float32)]


def seen(**options):
    """A trained trainer, and the indices of each batch that it has trained on."""
    batches = []

    def look(run, outputs, batch):
        batches.append([NUMBERS[x.tobytes()] for x, _ in batch])

    options = {"train_dataset": DATA, "shuffle": True, "plot_every": 1, "plot_pipe": look} | options
    trainer = make_trainer(**options)
    trainer.train()
    return trainer, batches


def expected(trainer, epochs=2):
    return [trainer.order(epoch)[BATCH * step :][:BATCH].tolist() for epoch in range(epochs) for step in range(STEPS)]


@pytest.fixture(scope="module")
def shuffled():
    return seen()


# ---- the order


@pytest.mark.parametrize("size", [1, 2, 3, 43, 64, 8191, 8193])
def test_an_order_has_each_index_once_and_is_another_one_in_each_epoch_and_for_each_seed(size):
    orders = [Order(size, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 2**20))]
    for order in orders:
        assert sorted(order[:].tolist()) == list(range(size)) == sorted(order)
    if size > 3:
        assert len({tuple(order) for order in orders}) == 4
    assert list(Order(size, 0, 1)) == list(orders[1])


def test_an_order_is_looked_at_like_a_sequence():
    order = Order(20_000, 0, 0)
    whole = order[:]
    assert (len(order), whole.dtype) == (20_000, np.int64)
    assert [order[0], order[-1], order[8192], order[5]] == [whole[0], whole[-1], whole[8192], whole[5]]
    assert order[19_990:30_000:3].tolist() == whole[19_990::3].tolist()
    assert repr(order) == "Order(20000 data, seed 0, epoch 0)"
    with pytest.raises(IndexError):
        order[20_000]


def test_all_orders_of_few_data_come_up_alike_often():
    counts = {}
    for epoch in range(1200):
        order = tuple(Order(3, 0, epoch)[:].tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 20.5  # chi squared, 1 in 1000


def test_neighbours_have_nothing_to_do_with_each_other():
    size = 1 << 15
    for epoch in range(4):
        order = Order(size, 0, epoch)[:]
        steps = np.diff(order)
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / np.sqrt(size)
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 4 / np.sqrt(size)
        assert np.count_nonzero(np.abs(steps) == 1) < 15  # two are expected
        halves = np.count_nonzero(order[: size // 2] < size // 2) - size // 4
        assert abs(halves) < 4 * np.sqrt(size) / 4
    both = Order(size, 0, 0)[:] == Order(size, 0, 1)[:]
    assert np.count_nonzero(both) < 10  # one is expected


def test_the_order_of_a_billion_data_takes_no_memory():
    tracemalloc.start()
    for size in (10**9, 10**14):
        order = Order(size, 0, 0)
        numbers = [order[size // 2], *order[size - 5 :].tolist()]
        assert len(set(numbers)) == 6
        assert all(0 <= number < size for number in numbers)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_devices_compute_the_order_that_the_host_does():
    for size in (3, 1000, 2**31):
        places = np.arange(min(size, 500), dtype=np.uint32)
        rounds = rounds_of(size, 5, 7)
        assert rounds.dtype == np.uint32
        on_device = jax.jit(lambda places, rounds, size=size: permuted(places, size, rounds, jnp))(places, rounds)
        assert np.asarray(on_device).tolist() == Order(size, 5, 7)[: len(places)].tolist()
    assert rounds_of(2**31 + 1, 5, 7).dtype == np.uint64


# ---- what is trained on


def test_each_epoch_has_its_own_order_over_all_data(shuffled):
    trainer, batches = shuffled
    assert batches == expected(trainer)
    assert sorted(trainer.order(0)) == list(range(SIZE))
    assert list(trainer.order(0)) != list(trainer.order(1))
    assert {number for batch in batches for number in batch} > set(range(40))  # those of a tail come up, too
    assert make_trainer().order(3) == range(SIZE)


@pytest.mark.parametrize("count", [2, 4])
def test_the_order_is_the_same_on_several_devices(count, shuffled):
    for options in ({}, {"train_dataset": Streamed(DATA)}, {"shard_state": True}):
        trainer, batches = seen(devices=jax.devices()[:count], **options)
        assert batches == shuffled[1]
        assert_trees_close(trainer.train_state, shuffled[0].train_state)


@pytest.mark.processes
def test_the_order_and_the_bits_are_the_same_however_data_are_read_and_dispatches_are_cut(shuffled):
    # A plot after each step cuts each dispatch; of these runs two are cut in no place.
    plain = {"plot_pipe": None}
    for options in ({"train_dataset": Streamed(DATA)}, {"train_dataset": Streamed(DATA), "num_workers": 2}, plain):
        trainer, batches = seen(**options)
        assert batches == ([] if options is plain else shuffled[1])
        assert trainer.metrics["train/loss"] == shuffled[0].metrics["train/loss"]
        assert_trees_equal(trainer.train_state, shuffled[0].train_state)


def test_a_list_is_stacked_once_and_gathered_in_the_one_program_that_trains(caplog):
    trainer = make_trainer(shuffle=True, num_epochs=3, val_datasets=[make_data(16)])
    blocks = []
    original = trainer.programs.train

    def train(live, seq, block, *cut):
        blocks.append(block)
        return original(live, seq, block, *cut)

    trainer.programs.train = train
    trainer.train()
    assert [program.kind for program in trainer.engine.programs.values()] == ["train", "evaluate"]
    assert len(blocks) == 3  # a dispatch an epoch
    for block in blocks:
        assert all(leaf is own for leaf, own in zip(block.host, blocks[0].host, strict=True))
        assert all(leaf is own for leaf, own in zip(block.device.rows, blocks[0].device.rows, strict=True))
        assert block.device.rows[0].shape == (SIZE, 8)
    assert not caplog.records
    text = str(trainer.loaders["train"])
    assert text == (
        "train: 43 data in 5 batches, in an order of each epoch's own, read by this process once, kept on each device "
        "and gathered there"
    )
    lazy = make_trainer(shuffle=True, train_dataset=Streamed(DATA)).loaders["train"]
    text = "train: 43 data in 5 batches, in an order of each epoch's own, read by this process in each pass"
    assert str(lazy) == text


def test_a_list_that_does_not_fit_the_devices_is_read_by_index(monkeypatch, shuffled):
    monkeypatch.setattr("learnax.parts.draft.RESIDENT_BYTES", SIZE * 44 - 1)
    trainer, batches = seen()
    assert batches == shuffled[1]
    assert "in each pass" in str(trainer.loaders["train"])
    assert_trees_equal(trainer.train_state, shuffled[0].train_state)


def test_accumulated_batches_come_in_order(shuffled):
    trainer, batches = seen(accumulate_steps=2)
    lazy, others = seen(accumulate_steps=2, train_dataset=Streamed(DATA))
    want = [batch for epoch in (0, 1) for batch in expected(trainer)[5 * epoch :][:4]]
    assert batches == others == want[1::2]  # a plot sees the last one of an update
    assert_trees_equal(trainer.train_state, lazy.train_state)


def test_random_keys_and_texts_are_gathered(shuffled):
    keys = jax.random.split(jax.random.key(0), SIZE)
    data = [[x, y, {"key": key, "name": "text"}] for (x, y), key in zip(DATA, keys, strict=True)]
    numbers = []

    def loss(output, datum):
        return output, jnp.mean((output - datum[1]) ** 2), {"bits": jax.random.uniform(datum[2]["key"])}

    class Wide(type(shuffled[0].model)):
        def __call__(self, x, y, rest):
            return super().__call__(x, y)

    for dataset in (data, Streamed(data)):
        trainer = make_trainer(model=Wide(), losses=loss, train_dataset=dataset, shuffle=True)
        trainer.train()
        numbers.append(trainer.metrics["train/bits"])
    assert numbers[0] == numbers[1]
    assert len(set(numbers[0])) == 10


def test_validation_data_keep_their_order():
    held_out = Streamed(make_data(20))
    make_trainer(shuffle=True, val_datasets=[held_out]).train()
    assert held_out.reads == [0, *range(20), *range(20)]


def test_a_single_batch_is_the_first_of_the_datasets_own_order():
    dataset = Streamed(DATA)
    trainer = make_trainer(train_dataset=dataset, shuffle=True, single_batch=True, num_epochs=1)
    trainer.train()
    assert dataset.reads == [0, *range(8)]


# ---- going on


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["list", "lazy", "workers"])
def test_a_run_that_was_stopped_in_mid_epoch_goes_on_with_the_rest_of_its_order(kind, shuffled):
    options = {
        "train_dataset": DATA if kind == "list" else Streamed(DATA),
        "num_workers": 2 if kind == "workers" else 0,
        "registry": "tests",
    }
    trainer = make_trainer(shuffle=True, save_every=7, **options)
    trainer.loop.session.save_stopped = lambda why: None
    trainer.hooks.saves.append(StopAt(8))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer, batches = seen(load_checkpoint=True, **options)
    assert batches == shuffled[1][7:]
    assert trainer.metrics["train/loss"] == shuffled[0].metrics["train/loss"]
    assert_trees_equal(trainer.train_state, shuffled[0].train_state)


def test_another_order_than_that_of_the_checkpoint_is_an_error():
    make_trainer(shuffle=True, registry="tests", num_epochs=1).train()
    lost = "From there, data would be trained on twice or not at all: use what was, or load_weights=True to begin anew"
    for change, text in (({"seed": 1}, "seed was 0 and is 1"), ({"shuffle": False}, "shuffle was True and is False")):
        options = {"shuffle": True, "registry": "tests", "load_checkpoint": True} | change
        with pytest.raises(ValueError, match=re.escape(f"was made by another script: {text}. {lost}")):
            make_trainer(**options)


def test_shuffle_is_no_text():
    with pytest.raises(TypeError, match=r"^shuffle must be True or False, but is the text 'no', which counts as True$"):
        make_trainer(shuffle="no")


# ---- datasets that are told


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_dataset_is_told_each_epoch_before_its_first_datum(shuffle):
    dataset, held_out = Epochs(DATA), Epochs(make_data(8))
    held_out.told.append(-1)
    seen_epochs = []
    trainer = make_trainer(
        train_dataset=dataset,
        val_datasets=[held_out],
        shuffle=shuffle,
        plot_every=1,
        plot_pipe=lambda run, outputs, batch: seen_epochs.append({y[0] for _, y in batch}),
    )
    assert dataset.told == [0]  # the first datum is looked at
    trainer.train()
    assert dataset.told == [0, 0, 1]
    assert seen_epochs == [{0}] * STEPS + [{1}] * STEPS
    assert held_out.told == [-1]  # validation data are the same each time


@pytest.mark.processes
@pytest.mark.parametrize("shuffle", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_each_worker_is_told_each_epoch(shuffle):
    seen_epochs = []
    options = {
        "train_dataset": Epochs(DATA),
        "shuffle": shuffle,
        "num_workers": 2,
        "registry": "tests",
        "plot_every": 1,
        "plot_pipe": lambda run, outputs, batch: seen_epochs.append({y[0] for _, y in batch}),
    }
    trainer = make_trainer(**options)
    trainer.hooks.saves.append(StopAt(8))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    make_trainer(load_checkpoint=True, **options).train()
    assert seen_epochs == [{0}] * STEPS + [{1}] * STEPS


@pytest.mark.processes
@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_cannot_take_an_epoch_is_said(workers):
    class Broken(Epochs):
        def set_epoch(self, epoch):
            super().set_epoch(epoch)
            if epoch == 1:
                raise LookupError("no such epoch")

    trainer = make_trainer(train_dataset=Broken(DATA), num_workers=workers)
    with pytest.raises(RuntimeError, match=r"^dataset 'train' raised in set_epoch\(1\): LookupError: no such epoch$"):
        trainer.train()
    assert len(trainer.metrics["train/loss"]) == STEPS
