"""Streams and ready-made batches: the runs of a list, gone on with from where they stood."""

import itertools
import re

import grain
import jax
import numpy as np
import pytest

from learnax.data import Batches, Stream
from learnax.data.plain import from_plain, to_plain
from learnax.data.reading import DatasetError
from tests.helpers import StopAt, assert_trees_equal, make_data, make_trainer

DATA = make_data(43)
HELD_OUT = make_data(21, seed=1)


class Counted:
    """Yields data, from the beginning each time, and counts them."""

    def __init__(self, data):
        self.data, self.yielded = data, []

    def __iter__(self):
        for number, datum in enumerate(self.data):
            self.yielded.append(number)
            yield datum


class Told(Counted):
    """Tells where it stands, and is told the epoch, as datasets of Hugging Face are."""

    def __init__(self, data):
        super().__init__(data)
        self.at, self.epochs = 0, []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def state_dict(self):
        return {"at": np.int64(self.at), "more": [(1, b"x"), {2: None}]}

    def load_state_dict(self, state):
        assert state["more"] == [(1, b"x"), {2: None}]
        self.at = int(state["at"])

    def __iter__(self):
        for number in range(self.at, len(self.data)):
            self.at = number + 1
            self.yielded.append(number)
            yield self.data[number]
        self.at = 0


def of_grain(data=DATA, repeat=False):
    dataset = grain.MapDataset.source([tuple(datum) for datum in data]).map(list)
    return (dataset.repeat() if repeat else dataset).to_iter_dataset()


def collated(data):
    return [np.stack([datum[place] for datum in data]) for place in (0, 1)]


def in_batches(data=DATA, size=8):
    return [collated(data[start : start + size]) for start in range(0, len(data), size)]


SOURCES = {
    "generators": lambda: Stream(lambda: iter(DATA)),
    "told": lambda: Stream(Told(DATA)),
    "grain": lambda: Stream(of_grain()),
    "batches": lambda: Batches(in_batches()),
    "grain batches": lambda: Batches(of_grain().batch(8, batch_fn=collated)),
    "goes on": lambda: Stream(lambda: itertools.cycle(DATA[:40]), steps_per_epoch=5, resume="replay"),
    "grain goes on": lambda: Stream(iter(of_grain(DATA[:40], repeat=True)), steps_per_epoch=5),
}
"""Each yields the batches of a list of the same data."""


def make(source, **options):
    dataset = SOURCES[source]() if isinstance(source, str) else source
    return make_trainer(**{"train_dataset": dataset, "val_datasets": [HELD_OUT]} | options)


def same_run(left, right):
    names = [name for name in left.metrics if "update_time" not in name]
    assert names == [name for name in right.metrics if "update_time" not in name]
    assert {name: left.metrics[name] for name in names} == {name: right.metrics[name] for name in names}
    assert_trees_equal(left.train_state, right.train_state)


@pytest.fixture(scope="module")
def of_list():
    trainer = make(DATA)
    trainer.train()
    return trainer


# ---- the same runs


@pytest.mark.parametrize("source", SOURCES)
def test_a_stream_trains_like_a_list_of_its_data(source, of_list):
    trainer = make(source)
    trainer.train()
    same_run(trainer, of_list)
    assert [program.kind for program in trainer.engine.programs.values()] == ["train", "evaluate"]


def test_validation_counts_each_datum_of_a_stream_once(of_list):
    for held_out in (Stream(of_grain(HELD_OUT)), Batches(in_batches(HELD_OUT)), Stream(iter(of_grain(HELD_OUT)))):
        trainer = make(DATA, val_datasets=[held_out])
        trainer.train()
        assert trainer.metrics["val/loss"] == of_list.metrics["val/loss"]
    limited = make(DATA, val_datasets=[Stream(lambda: itertools.cycle(HELD_OUT))], val_steps=2)
    limited.train()
    cut = make(DATA, val_datasets=[HELD_OUT[:16]])
    cut.train()
    assert limited.metrics["val/loss"] == cut.metrics["val/loss"]


