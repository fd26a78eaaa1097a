"""What goes wrong with checkpoints: full disks, lost folders, damaged files, slow storage, another script."""

import contextlib
import gc
import logging
import os
import pickle
import random
import re
import resource
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learnax.checkpoint import Checkpointer, DamagedError, SaveError, files, writer
from learnax.checkpoint.folder import Folder
from learnax.registry import Registry
from learnax.run import Run
from learnax.step.state import TrainState
from tests.helpers import MLP, MemoryRun, assert_trees_equal, host, make_data, run_script
from tests.test_checkpoint import make_state, step_of
from tests.test_resume import EPOCHS, STEPS, assert_same_run, make, on_disk, stop, trained

# Where a file cannot be read, orbax leaves tasks behind in a loop that is closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _nothing_is_left_for_other_tests():
    yield
    gc.collect()


class At:
    """An action that calls something, right after a step."""

    def __init__(self, step, call):
        self._step, self._call = step, call

    def next_due(self, step):
        return self._step if step < self._step else float("inf")

    def __call__(self, moment):
        self._call()


def wide(**options):
    """A run whose checkpoints take some hundred kB, and one of each five steps."""
    return make(model=MLP(2**14), save_every=5, **options)


def make_wide(checkpointer, step):
    state = TrainState({"wide": jnp.full((300, 1000), float(step)), "scale": jnp.float32(step)}, {}, jnp.int32(step))
    checkpointer.save_latest(state, step)


# ---- storage that fails

FULL = """
import logging, resource, sys
from learnax.checkpoint import SaveError
from tests.test_faults import At, on_disk, wide
import pathlib

logging.basicConfig(format="%(message)s", stream=sys.stdout)
trainer = wide()

def limit(size):
    trainer.checkpointer._saver.writer.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))

trainer.hooks.saves.append(At(6, lambda: limit(100_000)))
{more}
try:
    trainer.train()
except SaveError as error:
    print("raised:", error)
    print("because of:", type(error.__cause__).__name__)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
print("steps", trainer.log.step, "latest", on_disk(pathlib.Path({registry!r})).load_latest()["step"])
print("left", sorted(path.name for path in trainer.checkpointer.path.iterdir()))
"""


@pytest.mark.processes
def test_a_disk_that_is_full_for_a_while_ends_nothing_and_is_told_of_once(tmp_path, registry_path):
    more = "trainer.hooks.saves.append(At(12, lambda: limit(-1)))"
    done = run_script(FULL.format(more=more, registry=str(registry_path)), tmp_path)
    lines = done.stdout.splitlines()
    failures = [line for line in lines if "could not be saved" in line]
    assert len(failures) == 1, done.stdout
    assert re.match(r"the checkpoint of step 10 could not be saved: .*(EFBIG|[Ff]ile too large)", failures[0])
    assert failures[0].endswith("checkpoints/0; training goes on, and the next save tries again")
    assert lines[-2] == "steps 15 latest 15"
    assert re.match(r"left \['\d', '\d', 'history', 'index.json'\]", lines[-1])  # no half a save is left


@pytest.mark.processes
def test_a_disk_that_stays_full_leaves_the_last_good_one_and_raises_at_the_end(tmp_path, registry_path):
    done = run_script(FULL.format(more="", registry=str(registry_path)), tmp_path)
    lines = done.stdout.splitlines()
    (raised,) = [line for line in lines if line.startswith("raised:")]
    assert raised.startswith("raised: the checkpoint of step 15 could not be saved: ")
    assert raised.endswith("the newest whole one is " + str(registry_path / "tests" / "memory" / "checkpoints" / "0"))
    assert sum("could not be saved" in line for line in lines) == 2  # once when it began, and what is raised
    assert lines[-2:] == ["steps 15 latest 5", "left ['0', 'history', 'index.json']"]


def test_what_is_still_written_of_a_failed_save_is_removed_too(tmp_path):
    folder, writes = Folder(tmp_path), []

    def write():  # as threads do that were not waited for
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            path = tmp_path / "7.draft.tmp" / "state" / f"{len(writes)}"
            with contextlib.suppress(FileNotFoundError):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"a part of an array")
                writes.append(path)

    (tmp_path / "7").mkdir()
    (tmp_path / "7.draft").mkdir()
    thread = threading.Thread(target=write)
    thread.start()
    while not writes:
        time.sleep(1e-3)
    folder.discard(7)
    thread.join()
    assert len(writes) > 10
    assert [path.name for path in tmp_path.iterdir()] == ["7"]


