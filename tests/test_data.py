"""Which data a run reads, when, and what it says of those it cannot use."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learnax.data import Loader
from learnax.data.reading import DatasetError
from learnax.loss import LossFunction
from tests.helpers import Streamed, assert_trees_equal, batches, host, make_data, make_trainer


class Failing(Streamed):
    """Raises at one index."""

    def __init__(self, data, at, error):
        super().__init__(data)
        self.at = at
        self.error = error

    def __getitem__(self, index):
        if index == self.at:
            raise self.error
        return super().__getitem__(index)


def make_loader(dataset, batch_size=4, tail=False):
    return Loader("set", dataset, batch_size, tail=tail, num_workers=0, put=jax.device_put)


def numbers(n):
    return [[np.float32(i)] for i in range(n)]


def exactly(text):
    return f"^{re.escape(text)}$"


def test_batches_are_in_the_order_of_the_dataset():
    loader = make_loader(numbers(12))
    assert len(loader) == 3
    for _ in range(2):
        assert [batch[0].tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_training_tail_is_skipped_and_not_read():
    dataset = Streamed(numbers(11))
    loader = make_loader(dataset)
    assert len(loader) == 2
    assert [batch.count for batch in batches(loader)] == [4, 4]
    assert dataset.reads == list(range(8))


def test_a_validation_tail_is_filled_up_with_its_last_datum():
    dataset = Streamed(numbers(10))
    loader = make_loader(dataset, tail=True)
    assert len(loader) == 3
    found = list(batches(loader))
    assert [batch.host[0].tolist() for batch in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    assert [batch.count for batch in found] == [4, 4, 2]
    assert len({batch.signature for batch in found}) == 1
    assert dataset.reads == list(range(10))


def test_a_validation_set_may_be_smaller_than_a_batch():
    (batch,) = batches(make_loader(numbers(1), tail=True))
    assert batch.host[0].tolist() == [0, 0, 0, 0]
    assert batch.count == 1


def test_a_pass_may_start_at_any_batch():
    dataset = Streamed(numbers(12))
    loader = make_loader(dataset)
    assert [batch.host[0].tolist() for batch in batches(loader, 2)] == [[8, 9, 10, 11]]
    assert list(batches(loader, 3)) == []
    assert dataset.reads == [8, 9, 10, 11]


def test_host_and_device_hold_the_same_data():
    loader = make_loader([[np.float64(i), i, f"datum {i}"] for i in range(4)])
    (batch,) = loader.blocks()
    assert [getattr(leaf, "dtype", None) for leaf in batch.host] == [np.float32, np.int32, None]
    assert all(isinstance(leaf, jax.Array) for leaf in batch.device[:2])
    assert batch.device[2] is None
    assert_trees_equal(batch.host, batch.device)


def test_a_datum_that_is_no_list_is_one_argument():
    for datum in ({"x": 1.0}, (1.0, 2.0), np.ones(3)):
        (batch,) = make_loader([datum] * 4)
        assert isinstance(batch, list)
        assert len(batch) == 1
        assert type(batch[0]) is type(datum)


def test_random_keys_are_data():
    (batch,) = make_loader([[key] for key in jax.random.split(jax.random.key(0), 4)])
    assert (
        jax.random.key_data(batch[0]).tolist() == jax.random.key_data(jax.random.split(jax.random.key(0), 4)).tolist()
    )


def test_the_first_batch_and_the_first_datum_are_read_alone():
    dataset = Streamed(numbers(12))
    loader = make_loader(dataset)
    assert loader.first(repeat_datum=False)[0].tolist() == [0, 1, 2, 3]
    assert loader.first(repeat_datum=True)[0].tolist() == [0, 0, 0, 0]
    assert dataset.reads == [0, 1, 2, 3, 0]


def test_a_run_reads_full_training_batches_and_all_of_the_validation_data():
    dataset, held_out = Streamed(make_data(19)), Streamed(make_data(10))
    trainer = make_trainer(train_dataset=dataset, val_datasets=[held_out])
    assert dataset.reads == held_out.reads == [0]  # what the model is checked and initialised on
    trainer.train()
    assert dataset.reads == [0] + 2 * list(range(16))
    assert held_out.reads == [0] + 2 * list(range(10))


def test_a_dataset_of_its_own_class_trains_like_a_list():
    trainers = [make_trainer(train_dataset=dataset) for dataset in (make_data(24), Streamed(make_data(24)))]
    for trainer in trainers:
        trainer.train()
    assert trainers[0].metrics["train/loss"] == trainers[1].metrics["train/loss"]


@pytest.mark.parametrize(
    ("argument", "constant", "reads"),
    [
        ("single_batch", lambda data: data[:8] * 1000, [0, *range(8)]),
        ("single_datum", lambda data: data[:1] * 8000, [0, 0]),
    ],
)
def test_a_single_batch_or_datum_is_a_training_on_constant_data(argument, constant, reads):
    dataset, held_out = Streamed(make_data(43)), Streamed(make_data(8))
    single = make_trainer(train_dataset=dataset, val_datasets=[held_out], num_epochs=1, **{argument: True})
    single.train()
    assert dataset.reads == reads
    assert held_out.reads == []
    assert len(single.metrics["train/loss"]) == 1000
    plain = make_trainer(train_dataset=constant(make_data(43)), num_epochs=1)
    plain.train()
    assert single.metrics["train/loss"] == plain.metrics["train/loss"]
    assert_trees_equal(single.train_state, plain.train_state)


def test_a_single_batch_stays_the_same_over_epochs():
    dataset = Streamed(make_data(8))
    trainer = make_trainer(train_dataset=dataset, num_epochs=2, single_batch=True, num_workers=2)
    trainer.train()
    assert dataset.reads == [0, *range(8)]
    assert len(trainer.metrics["train/loss"]) == 2000


class Long(LossFunction):
    """Adds nothing to the loss, in many times the time that a datum is read in."""

    def _call(self, output, batch):
        start = jnp.full((200, 200), jax.lax.stop_gradient(output[0]))
        nothing = 0 * jax.lax.fori_loop(0, 400, lambda _, x: jnp.tanh(x @ x), start).sum()
        return output, jnp.mean((output - batch[1]) ** 2) + nothing, {}


@pytest.mark.thorough
def test_the_next_batch_is_read_while_the_step_runs():
    running = []

    class Watching(Streamed):
        def __getitem__(self, index):
            if trainer is not None and index % 8 == 0:
                running.append(not jax.tree.leaves(trainer.parts.progress.live)[0].is_ready())
            return super().__getitem__(index)

    trainer = None
    trainer = make_trainer(train_dataset=Watching(make_data(40)), losses=Long(), num_epochs=1, steps_per_execution=1)
    trainer.train()
    assert len(running) == 5
    assert any(running[1:])


def test_a_batch_is_read_after_the_step_before_it_was_dispatched_and_metrics_come_late(monkeypatch):
    monkeypatch.setattr("learnax.log.log._BULK", 1)
    monkeypatch.setattr("learnax.log.pace._MOST", 2)  # no further ahead
    history = []

    class Watching(Streamed):
        def __getitem__(self, index):
            if index % 8 == 0 and trainer is not None:
                calls = sum(program.calls for program in trainer.engine.programs.values())
                history.append((index // 8, calls, len(trainer.metrics.get("train/loss", []))))
            return super().__getitem__(index)

    trainer = None
    trainer = make_trainer(train_dataset=Watching(make_data(64)), num_epochs=1, steps_per_execution=1)
    trainer.train()
    assert trainer.engine.in_flight == 2
    # Batch k is read with k steps dispatched; of them the newest three may be unread.
    assert history == [(k, k, max(0, k - 3)) for k in range(8)]


LIST_HINT = ": write list(...) around it, or learnax.data.Stream(...) to have the data read as they come"


@pytest.mark.parametrize(
    ("dataset", "kind", "hint"),
    [
        (
            iter([]),
            "list_iterator",
            LIST_HINT,
        ),
        ({1, 2}, "set", LIST_HINT),
        (7, "int", ""),
        (None, "NoneType", ""),
    ],
)
def test_what_is_no_dataset_is_said_when_the_trainer_is_built(dataset, kind, hint):
    text = f"must have __len__ and __getitem__, but is {kind}; a list of data is the simplest{hint}"
    with pytest.raises(TypeError, match=exactly(f"dataset 'train' {text}")):
        make_trainer(train_dataset=dataset)
    with pytest.raises(TypeError, match=exactly(f"dataset 'near' {text}")):
        make_trainer(val_datasets={"near": dataset})


def test_an_empty_dataset_is_said_when_the_trainer_is_built():
    with pytest.raises(ValueError, match=exactly("dataset 'train' is empty; expected at least 8 data")):
        make_trainer(train_dataset=[])
    with pytest.raises(ValueError, match=exactly("dataset 'val_1' is empty; expected at least 1 data")):
        make_trainer(val_datasets=[make_data(3), []])


def test_a_training_set_without_a_full_batch_is_said_when_the_trainer_is_built():
    text = "dataset 'train' has 7 data, fewer than one batch of 8: every batch would be skipped; use batch_size <= 7"
    with pytest.raises(ValueError, match=exactly(text)):
        make_trainer(train_dataset=make_data(7))
    make_trainer(val_datasets=[make_data(7)])


def test_a_dataset_that_raises_at_once_is_said_when_the_trainer_is_built():
    with pytest.raises(DatasetError, match=exactly("dataset 'val' raised at index 0: KeyError: 'missing'")) as caught:
        make_trainer(val_datasets=[Failing(make_data(8), 0, KeyError("missing"))])
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("error", [IndexError("too far"), StopIteration("done"), OSError(5, "bad disk")])
def test_a_dataset_that_raises_later_is_said_with_its_index_and_its_error(error):
    trainer = make_trainer(train_dataset=Failing(make_data(40), 21, error))
    text = f"dataset 'train' raised at index 21: {type(error).__name__}: {error}"
    with pytest.raises(DatasetError, match=exactly(text)) as caught:
        trainer.train()
    assert caught.value.__cause__ is error
    assert len(trainer.metrics["train/loss"]) == 2  # the steps before it are done and written


def test_data_of_two_shapes_in_a_batch_are_said_with_path_indices_and_shapes():
    data = make_data(16)
    data[13][1] = np.zeros(5, np.float32)
    text = "leaf [1] differs within a batch: datum 8 has shape (3,), datum 13 has shape (5,); pad the data to one shape"
    with pytest.raises(ValueError, match=exactly(f"dataset 'train': {text}")):
        make_trainer(train_dataset=data).train()
    with pytest.raises(ValueError, match=exactly(f"dataset 'val': {text}")):
        make_trainer(val_datasets=[data]).train()


def test_data_of_two_structures_in_a_batch_are_said():
    data = make_data(16)
    data[9] = data[9][:1]
    text = (
        "dataset 'train': data differ in structure within a batch:\n"
        " datum 8: PyTreeDef([*, *])\n  [0]: float32[8]\n  [1]: float32[3]\n"
        " datum 9: PyTreeDef([*])\n  [0]: float32[8]"
    )
    with pytest.raises(ValueError, match=exactly(text)):
        make_trainer(train_dataset=data).train()


def test_a_run_goes_on_after_a_dataset_was_mended():
    dataset = Failing(make_data(40), 21, OSError("bad disk"))
    trainer = make_trainer(train_dataset=dataset)
    with pytest.raises(DatasetError):
        trainer.train()
    dataset.at = None
    trainer.train()
    plain = make_trainer(train_dataset=make_data(40))
    plain.train()
    assert trainer.metrics["train/loss"] == plain.metrics["train/loss"]
    assert_trees_equal(host(trainer.train_state), plain.train_state)
