"""Data read in worker processes are the data read here, and what goes wrong there is told here.

What workers import is slow, so that this module imports little: they load it for its classes.
"""

import dataclasses
import multiprocessing
import os
import re
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learnax.data import Loader
from learnax.data.reading import DatasetError
from learnax.data.workers import WorkerError

pytestmark = [pytest.mark.processes, pytest.mark.timeout(100)]  # a worker that died must not be waited for


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class Molecule:
    positions: np.ndarray
    charge: float
    name: str

    def tree_flatten(self):
        return (self.positions, self.charge, self.name), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


class Molecules:
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return Molecule(np.random.default_rng(index).normal(size=(3, 2)), index / 2, f"molecule {index}")


def make_dataset(getitem, n=8, **attributes):
    """A dataset of a class that no module has: it travels by value, like one of a script."""

    class Dataset:
        def __init__(self):
            self.__dict__.update(attributes)

        def __len__(self):
            return n

        def __getitem__(self, index):
            return getitem(index)

    return Dataset()


@pytest.fixture
def make_loader():
    loaders = []

    def make(dataset, num_workers, batch_size=2, tail=False):
        loaders.append(Loader("set", dataset, batch_size, tail=tail, num_workers=num_workers, put=jax.device_put))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()
    assert workers() == []


def workers():
    return [process for process in multiprocessing.active_children() if process.name.startswith("grain-process")]


def batches(loader, start=0):
    from tests.helpers import batches

    return batches(loader, start)


def rows(loader, start=0):
    return [(jax.tree.map(np.asarray, batch.host), batch.count) for batch in batches(loader, start)]


def assert_rows_equal(left, right):
    assert len(left) == len(right)
    for (batch, count), (other, other_count) in zip(left, right, strict=True):
        assert count == other_count
        assert jax.tree.structure(batch) == jax.tree.structure(other)
        jax.tree.map(np.testing.assert_array_equal, batch, other)
        assert [leaf.dtype for leaf in jax.tree.leaves(batch)] == [leaf.dtype for leaf in jax.tree.leaves(other)]


@pytest.mark.parametrize(
    ("num_workers", "batch_size"), [(1, 2), (3, 2), (8, 8)], ids=["one", "three", "no more than batches"]
)
def test_batches_are_those_of_one_process_in_their_order_pass_after_pass(num_workers, batch_size, make_loader):
    dataset = Molecules(15)
    expected = rows(make_loader(dataset, 0, batch_size, tail=True))
    loader = make_loader(dataset, num_workers, batch_size, tail=True)
    assert isinstance(expected[0][0][0], Molecule)
    for _ in range(3):
        assert_rows_equal(rows(loader), expected)
    assert len(workers()) == min(num_workers, len(expected))


def test_a_worker_stacks_what_it_knows_and_sends_on_what_it_does_not(make_loader):
    def fails(indices, data):
        raise AssertionError("stacked here")

    plain = [[np.full(3, i, np.float32), i, f"datum {i}", {"none": None, "pair": (1.5 * i, True)}] for i in range(8)]
    loader = make_loader(plain, 1)
    expected = rows(make_loader(plain, 0))
    loader._reader._collate = fails
    assert_rows_equal(rows(loader), expected)

    @jax.tree_util.register_dataclass  # of a class that travels by value, a worker has no registration
    @dataclasses.dataclass
    class Point:
        x: np.ndarray

    loader = make_loader(make_dataset(lambda index: [Point(np.float32(index))]), 1)
    loader._reader._collate = fails
    with pytest.raises(AssertionError, match="stacked here"):
        rows(loader)


def test_a_worker_stacks_in_the_precision_of_this_process_and_reads_in_one_thread(make_loader):
    dataset = make_dataset(lambda index: [np.float64(index), threading.get_ident() % 2**31], n=80)
    with jax.enable_x64(True):
        found = rows(make_loader(dataset, 1))
    assert [leaf.dtype for leaf in found[0][0]] == [np.float64, np.int64]
    assert len({int(thread) for (_, threads), _ in found for thread in threads}) == 1


@pytest.mark.parametrize(
    "dataset",
    [
        [[jnp.full(3, i), np.full(3, i, np.float32), i, f"datum {i}", None] for i in range(8)],
        make_dataset(lambda index: {"x": np.arange(index, index + 2), "y": (index, [float(index)])}),
        make_dataset(lambda index: jnp.full(3, index)),
    ],
    ids=["jax arrays in a list", "own class", "jax arrays made there"],
)
def test_any_data_come_back_as_they_are_here(dataset, make_loader):
    assert_rows_equal(rows(make_loader(dataset, 1)), rows(make_loader(dataset, 0)))