@pytest.mark.thorough
def test_a_folder_that_is_gone_is_made_again(registry_path):
    trainer = make(save_every=5)
    trainer.hooks.saves.append(At(7, lambda: (trainer.checkpointer.wait(), shutil.rmtree(trainer.checkpointer.path))))
    trainer.train()
    assert on_disk(registry_path).load_latest()["step"] == 15
    assert list(on_disk(registry_path).list_available_checkpoints()) == ["latest", 15]


@pytest.mark.thorough
def test_a_folder_that_became_something_else_is_told_of_and_raised_at_the_end(registry_path, caplog):
    trainer = make(save_every=5)
    path = trainer.checkpointer.path

    def replace():
        trainer.checkpointer.wait()
        shutil.rmtree(path)
        path.write_text("no folder")

    trainer.hooks.saves.append(At(7, replace))
    with pytest.raises(
        SaveError, match=r"^the checkpoint of step 15 could not be saved: .*; which ones there are cannot be seen: "
    ):
        trainer.train()
    assert len(trainer.metrics["train/loss"]) == 15
    assert sum("could not be saved" in message for message in caplog.messages) == 1


@pytest.mark.thorough
def test_a_folder_that_cannot_be_written_to_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "file").touch()
    trainer = make(registry=Registry("tests", tmp_path / "file"))
    with pytest.raises(NotADirectoryError, match=re.escape(str(tmp_path / "file"))):
        trainer.train()
    assert trainer.log.step == 0
    (tmp_path / "file").unlink()
    trainer.train()
    assert trainer.log.step == 15


@pytest.mark.thorough
def test_storage_that_is_slower_than_the_cadence_skips_saves_and_says_so_once(tmp_path, monkeypatch, caplog):
    write, gate = files.write, threading.Semaphore(0)
    monkeypatch.setattr(files, "write", lambda *args: (gate.acquire(), write(*args)))
    monkeypatch.setattr(writer, "PENDING", 2)
    checkpointer = Checkpointer.at(tmp_path / "slow", save_every=1, checkpoint_every=10)
    saved = [step for step in range(1, 10) if checkpointer.maybe_save_checkpoints(make_state(step), step)]
    assert saved == [1, 2]
    threading.Timer(0.5, gate.release).start()
    began = time.perf_counter()
    assert checkpointer.maybe_save_checkpoints(make_state(10), 10)  # waits for room: a numbered one is not skipped
    assert time.perf_counter() - began > 0.3
    # 20 would have to wait for another numbered one.
    assert not any(checkpointer.maybe_save_checkpoints(make_state(step), step) for step in range(11, 30))
    gate.release(10)
    checkpointer.wait()
    checkpointer.close()
    assert list(checkpointer.list_available_checkpoints()) == ["latest", 2, 10]
    assert caplog.messages == [
        "the save of step 3 is skipped: the one before it is still being written; where storage is slower than "
        "save_every or checkpoint_every, save less often",
        "26 save(s) in all were skipped: storage is slower than their cadence",
    ]


@pytest.mark.thorough
def test_large_states_wait_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "PENDING_BYTES", 1 << 20)
    write, taken = files.write, []
    checkpointer = Checkpointer.at(tmp_path / "large", save_every=1)
    monkeypatch.setattr(
        files, "write", lambda *args: (time.sleep(0.2), taken.append(len(checkpointer._saver.pending)), write(*args))
    )
    for step in (1, 2, 3):
        make_wide(checkpointer, step)  # by hand: waits, and is not skipped
    checkpointer.wait()
    assert taken == [1, 1, 1]
    assert step_of(checkpointer.load_latest()) == 3


# ---- snapshots


@pytest.mark.thorough
@pytest.mark.parametrize("count", [1, 4])
def test_a_save_leaves_the_state_to_be_updated_in_place(count):
    trainer = make(devices=jax.devices()[:count], save_every=1, steps_per_execution=1)
    places = []
    trainer.hooks.saves.append(At(3, lambda: places.append(trainer.programs.places(trainer.parts.progress.live))))
    trainer.hooks.saves.append(At(9, lambda: places.append(trainer.programs.places(trainer.parts.progress.live))))
    trainer.train()
    assert places[0] == places[1]


