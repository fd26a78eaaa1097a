"""Whose memory data are in, which are read how often, and what ends the reading."""

import logging
import random
import re
import signal
import types
from typing import NamedTuple

import jax
import numpy as np
import pytest

from learnax.cluster.stops import TimeUpError
from learnax.data import Loader, Repeated, first_datum, stack_on_host
from learnax.data.at_once import stacked_at_once
from learnax.data.randomness import find_generator, tell_of_generators
from learnax.data.reading import DatasetError
from tests.helpers import MLP, Streamed, assert_trees_equal, host, make_data, make_trainer


class Buffered:
    """Gives the same memory again and again."""

    def __init__(self, n, datum):
        self._n, self._datum = n, datum

    def __len__(self):
        return self._n

    def __getitem__(self, index):
        for leaf in jax.tree.leaves(self._datum):
            leaf[...] = index
        return self._datum


def make_loader(dataset, batch_size=4, **options):
    return Loader("set", dataset, batch_size, **({"tail": False, "num_workers": 0, "put": jax.device_put} | options))


# ---- one buffer


@pytest.mark.parametrize(
    "datum",
    [np.zeros(3, np.float32), [np.zeros(2), {"x": np.zeros((), np.int64)}], (np.zeros(2, np.float16),)],
    ids=["array", "tree", "tuple"],
)
def test_one_buffer_again_and_again_gives_each_datum(datum):
    loader = make_loader(Buffered(6, datum), tail=True, room=2)
    (block,) = loader.blocks()
    for leaf in (*jax.tree.leaves(block.host), *jax.tree.leaves(block.device)):
        rows = np.asarray(leaf).reshape(8, -1)
        assert rows[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 5, 5]
    assert [jax.tree.leaves(batch)[0].reshape(4, -1)[:, 0].tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 5, 5]]
    first = first_datum("set", Buffered(6, datum))
    datum_again = jax.tree.leaves(datum)[0]
    datum_again[...] = 9
    assert np.max(jax.tree.leaves(first.arguments)[0]) == 0


def test_a_list_that_holds_one_buffer_is_read_as_it_is_and_kept():
    buffer = np.zeros(2, np.float32)
    loader = make_loader([[buffer]] * 4, budget=1 << 20)
    (block,) = loader.blocks()
    buffer += 1
    (again,) = loader.blocks()
    assert np.asarray(again.device[0]).max() == np.asarray(block.device[0]).max() == 0


@pytest.mark.parametrize("datum", [False, True])
def test_one_buffer_is_one_batch_repeated(datum):
    buffered = Buffered(8, [np.zeros(1, np.float32)])
    repeated = Repeated(make_loader(buffered), 3, datum=datum, put=jax.device_put)
    for batch in repeated:
        assert batch[0][:, 0].tolist() == ([0] * 4 if datum else [0, 1, 2, 3])


# ---- whose memory


def wide_data(n=24):
    """Data whose batches a CPU device takes over as they are."""
    rng = np.random.default_rng(0)
    return [[rng.random(256).astype(np.float32), rng.normal(size=3).astype(np.float32)] for _ in range(n)]


def spoil(tree):
    for leaf in jax.tree.leaves(tree):
        leaf[...] = 7


@pytest.fixture(scope="module", params=[1, 4])
def some_devices(request):
    return jax.devices()[: request.param]


@pytest.fixture(scope="module")
def left_alone(some_devices):
    trainer = make_trainer(train_dataset=wide_data(), devices=some_devices, steps_per_execution=1)
    trainer.train()
    return trainer


def sampled(params, key, datum):
    return datum[0].sum() + params["Dense_0"]["bias"].sum()


def test_what_user_code_does_to_its_data_changes_no_bit(some_devices, left_alone):
    seen = []
    over = {"Dense_0": {"bias": np.zeros(16, np.float32)}}

    def metrics(sample, datum):
        spoil(datum)
        return {"sample": sample}

    trainer = make_trainer(
        train_dataset=wide_data(),
        devices=some_devices,
        steps_per_execution=1,
        plot_every=1,
        plot_pipe=lambda run, outputs, batch: spoil((outputs, batch)),
        sample_every=1,
        sample_model=sampled,
        sample_metrics=metrics,
        sample_plot=lambda run, samples, _: seen.extend(np.array(samples)),
        sample_params=over,
    )
    spoil(over)
    trainer.train()
    assert trainer.metrics["train/loss"] == left_alone.metrics["train/loss"]
    assert_trees_equal(trainer.train_state, left_alone.train_state)
    sums = [x.sum() for start in (0, 8, 16) for x, _ in wide_data()[start : start + 8]]
    np.testing.assert_allclose(seen, sums * 2, rtol=1e-5)  # neither the spoilt data nor the spoilt parameters