@pytest.mark.parametrize("source", ["grain", "batches"])
def test_streams_are_spread_over_devices_and_go_on_there(source):
    options = {"devices": jax.devices()[:4], "accumulate_steps": 2}
    other = make(DATA, **options)
    other.train()
    trainer = make(source, registry="r", save_every=3, **options)
    trainer.loop.session.save_stopped = lambda why: None
    trainer.hooks.saves.append(StopAt(3))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    dataset = SOURCES[source]()
    dataset.resume = None if source == "grain" else "replay"
    trainer = make(dataset, registry="r", load_checkpoint=True, **options)
    trainer.train()
    same_run(trainer, other)


@pytest.mark.processes
def test_a_stream_that_grain_reads_in_processes_goes_on_where_it_stood(of_list):
    def read():
        return Stream(of_grain().mp_prefetch(grain.MultiprocessingOptions(num_workers=2)))

    make(read(), registry="r", num_epochs=None, num_steps=7).train()
    trainer = make(read(), registry="r", load_checkpoint=True)
    trainer.train()
    assert trainer.metrics["train/loss"] == of_list.metrics["train/loss"]
    assert_trees_equal(trainer.train_state, of_list.train_state)


def test_a_stream_without_epochs_is_trained_on_for_so_many_steps(of_list):
    source = Counted([*DATA[:40], *DATA[:40]])
    endless = Stream(lambda: itertools.cycle(source))
    trainer = make(endless, num_epochs=None, num_steps=10, steps_per_execution=4)
    trainer.train()
    assert trainer.metrics["train/loss"] == of_list.metrics["train/loss"]
    assert len(trainer.metrics["val/loss"]) == 1
    assert source.yielded == list(range(80))  # no datum beyond the last step's
    short = make(Stream(Counted(DATA)), num_epochs=None, num_steps=10)
    short.train()  # of as many epochs as it takes
    assert short.metrics["train/loss"] == of_list.metrics["train/loss"]


def test_a_source_is_told_each_epoch():
    source = Told(DATA)
    make(Stream(source), val_datasets=None).train()
    assert source.epochs == [0, 1]


def test_a_single_batch_of_a_stream_is_its_first():
    for source in (Stream(Counted(DATA)), Batches(in_batches())):
        for option in ("single_batch", "single_datum"):
            loaders = [make(one, **{option: True}).loaders["train"] for one in (source, DATA)]
            first, other = (next(iter(loader)) for loader in loaders)
            assert_trees_equal(first, other)


def test_a_preflight_takes_nothing_from_the_stream(of_list):
    for source in ("grain", "goes on", "batches"):
        trainer = make(source, steps_per_execution=2)
        assert ("\nan epoch" in str(trainer.preflight())) == (source == "goes on")
        trainer.train()
        assert trainer.metrics["train/loss"] == of_list.metrics["train/loss"]


def test_loaders_say_where_they_read():
    loaders = make("goes on", val_datasets=[Batches(in_batches())]).loaders
    here = "read by this process in each pass"
    text = "train: batches of 8 data as they come, 5 of them in a pass, from a Stream of function"
    assert str(loaders["train"]) == f"{text}, {here}"
    assert str(loaders["val"]) == f"val: batches as they come, from a Batches of list, {here}"


# ---- going on


