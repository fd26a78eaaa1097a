"""What is asked for and what comes: names, steps, paths and slips; the calls of 0.1.0's checkpointer; links."""

import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from learnax.checkpoint import Checkpointer
from learnax.checkpoint.folder import Folder
from learnax.step.state import TrainState
from tests.test_faults import write_old


def make_state(step):
    return TrainState({"scale": jnp.float32(step)}, {}, jnp.int32(step))


def step_of(loaded):
    assert float(loaded["state"].params["scale"]) == loaded["step"]
    return loaded["step"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of the id 12345678: steps 300 (numbered), 400 (best), 450 (by a name), 500 (latest)."""
    checkpointer = Checkpointer(tmp_path_factory.mktemp("registry"), "12345678", keep_best=True)
    checkpointer.save_checkpoint(make_state(300))
    checkpointer.update_best_checkpoint(make_state(400), 1.0)
    checkpointer.save_checkpoint(make_state(450), suffix="pretrained")
    checkpointer.save_latest(make_state(500))
    checkpointer.close()
    return checkpointer


# ---- what a name stands for


@pytest.mark.parametrize("asked", ["latest", "12345678", "3kx81bz0", "sunny-river-7", "a run of mine", "run12"])
def test_this_runs_id_and_whatever_is_near_no_name_mean_the_latest(saved, asked):
    assert step_of(saved.load_checkpoint(asked)) == 500


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("Best", "'best'"),
        ("bset", "'best'"),
        ("best ", "'best'"),
        ("latest ", "'latest'"),
        ("last", "'latest'"),
        ("LATEST", "'latest'"),
        ("Pretrained", "'pretrained'"),
        ("pretraind", "'pretrained'"),
        ("step 300", "300"),
        ("step_8", "8"),
        (" 300", "300"),
        ("checkpoint-8", "8"),
    ],
)
def test_a_slip_of_a_name_is_an_error_with_what_there_is_and_what_may_be_meant(saved, asked, meant):
    for load in (saved.load, saved.load_checkpoint):
        with pytest.raises(FileNotFoundError) as error:
            load(asked)
        assert str(error.value) == (
            f"no checkpoint {asked!r} in {saved.path}; there are: latest, best, pretrained, 300, 400, 450, 500. Is "
            f"{meant} meant? (This run's id would mean the latest, but is '12345678')"
        )


@pytest.mark.parametrize("asked", ["9", 9, "12345679", "-2", "0"])
def test_a_step_that_is_not_there_is_none_or_an_error(saved, asked):
    if asked == "-2":
        with pytest.raises(FileNotFoundError, match="Is 2 meant"):
            saved.load_checkpoint(asked)
        return
    assert saved.load_checkpoint(asked) is None
    with pytest.raises(FileNotFoundError, match=rf"no checkpoint '{asked}' in .*; there are: latest, best, pretr"):
        saved.load(asked)


def test_a_step_wins_over_an_id_of_the_same_digits(tmp_path):
    checkpointer = Checkpointer(tmp_path, "300")
    checkpointer.save_checkpoint(make_state(300))
    checkpointer.save_latest(make_state(500))
    assert step_of(checkpointer.load_checkpoint("300")) == 300
    checkpointer.close()
    other = Checkpointer(tmp_path, "301")
    other.save_latest(make_state(7))
    assert step_of(other.load_checkpoint("301")) == 7
    other.close()


def test_a_path_is_a_save_or_a_pickle_wherever_it_lies(saved, tmp_path):
    listed = saved.list_available_checkpoints()
    for name, step in (("latest", 500), ("best", 400), ("pretrained", 450), (300, 300)):
        for path in (listed[name], str(listed[name])):
            assert step_of(saved.load_checkpoint(path)) == step
    write_old(tmp_path / "old", 100)
    assert saved.load_checkpoint(tmp_path / "old" / "state_100.pyd")["step"] == 100
    old = Checkpointer.at(tmp_path / "old")
    assert old.load_checkpoint("state_100.pyd")["step"] == 100
    assert saved.load_checkpoint(str(tmp_path / "nowhere")) is None
    with pytest.raises(FileNotFoundError, match=r"^no checkpoint '.*nowhere'; in .* there are: latest, best, pretr"):
        saved.load(tmp_path / "nowhere")


# ---- the calls of 0.1.0


def test_everything_is_called_as_before_by_position_and_by_name(tmp_path):
    checkpointer = Checkpointer(str(tmp_path), "run", 2, 4, 3, True, "val/score", False, None)
    folder = tmp_path / "run" / "checkpoints"
    assert (checkpointer.registry_path, checkpointer.run_id, checkpointer.checkpoint_dir) == (tmp_path, "run", folder)
    policy = {"save_every": 2, "checkpoint_every": 4, "max_to_keep": 3, "keep_best": True, "metric_name": "val/score"}
    policy |= {"minimize_metric": False, "prepare_fn": None}
    assert {name: getattr(checkpointer, name) for name in policy} == policy
    assert Checkpointer(registry_path=tmp_path, run_id="run", **policy).checkpoint_dir == folder
    defaults = Checkpointer(tmp_path, "run")
    assert (defaults.save_every, defaults.checkpoint_every, defaults.max_to_keep) == (300, 5000, None)

    assert checkpointer.load_latest() is checkpointer.load_best() is checkpointer.load_checkpoint(3) is None
    assert checkpointer.list_available_checkpoints() == {}
    first = checkpointer.save_checkpoint(make_state(1), 1, {"val/score": 0.5}, False, None)
    second = checkpointer.save_latest(train_state=make_state(2), step=None, metrics=None)
    assert (first, second) == (folder / "0", folder / "1")
    assert checkpointer.update_best_checkpoint(make_state(3), 0.25, 3) is True
    assert checkpointer.update_best_checkpoint(make_state(4), 0.125) is False
    assert checkpointer.maybe_save_checkpoints(make_state(5), 5, {"val/score": 0.1}) == {}
    assert checkpointer.maybe_save_checkpoints(make_state(6), 6) == {"latest": folder / "3"}
    assert checkpointer.maybe_save_checkpoints(make_state(7), 7, {"val/score": 0.5}) == {"best": folder / "4"}
    due = checkpointer.maybe_save_checkpoints(train_state=make_state(8), step=8, metrics={"val/score": 0.75})
    assert due == {"latest": folder / "5", "numbered": folder / "5", "best": folder / "5"}
    checkpointer.wait()
    assert step_of(checkpointer.load_best()) == step_of(checkpointer.load_latest()) == 8
    loaded = checkpointer.load_checkpoint(path_or_index=1)
    assert (loaded["step"], loaded["metrics"]) == (1, {"val/score": 0.5})
    assert checkpointer.list_available_checkpoints() == {
        **{"latest": folder / "5", "best": folder / "5"},
        **{1: folder / "0", 7: folder / "4", 8: folder / "5"},
    }
    checkpointer.close()


def test_a_name_is_kept_and_replaced_by_its_like_and_best_may_be_said_by_hand(tmp_path):
    checkpointer = Checkpointer(tmp_path, "run", keep_best=True, max_to_keep=1)
    for step in (1, 2):
        checkpointer.save_checkpoint(make_state(step), suffix="pretrained")
    checkpointer.save_checkpoint(make_state(3), is_best=True)
    checkpointer.save_checkpoint(make_state(4), suffix="best")
    checkpointer.save_checkpoint(make_state(5), suffix="latest")
    for step in (6, 7, 8):
        checkpointer.save_checkpoint(make_state(step), suffix=step)
    assert list(checkpointer.list_available_checkpoints()) == ["latest", "best", "pretrained", 2, 4, 7, 8]
    assert step_of(checkpointer.load_checkpoint("pretrained")) == 2
    assert step_of(checkpointer.load_best()) == 4
    assert checkpointer.update_best_checkpoint(make_state(9), 5.0)  # of the one by hand no value is known
    assert not checkpointer.update_best_checkpoint(make_state(10), 6.0)
    for suffix in ("", "a/b", "state.pyd"):
        with pytest.raises(ValueError, match="suffix must be a name without '/', such as 'pretrained', but is"):
            checkpointer.save_checkpoint(make_state(11), suffix=suffix)
    checkpointer.close()


def test_prepare_fn_is_what_is_saved(tmp_path):
    def halved(state):
        return state._replace(params={"scale": state.params["scale"] / 2})

    checkpointer = Checkpointer(tmp_path, "run", prepare_fn=halved)
    checkpointer.save_latest(make_state(4))
    assert float(checkpointer.load_latest()["state"].params["scale"]) == 2
    checkpointer.close()


# ---- the best, by which metric


def test_another_metric_or_direction_begins_anew_and_says_so(tmp_path, caplog):
    def make(**options):
        return Checkpointer(tmp_path, "run", keep_best=True, **options)

    first = make(metric_name="val/acc", minimize_metric=False)
    first.update_best_checkpoint(make_state(1), 0.9)
    first.close()
    again = make(metric_name="val/acc", minimize_metric=False)
    assert not again.update_best_checkpoint(make_state(2), 0.8)
    again.close()
    other = make()
    assert step_of(other.load_best()) == 1  # until there is one by the new metric
    assert other.update_best_checkpoint(make_state(3), 2.0)
    assert not other.update_best_checkpoint(make_state(4), 3.0)
    other.close()
    upwards = make(minimize_metric=False)
    assert upwards.update_best_checkpoint(make_state(5), 1.0)
    upwards.close()
    assert caplog.messages == [
        "the best checkpoint so far (step 1) is that by 'val/acc' (larger is better): by 'val/loss' (smaller is "
        "better) the best is looked for anew",
        "the best checkpoint so far (step 3) is that by 'val/loss' (smaller is better): by 'val/loss' (larger is "
        "better) the best is looked for anew",
    ]


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_a_best_from_before_its_metric_was_kept_counts_as_of_the_one_asked_for(tmp_path, monkeypatch, index, caplog):
    first = Checkpointer(tmp_path, "run", keep_best=True, metric_name="val/acc")
    with monkeypatch.context() as before:
        as_best = Checkpointer._as_best
        before.setattr(
            Checkpointer, "_as_best", lambda *args: as_best(*args)._replace(best_of=None, minimize=None, name=None)
        )
        first.update_best_checkpoint(make_state(1), 0.5)
    first.close()
    if not index:
        (first.path / "index.json").unlink()
    now = Checkpointer(tmp_path, "run", keep_best=True)
    assert not now.update_best_checkpoint(make_state(2), 0.75)
    assert not caplog.messages


# ---- links


@pytest.fixture(params=["absolute", "relative"])
def linked(tmp_path, request):
    """A run whose checkpoints are a link to another file system."""
    disk = "/dev/shm" if os.path.isdir("/dev/shm") and os.stat("/dev/shm").st_dev != os.stat(tmp_path).st_dev else None
    import tempfile

    target = tempfile.mkdtemp(dir=disk or tmp_path)
    link = tmp_path / "registry" / "run" / "checkpoints"
    link.parent.mkdir(parents=True)
    link.symlink_to(target if request.param == "absolute" else os.path.relpath(target, link.parent))
    yield link
    for path in (target, f"{target}.1", f"{target}.2"):
        shutil.rmtree(path, ignore_errors=True)
    for suffix in (".lock", ".owner"):
        os.path.exists(target + suffix) and os.unlink(target + suffix)


def test_a_link_stays_and_what_is_moved_aside_stays_on_its_disk(linked):
    target = linked.resolve()
    for after in ("all", 6, None):
        checkpointer = Checkpointer(linked.parents[1], "run", save_every=2, checkpoint_every=2)
        if after == 6:
            checkpointer.leave_behind(checkpointer.load(6)["number"])
        elif after is None:
            checkpointer.leave_behind(None)
        for step in (2, 4, 6, 8) if after == "all" else (7,):
            assert checkpointer.save_latest(make_state(step)).parent == linked
        if after == "all":
            checkpointer.save_checkpoint(make_state(6))
            checkpointer.save_latest(make_state(8))
        checkpointer.wait()
        checkpointer.close()
        assert linked.is_symlink()
        assert linked.resolve() == target
    assert list(Checkpointer.at(linked).list_available_checkpoints()) == ["latest", 7]
    assert list(Checkpointer.at(f"{target}.1").list_available_checkpoints()) == ["latest", 8]
    assert list(Checkpointer.at(f"{target}.2").list_available_checkpoints()) == ["latest", 6, 7]
    assert [path.name for path in linked.parent.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("what", ["run", "registry"])
def test_the_run_or_the_registry_may_be_a_link(tmp_path, what):
    (tmp_path / "real" / "run").mkdir(parents=True)
    if what == "registry":
        (tmp_path / "registry").symlink_to("real")
    else:
        (tmp_path / "registry").mkdir()
        (tmp_path / "registry" / "run").symlink_to(tmp_path / "real" / "run")
    by_link = Checkpointer(tmp_path / "registry", "run")
    by_link.save_latest(make_state(1))
    by_path = Checkpointer(tmp_path / "real", "run")  # one folder, by whatever path
    assert [each.save_latest(make_state(2)).name for each in (by_path, by_link, by_path)] == ["1", "2", "3"]
    for each in (by_link, by_path):
        each.wait()
        each.close()
    assert sorted(path.name for path in (tmp_path / "real" / "run" / "checkpoints").iterdir())[-1] == "index.json"
    assert step_of(by_link.load_latest()) == 2


def test_a_link_to_a_folder_that_is_yet_to_be_makes_it_and_one_to_no_disk_is_an_error(tmp_path):
    run = tmp_path / "registry" / "run"
    run.mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "disk" / "of the run")
    checkpointer = Checkpointer(tmp_path / "registry", "run")
    checkpointer.prepare(make_state(0))
    checkpointer.save_latest(make_state(1))
    checkpointer.wait()
    checkpointer.close()
    assert (tmp_path / "disk" / "of the run" / "0").is_dir()

    other = tmp_path / "registry" / "other"
    other.mkdir()
    (other / "checkpoints").symlink_to(tmp_path / "unplugged" / "of the run")
    checkpointer = Checkpointer(tmp_path / "registry", "other")
    with pytest.raises(FileNotFoundError) as error:
        checkpointer.prepare(make_state(0))
    assert (
        f"is a link to {tmp_path / 'unplugged' / 'of the run'}, and {tmp_path / 'unplugged'} is not there: is its "
        in (str(error.value))
    )
    assert not (tmp_path / "unplugged").exists()


def test_a_link_that_leads_to_itself_is_an_error_of_the_system(tmp_path):
    run = tmp_path / "registry" / "run"
    run.mkdir(parents=True)
    (run / "checkpoints").symlink_to("checkpoints")
    with pytest.raises(OSError, match=r"checkpoints"):
        Checkpointer(tmp_path / "registry", "run").prepare(make_state(0))


def test_the_root_of_a_disk_keeps_in_itself_what_is_set_aside(tmp_path, monkeypatch):
    import learnax.checkpoint.owner as owner

    path = tmp_path / "run" / "checkpoints"
    monkeypatch.setattr(owner.os.path, "ismount", lambda given: given == path)
    checkpointer = Checkpointer.at(path)
    for step in (1, 2):
        checkpointer.save_latest(make_state(step))
    checkpointer.close()
    fresh = Checkpointer.at(path)
    fresh.leave_behind(None)
    fresh.save_latest(make_state(7))
    fresh.wait()
    fresh.close()
    assert list(fresh.list_available_checkpoints()) == ["latest", 7]
    assert list(Checkpointer.at(path / "checkpoints.1").list_available_checkpoints()) == ["latest", 1, 2]
    assert sorted(path.parent.iterdir()) == [path]
    assert sorted(entry.name for entry in path.iterdir()) == [
        *("0", "checkpoints.1", "checkpoints.lock", "checkpoints.owner", "index.json"),
    ]


def test_numbers_are_of_folders_alone(tmp_path):
    (tmp_path / "3").mkdir()
    for name in ("4", "x"):
        (tmp_path / name).touch()
    assert Folder(tmp_path).numbers() == [3]
    assert Folder(tmp_path / "nowhere").numbers() == []
    with pytest.raises(NotADirectoryError):
        Folder(tmp_path / "4").numbers()
    assert np.array(3) == 3
