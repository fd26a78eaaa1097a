"""Worker processes end with what they read for, however that ends, and leave nothing behind.

What workers import is slow, so that this module imports little: they load it for its classes.
"""

import contextlib
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from learnax.cluster.stops import TimeUpError
from learnax.data import Loader
from learnax.data.ending import SHARED, clear_segments
from learnax.data.workers import WorkerError
from tests.test_workers import make_dataset, make_loader, rows, workers

__all__ = ["make_loader"]

pytestmark = [pytest.mark.processes, pytest.mark.timeout(100)]
ROOT = Path(__file__).parents[1]


# ---- one buffer, in a worker


WRAPS = {
    "stacked": lambda x, index: "text",
    "sent on": lambda x, index: jax.numpy.float32(index),  # a worker sends it on as it is
    "sent on, then numbers": lambda x, index: (
        1.0 if index % 2 else np.asarray(jax.numpy.ones(()))[()] if index else jax.numpy.ones(())
    ),
    "sent on from the second": lambda x, index: jax.numpy.float32(index) if index % 2 else float(index),
}


def test_one_buffer_again_and_again_gives_each_datum_in_a_worker(make_loader):
    x, wraps = np.zeros(2, np.float32), list(WRAPS.values())

    def getitem(index):
        x[:] = index
        return [x, wraps[index // 8](x, index % 8)]

    # Two batches of each.
    loader = make_loader(make_dataset(getitem, 8 * len(wraps) - 1), 1, batch_size=4, tail=True)
    found = [batch[0][:, 0].tolist() for batch, _ in rows(loader)]
    assert found[:-1] == [[first, first + 1, first + 2, first + 3] for first in range(0, 28, 4)]
    assert found[-1] == [28, 29, 30, 30]


@pytest.mark.parametrize(
    ("leaf", "kind", "text"),
    [
        (2**40, ValueError, "leaf [0] of datum 5 has 1099511627776, which does not fit into int32; enable jax_enable_"),
        (
            frozenset(),
            TypeError,
            "leaf [0] of datum 5 is of type frozenset, neither array, number, text nor None; give",
        ),
    ],
)
def test_what_cannot_be_stacked_in_a_worker_is_told_as_here(leaf, kind, text, make_loader):
    loader = make_loader(make_dataset(lambda index: [leaf if index == 5 else 1]), 1)
    with pytest.raises(kind, match=f"^{re.escape('dataset ' + repr('set') + ': ' + text)}"):
        rows(loader)


# ---- files that are mapped


class Mapped:
    def __init__(self, array):
        self.array = array

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return [self.array[index], is_mapped(self.array)]


@pytest.fixture
def mapped(tmp_path):
    path = tmp_path / "data.bin"
    np.arange(96, dtype=np.int16).tofile(path)
    return np.memmap(path, np.int16, "r", offset=32, shape=(8, 10))


VIEWS = {
    "whole": lambda a: a,
    "reshaped": lambda a: a.reshape(4, 20),
    "sliced": lambda a: a[2:7, 1:],
    "backwards": lambda a: a[::-2, ::-1],
    "transposed": lambda a: a.T,
    "plain": lambda a: np.asarray(a)[1:],
    "as bytes": lambda a: a[1:].view(np.uint8),
    "one": lambda a: a[3:4, 2],
}


def test_views_of_a_file_travel_by_its_path(mapped):
    from learnax.data.sending import in_worker, to_worker

    for name, view in VIEWS.items():
        array = view(mapped)
        sent, _ = to_worker({"some": [array]})
        again = in_worker(sent)[0]["some"][0]
        np.testing.assert_array_equal(again, array, err_msg=name)
        assert type(again) is type(array), name
        assert (again.dtype, again.shape, again.strides) == (array.dtype, array.shape, array.strides)
        assert is_mapped(again), name
        assert not again.flags.writeable
    assert again.filename == mapped.filename
    big = np.lib.format.open_memmap(Path(mapped.filename).parent / "big.npy", "w+", np.uint8, (1 << 24,))
    big[5] = 7  # not flushed
    sent, _ = to_worker(big)
    assert len(sent) < 5000
    again = in_worker(sent)[0]
    assert again[5] == 7
    again[5] = 8  # a worker's own, as in any copy
    assert big[5] == 7
    del big, again


def is_mapped(array):
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


def test_what_is_not_in_the_file_travels_itself(mapped, tmp_path):
    from learnax.data.sending import in_worker, to_worker

    private = np.memmap(mapped.filename, np.int16, "c")
    private[0] = 99
    for array in (private, mapped[:0], np.array(mapped)):
        again = in_worker(to_worker(array)[0])[0]
        np.testing.assert_array_equal(again, array)
        assert not is_mapped(again)
    with (tmp_path / "nameless").open("w+b") as file:
        file.write(bytes(20))
        file.flush()
        with open(os.dup(file.fileno()), "r+b") as nameless:
            again = in_worker(to_worker(np.memmap(nameless, np.uint8, "r"))[0])[0]
    assert again.tolist() == [0] * 20


def test_workers_map_the_file_and_stack_its_rows(mapped, make_loader):
    loader = make_loader(Mapped(mapped), 1)
    assert [(batch[0].tolist(), batch[1].tolist()) for batch, _ in rows(loader)] == [
        (mapped[:2].tolist(), [True, True]),
        (mapped[2:4].tolist(), [True, True]),
    ]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_gone_is_named_when_the_loader_is_built(replaced, mapped, make_loader):
    path = Path(mapped.filename)
    path.unlink()
    if replaced:
        np.zeros(96, np.int16).tofile(path)
    text = f": its attribute 'array' of type memmap: it is mapped from the file {path}, which was removed or replaced"
    with pytest.raises(WorkerError, match=re.escape(text)):
        make_loader(Mapped(mapped), 1)
    make_loader(Mapped(mapped), 0)


# ---- stops while workers are waited for


@pytest.mark.parametrize(("kind", "num_workers"), [(TimeUpError, 2), (SystemExit, 1)])
def test_a_stop_is_heeded_while_a_worker_is_waited_for(kind, num_workers, tmp_path):
    (tmp_path / "gate").touch()

    def getitem(index):
        while index == 4 and (tmp_path / "gate").exists():
            time.sleep(0.05)
        (tmp_path / "read").touch()
        return [np.float32(index)]

    stopped = []

    def heed():
        if (tmp_path / "read").exists() and not stopped:
            raise kind("stop")

    loader = Loader(
        "set", make_dataset(getitem), 2, tail=False, num_workers=num_workers, put=jax.device_put, heed=heed, room=4
    )
    with pytest.raises(kind, match="stop"):
        next(loader.blocks())
    assert workers() == []
    stopped.append(True)
    (tmp_path / "gate").unlink()
    (block,) = loader.blocks()
    assert block.host[0].ravel().tolist() == list(range(8))
    loader.close()


def test_a_worker_that_is_amid_its_data_is_not_waited_for(tmp_path):
    def getitem(index):
        if index > 1:
            (tmp_path / "slow").touch()
            time.sleep(1000)
        return [np.float32(index)]

    loader = Loader("set", make_dataset(getitem), 2, tail=False, num_workers=2, put=jax.device_put)
    next(loader.blocks())
    wait_for(lambda: (tmp_path / "slow").exists())
    loader.close()
    assert workers() == []
    assert own_segments() == []


def own_segments():
    return [path.name for path in SHARED.iterdir() if f"-{os.getpid()}-" in path.name and path.name[:3] != "sem"]


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_an_error_while_a_signal_is_pending_is_that_signal(tmp_path):
    def getitem(index):
        if index == 2:
            while not (tmp_path / "signal").exists():
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)  # as one to all processes of a group
            time.sleep(10)
        return [np.float32(index)]

    died = []

    def heed():
        if died:
            raise SystemExit(143)

    loader = Loader("set", make_dataset(getitem), 2, tail=False, num_workers=1, put=jax.device_put, heed=heed)
    blocks = loader.blocks()
    next(blocks)
    died.append(True)
    (tmp_path / "signal").touch()
    with pytest.raises(SystemExit):
        next(blocks)
    assert workers() == []


def test_a_bus_error_names_shared_memory(make_loader):
    def getitem(index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGBUS)
        return [np.float32(index)]

    with pytest.raises(WorkerError) as caught:
        rows(make_loader(make_dataset(getitem), 1))
    assert re.search(
        r"exit code -7\..*\): a bus error, as where shared memory is full; batches travel through /dev/shm, of whose "
        r"\d+ MB \d+ MB are free now: give it more \(docker run --shm-size=8g\), or use fewer workers or smaller "
        r"batches; it may have",
        str(caught.value),
    )


# ---- the death of the run

VICTIM = """
import os, signal, sys, time
import jax
import numpy as np
from learnax.data import Loader

class Data:
    def __len__(self):
        return 10**9

    def __getitem__(self, index):
        open(f"worker-{os.getpid()}", "w").close()
        if index > 200:
            time.sleep(1000)  # amid a datum
        return [np.zeros(100)]

loader = Loader("set", Data(), 4, tail=False, num_workers=int(sys.argv[2]), put=jax.device_put)
blocks = loader.blocks()
if sys.argv[1] == "fork":
    next(blocks)
    if os.fork() == 0:
        time.sleep(1000)
for block in blocks:
    open("read", "w").close()
"""


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and /dev/shm are Linux's")
@pytest.mark.parametrize(("how", "count"), [("group", 2), ("fork", 1)])
def test_a_run_that_is_killed_leaves_no_worker_and_no_shared_memory(how, count, tmp_path):
    (tmp_path / "victim.py").write_text(VICTIM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, "victim.py", how, str(count)], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(lambda: len(list(tmp_path.glob("worker-*"))) == count and (tmp_path / "read").exists())
        pids = [int(path.name.partition("-")[2]) for path in tmp_path.glob("worker-*")]
        assert all(map(alive, pids))
        left = [path for path in SHARED.iterdir() if f"-{process.pid}-" in path.name]
        assert any(path.name.startswith("sem.") for path in left)
        if how == "group":
            trackers = [int(pid.name) for pid in Path("/proc").glob("[0-9]*") if is_of(pid, process.pid)]
            for pid in {*trackers, process.pid} - set(pids):  # Python's own tracker of what is left, too
                os.kill(pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
        wait_for(lambda: not any(map(alive, pids)), 20)
        clear_segments()
        assert [path for path in SHARED.iterdir() if f"-{process.pid}-" in path.name] == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def is_of(entry, parent):
    with contextlib.suppress(OSError):
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent
    return False


def test_the_shared_memory_of_others_is_left_alone(make_loader):
    loader = make_loader([[np.zeros(100, np.float32)]] * 80, 1)
    blocks = loader.blocks()
    next(blocks)
    wait_for(own_segments)
    mine = own_segments()
    strange = [SHARED / "learnax-strange", SHARED / "learnax-1-2-3-4-5", SHARED / f"psm_{os.getpid()}"]
    for path in strange:
        path.touch()
    try:
        clear_segments()
        assert all(path.exists() for path in strange)
        assert set(mine) <= set(own_segments())
        assert len(list(blocks)) == 39
    finally:
        for path in strange:
            path.unlink()
    loader.close()
    assert own_segments() == []