@pytest.mark.parametrize(
    ("source", "step", "again"),
    [
        *((source, 8, "a new trainer") for source in SOURCES),
        *(
            pytest.param(source, 5, "a new trainer", marks=pytest.mark.soak)
            for source in ("grain", "goes on", "grain goes on")
        ),
        *((source, 8, "the same trainer") for source in ("generators", "grain goes on")),
    ],
)
def test_a_run_that_was_stopped_goes_on_where_its_stream_stood(source, step, again, of_list, caplog):
    tells = source in ("told", "grain", "grain batches", "grain goes on")
    trainer = make(source, registry="r", save_every=step - 1)
    trainer.loop.session.save_stopped = lambda why: None
    trainer.hooks.saves.append(StopAt(step))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    if again == "a new trainer":
        dataset = SOURCES[source]()
        if not tells and source != "goes on":
            with pytest.raises(ValueError, match="does not tell where it stands"):
                make(dataset, registry="r", load_checkpoint=True)
            dataset.resume = "replay"
        trainer = make(dataset, registry="r", load_checkpoint=True)
    trainer.train()
    same_run(trainer, of_list)
    replayed = again == "a new trainer" and not tells
    assert ("that the run has seen were read again and skipped, in" in caplog.text) == replayed


def test_what_was_seen_is_not_read_again():
    for step, want in ((7, [0, *range(16, 43)]), (5, [0, 40, 41, 42, *range(43)])):  # its first datum is looked at
        trainer = make(Stream(Told(DATA)), registry=f"r{step}", num_epochs=None, num_steps=step)
        trainer.train()
        source = Told(DATA)
        make(Stream(source), registry=f"r{step}", load_checkpoint=True).train()
        assert source.yielded == want