def test_data_are_of_the_very_classes_that_are_here(make_loader):
    @jax.tree_util.register_pytree_node_class
    class Local:
        made = 0

        class Name(str):
            pass

        def __init__(self, x, name):
            self.x = x
            self.name = self.Name(name)
            type(self).made += 1

        def tree_flatten(self):
            return (self.x,), self.name

        @classmethod
        def tree_unflatten(cls, name, children):
            made = object.__new__(cls)
            (made.x,), made.name = children, name
            return made

    make = Local.__init__
    loader = make_loader(make_dataset(lambda index: Local(np.full(2, index), "local")), 1)
    Local.made = -1
    seen = [batch[0] for batch in loader._reader.read(0)]
    assert len(seen) == 4
    assert {type(datum) for datum in seen} == {Local}
    assert {type(datum.name) for datum in seen} == {Local.Name}
    assert Local.made == -1
    assert Local.__init__ is make
    assert_rows_equal(rows(loader), rows(make_loader([Local(np.full(2, index), "local") for index in range(8)], 0)))


def test_a_pass_may_start_and_end_anywhere(make_loader):
    dataset = [[np.float32(i)] for i in range(14)]
    expected = rows(make_loader(dataset, 0))
    loader = make_loader(dataset, 2)
    assert_rows_equal(rows(loader, start=3), expected[3:])
    abandoned = batches(loader)
    for number in range(3):
        assert next(abandoned).host[0].tolist() == expected[number][0][0].tolist()
    assert_rows_equal(rows(loader), expected)
    assert next(abandoned).host[0].tolist() == expected[3][0][0].tolist()
    assert rows(loader, start=7) == []


def test_a_training_is_the_same_bit_for_bit_and_its_workers_are_gone():
    from tests.helpers import assert_trees_equal, make_data, make_trainer

    here, there = (make_trainer(num_workers=count, val_datasets=[make_data(11, seed=1)]) for count in (0, 2))
    for trainer in (here, there):
        trainer.train()
        assert workers() == []
    metrics, others = (
        {name: values for name, values in trainer.metrics.items() if "time" not in name} for trainer in (here, there)
    )
    assert metrics == others
    assert_trees_equal(here.train_state, there.train_state)


class ShapeError(Exception):
    """Wants two arguments, so that it does not come out of a pickle."""

    def __init__(self, index, size):
        super().__init__(f"datum {index} has size {size}")