@pytest.mark.thorough
def test_copies_are_made_into_the_same_memory_again(tmp_path):
    checkpointer = Checkpointer.at(tmp_path / "memory")
    checkpointer.prepare(make_state(1))
    checkpointer.wait()
    (memory,) = checkpointer._saver._camera._free
    addresses = {path: buffer.ctypes.data for path, buffer in memory.items()}
    checkpointer.prepare(make_state(1))  # as each call of train() does
    for step in (1, 2):
        checkpointer.save_latest(make_state(step), step)
        checkpointer.wait()
    (memory,) = checkpointer._saver._camera._free
    assert {path: buffer.ctypes.data for path, buffer in memory.items()} == addresses
    assert set(addresses) >= {"params/Dense_0/kernel", "params/Dense_0/bias", "step"}
    assert step_of(checkpointer.load_latest()) == 2


def test_arrays_without_elements_come_back(tmp_path):
    params = {"none": jnp.zeros((0, 3), jnp.bfloat16), "some": jnp.ones(2)}
    checkpointer = Checkpointer.at(tmp_path / "empty")
    checkpointer.save_latest(TrainState(params, {}, 1), 1)
    loaded = checkpointer.load_latest()["state"]
    assert_trees_equal(loaded.params, params)
    assert loaded.params["none"].dtype == jnp.bfloat16


@pytest.mark.thorough
def test_histories_are_saved_as_they_are_however_they_grew(tmp_path):
    checkpointer = Checkpointer.at(tmp_path / "history")
    resume = {"rng": np.zeros(2, np.uint32), "position": {}}
    first, rng = [], np.random.default_rng(0)
    for length in (0, 1, 5, 5, 40):
        first += rng.normal(size=length - len(first)).tolist()
        checkpointer.save_latest(make_state(1), 1, resume={**resume, "history": {"loss": first}})
        assert checkpointer.load_latest()["resume"]["history"]["loss"].tolist() == first
    for other in ([7.0] * 60, [8.0] * 3, []):  # lists of the same name that are not that one
        checkpointer.save_latest(make_state(1), 1, resume={**resume, "history": {"loss": other}})
        assert checkpointer.load_latest()["resume"]["history"]["loss"].tolist() == other
    checkpointer.save_latest(make_state(1), 1, resume={**resume, "history": {"loss": first[:2]}})
    assert checkpointer.load_latest()["resume"]["history"]["loss"].tolist() == first[:2]


def test_a_best_save_that_failed_is_not_taken_for_the_best(tmp_path, monkeypatch, caplog):
    checkpointer = Checkpointer.at(tmp_path / "best", keep_best=True)
    assert checkpointer.update_best_checkpoint(make_state(1), 2.0, 1)
    checkpointer.wait()
    with monkeypatch.context() as full:
        full.setattr(files, "write", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert checkpointer.update_best_checkpoint(make_state(2), 1.0, 2)
        with pytest.raises(SaveError, match="No space left"):
            checkpointer.wait()
    assert step_of(checkpointer.load_best()) == 1
    assert checkpointer.update_best_checkpoint(make_state(3), 1.5, 3)
    assert step_of(checkpointer.load_best()) == 3
    assert not checkpointer.update_best_checkpoint(make_state(4), 1.75, 4)


# ---- files that are not what was written


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory):
    path = tmp_path_factory.mktemp("two") / "checkpoints"
    checkpointer = Checkpointer.at(path)
    resume = {"rng": np.array([3, 4], np.uint32), "position": {"epoch": 1}, "history": {"train/loss": [0.5] * 50}}
    for step in (1, 2):
        checkpointer.save_latest(make_state(step), step, {"loss": 0.25}, resume=resume)
    checkpointer.wait()
    return path


def spoil(folder, chance):
    """Does harm to a file of a save: cuts it, changes a byte, empties or removes it; says what."""
    victims = sorted(path for path in folder.rglob("*") if path.is_file())
    (victim,) = chance.choices(victims, [path.stat().st_size for path in victims])
    content = victim.read_bytes()
    place = chance.randrange(max(len(content), 1))
    kind = chance.choice(["cut", "flip", "flip", "flip", "remove", "empty"])
    if kind == "remove":
        victim.unlink()
    elif kind == "flip" and content:
        victim.write_bytes(
            content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]
        )
    else:
        victim.write_bytes(content[:place] if kind == "cut" else b"")
    return f"{kind} {victim.name} at {place}"


