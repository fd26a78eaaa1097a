"""Pickles of plain content: they come back as they were; what is no plain content is refused by name, at any size."""

import collections
import datetime
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from learnax.checkpoint import DamagedError, thaw
from learnax.step.state import TrainState
from tests.helpers import ROOT

PROTOCOLS = [0, 1, 2, 3, 4, 5]


def write(path, content, protocol=pickle.DEFAULT_PROTOCOL):
    path.write_bytes(content if isinstance(content, Raw) else pickle.dumps(content, protocol))
    return path


class Raw(bytes):
    """A pickle that is written as it is."""


def same(left, right):
    """Equal, with every type and bit alike."""
    assert type(left) is type(right) or (isinstance(left, jax.Array) and isinstance(right, jax.Array))
    if isinstance(left, dict):
        assert list(left) == list(right)
        assert [type(key) for key in left] == [type(key) for key in right]
        return all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, (np.ndarray, np.generic, jax.Array)):
        return (left.dtype, left.shape) == (right.dtype, right.shape) and np.asarray(left).tobytes() == np.asarray(
            right
        ).tobytes()
    return left == right


CONTENT = {
    "scalars": [None, True, False, 0, -1, 2**70, 0.1, -0.0, 1 + 2j, complex(0, float("inf")), "", "tëxt\n\udc80"],
    "bytes": [b"", b"\x00\xff"],
    "containers": {"a": [1, (2, ()), {}], 3: (), "b": [[]], None: 1, 0.5: 2, (1, "x"): 3, b"k": 4, True: 5},
    "ordered": collections.OrderedDict([("z", 1), ("a", collections.OrderedDict())]),
    "sets": [{1, 2}, set(), frozenset({"a", (1, None)}), frozenset()],
    "bytearray": [bytearray(b"xyz"), bytearray()],
    "numbers of numpy": [np.float32(0.1), np.int64(-3), np.bool_(True), np.complex64(1j), np.float16(2), np.str_("äb")],
    "keys of numpy": {np.int64(3): "a", np.float32(0.5): "b"},
    "arrays": {
        "f": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "strided": np.arange(24).reshape(4, 6)[::2, ::3],
        "empty": np.zeros((0, 3), np.int8),
        "scalar": np.array(3.0),
        "text": np.array(["a", "größe"]),
        "bytes": np.array([b"ab", b"c"]),
        "bfloat16": np.ones(3, ml_dtypes.bfloat16),
        "bool": np.array([True, False]),
        "complex": np.array([1j, 2]),
    },
    "jax": [jnp.arange(3), jnp.ones((2, 2), jnp.bfloat16), jnp.float32(2), jnp.zeros((0, 4))],
    "state": TrainState({"w": np.ones(2)}, (optax.EmptyState(),), 3),
}  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", CONTENT)
def test_plain_content_comes_back_as_it_was(tmp_path, name, protocol):
    if name == "state" and protocol < 2:
        return  # a NamedTuple is written as a call of copyreg's there, which no version of ours did
    assert same(thaw.read_plain(write(tmp_path / "x.pkl", CONTENT[name], protocol)), CONTENT[name])


def test_arrays_of_another_byte_order_come_in_the_machines(tmp_path):
    array = np.arange(6, dtype=">i4").reshape(2, 3)
    got = thaw.read_plain(write(tmp_path / "x.pkl", array))
    np.testing.assert_array_equal(got, array)
    assert got.dtype == np.int32


def test_arrays_may_be_written_to_and_what_is_shared_stays_shared(tmp_path):
    array, inner = np.zeros(3), [1]
    got = thaw.read_plain(write(tmp_path / "x.pkl", {"a": array, "b": array, "c": [inner, inner]}))
    got["a"][0] = 1
    got["c"][0].append(2)
    assert got["b"][0] == 1
    assert got["c"] == [[1, 2], [1, 2]]


def test_a_typed_key_comes_back(tmp_path):
    keys = jax.random.split(jax.random.key(3))
    got = thaw.read_plain(write(tmp_path / "x.pkl", [keys]))[0]
    assert got.dtype == keys.dtype
    assert (jax.random.key_data(got) == jax.random.key_data(keys)).all()


class Mine:
    pass