def raising(make, at=5):
    def getitem(index):
        if index == at:
            raise make()
        return [np.float32(index)]

    return getitem


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: KeyError("missing"), "KeyError: 'missing'"),
        (lambda: StopIteration("done"), "StopIteration: done"),
        (lambda: SystemExit(0), "SystemExit: 0"),
        (lambda: ShapeError(5, 7), "ShapeError: datum 5 has size 7"),
    ],
    ids=["KeyError", "StopIteration", "SystemExit", "ShapeError"],
)
def test_a_dataset_that_raises_is_told_of_with_its_index_and_its_error(make, text, make_loader):
    error = make()
    loader = make_loader(make_dataset(raising(make)), 1)
    found = batches(loader)
    assert [next(found).host[0].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(DatasetError) as caught:
        next(found)
    assert str(caught.value) == f"dataset 'set' raised at index 5: {text}"
    cause = caught.value.__cause__
    if isinstance(error, ShapeError):
        assert cause is None
    else:
        assert type(cause) is type(error)
        assert cause.args == error.args
    (note,) = (cause or caught.value).__notes__
    assert note.startswith("in a worker process:\nTraceback")
    assert re.search(rf'File "{re.escape(__file__)}", line \d+, in getitem\n    raise make\(\)\n', note)


def test_a_dataset_that_raises_ends_the_training_and_its_workers():
    from tests.helpers import make_data, make_trainer

    class Broken(list):
        def __getitem__(self, index):
            return super().__getitem__(index if index != 21 else 99)

    trainer = make_trainer(train_dataset=Broken(make_data(43)), num_workers=1)
    with pytest.raises(
        DatasetError, match=r"^dataset 'train' raised at index 21: IndexError: list index out of range$"
    ):
        trainer.train()
    assert len(trainer.metrics["train/loss"]) == 2
    assert workers() == []


@pytest.mark.parametrize(("code", "at", "num_workers"), [(0, 4, 2), (3, 0, 1)])
def test_a_worker_that_ends_is_told_of(code, at, num_workers, make_loader):
    def getitem(index):
        if index == at:
            os._exit(code)
        return [np.float32(index)]

    loader = make_loader(make_dataset(getitem), num_workers)
    with pytest.raises(WorkerError) as caught:
        rows(loader)
    assert re.fullmatch(
        r"dataset 'set': worker process 0 died before it gave the data [04] to [15] \(.*exit code [13].*\); it may "
        "have run out of memory or been killed, and num_workers=0 reads in this process",
        str(caught.value),
    )
    assert workers() == []


def test_a_worker_that_is_killed_is_told_of_and_a_new_pass_has_new_workers(make_loader):
    dataset = [[np.float32(i)] for i in range(60)]
    loader = make_loader(dataset, 1)
    found = batches(loader)
    next(found)
    (worker,) = workers()
    worker.kill()
    with pytest.raises(
        WorkerError,
        match=r"^dataset 'set': worker process 0 died before it gave the data \d+ to \d+ \(.*exit code -9\.",
    ):
        list(found)
    assert workers() == []
    assert_rows_equal(rows(loader), rows(make_loader(dataset, 0)))


def test_a_worker_that_hangs_is_ended_and_told_of(make_loader, monkeypatch):
    monkeypatch.setattr("learnax.data.workers.PATIENCE_S", 8.0)  # a worker takes a while to start

    def getitem(index):
        if index == 6:
            threading.Event().wait()
        return [np.float32(index)]

    loader = make_loader(make_dataset(getitem), 2)
    found = batches(loader)
    for _ in range(3):
        next(found)
    with pytest.raises(WorkerError) as caught:
        next(found)
    assert str(caught.value) == (
        "dataset 'set': worker process 1 has not given the data 6 to 7 in 8 s and was ended: it hangs, or that is how "
        "long they take; num_workers=0 reads in this process, and waits"
    )
    assert workers() == []
    assert "learnax-watchdog" not in [thread.name for thread in threading.enumerate() if thread.is_alive()]


def test_data_that_cannot_be_sent_are_told_of(make_loader):
    loader = make_loader(make_dataset(lambda index: [np.float32(index), threading.Lock()]), 1)
    text = (
        "dataset 'set': the data at indices 0 to 1 cannot be sent from a worker process: "
        "TypeError: cannot pickle '_thread.lock' object; num_workers=0 reads in this process"
    )
    with pytest.raises(WorkerError, match=f"^{re.escape(text)}$"):
        rows(loader)


def test_a_dataset_that_a_worker_cannot_make_again_is_told_of(make_loader):
    class Fragile:
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return [np.float32(index)]

        def __getstate__(self):
            return {"size": 8}

        def __setstate__(self, state):
            raise OSError("no such disk here")

    text = (
        "dataset 'set': it cannot be made again in a worker process: OSError: no such disk here; "
        "num_workers=0 reads in this process"
    )
    with pytest.raises(WorkerError, match=f"^{re.escape(text)}$"):
        rows(make_loader(Fragile(), 1))


@pytest.fixture
def unsendable(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        yield {"file": file, "lock": threading.Lock(), "generator": (i for i in range(3))}


@pytest.mark.parametrize(
    ("what", "kind", "reason"),
    [
        ("file", "BufferedWriter", "cannot pickle '"),  # the rest differs between versions of Python
        ("lock", "lock", "cannot pickle '_thread.lock' object"),
        ("generator", "generator", "cannot pickle 'generator' object"),
    ],
)
def test_a_dataset_that_cannot_be_sent_names_its_attribute_when_the_trainer_is_built(what, kind, reason, unsendable):
    from tests.helpers import make_trainer

    held = unsendable[what]
    dataset = make_dataset(lambda index: [np.zeros(8, np.float32), np.zeros(3, np.float32)], fine=1, source=held)
    with pytest.raises(WorkerError) as caught:
        make_trainer(train_dataset=dataset, num_workers=1)
    assert str(caught.value).startswith(
        f"dataset 'train' cannot be sent to worker processes: its attribute 'source' of type {kind}: {reason}"
    )
    assert str(caught.value).endswith(
        ". Open files, locks and connections cannot travel: open them in __getitem__ at first use, leave them out in "
        "__getstate__, or use num_workers=0"
    )
    make_trainer(train_dataset=dataset, num_workers=0)


def test_a_file_opened_at_first_use_is_a_way_out(tmp_path, make_loader):
    np.save(tmp_path / "data.npy", np.arange(8, dtype=np.float32))

    class OnDisk:
        def __init__(self, path):
            self.path = path
            self.file = None

        def __len__(self):
            return 8

        def __getitem__(self, index):
            if self.file is None:
                self.file = np.load(self.path, mmap_mode="r")
            return [np.array(self.file[index])]

        def __getstate__(self):
            return self.__dict__ | {"file": None}

    dataset = OnDisk(tmp_path / "data.npy")
    expected = rows(make_loader(dataset, 0))
    assert dataset.file is not None
    assert_rows_equal(rows(make_loader(dataset, 1)), expected)


PAIRS = """
import dataclasses

import jax
import numpy as np

SCALE = 2.0


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class Pair:
    x: np.ndarray
    y: np.ndarray
    name: str

    def tree_flatten(self):
        return (self.x, self.y, self.name), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


class Pairs:
    def __len__(self):
        return 35

    def __getitem__(self, index):
        x, y = make_pair(index)
        return Pair(SCALE * x, y, f"pair {index}")


def make_pair(index):
    rng = np.random.default_rng(index)
    return rng.normal(size=4).astype(np.float32), rng.normal(size=2).astype(np.float32)


print("the script runs")
"""
TRAINS = """
import flax.linen as nn
import jax.numpy as jnp

from learnax.loss import LossFunction, LossPipe
from learnax.trainer import Trainer


class Model(nn.Module):
    @nn.compact
    def __call__(self, pair):
        return nn.Dense(2)(pair.x)


class Distance(LossFunction):
    def _call(self, output, batch):
        return output, jnp.mean((output - batch[0].y) ** 2), {}


for num_workers in (1, 0):
    trainer = Trainer(Model(), 1e-2, LossPipe([Distance()]), 0, Pairs(), 2, 8, num_workers, val_datasets=[Pairs()])
    trainer.train()
    print("read", num_workers, trainer.metrics["train/loss"][-1], trainer.metrics["val/loss"][-1])
"""
READS = """
from learnax.data import Loader

for num_workers in (1, 0):
    loader = Loader("set", Pairs(), 8, tail=False, num_workers=num_workers, put=jax.device_put)
    pairs = [pair for block in loader.blocks() for pair in block.host]
    print("read", num_workers, [(float(pair.x.sum()), float(pair.y.sum())) for pair in pairs])
    loader.close()
"""


def check_output(result):
    first, there, here = result.stdout.splitlines()
    assert first == "the script runs"
    assert there.split()[:2] == ["read", "1"]
    assert here.split()[:2] == ["read", "0"]
    assert there.split()[2:] == here.split()[2:]
    assert "Traceback" not in result.stderr
    assert "leaked" not in result.stderr


def test_a_script_without_a_main_guard_runs_once_and_imports_its_neighbours(tmp_path):
    from tests.helpers import run_script

    begin, end = PAIRS.index("def make_pair"), PAIRS.index("print")
    (tmp_path / "neighbour.py").write_text(f"import numpy as np\n\n\n{PAIRS[begin:end]}")
    source = PAIRS[:begin] + PAIRS[end:] + TRAINS
    check_output(run_script(source.replace("SCALE =", "from neighbour import make_pair\n\nSCALE ="), tmp_path))


@pytest.mark.parametrize("how", ["-c", "stdin"])
def test_a_program_without_a_file_runs_once(how, tmp_path):
    from tests.helpers import ROOT

    source = PAIRS + READS
    command, text = ([sys.executable, "-c", source], None) if how == "-c" else ([sys.executable, "-"], source)
    result = subprocess.run(
        command,
        input=text,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    check_output(result)


def test_a_worker_that_starts_late_does_not_run_the_script_either(tmp_path):
    from tests.helpers import run_script

    # The dataset is pickled when the loader is built, then for each worker. The last pickling is held up until the
    # first batch is there; or, if it is that of the worker who reads that batch, until the other one reads.
    (tmp_path / "gate.py").write_text("""
import itertools
import threading
from pathlib import Path

first_batch = threading.Event()
picklings = itertools.count(1)


def hold_the_third():
    number = next(picklings)
    while number == 3 and not first_batch.wait(0.1) and not Path("2").exists():
        pass
""")
    source = """
from pathlib import Path

import jax
import numpy as np

import gate
from learnax.data import Loader
from learnax.data.reading import DatasetError

print("the script runs")


class Odd(Exception):
    pass


class Numbers:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        Path(str(index)).touch()
        if index == 7:
            raise Odd("seven")
        return [np.float32(index)]

    def __getstate__(self):
        gate.hold_the_third()
        return {"some": "state"}


loader = Loader("set", Numbers(), 2, tail=False, num_workers=2, put=jax.device_put)
try:
    for block in loader.blocks():
        gate.first_batch.set()
        print(block.host[0][0].tolist())
except DatasetError as error:
    print(error, type(error.__cause__) is Odd)
"""
    assert run_script(source, tmp_path).stdout.splitlines() == [
        "the script runs",
        "[0.0, 1.0]",
        "[2.0, 3.0]",
        "[4.0, 5.0]",
        "dataset 'set' raised at index 7: Odd: seven True",
    ]


def test_workers_that_nobody_ended_end_with_the_program(tmp_path):
    from tests.helpers import run_script

    result = run_script(
        """
import jax
import numpy as np

from learnax.data import Loader

loader = Loader("set", [[np.ones(2)]] * 40, 2, tail=False, num_workers=1, put=jax.device_put)
print(next(iter(loader))[0].tolist())
""",
        tmp_path,
    )
    assert result.stdout == "[[1.0, 1.0], [1.0, 1.0]]\n"
    assert result.stderr == ""