@pytest.mark.thorough
def test_damage_anywhere_is_noticed_and_the_one_before_is_taken(two_saves, tmp_path, caplog):
    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    expected = Checkpointer.at(two_saves).load_latest()
    noticed = 0
    for trial in range(60):
        path = tmp_path / "spoiled"
        shutil.copytree(two_saves, path)
        what = f"trial {trial} of seed {seed}: {spoil(path / '1', chance)}"
        caplog.clear()
        loaded = Checkpointer.at(path).load_latest(target=make_state(0))
        messages = [record.getMessage() for record in caplog.records if record.name == "learnax"]
        if messages:
            noticed += 1
            damage, taken = messages
            assert damage.startswith(f"checkpoint {path / '1'} is damaged: "), what
            assert taken == "the checkpoint before it is taken in its place: that of step 1", what
            assert step_of(loaded) == 1, what
        else:  # what was changed means nothing: all is there as it was written
            assert step_of(loaded) == 2, what
            assert_trees_equal(loaded["state"], make_state(2))
            assert {k: loaded[k] for k in ("step", "time", "metrics")} == {
                k: expected[k] for k in ("step", "time", "metrics")
            }
            assert loaded["resume"]["position"] == expected["resume"]["position"], what
            np.testing.assert_equal(loaded["resume"]["history"], expected["resume"]["history"])
            np.testing.assert_equal(loaded["resume"]["rng"], expected["resume"]["rng"])
        shutil.rmtree(path)
    assert noticed > 20, f"seed {seed}"


