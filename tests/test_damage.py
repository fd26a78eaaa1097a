"""Saves that something happened to, by accident or with intent: a DamagedError tells of them, soon, and no more."""

import contextlib
import json
import logging
import os
import random
import shutil
import socket

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from learnax.checkpoint import Checkpointer, DamagedError, SaveError, files, seals
from learnax.step.optimizers import adam
from learnax.step.state import TrainState
from tests.helpers import assert_trees_equal

RESUME = {"rng": np.array([3, 4], np.uint32), "position": {"epoch": 1}, "history": {"loss": [0.5, 0.25]}}


def make_state():
    params = {"w": jnp.arange(6.0).reshape(2, 3), "narrow": jnp.ones(3, jnp.uint4), "none": jnp.zeros((0, 2))}
    return TrainState(params, {"m": jnp.ones(2), "key": jax.random.key(3)}, jnp.int32(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "checkpoints"
    saver = Checkpointer.at(path)
    saver.save_latest(make_state(), 1, {"loss": 0.5}, resume=RESUME)
    saver.wait()
    return path


@pytest.fixture
def save(saved, tmp_path):
    """A copy of the save, to do something to."""
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints" / "0"


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("absl").disabled = True  # orbax tells of its own errors at length
    yield
    logging.getLogger("absl").disabled = False


def assert_damaged(save, match=""):
    """A load fails with a text that names the save, and a list of what there is does not fail."""
    for target in (None, make_state()):
        with pytest.raises(DamagedError, match=rf"checkpoint {save} is damaged: [\s\S]*{match}"):
            Checkpointer.at(save.parent).load_latest(target=target)
    (save.parent / "index.json").unlink(missing_ok=True)
    assert Checkpointer.at(save.parent).list_available_checkpoints()["latest"] == save


def is_damaged(save):
    """Whether a load says so; else it gives what was saved."""
    state = make_state()
    with contextlib.suppress(DamagedError):
        loaded = Checkpointer.at(save.parent).load_latest(target=state)["state"]
        assert_trees_equal((loaded.params, loaded.opt_state["m"]), (state.params, state.opt_state["m"]))
        return False
    return True


def files_of(save):
    return sorted(path for path in save.rglob("*") if path.is_file())


# ---- a save is looked at before it counts


def lose(path):
    path.unlink()


def shorten(path):
    path.write_bytes(path.read_bytes()[:20])


@pytest.mark.parametrize("fault", [lose, shorten])
@pytest.mark.parametrize("name", ["state/manifest.ocdbt", "state/_METADATA", "meta/metadata"])
def test_a_save_that_a_load_could_not_read_is_told_and_does_not_count(tmp_path, monkeypatch, name, fault):
    saver = Checkpointer.at(tmp_path)
    saver.save_latest(make_state(), 1)
    saver.wait()
    handler = files._orbax(together=False)
    save = handler.save

    def save_and_lose(path, **arguments):
        save(path, **arguments)
        fault(path / name)

    with monkeypatch.context() as storage:
        storage.setattr(handler, "save", save_and_lose)
        saver.save_latest(make_state(), 2)
        with pytest.raises(
            SaveError, match="the checkpoint of step 2 could not be saved: OSError: it was written, but"
        ) as told:
            saver.wait()
    assert f"cannot be read: checkpoint {tmp_path / '1.draft'} is damaged" in str(told.value)
    assert str(told.value).endswith(f"the newest whole one is {tmp_path / '0'}")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["0", "index.json"]
    saver.save_latest(make_state(), 3)
    saver.wait()
    assert Checkpointer.at(tmp_path).load_latest()["step"] == 3


# ---- hostile


def rewrite_array(save, name, change):
    """Changes the metadata of an array where orbax keeps it."""
    import tensorstore

    spec = {"driver": "ocdbt", "base": f"file://{save / 'state'}/"}
    store = tensorstore.KvStore.open(spec).result()
    held = json.loads(store.read(f"{name}/zarr.json").result().value)
    change(held)
    store.write(f"{name}/zarr.json", json.dumps(held)).result()


def set_shape(*shape):
    return lambda held: held.update(shape=list(shape))


def set_chunk(*shape):
    return lambda held: held["chunk_grid"]["configuration"].update(chunk_shape=list(shape))


HOSTILE = {
    "a shape of 1e15": ("params.w", set_shape(10**8, 10**7), r"params/w: float32\[100000000, 10000000\], not float32"),
    "another shape": ("params.w", set_shape(3, 2), r"params/w: float32\[3, 2\], not float32\[2, 3\]"),
    "another dtype": ("params.w", lambda held: held.update(data_type="int32"), "params/w: int32"),
    "a chunk of 1e15": ("params.w", set_chunk(10**8, 10**7), r"params/w is of shape \[2, 3\], but written in parts"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_array_that_says_it_is_another_one_takes_no_memory(save, name):
    array, change, text = HOSTILE[name]

    def both(held):
        change(held)
        codecs = held["codecs"]
        for codec in codecs:
            inner = codec.get("configuration", {})
            if "chunk_shape" in inner and change.__qualname__.startswith("set_chunk"):
                inner["chunk_shape"] = held["chunk_grid"]["configuration"]["chunk_shape"]

    rewrite_array(save, array, both)
    assert_damaged(save, text)


def read_content(save):
    return json.loads((save / "meta" / "metadata").read_text())["content"]


def reseal(save, content):
    (save / "meta" / "metadata").write_text(json.dumps({"content": content, "checksum": seals.seal(content)}))


def test_a_save_that_is_larger_than_the_machine_takes_no_memory(save):
    huge = [10**8, 10**7]

    rewrite_array(save, "params.w", set_shape(*huge))
    content = read_content(save)
    content["arrays"]["params/w"] = [huge, "float32"]
    reseal(save, content)
    assert_damaged(save, r"its arrays say that they take 4\d{15} bytes; this machine has \d+ in all")
    del content["arrays"]  # as saves of before had it
    reseal(save, content)
    assert_damaged(save, r"its arrays say that they take 4\d{15} bytes")


def make_socket(path):
    folder = os.open(path.parent, os.O_RDONLY)
    short = f"/proc/self/fd/{folder}/{path.name}"  # a socket's path may have 107 letters
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(short)
    os.close(folder)


OTHERS = {
    "a pipe": os.mkfifo,
    "a link to a pipe": lambda path: (os.mkfifo(path.parents[1] / "pipe"), path.symlink_to(path.parents[1] / "pipe")),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a folder": lambda path: path.symlink_to(path.parents[1]),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", ["meta/metadata", "state/manifest.ocdbt", "state/_METADATA", "_CHECKPOINT_METADATA"])
def test_what_is_no_file_is_not_opened(save, name, other):
    (save / name).unlink()
    OTHERS[other](save / name)
    assert_damaged(save, r"\S* is no file")


def test_a_socket_or_a_folder_in_place_of_a_file_is_no_file(save):
    path = save / "state" / "manifest.ocdbt"
    path.unlink()
    path.mkdir()
    assert_damaged(save)
    path.rmdir()
    make_socket(path)
    assert_damaged(save, "manifest.ocdbt is no file")


def test_a_link_to_nothing_or_to_itself_is_damage(save):
    path = save / "state" / "manifest.ocdbt"
    path.unlink()
    path.symlink_to(path)
    assert_damaged(save)
    path.unlink()
    path.symlink_to("nothing")
    assert_damaged(save)


def test_files_that_are_links_to_files_are_read(save, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    for number, path in enumerate(files_of(save)):
        path.rename(store / str(number))
        path.symlink_to(store / str(number))
    assert not is_damaged(save)


def test_a_file_that_is_endless_is_not_read(save):
    with (save / "meta" / "metadata").open("r+b") as file:
        file.truncate(1 << 40)
    assert_damaged(save, "meta/metadata has 1099511627776 bytes, more than a file of its kind can have")


def test_a_save_that_may_not_be_looked_at_is_not_called_damaged(save, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)  # root may look at all
    with pytest.raises(PermissionError):
        Checkpointer.at(save.parent).load_latest()


# ---- what any accident does


@pytest.mark.thorough
def test_a_file_that_is_gone_or_cut_short_is_damage_or_of_no_matter(save):
    damaged = set()
    for path in files_of(save):
        whole = path.read_bytes()
        for rest in (None, b"", whole[: len(whole) // 2], whole[:-1], whole + b"x", b"\xff" * len(whole)):
            path.unlink() if rest is None else path.write_bytes(rest)
            if is_damaged(save):
                damaged.add(str(path.relative_to(save)).partition("/d/")[0])
            path.write_bytes(whole)
    assert {"meta/metadata", "state/_METADATA", "state/manifest.ocdbt", "state"} <= damaged
    assert not is_damaged(save)


@pytest.mark.thorough
def test_bytes_that_are_others_are_damage_or_of_no_matter(save):
    rng = random.Random(0)
    for path in files_of(save):
        whole = path.read_bytes()
        for _ in range(8):
            broken = bytearray(whole)
            for _ in range(rng.choice([1, 1, 5])):
                if broken:
                    broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
            path.write_bytes(broken)
            is_damaged(save)  # or it is as it was
        path.write_bytes(whole)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
FUZZ = hypothesis.settings(
    max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)


@pytest.fixture(scope="module")
def broken(saved, tmp_path_factory):
    """One more copy, whose meta values change again and again."""
    path = tmp_path_factory.mktemp("broken") / "checkpoints"
    shutil.copytree(saved, path)
    (path / "index.json").unlink()
    return path / "0"


@FUZZ
@hypothesis.given(JSON)
def test_anything_under_a_right_seal_is_damage(broken, content):
    reseal(broken, content)
    with pytest.raises(DamagedError, match="is damaged"):
        Checkpointer.at(broken.parent).load_latest()
    assert Checkpointer.at(broken.parent).list_available_checkpoints().keys() == {"latest"}


@pytest.mark.thorough
@FUZZ
@hypothesis.given(st.data(), JSON)
def test_any_one_value_under_a_right_seal_is_damage_or_taken(saved, broken, data, value):
    place = changed = read_content(saved / "0")
    while True:
        key = data.draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        if isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        if data.draw(st.booleans()):
            place[key] = value
        else:
            del place[key]
        break
    reseal(broken, changed)
    checkpointer = Checkpointer.at(broken.parent)
    checkpointer.list_available_checkpoints()
    for target in (None, make_state()):
        error = None
        try:
            assert isinstance(checkpointer.load_latest(target=target)["step"], int)
        except ValueError as told:
            error = told
        # A key of another kind is a state that does not fit the model.
        assert error is None or isinstance(error, DamagedError) or "does not match this model" in str(error)


@pytest.mark.parametrize("files", ["0", [], {"train/loss": 1}, 7])
def test_a_history_under_a_right_seal_that_names_no_files_is_lost_and_the_state_is_not(broken, saved, files):
    content = read_content(saved / "0")
    reseal(broken, {**content, "history": {**content["history"], "files": files}})
    assert Checkpointer.at(broken.parent).load_latest(target=make_state())["step"] > 0


def test_a_damaged_save_stands_back_behind_the_one_before_it(tmp_path, caplog):
    saver = Checkpointer.at(tmp_path)
    for step in (1, 2):
        saver.save_checkpoint(make_state(), step)
    saver.wait()
    (tmp_path / "1" / "meta" / "metadata").unlink()
    os.mkfifo(tmp_path / "1" / "meta" / "metadata")
    assert Checkpointer.at(tmp_path).load_latest(target=make_state())["step"] == 1
    assert "is no file" in caplog.messages[0]
    with pytest.raises(DamagedError, match="there is no other one that would do"):
        Checkpointer.at(tmp_path).load_checkpoint(2, target=make_state())


def test_meta_values_that_no_state_needs_do_not_hinder(save):
    reseal(save, {**read_content(save), "later": {"a": [1]}})
    assert not is_damaged(save)


def test_an_optimiser_of_default_containers_still_fits(tmp_path):
    params = {"w": jnp.ones(2)}
    state = TrainState(params, adam(1e-2).init(params), jnp.int32(1))
    saver = Checkpointer.at(tmp_path)
    saver.save_latest(state, 1)
    assert jax.tree.structure(saver.load_latest()["state"].opt_state) == jax.tree.structure(state.opt_state)


def test_damage_is_told_by_the_name_that_the_user_gave(tmp_path):
    path = tmp_path / "[x]"
    saver = Checkpointer.at(path)
    saver.save_latest(make_state(), 1)
    saver.wait()
    os.truncate(path / "0" / "state" / "manifest.ocdbt", 10)
    with pytest.raises(DamagedError) as told:
        Checkpointer.at(path).load_latest()
    assert str(path / "0" / "state") in str(told.value)
    assert "learnax-" not in str(told.value)
