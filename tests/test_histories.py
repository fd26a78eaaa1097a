"""Histories of metrics beside the saves: as they were, however a run is cut, and never a reason to lose a state."""

import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from learnax.checkpoint import Checkpointer, SaveError, files, history
from learnax.step.state import TrainState
from tests.helpers import ROOT

RNG = np.array([3, 4], np.uint32)


class Trained:
    """A run that logs and saves, and goes on from its latest save as a trainer does."""

    def __init__(self, path, **options):
        self.checkpointer = Checkpointer.at(path, **options)
        self.metrics = {}
        self.step = 0

    def load(self, asked=-1):
        loaded = self.checkpointer.load(asked)
        self.checkpointer.leave_behind(loaded["number"])
        self.metrics = {name: values.tolist() for name, values in loaded["resume"]["history"].items()}
        self.step = loaded["step"]
        return self

    def train(self, steps, *, epochs=0):
        for _ in range(steps):
            self.step += 1
            for name, value in metrics_of(self.step).items():
                self.metrics.setdefault(name, []).append(value)
        for _ in range(epochs):
            self.metrics.setdefault("val/loss", []).append(1 / (1 + self.step))
        return self

    def save(self, **options):
        state = TrainState({"w": np.full(3, self.step, np.float32)}, {}, self.step)
        resume = {"rng": RNG, "position": {"batch": self.step}, "history": self.metrics}
        self.checkpointer.save_latest(state, self.step, resume=resume, **options)
        self.checkpointer.wait()
        return self

    def close(self):
        self.checkpointer.close()
        return self


def metrics_of(step):
    """Values whose every bit matters: NaN, infinities, the smallest number."""
    special = {3: float("nan"), 5: float("inf"), 7: -0.0, 11: 5e-324}
    return {"train/loss": special.get(step, 1 / step), "train/rate": 0.1 * step}


def assert_history(loaded, steps):
    values = loaded["resume"]["history"]
    for name in ("train/loss", "train/rate"):
        expected = np.array([metrics_of(step)[name] for step in range(1, steps + 1)])
        assert values[name].tobytes() == expected.tobytes(), name


def bins(path):
    return sorted((path / "history").glob("*.bin"))


def latest(path):
    return Checkpointer.at(path).load_latest()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "checkpoints"


def size_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# ---- how much is written


def test_a_save_writes_as_much_after_a_million_steps_as_after_ten(tmp_path):
    written = {}
    for steps in (10, 1_000_000):
        path = tmp_path / str(steps) / "checkpoints"
        run = Trained(path)
        run.metrics = {"train/loss": np.random.default_rng(0).normal(size=steps).tolist()}
        run.step = 1_000_000  # of the same number of digits
        run.save()
        (file,) = bins(path)
        before = file.stat().st_size
        run.metrics["train/loss"] += [0.5] * 10
        run.save()
        written[steps] = file.stat().st_size - before, size_of(path / "1")
        assert len(latest(path)["resume"]["history"]["train/loss"]) == steps + 10
        run.close()
    (frame, save), (other, large) = written.values()
    assert frame == other < 200
    assert abs(save - large) < 4096  # the storage library's own files differ a little; a history would take megabytes


def test_what_did_not_grow_writes_nothing(path):
    run = Trained(path).train(5).save()
    (file,) = bins(path)
    before = file.stat().st_size
    run.save()
    assert bins(path) == [file]
    assert file.stat().st_size == before
    assert_history(latest(path), 5)


# ---- however a run is cut


def test_sessions_go_on_where_others_ended_bit_for_bit(path):
    run = Trained(path).train(4).save()
    assert_history(latest(path), 4)
    run.train(3, epochs=1).save().close()
    for session in range(3):
        run = Trained(path).load()
        assert run.metrics["train/loss"][3] == 0.25
        run.train(2).save().train(1, epochs=1).save().close()
        assert_history(latest(path), 7 + 3 * (session + 1))
        assert len(latest(path)["resume"]["history"]["val/loss"]) == session + 2
    assert len(bins(path)) == 4
    run.train(2).save().close()  # another session of the same process
    assert_history(latest(path), 18)


@pytest.mark.thorough
def test_a_chain_that_grew_long_becomes_one_file_and_what_nothing_needs_is_removed(path, monkeypatch):
    monkeypatch.setattr(history, "MOST_FILES", 4)
    run = Trained(path).train(2).save().close()
    for _ in range(6):
        run = Trained(path).load().train(2).save().train(2).save().close()
    assert_history(latest(path), 26)
    assert len(bins(path)) <= 5
    referred = run.checkpointer._folder.referred()
    Trained(path).load().train(1).save().train(1).save().close()
    Trained(path).load().train(1).save().close()
    assert referred
    assert {file.name for file in bins(path)} == run.checkpointer._folder.referred()