def test_a_stream_that_does_not_tell_where_it_stands_is_said_with_what_to_do():
    make(Stream(Counted(DATA)), registry="r", num_epochs=None, num_steps=7).train()
    text = (
        "dataset 'train' cannot go on before batch 2 of epoch 1: its Stream of Counted does not tell where it stands "
        "(get_state and set_state, or state_dict and load_state_dict), and the checkpoint does not say. Stream(..., "
        "resume='replay') reads again what was seen, and skips it; load_weights=True begins anew with the checkpoint's "
        "parameters"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        make(Stream(Counted(DATA)), registry="r", load_checkpoint=True)
    trainer = make(Stream(Counted(DATA[:9]), resume="replay"), registry="r", load_checkpoint=True)
    with pytest.raises(ValueError, match=r"^dataset 'train' ended after 1 of the 2 batches that the run has seen"):
        trainer.train()


def test_another_kind_of_data_than_that_of_the_checkpoint_is_an_error():
    make(DATA, registry="r", num_epochs=1).train()
    with pytest.raises(ValueError, match=r"len\(train_dataset\) was 43 and is 'Stream of 5 steps an epoch'"):
        make("goes on", registry="r", load_checkpoint=True)


def test_a_state_that_is_no_plain_data_is_said():
    class Odd(Told):
        def state_dict(self):
            return {"at": [self]}

    trainer = make(Stream(Odd(DATA)))
    text = (
        "dataset 'train': where its Stream of Odd stands cannot be kept in a checkpoint: state['at'][0] is Odd, which "
        "is no plain data; with resume='replay' it is not asked"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        trainer.train()
    make(Stream(Odd(DATA), resume="replay")).train()


def test_states_are_kept_as_they_are():
    state = {"a": [1, 2.5, None, True, "text"], "$b": (b"\0", {3: {"c": ()}}), "d": np.arange(6).reshape(2, 3)}
    again = from_plain(to_plain(state))
    np.testing.assert_equal(again, state)
    assert type(again["$b"]) is tuple
    number = from_plain(to_plain(np.float32(0.1)))
    assert (number, type(number)) == (np.float32(0.1), np.float32)


# ---- what goes wrong


def error_of(source, **options):
    with pytest.raises((ValueError, TypeError, DatasetError)) as caught:
        make(source, **options).train()
    return str(caught.value)


def raising(error, after):
    yield from DATA[:after]
    raise error


def test_streams_that_end_or_raise_are_said_with_where():
    assert error_of(Stream([])) == "dataset 'train' yields nothing: is its stream used up already?"
    assert error_of(DATA, val_datasets=[Batches([])]).startswith("dataset 'val' yields nothing")
    text = "dataset 'train' yielded nothing or fewer data than one batch of 8 in epoch 0"
    assert error_of(Stream(DATA[:7])) == text
    text = (
        "dataset 'train' ended after 5 of the 6 steps of epoch 0: steps_per_epoch is for streams that go on "
        "(.repeat()); without it an epoch is one pass"
    )
    assert error_of(Stream(DATA, steps_per_epoch=6)) == text
    text = "dataset 'train' raised after datum 20 of this pass: OSError: the disk is gone"
    assert error_of(Stream(lambda: raising(OSError("the disk is gone"), 20))) == text
    text = (
        "dataset 'train' is an iterator (list_iterator), which was used, and is needed again from its beginning: give "
        "a function that makes one, Stream(lambda: ...), or steps_per_epoch= where it is endless"
    )
    assert error_of(Stream(iter(DATA))) == text
    make(Stream(iter(DATA)), num_epochs=1).train()


def test_steps_before_an_error_are_made_and_a_stream_that_tells_is_gone_on_with(of_list):
    class Failing(Told):
        fails = True

        def __iter__(self):
            for datum in super().__iter__():
                if self.fails and self.at == 22:
                    raise OSError("for now")
                yield datum

    source = Failing(DATA)
    trainer = make(Stream(source))
    with pytest.raises(DatasetError, match="raised after datum 21 of this pass: OSError: for now"):
        trainer.train()
    assert len(trainer.metrics["train/loss"]) == 2
    with pytest.raises(DatasetError, match="raised after datum 21 of this pass: OSError: for now"):
        trainer.train()
    source.fails = False
    trainer.train()
    same_run(trainer, of_list)


def test_data_that_do_not_go_together_are_said_with_leaf_and_number():
    wrong = [*DATA[:12], [DATA[0][0], np.zeros(5, np.float32)], *DATA[13:]]
    text = "dataset 'train': leaf [1] differs within a batch: datum 8 has shape (3,), datum 12 has shape (5,); pad the"
    assert error_of(Stream(wrong)).startswith(text)
    other = [*in_batches()[:2], [in_batches()[2][0]]]
    text = (
        "dataset 'train': batch 2 has another structure than the first one:\n  [0]: float32[8, 8]\nand the first one\n"
    )
    assert error_of(Batches(other)).startswith(text)
    text = "dataset 'train': batch 0 must have 8 data, the first axis of each leaf, but is\n  [0]: float32[16, 8]\n"
    assert error_of(Batches(in_batches(size=16))).startswith(text)
    uneven = [[np.zeros((8, 8)), np.zeros((7, 3))]]
    assert error_of(Batches(uneven)).startswith("dataset 'train': batch 0 must have 8 data")
    text = "dataset 'train': batch 0 has 4 data, fewer than 8, and is not the last one: only the last may be short"
    assert error_of(Batches(in_batches(size=4))) == text
    assert error_of(Batches([[object()]])).startswith("dataset 'train': leaf [0] is of type object")


def test_what_a_stream_cannot_do_is_said_when_the_trainer_is_built():
    with pytest.raises(
        ValueError, match=r"^shuffle=True needs data that can be read by number, but train_dataset is a"
    ):
        make("grain", shuffle=True)
    with pytest.raises(
        ValueError, match=r"^dataset 'val': steps_per_epoch is for training data; each validation takes"
    ):
        make(DATA, val_datasets=[Stream(HELD_OUT, steps_per_epoch=2)])
    with pytest.raises(
        TypeError, match=r"^Stream needs something to iterate over, or a function that makes such a thing"
    ):
        Stream(7)
    with pytest.raises(ValueError, match=r"^Batches: resume must be 'replay' or None, but is 'again'$"):
        Batches([], resume="again")
    with pytest.raises(ValueError, match=r"^Stream: steps_per_epoch must be at least 1, but is 0$"):
        Stream([], steps_per_epoch=0)
    with pytest.raises(TypeError, match=r"^a stream's data have no indices"):
        make("grain").order(0)
    with pytest.raises(TypeError, match=r"or learnax.data.Stream\(...\) to have the data read as they come$"):
        make(iter(DATA))
