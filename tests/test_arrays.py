"""Whole arrays as data, in memory and in files."""

import re
import tracemalloc

import h5py
import jax.numpy as jnp
import numpy as np
import pytest

from learnax.data import arrays
from tests.helpers import assert_trees_equal, make_data, make_trainer

DATA = make_data(43)
X, Y = (np.stack(column) for column in zip(*DATA, strict=True))


def trained(dataset, **options):
    trainer = make_trainer(train_dataset=dataset, **options)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def of_list():
    return trained(DATA)


@pytest.fixture
def files(tmp_path):
    """The same arrays, mapped and in a file of h5py."""
    for name, array in (("x", X), ("y", Y)):
        np.save(tmp_path / f"{name}.npy", array)
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"], file["deep/y"] = X, Y
    file = h5py.File(tmp_path / "data.h5", "r")
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("x", "y")]
    return {"mapped": arrays(*mapped), "h5py": arrays(file["x"], file["deep/y"])}


def test_arrays_in_memory_train_like_a_list(of_list):
    for dataset in (arrays(X, Y), arrays((X, Y)), arrays([X, jnp.asarray(Y)])):
        trainer = trained(dataset)
        assert trainer.metrics["train/loss"] == of_list.metrics["train/loss"]
        assert_trees_equal(trainer.train_state, of_list.train_state)
        assert "kept on the devices" in str(trainer.loaders["train"])
    shuffled = [trained(dataset, shuffle=True) for dataset in (arrays(X, Y), DATA)]
    assert shuffled[0].metrics["train/loss"] == shuffled[1].metrics["train/loss"]
    assert "gathered there" in str(shuffled[0].loaders["train"])


def test_data_are_rows_in_the_structure_that_was_given():
    assert_trees_equal(arrays({"a": X, "b": {"c": Y}})[5], {"a": X[5], "b": {"c": Y[5]}})
    assert_trees_equal(arrays(X)[42], X[42])
    dataset = arrays(X, Y)
    assert (len(dataset), type(dataset[0]), repr(dataset)) == (43, list, "arrays of 43 data")
    for index in (43, -1):
        with pytest.raises(IndexError, match=f"datum {index} of 43"):
            dataset[index]


@pytest.mark.processes
@pytest.mark.parametrize(("kind", "workers"), [("mapped", 0), ("h5py", 0), ("mapped", 2), ("h5py", 2)])
def test_arrays_in_files_are_read_row_by_row_and_by_path_in_workers(kind, workers, files, of_list):
    trainer = trained(files[kind], num_workers=workers)
    assert trainer.metrics["train/loss"] == of_list.metrics["train/loss"]
    assert_trees_equal(trainer.train_state, of_list.train_state)
    assert "in each pass" in str(trainer.loaders["train"])


def test_an_array_in_a_file_is_never_in_memory(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 32)
    large = np.memmap(tmp_path / "large", np.float32, "r").reshape(-1, 1024)
    tracemalloc.start()
    dataset = arrays(large[:, :8], large[:, 8:11])
    for index in range(0, len(dataset), 1 << 15):
        assert [leaf.shape for leaf in dataset[index]] == [(8,), (3,)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert not dataset.in_memory


def test_what_are_no_arrays_of_one_length_is_said():
    for given, error, text in (
        ((X, Y[:40]), ValueError, "arrays: all of them must have a row for each datum, but [0] has 43, [1] has 40"),
        (({"a": X, "b": "text"},), TypeError, "arrays: ['b'] is str, and no array; np.asarray(...) makes one of it"),
        ((X, None), TypeError, "arrays: [1] is NoneType, and no array; np.asarray(...) makes one of it"),
        ((X, np.float32(1)), ValueError, "arrays: [1] is one number, and has no row for each datum"),
        ((), ValueError, "arrays: expected at least one array, got none"),
        (((),), ValueError, "arrays: expected at least one array, got none"),
    ):
        with pytest.raises(error, match=f"^{re.escape(text)}$"):
            arrays(*given)
    with pytest.raises(ValueError, match="dataset 'train' has 7 data, fewer than one batch of 8"):
        make_trainer(train_dataset=arrays(X[:7], Y[:7]))
