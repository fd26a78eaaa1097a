"""Arrow files: mapped, read by row, in this process and in workers."""

import pickle
import sys

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest

from learnax.data import ArrowFile
from tests.helpers import assert_trees_equal, make_trainer

ROWS = 43


def arrays():
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(ROWS, 8)).astype(np.float32),
        "y": rng.normal(size=ROWS).astype(np.float32),
        "label": rng.integers(0, 9, ROWS).astype(np.int32),
        "known": rng.integers(0, 2, ROWS).astype(bool),
    }


def write(path, pieces=1, **more):
    columns = arrays()
    columns["x"] = pa.FixedSizeListArray.from_arrays(pa.array(columns["x"].reshape(-1)), 8)
    table = pa.table(columns | more)
    size = -(-ROWS // pieces)
    table = pa.concat_tables([table.slice(start, size) for start in range(0, ROWS, size)])
    pyarrow.feather.write_feather(table, path, compression="uncompressed", chunksize=size)
    return path


@pytest.mark.parametrize("pieces", [1, 5])
def test_rows_are_those_of_the_table(tmp_path, pieces):
    dataset, wanted = ArrowFile(write(tmp_path / "t.arrow", pieces)), arrays()
    assert len(dataset) == ROWS
    for number in range(ROWS):
        assert_trees_equal(dataset[number], {name: column[number] for name, column in wanted.items()})
    assert dataset[3]["x"].base is not None  # the file's own memory
    assert {name: value.dtype for name, value in dataset[0].items()} == {k: v.dtype for k, v in wanted.items()}
    assert list(ArrowFile(tmp_path / "t.arrow", columns=["label", "x"])[0]) == ["label", "x"]
    with pytest.raises(IndexError, match=r"datum 43 of 43"):
        dataset[ROWS]
    # By its path: what is sent to a worker holds no data.
    assert len(pickle.dumps(dataset)) < 500
    assert_trees_equal(pickle.loads(pickle.dumps(dataset))[7], dataset[7])


@pytest.mark.processes
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_is_that_of_a_list(tmp_path, workers):
    def losses(output, datum):
        (row,) = datum
        return output, (output - row["y"]) ** 2, {"label": row["label"].astype("float32")}

    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, row):
            return nn.Dense(1)(row["x"])[0]

    columns = {name: column for name, column in arrays().items() if name != "known"}
    data = [{name: column[number] for name, column in columns.items()} for number in range(ROWS)]
    common = {"model": Net(), "losses": losses, "shuffle": True}
    of_list = make_trainer(train_dataset=data, **common)
    of_list.train()
    dataset = ArrowFile(write(tmp_path / "t.arrow", 3), columns=["x", "y", "label"])
    trainer = make_trainer(train_dataset=dataset, num_workers=workers, **common)
    trainer.train()
    assert trainer.metrics["train/label"] == of_list.metrics["train/label"]
    assert_trees_equal(trainer.train_state, of_list.train_state)


def test_what_cannot_be_read_is_told_by_name(tmp_path, monkeypatch):
    path = write(tmp_path / "t.arrow", name=[str(n) for n in range(ROWS)], some=[None, *range(ROWS - 1)])
    with pytest.raises(TypeError, match=r"t.arrow: column 'name' is of type (large_)?string, but columns"):
        ArrowFile(path)
    with pytest.raises(TypeError, match=r"column 'some' has 1 nulls, but .* name others by columns="):
        ArrowFile(path, columns=["x", "some"])
    with pytest.raises(ValueError, match=r"has no column 'z'; there are x, y, label, known, name, some"):
        ArrowFile(path, columns=["z"])
    other = tmp_path / "other"
    other.write_bytes(b"PAR1" * 20)
    with pytest.raises(ValueError, match=r"other is no Arrow IPC file .*write_feather\(table, path"):
        ArrowFile(other)
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        ArrowFile(tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"reading Arrow files needs pyarrow, which is not installed"):
        ArrowFile(path)