REFUSED = {
    "a class of the script": (Mine(), r"'.*test_thaw\.Mine'"),
    "a function": (len, r"'builtins\.len'"),
    "a date": (datetime.date(2020, 1, 1), r"'datetime\.date'"),
    "a path": (Path("/x"), r"'pathlib.*Path'"),
    "a range": (range(3), r"'builtins\.range'"),
    "a defaultdict": (collections.defaultdict(list), r"'collections\.defaultdict'"),
    "an array of objects": (np.array([None]), "an array that is not of numbers or text"),
    "an array of dates": (np.array(["2020-01-01"], "M8[D]"), "an array that is not of numbers or text"),
    "a masked array": (np.ma.ones(2), r"'numpy\.ma.*_mareconstruct'"),
    "a deep list": (Raw(b"\x80\x04" + b"]" * 200 + b"a" * 199 + b"."), "containers more than 100 deep"),
    "a key that is a tuple of tuples": ({((1, 2), 3): 4}, "a key of type tuple; keys have to be text"),
    "a key that is large": ({1 << 60: 4}, "a key of type int"),
    "a set of large numbers": ({-(1 << 61)}, "a key of type int"),
    "many tuples": ({(i,): i for i in range(10_001)}, "more than 10000 keys that are tuples"),
    "an exception": (Raw(b"cos\nsystem\n(S'true'\ntR."), r"'os\.system'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_plain_is_refused_by_name_with_the_way_out(tmp_path, name):
    content, what = REFUSED[name]
    path = write(tmp_path / "x.pkl", content)
    with pytest.raises(ValueError, match=rf"x\.pkl was not read: it has {what}") as error:
        thaw.read_plain(path)
    assert not isinstance(error.value, DamagedError)
    assert "read_fn=lambda path: pickle.loads(path.read_bytes())" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x04]", pickle.dumps([1] * 9)[:-4]])
def test_what_is_torn_is_damaged(tmp_path, content):
    path = write(tmp_path / "x.pkl", Raw(content))
    with pytest.raises(DamagedError, match=rf"x\.pkl \({len(content)} bytes\) is torn, or is not a pickle"):
        thaw.read_plain(path)


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "endless").open("wb") as file:
        file.truncate(1 << 43)
    for name in ("pipe", "device", "folder", "endless"):
        with pytest.raises(DamagedError, match=rf"{name} is no file that can be read"):
            thaw.read_plain(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        thaw.read_plain(tmp_path / "nothing")


# ---- hostile: to be read by a process of its own, which they would end, or fill


DEPTH = 200_000
DEEP = b")" + b"\x85" * DEPTH  # a tuple in a tuple in ...
ARRAY = pickle.dumps(np.ones(100_000, ">f8"), 4)[2:-1]  # its last place is the bytes'
ORDERED = b"ccollections\nOrderedDict\n"
HOSTILE = {
    "deep tuple as a key": (b"\x80\x04}" + DEEP + b"Ns.", "a key of type tuple"),
    "deep tuple as one of several keys": (b"\x80\x04}(" + DEEP + b"Nu.", "a key of type tuple"),
    "deep tuple as a key of protocol 0": (b"(" + DEEP + b"Nd.", "a key of type tuple"),
    "deep tuple in a set": (b"\x80\x04\x8f(" + DEEP + b"\x90.", "a key of type tuple|a set,"),
    "deep tuple in a frozenset": (b"\x80\x04(" + DEEP + b"\x91.", "a key of type tuple|a set,"),
    "deep tuple in a set by name": (b"cbuiltins\nset\n](" + DEEP + b"e\x85R.", "a key of type tuple|builtins.set"),
    "deep tuple in an ordered dict": (ORDERED + b")R" + DEEP + b"Ns.", "a key of type tuple"),
    "deep tuple in a list of items": (ORDERED + b"](](" + DEEP + b"Nee\x85R.", "a key of type tuple"),
    "deep lists": (b"\x80\x04" + b"]" * DEPTH + b"a" * (DEPTH - 1) + b".", "more than 100 deep"),
    "deep dicts": (b"\x80\x04" + b"}K\x00" * DEPTH + b"N" + b"s" * DEPTH + b".", "more than 100 deep"),
    "one list in many places": (
        b"\x80\x04]\x94(" + b"K\x01" * 9999 + b"e](" + b"h\x00" * 200 + b"e.",
        "read|1000000 values",
    ),
    "one array in many places": (b"\x80\x04](" + ARRAY + b"\x940(" + b"h\x09" * 20_000 + b"te.", "read|found a list"),
    "many arrays of the same bytes": (
        b"\x80\x04](" + ARRAY + b"\x940(" + b"h\x02h\x08Rh\x13b" * 20_000 + b"te.",
        "one array or text in so many places that its copies are larger than the file",
    ),
    "many arguments": (
        ORDERED + b"\x940](h\x00(" + b"N" * DEPTH + b"tR" + b"e.",
        "a Ordered with other arguments than there can be",
    ),
    "places of one hash": (
        b"N" + b"".join(b"p%d\n" % (k * (2**61 - 1)) for k in range(1, 20_000)) + b".",
        "something at place 2305843009213693951",
    ),
}  # fmt: skip


READ = """
import resource, sys
from pathlib import Path
from learnax.checkpoint import legacy, thaw
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).iterdir()):
    for read in (thaw.read_plain, legacy.read):
        try:
            read(path)
        except ValueError as error:
            print(path.name, "->", str(error).partition(" it has ")[2] or error)
        else:
            print(path.name, "-> read")
print("MB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.processes
def test_hostile_files_neither_end_nor_fill_the_process(tmp_path):
    for name, (content, _) in HOSTILE.items():
        (tmp_path / name).write_bytes(content)
    command = [sys.executable, "-c", READ, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    *lines, last = result.stdout.splitlines()
    assert len(lines) == 2 * len(HOSTILE)
    for line in lines:
        assert re.search(HOSTILE[line.partition(" -> ")[0]][1], line.partition(" -> ")[2]), line
    assert int(last.removeprefix("MB ")) < 500