def test_another_history_of_the_name_is_another_history(path):
    run = Trained(path).train(9).save()
    run.metrics, run.step = {}, 0
    run.train(4).save()
    assert_history(latest(path), 4)
    run.metrics = {"train/loss": [7.0] * 20}
    run.save()
    assert {name: len(values) for name, values in latest(path)["resume"]["history"].items()} == {"train/loss": 20}


def test_lists_that_do_not_begin_with_what_was_loaded_are_written_whole(path):
    Trained(path).train(6).save().close()
    run = Trained(path).load()
    run.metrics = {"train/loss": [7.0] * 8}
    run.save().close()
    assert latest(path)["resume"]["history"]["train/loss"].tolist() == [7.0] * 8


KILLED = """
import os, signal, sys
from learnax.checkpoint import files
from tests.test_histories import Trained

run = Trained({path!r}).load().train(5).save().train(3)
write = files.write
files.write = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
run.save()
"""


@pytest.mark.processes
def test_a_kill_between_the_histories_and_the_save_loses_and_repeats_nothing(path):
    Trained(path).train(4).save().close()
    killed = subprocess.run([sys.executable, "-c", KILLED.format(path=str(path))], cwd=ROOT, timeout=100, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert_history(latest(path), 9)  # though 12 steps are in the file
    run = Trained(path).load().train(3).save().train(2).save().close()
    assert run.step == 14
    assert_history(latest(path), 14)


def test_a_save_that_fails_behind_its_histories_leaves_them_to_the_next(path, monkeypatch):
    run = Trained(path).train(4).save()
    with monkeypatch.context() as full:
        full.setattr(files, "write", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(SaveError, match="No space left"):
            run.train(3).save()
    run.train(2).save()
    assert_history(latest(path), 9)


def test_half_a_frame_is_left_behind_and_the_next_one_begins_another_file(path, monkeypatch):
    import resource

    run = Trained(path).train(4).save()
    (file,) = bins(path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    run.train(2000)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        for _ in range(2):
            with pytest.raises(SaveError, match="File too large"):
                run.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert bins(path) == [file]  # what the second try began, it has taken away
    run.train(1).save().close()
    assert len(bins(path)) == 2
    assert_history(latest(path), 2005)
    assert_history(Trained(path).load().train(1).save().checkpointer.load_latest(), 2006)


@pytest.mark.parametrize("gone", ["the file", "the folder"])
def test_files_that_vanish_in_the_midst_of_a_run_are_written_again(path, gone):
    import shutil

    Trained(path).train(4).save().close()
    run = Trained(path).load().train(2).save()
    bins(path)[0].unlink() if gone == "the file" else shutil.rmtree(path)
    run.train(2).save()
    assert_history(latest(path), 8)


# ---- histories that are not what was written


def cut(file, size):
    os.truncate(file, size)


def flip(file, size):
    content = bytearray(file.read_bytes())
    content[size - 1] ^= 1
    file.write_bytes(content)


def remove(file, size):
    file.unlink()


def swap(file, size):
    file.write_bytes(np.random.default_rng(0).bytes(2 * size))  # as of another run, and longer


def pipe(file, size):
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("harm", [cut, flip, remove, swap, pipe])
def test_of_two_saves_the_one_whose_history_is_whole_is_taken(path, harm, caplog):
    Trained(path).train(4).save().close()
    run = Trained(path).load().train(4).save().close()
    (second,) = [file for file in bins(path) if file.name == run.checkpointer._saver.history._chain[-1].file]
    harm(second, second.stat().st_size - (harm is cut))
    loaded = latest(path)
    assert loaded["step"] == 4
    assert_history(loaded, 4)
    lost, taken = caplog.messages
    assert lost.startswith(f"the histories of checkpoint {path / '1'} are lost: {second} ")
    assert taken == "the checkpoint before it is taken in its place: that of step 4"
    # Who wants the state alone is not kept from the newest.
    assert Checkpointer.at(path).load_latest(resume=False)["step"] == 8


def test_a_longer_file_is_what_later_saves_have_written(path):
    run = Trained(path, save_every=1).train(4)
    run.checkpointer.save_checkpoint(
        TrainState({}, {}, 4), 4, resume={"rng": RNG, "position": {}, "history": run.metrics}
    )
    run.train(5).save().close()
    with bins(path)[0].open("ab") as file:
        file.write(b"half a frame of a save that never was")
    assert_history(Checkpointer.at(path).load_checkpoint(4), 4)
    assert_history(latest(path), 9)


def test_where_no_history_is_whole_the_newest_state_is_taken_with_nan_in_its_place(path, caplog):
    run = Trained(path).train(4).save().train(4, epochs=2).save().close()
    for file in bins(path):
        file.unlink()
    loaded = latest(path)
    assert loaded["step"] == 8
    assert loaded["state"].params["w"].tolist() == [8, 8, 8]
    assert loaded["resume"]["position"] == {"batch": 8}
    np.testing.assert_equal(
        loaded["resume"]["history"],
        {"train/loss": np.full(8, np.nan), "train/rate": np.full(8, np.nan), "val/loss": np.full(2, np.nan)},
    )
    assert caplog.messages[-1] == (
        f"checkpoint {path / '1'} is taken all the same, for its state is whole: in `metrics`, NaN stands for what was "
        "logged up to step 8"
    )
    Trained(path).load().train(2).save().close()  # and it goes on
    np.testing.assert_equal(latest(path)["resume"]["history"]["train/rate"], [np.nan] * 8 + [0.1 * 9, 0.1 * 10])
    assert run.step == 8


def test_one_save_that_was_copied_elsewhere_loads_with_a_word_on_what_is_not_there(path, tmp_path, caplog):
    import shutil

    Trained(path).train(4).save().close()
    copied = shutil.copytree(path / "0", tmp_path / "elsewhere" / "best of all")
    loaded = Checkpointer.at(tmp_path / "other").load_checkpoint(str(copied))
    assert (loaded["step"], loaded["number"]) == (4, -1)
    assert np.isnan(loaded["resume"]["history"]["train/loss"]).all()
    assert re.search(r"best of all are lost: .*\.bin is missing$", caplog.messages[0])
    assert "is taken all the same" in caplog.messages[1]
    caplog.clear()
    assert Checkpointer.at(tmp_path / "other").load_checkpoint(copied, resume=False)["step"] == 4
    assert not caplog.messages


# ---- saves from before


def write_as_before(path, number, steps):
    """A save with its histories in itself."""
    run = Trained(path).train(steps)
    meta = {"step": steps, "numbered": False, "best": None, "time": 1.0, "metrics": None, "position": {"batch": steps}}
    meta |= {"history": [[name, steps] for name in run.metrics], "script": None}
    joined = np.concatenate([np.array(values) for values in run.metrics.values()])
    arrays = {"params/w": np.full(3, steps, np.float32), "step": np.int32(steps), "rng": RNG, "history": joined}
    files.write(path / str(number), arrays, meta)


def test_a_save_that_has_its_histories_in_itself_is_read_and_gone_on_from(path):
    path.mkdir(parents=True)
    write_as_before(path, 0, 6)
    assert_history(latest(path), 6)
    assert list(Checkpointer.at(path).list_available_checkpoints()) == ["latest", 6]
    run = Trained(path).load().train(4).save()
    assert run.checkpointer.path.joinpath("1").is_dir()
    assert_history(latest(path), 10)
    run.train(1).save().close()
    assert_history(latest(path), 11)


# ---- a past that is left


@pytest.mark.thorough
@pytest.mark.parametrize("links", [True, False], ids=["hard links", "copies"])
def test_saves_that_are_set_aside_keep_their_histories(path, links, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError(95, "not supported")))
    first = Trained(path).train(3).save().train(3).save().close()
    Trained(path).load().train(3).save().close()
    older = Trained(path).load()
    (step,) = {older.checkpointer.load(asked)["step"] for asked in ("6",)}
    Trained(path).load(step).train(1).save().close()
    aside = path.with_name("checkpoints.1")
    assert_history(latest(path), 7)
    assert_history(latest(aside), 9)
    assert first.step == 6
    fresh = Trained(path)
    fresh.checkpointer.leave_behind(None)
    fresh.train(2).save().close()
    assert_history(latest(path), 2)
    assert_history(latest(path.with_name("checkpoints.2")), 7)
    assert len(bins(path)) == 1


def test_a_name_in_a_save_leads_nowhere_else(tmp_path):
    outside = tmp_path / "outside.bin"
    outside.write_bytes(b"")
    with pytest.raises(history.HistoryLostError, match=r"history/outside\.bin is missing"):
        history.read(tmp_path / "saves", {"files": [["../../outside.bin", 0, 0]], "lengths": {}})