@pytest.mark.thorough
def test_a_run_goes_on_from_the_one_before_a_damaged_one_and_keeps_that_aside(registry_path, caplog):
    untouched = trained(registry=None)
    stop(step=13)
    path = on_disk(registry_path).path
    newest = max(int(name) for name in os.listdir(path) if name.isdecimal())
    for data in (path / str(newest)).rglob("d/*"):
        os.truncate(data, data.stat().st_size // 2)
    with caplog.at_level(logging.WARNING, "learnax"):
        trainer = make(load_checkpoint=True)
    assert trainer.log.step == 8
    assert f"checkpoint {path / str(newest)} is damaged" in caplog.text
    trainer.train()
    assert_same_run(trainer, untouched)
    assert (path.with_name("checkpoints.1") / str(newest)).is_dir()


@pytest.mark.thorough
def test_where_all_are_damaged_that_is_an_error_and_no_fresh_start(registry_path):
    trained(num_epochs=1)
    path = on_disk(registry_path).path
    for save in path.iterdir():
        if save.name.isdecimal():
            shutil.rmtree(save / "state")
    with pytest.raises(DamagedError, match=r"^checkpoint .* is damaged: .*; there is no other one that would do$"):
        make(load_checkpoint=True)


def test_a_named_checkpoint_that_is_damaged_is_not_replaced_by_another(tmp_path):
    checkpointer = Checkpointer.at(tmp_path / "named", keep_best=True)
    checkpointer.save_checkpoint(make_state(1), 1)
    checkpointer.update_best_checkpoint(make_state(2), 1.0, 2)
    checkpointer.save_checkpoint(make_state(3), 3)
    checkpointer.wait()
    (checkpointer.path / "1" / "meta" / "metadata").write_text("{}")
    with pytest.raises(DamagedError, match=re.escape(str(checkpointer.path / "1"))):
        checkpointer.load_best()
    assert step_of(checkpointer.load_latest()) == 3
    assert step_of(checkpointer.load_checkpoint(1)) == 1


# ---- checkpoints of 0.1.0


def write_old(path, step, **more):
    """As 0.1.0 did."""
    path.mkdir(parents=True, exist_ok=True)
    held = {"state": make_state(step)._replace(step=step), "step": step, "time": 1.7e9 + step, **more}
    for name in ("latest", step):
        (path / f"state_{name}.pyd").write_bytes(pickle.dumps(held))


def test_old_checkpoints_load_through_the_same_calls_until_there_are_newer_ones(tmp_path):
    path = tmp_path / "old"
    write_old(path, 100)
    write_old(path, 200, metrics={"val/loss": 0.5})
    (path / "state_best.pyd").write_bytes((path / "state_100.pyd").read_bytes())
    checkpointer = Checkpointer.at(path, keep_best=True)
    assert list(checkpointer.list_available_checkpoints()) == ["latest", "best", 100, 200]
    assert step_of(checkpointer.load_latest()) == 200
    assert step_of(checkpointer.load_checkpoint("a run's id")) == 200
    assert step_of(checkpointer.load_best(target=make_state(0))) == 100
    loaded = checkpointer.load_checkpoint(200, target=make_state(0))
    assert (loaded["metrics"], loaded["time"], loaded["resume"]) == ({"val/loss": 0.5}, 1.7e9 + 200, None)
    assert_trees_equal(loaded["state"], make_state(200))
    checkpointer.save_latest(make_state(300), 300)
    assert list(checkpointer.list_available_checkpoints()) == ["latest", "best", 100, 200, 300]
    assert step_of(checkpointer.load_latest()) == 300
    assert step_of(checkpointer.load_checkpoint(100)) == 100


def test_of_a_torn_old_checkpoint_the_one_before_is_taken(tmp_path, caplog):
    path = tmp_path / "old"
    write_old(path, 100)
    os.truncate(path / "state_latest.pyd", 500)  # as a kill in the midst of 0.1.0's save left it
    assert step_of(Checkpointer.at(path).load_latest()) == 100
    assert "state_latest.pyd (500 bytes) is torn, or is not a checkpoint of learnax 0.1.0" in caplog.messages[0]
    assert caplog.messages[1] == "the checkpoint before it is taken in its place: that of step 100"


@pytest.mark.thorough
def test_a_run_goes_on_from_an_old_checkpoint_and_others_read_it(registry_path):
    trained_before = trained(registry=None, num_epochs=1)
    state = host(trained_before.train_state)
    path = on_disk(registry_path).path
    path.mkdir(parents=True)
    held = {"state": state._replace(step=5), "step": 5, "time": 1.7e9}
    (path / "state_latest.pyd").write_bytes(pickle.dumps(held))
    assert_trees_equal(Run(MemoryRun.id, path.parent).get_weights(), state.params)
    assert_trees_equal(Run(MemoryRun.id, path.parent).get_train_state().opt_state, state.opt_state)
    trainer = make(load_checkpoint=True)
    assert_trees_equal(trainer.train_state, trained_before.train_state)
    trainer.train()
    assert trainer.log.step == 5 + EPOCHS * STEPS
    assert on_disk(registry_path).load_latest()["step"] == 20
    assert (path / "state_latest.pyd").exists()


def test_an_old_checkpoint_that_would_run_something_is_refused(registry_path):
    path = on_disk(registry_path).path
    path.mkdir(parents=True)
    (path / "state_latest.pyd").write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(
        ValueError, match=r"'posix.system', which no training state needs; opening a checkpoint runs no"
    ):
        make(load_checkpoint=True)


# ---- another script


@pytest.mark.processes
def test_a_change_that_spoils_the_run_is_an_error_another_seed_is_told_of_and_the_rest_is_no_matter(caplog):
    stop(step=9)
    for changed, text in (
        ({"batch_size": 4}, "batch_size was 8 and is 4"),
        ({"train_dataset": make_data(51)}, "len(train_dataset) was 43 and is 51"),
        ({"accumulate_steps": 2, "batch_size": 4}, "batch_size was 8 and is 4, accumulate_steps was 1 and is 2"),
        ({"single_batch": True}, "single_batch was False and is True"),
    ):
        with pytest.raises(ValueError, match="another script") as raised:
            make(load_checkpoint=True, **changed)
        assert str(raised.value) == (
            f"the checkpoint of step 8 was made by another script: {text}. From there, data would be trained on twice "
            "or not at all: use what was, or load_weights=True to begin anew with its parameters"
        )
        make(load_checkpoint=True, load_weights=True, **changed)
    make(load_checkpoint=True, seed=5)
    assert caplog.messages[-1] == "seed was 0 and is 5: the run goes on with the random sequence of its checkpoint"
    caplog.clear()
    # What does no harm, on the other hand, is not spoken of.
    trainer = make(load_checkpoint=True, num_epochs=4, num_workers=1, save_every=3, devices=jax.devices()[:2])
    trainer.train()
    assert trainer.log.step == 20
    assert not caplog.messages


# ---- workers


@pytest.mark.processes
@pytest.mark.timeout(100)
def test_a_worker_that_is_killed_ends_the_run_after_a_save_and_it_goes_on(registry_path):
    import multiprocessing

    untouched = trained(registry=None)
    trainer = make(num_workers=1, save_every=1000, num_epochs=3)

    def kill():
        for process in multiprocessing.active_children():
            if process.name.startswith("grain-process-prefetch-"):
                process.kill()

    trainer.hooks.saves.append(At(6, kill))
    with contextlib.suppress(RuntimeError):  # what it had sent before may be all that this short run needs
        trainer.train()
    assert on_disk(registry_path).load_latest()["step"] == trainer.log.step
    resumed = make(num_workers=1, load_checkpoint=True)
    resumed.train()
    assert_same_run(resumed, untouched)


def test_file_size_limits_are_off_here():
    """The tests of a full disk set one in a process of their own."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert MemoryRun.id == "memory"