def test_what_is_done_to_the_batches_of_a_loader_changes_no_bit(some_devices, left_alone):
    trainer = make_trainer(train_dataset=wide_data(), devices=some_devices, steps_per_execution=1)
    for _ in range(2):
        for batch in trainer.loaders["train"]:
            spoil(batch)
    trainer.train()
    assert_trees_equal(trainer.train_state, left_alone.train_state)


@pytest.mark.parametrize("form", ["stacked", "by device", "list"])
def test_a_batch_by_hand_may_be_changed_at_once(form, some_devices):
    trainer = make_trainer(train_dataset=wide_data(), devices=some_devices)
    count = len(some_devices)

    def batch():
        data = wide_data(8)
        if form == "list":
            return data
        stacked = [np.stack(leaves) for leaves in zip(*data, strict=True)]
        return stacked if form == "stacked" else [x.reshape(count, 8 // count, -1) for x in stacked]

    results = []
    for change in (False, True):
        mine, key = batch(), np.array(jax.random.key_data(jax.random.key(3)))
        outputs, state, _ = trainer.update(key, trainer.train_state, mine)
        if change:
            spoil((mine, key))
        results.append(host((outputs, state)))
    assert_trees_equal(*results)


# ---- how long a dataset may be


class Endless:
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return [np.full(8, index % 5, np.float32), np.zeros(3, np.float32)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_grows_with_the_length_of_a_dataset(num_workers):
    import tracemalloc

    tracemalloc.start()
    loader = make_loader(Endless(10**15 + 1), num_workers=num_workers, tail=True, share=(1, 3), room=2)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert len(loader) == 25 * 10**13 + 1
    if num_workers:
        return
    (last,) = loader.blocks(len(loader) - 1)
    assert last.size == 1  # the share is all padding
    block = next(loader.blocks(10**14))
    assert block.size == 8
    assert block.host[0][..., 0].tolist() == [[1, 2], [0, 1]]  # rows 1 and 2 of data 4e14 to 4e14 + 7, modulo 5


def test_a_trainer_takes_a_long_dataset():
    class Interrupted(Endless):
        def __getitem__(self, index):
            if index == 20:
                signal.raise_signal(signal.SIGINT)
            return super().__getitem__(index)

    options = {"val_datasets": [Endless(10**9)], "num_epochs": 1, "steps_per_execution": 1}
    trainer = make_trainer(train_dataset=Interrupted(10**12), **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.log.step == trainer.position.batch == 2


# ---- stops while data are read


def numbers(n):
    return [[np.full(8, i, np.float32), np.zeros(3, np.float32)] for i in range(n)]


class ToldError(Exception):
    pass


@pytest.mark.parametrize("kind", [TimeUpError, KeyboardInterrupt, SystemExit, ToldError])
def test_a_stop_is_heeded_before_the_next_datum_and_what_is_half_read_is_dropped(kind):
    dataset = Streamed(numbers(16))

    def heed():
        if len(dataset.reads) == 6:
            raise kind

    loader = make_loader(dataset, heed=heed, room=4)
    with pytest.raises(kind):
        list(loader.blocks())
    assert dataset.reads == list(range(6))
    dataset.reads += [None]
    (block,) = loader.blocks()
    assert block.size == 16


def test_a_stop_is_heeded_in_the_first_pass_of_a_list_and_in_a_first_batch():
    asked = []

    def heed():
        asked.append(1)
        if len(asked) == 2:
            raise ToldError

    loader = make_loader(numbers(8), heed=heed, budget=1 << 20)
    with pytest.raises(ToldError):
        list(loader.blocks())
    assert not loader._resident
    assert len(list(loader.blocks())) == 2
    assert len(asked) == 4  # once for each block, which is stacked at once
    list(loader.blocks())  # it stays on the devices: nothing is read
    assert len(asked) == 4
    asked.clear()
    with pytest.raises(ToldError):
        loader.first(repeat_datum=False)


class Signalling(list):
    """Sends a signal once, while it is read."""

    at = None

    def __getitem__(self, index):
        if index == self.at:
            self.at = None
            signal.raise_signal(signal.SIGINT)
        return super().__getitem__(index)


@pytest.mark.thorough
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_signal_while_data_are_read_stops_a_fused_run_which_goes_on_bit_for_bit(split):
    options = {"num_epochs": 2, "steps_per_execution": 16}
    plain = make_trainer(val_datasets=[make_data(20, seed=1)], **options)
    plain.train()
    data = {"train": Streamed(Signalling(make_data(43))), "val": Streamed(Signalling(make_data(20, seed=1)))}
    data[split].data.at = 11
    trainer = make_trainer(train_dataset=data["train"], val_datasets={"val": data["val"]}, **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert data[split].reads[-1] == 11
    assert trainer.position.batch == trainer.log.step == {"train": 0, "val": 5}[split]
    trainer.train()
    assert trainer.metrics["train/loss"] == plain.metrics["train/loss"]
    assert trainer.metrics["val/loss"] == plain.metrics["val/loss"]
    assert_trees_equal(trainer.train_state, plain.train_state)


def test_a_limit_that_is_over_stops_no_reading_outside_of_the_run():
    trainer = make_trainer(max_seconds=1e-6)
    trainer.train()
    assert trainer.log.step == 0
    assert len(list(trainer.loaders["train"])) == 5


# ---- generators


class Wrapping:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def __len__(self):
        return 43

    def __getitem__(self, index):
        return make_data(1)[0]


class OfTheClass(Wrapping):
    rng = np.random.default_rng(0)


class TorchGenerator:
    def manual_seed(self, seed):
        pass

    def initial_seed(self):
        return 0


@pytest.mark.parametrize(
    ("dataset", "attribute"),
    [
        (Wrapping(rng=np.random.default_rng(0)), "rng"),
        (Wrapping(_state=np.random.RandomState(0)), "_state"),
        (Wrapping(inner=Wrapping(python=random.Random(0))), "inner.python"),
        (Wrapping(transforms=[len, Wrapping(generator=TorchGenerator())]), "transforms[1].generator"),
        (Wrapping(by={"name": np.random.default_rng(0)}), "by['name']"),
        (OfTheClass(), "rng"),
        (Wrapping(data=make_data(3), modules=(np.random, random, types), function=np.random.default_rng), None),
        (make_data(3), None),
    ],
)
def test_a_generator_is_found_where_it_is(dataset, attribute):
    assert find_generator(dataset) == attribute


def test_the_search_for_generators_has_an_end():
    wide = [[] for _ in range(10_000)]
    many = Wrapping(wide=wide, last=[np.random.default_rng(0)])
    many.itself = many
    assert find_generator(many) == "last[0]"
    many.last = [*wide, np.random.default_rng(0)]  # behind thousands that are not looked at
    assert find_generator(many) is None


def test_a_dataset_with_a_generator_is_told_of_once(caplog, monkeypatch):
    monkeypatch.setattr("learnax.data.randomness._told", set())
    dataset = Wrapping(transform=Wrapping(rng=np.random.default_rng(0)))
    with caplog.at_level(logging.WARNING, "learnax"):
        make_trainer(train_dataset=dataset, num_workers=2)
        make_trainer(train_dataset=dataset)
        make_trainer(train_dataset=dataset, single_batch=True)
    assert caplog.messages == [
        "dataset 'train' has a random generator, its attribute 'transform.rng': where __getitem__ draws from it, a "
        "resumed run sees other data than one that was not stopped, and the data depend on num_workers, for each "
        "worker process has a copy of its own. Make what is random a function of the index: "
        "np.random.default_rng((seed, index))"
    ]
    tell_of_generators("val", make_data(3))
    assert len(caplog.messages) == 1


def test_a_number_that_does_not_fit_names_the_dataset():
    data = make_data(16)
    data[9].append(2**40)
    data = [[*datum[:2], datum[2] if len(datum) > 2 else 1] for datum in data]
    text = (
        "dataset 'train': leaf [2] of datum 9 has 1099511627776, which does not fit into int32; enable jax_enable_x64, "
        "or give smaller numbers, or two parts of it"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        make_trainer(model=Three(), train_dataset=data).train()


class Three(MLP):
    def __call__(self, x, y=None, number=None):
        return super().__call__(x, y)


# ---- lists, which are stacked at once


class Point(NamedTuple):
    x: np.ndarray
    name: str


USUAL = {
    "arrays": [np.full((2, 3), i, np.float32) for i in range(5)],
    "wide": [np.full(2, i, np.float64) for i in range(5)],
    "the other way round": [np.full(2, i, ">f4") for i in range(5)],
    "one array": np.arange(30, dtype=np.float64).reshape(5, 2, 3),
    "one array of numbers": np.arange(5),
    "a mapped one": np.arange(10, dtype=">i2").reshape(5, 2).view(np.memmap),
    "no axes": [np.array(i) for i in range(5)],
    "lists": [[np.full(2, i), float(i), i] for i in range(5)],
    "trees": [{"x": (np.full(2, i), None), "y": np.float32(i), "name": str(i), "on": i > 2} for i in range(5)],
    "named": [Point(np.full(2, i), "name" if i else None) for i in range(5)],
}
UNUSUAL = {
    "two shapes": [np.zeros(2), np.zeros(3)],
    "shapes that broadcast": [np.zeros((2, 1)), np.zeros((2, 3))],
    "an axis more": [np.zeros(2), np.zeros((2, 1))],
    "empty": [np.zeros((0, 3)), np.zeros((0, 4))],
    "two types": [np.zeros(2, np.int32), np.zeros(2, np.float32)],
    "numbers of two types": [1, 2.0],
    "too large for 64 bits": [1 << 70, 1],
    "too large for 32 bits": [1 << 40, 1],
    "too large a float": [1e300, 1.0],
    "one array, too large": np.array([1 << 40, 1]),
    "one array of records": np.zeros(2, [("x", np.float32)]),
    "objects": [np.array([None]), np.array([None])],
    "text in arrays": [np.array(["a"]), np.array(["b"])],
    "of jax": [jax.numpy.zeros(2), jax.numpy.zeros(2)],
    "two structures": [{"x": 1}, {"y": 1}],
    "a list and none": [[np.zeros(2)], np.zeros(2)],
    "lists of two lengths": [[1, 2], [1]],
    "text and a number": ["a", 1],
    "text alone, of one of them": [None, np.zeros(2)],
    "half precision of another library": [np.zeros(2, jax.numpy.bfloat16)] * 2,
    "masked": [np.ma.array([1.0, 2.0], mask=[True, False])] * 2,
    "mapped": [np.zeros(2).view(np.memmap)] * 2,
}


@pytest.mark.parametrize("kind", USUAL)
@pytest.mark.parametrize("room", [(1, 5), (2, 4)])
def test_usual_data_are_stacked_at_once_as_one_by_one(kind, room):
    data = USUAL[kind]
    at_once, one_by_one = stacked_at_once(data, room), stack_on_host(data, range(5), room[0] * room[1])
    one_by_one = jax.tree.map(lambda leaf: leaf.reshape(*room, *leaf.shape[1:]), one_by_one)
    assert jax.tree.structure(at_once) == jax.tree.structure(one_by_one)
    for left, right in zip(jax.tree.leaves(at_once), jax.tree.leaves(one_by_one), strict=True):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert left.dtype.isnative
        np.testing.assert_array_equal(left, right)
        assert not any(np.shares_memory(left, leaf) for leaf in jax.tree.leaves(data) if isinstance(leaf, np.ndarray))


@pytest.mark.parametrize("kind", UNUSUAL)
def test_data_that_are_not_usual_are_left_to_be_stacked_one_by_one(kind):
    assert stacked_at_once(UNUSUAL[kind], (1, 2)) is None


def test_a_list_goes_on_one_by_one_from_where_it_is_not_usual():
    """Blocks are cut where shapes change, and what comes before bad data is given before the error."""
    data = [np.zeros(2, np.float32)] * 9 + [np.zeros(3, np.float32)] * 4
    for dataset in (data, Streamed(data)):
        blocks = list(make_loader(dataset, batch_size=1, room=4, tail=True).blocks())
        assert [(block.size, block.host[0].shape) for block in blocks] == [
            (4, (4, 1, 2)),
            (4, (4, 1, 2)),
            (1, (4, 1, 2)),
            (4, (4, 1, 3)),
        ]
    blocks = make_loader([*data[:6], np.array([None])], batch_size=2, room=2, tail=True).blocks()
    assert [next(blocks).size for _ in range(2)] == [4, 2]
    with pytest.raises(TypeError, match=r"dataset 'set': leaf \[0\] of datum 6 is .* dtype object"):
        next(blocks)
    short = make_loader(data[:8], batch_size=2, room=2)
    short.dataset.pop()
    blocks = short.blocks()
    assert [next(blocks).size for _ in range(2)] == [4, 2]
    with pytest.raises(DatasetError, match="raised at index 7: IndexError"):
        next(blocks)
