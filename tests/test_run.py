"""Runs and their registry, on real folders and on wandb, offline."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wandb
from omegaconf import DictConfig, OmegaConf

from learnax.checkpoint import Checkpointer
from learnax.registry import Registry
from learnax.run import Run
from learnax.step.state import TrainState
from tests.helpers import assert_trees_equal, make_trainer
from tests.test_wandb import offline_run

CONFIG = {"width": 16, "data": {"size": 43, "path": "/data/${width}"}, "layers": [1, 2]}


@dataclasses.dataclass
class Config:
    """A config as a dataclass."""

    width: int = 16
    name: str = "mlp"


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    """No wandb account is found, and no session outlasts its test."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield
    wandb.finish()


@pytest.fixture(scope="module", autouse=True)
def no_service_left():
    yield
    wandb.teardown()


@pytest.fixture
def run(tmp_path):
    """A run that is only read, with some files."""
    path = tmp_path / "abc"
    (path / "data").mkdir(parents=True)
    for name, text in (("data/b.txt", "two"), ("data/a.txt", "one"), ("notes.md", "three")):
        (path / name).write_text(text)
    (tmp_path / "secret.txt").write_text("secret")
    return Run("abc", path, "a run")


def save_checkpoints(path):
    checkpointer = Checkpointer.at(path / "checkpoints", keep_best=True)
    for step in (1, 2, 3):
        state = TrainState({"w": np.full(2, step, np.float32)}, {}, step)
        checkpointer.save_checkpoint(state, step)
        checkpointer.update_best_checkpoint(state, abs(step - 2), step)
    checkpointer.close()


# ---- wandb


def written_run(folder, run_id):
    """An offline run's config and history, once wandb's service has ended: it writes on after a session has."""
    wandb.teardown()
    return offline_run(folder, run_id)


@pytest.mark.processes
def test_a_new_run_has_a_folder_a_config_and_a_session(tmp_path):
    run = Run.new("tests", tmp_path, CONFIG)
    assert run.wandb_run is wandb.run
    assert run.id == run.name == wandb.run.id  # offline, wandb names nothing
    assert wandb.run.project == "tests"
    assert run.path == tmp_path / run.id
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yml"]
    config = run.get_config()
    assert isinstance(config, DictConfig)
    assert config.data.path == "/data/16"
    assert OmegaConf.to_container(config) == CONFIG  # as it was written, references and all
    assert dict(wandb.run.config) == {**CONFIG, "data": {"size": 43, "path": "/data/16"}}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("config", "expected"),
    [(None, {}), (Config(width=4), {"width": 4, "name": "mlp"}), (OmegaConf.create({"a": 1}), {"a": 1})],
    ids=["none", "dataclass", "omegaconf"],
)
def test_a_config_may_be_nothing_a_dataclass_or_omegaconf(tmp_path, config, expected):
    run = Run.new("tests", tmp_path, config)
    assert OmegaConf.to_container(run.get_config()) == dict(wandb.run.config) == expected


@pytest.mark.processes
def test_what_a_run_logs_is_in_its_history(tmp_path):
    run = Run.new("tests", tmp_path, CONFIG)
    run.log({"train/loss": 0.5, "step": 1})
    run.log({"train/loss": 0.25, "step": 2})
    run.finish()
    config, rows = written_run(tmp_path, run.id)
    assert config["layers"] == [1, 2]
    assert [(row["train/loss"], row["step"]) for row in rows] == [(0.5, 1), (0.25, 2)]


@pytest.mark.processes
def test_a_restored_run_goes_on_with_its_session(tmp_path):
    first = Run.new("tests", tmp_path, CONFIG)
    first.log({"x": 1})
    first.finish()
    second = Run.restore(first.id, tmp_path, "tests")
    assert (second.id, second.path, second.wandb_run.id) == (first.id, first.path, first.id)
    assert second.wandb_run is wandb.run
    assert second.get_config() == first.get_config()
    second.log({"x": 2})
    second.finish()
    assert [row["x"] for row in written_run(tmp_path, first.id)[1]] == [1, 2]


@pytest.mark.processes
def test_a_second_run_of_a_script_is_a_run_of_its_own(tmp_path):
    first = Run.new("tests", tmp_path, {"number": 1})
    first.log({"x": 1})
    second = Run.new("tests", tmp_path, {"number": 2})
    assert first.id != second.id
    second.log({"x": 2})
    third = Run.restore(first.id, tmp_path, "tests")
    third.log({"x": 3})
    third.finish()
    assert [run.get_config().number for run in (first, second, third)] == [1, 2, 1]
    assert [row["x"] for row in written_run(tmp_path, first.id)[1]] == [1, 3]
    assert [row["x"] for row in written_run(tmp_path, second.id)[1]] == [2]


# ---- checkpoints and files


def test_a_run_that_is_only_read_logs_nothing_and_needs_no_session(run):
    assert (run.id, run.name, run.wandb_run) == ("abc", "a run", None)
    assert Run("abc", run.path).name == "abc"
    run.log({"x": 1})
    run.finish()
    assert wandb.run is None


def test_states_and_weights_are_read_by_name(run):
    save_checkpoints(run.path)
    assert [run.get_train_state(name).step for name in (-1, 1, "best", "3", True)] == [3, 1, 2, 3, 3]
    assert_trees_equal(run.get_weights(), {"w": np.float32([3, 3])})
    assert_trees_equal(run.get_weights("best"), {"w": np.float32([2, 2])})
    with pytest.raises(FileNotFoundError) as error:
        run.get_weights(7)
    assert str(error.value) == f"no checkpoint '7' in {run.path}/checkpoints; there are: latest, best, 1, 2, 3"


def test_a_run_without_checkpoints_says_so(run):
    with pytest.raises(FileNotFoundError) as error:
        run.get_train_state()
    assert str(error.value) == f"run 'abc' has no checkpoint in {run.path}/checkpoints"


def test_a_checkpoint_is_a_dict_and_its_state(run):
    save_checkpoints(run.path)
    saved = run.get_train_state()
    assert isinstance(saved, dict)
    assert isinstance(saved["state"], TrainState)
    assert (saved["step"], saved.step, saved.opt_state) == (3, 3, {})
    assert saved.params is saved["state"].params
    assert saved._replace(step=5).step == 5
    assert not hasattr(saved, "parms")
    for copied in (copy.deepcopy(saved), pickle.loads(pickle.dumps(saved))):
        assert_trees_equal(copied.params, saved.params)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, {"a": saved})["a"]  # as of a plain dict, in a tree, too
    assert isinstance(doubled, dict)
    assert doubled.params["w"].tolist() == [6, 6]
    assert doubled["step"] == 6


CONTENT = {
    "numbers": {"a": 1, "b": [2.5, True, None], ("c", 1): {3, 4}, "wide": 2**70},
    "arrays": [np.arange(6).reshape(2, 3), np.float32(2), np.array(["x", "yz"])],
    "text": "a text",
    "bytes": b"\x80\x00",
    "nothing": None,
}


@pytest.mark.parametrize("name", CONTENT)
def test_what_is_saved_is_read_again(run, name):
    assert run.save("deep/down/content.pkl", CONTENT[name]) == run.path / "deep/down/content.pkl"
    for read in (run.read("deep/down/content.pkl"), Run("abc", run.path).read(filepath="deep/down/content.pkl")):
        assert type(read) is type(CONTENT[name])
        np.testing.assert_equal(read, CONTENT[name])


def test_arrays_of_jax_and_states_are_read_again(run):
    trees = {"weights": jnp.arange(3.0), "key": jax.random.key(3)}
    run.save(filepath="weights.pkl", content=trees)
    read = run.read("weights.pkl")
    np.testing.assert_array_equal(read["weights"], np.arange(3.0))
    assert_trees_equal(jax.random.key_data(read["key"]), jax.random.key_data(trees["key"]))


def test_what_is_not_plain_is_saved_and_read_by_a_function_only(run):
    run.save("config.pkl", Config(width=3))
    with pytest.raises(ValueError, match=r"tests\.test_run\.Config.*read_fn"):
        run.read("config.pkl")
    with pytest.raises(ValueError, match=r"tests\.test_run\.Config.*read_fn"):
        run.read_all("*.pkl")
    assert run.read("config.pkl", read_fn=lambda path: pickle.loads(path.read_bytes())) == Config(width=3)
    before = run.save("function.pkl", 1).read_bytes()
    with pytest.raises(TypeError) as error:
        run.save("function.pkl", lambda: 1)
    assert str(error.value).startswith("save('function.pkl'): function cannot be pickled (")
    assert str(error.value).endswith("); save plain content, or give a write_fn")
    assert (run.path / "function.pkl").read_bytes() == before
    with pytest.raises(TypeError, match="generator cannot be pickled"):
        run.save("none/function.pkl", (i for i in ()))
    assert not (run.path / "none").exists()


def test_a_torn_pickle_is_named_and_a_file_that_is_none_is_its_bytes(run):
    path = run.save("numbers.pkl", list(range(1000)))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"numbers\.pkl \(100 bytes\) is torn"):
        run.read("numbers.pkl")
    assert run.read("notes.md") == b"three"
    (run.path / "empty").touch()
    assert run.read("empty") == b""
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*abc/none\.txt'"):
        run.read("none.txt")


def test_all_files_at_any_depth_are_read_by_their_paths(run):
    run.save("x.pkl", 1)
    run.save("data/deep/y.pkl", [2])
    assert run.read_all("*.pkl") == {f"{run.path}/data/deep/y.pkl": [2], f"{run.path}/x.pkl": 1}
    assert run.read_all("deep/*.pkl") == {f"{run.path}/data/deep/y.pkl": [2]}
    assert run.read_all("data/*.txt", read_fn=lambda path: path.read_text()) == {
        f"{run.path}/data/a.txt": "one",
        f"{run.path}/data/b.txt": "two",
    }
    names = run.read_all("**/*", lambda path: path.name)
    assert list(names.values()) == ["a.txt", "b.txt", "y.pkl", "notes.md", "x.pkl"]
    assert [run.read(path, lambda path: path.name) for path in names] == list(names.values())
    assert run.read_all("*.none") == {}


def test_files_are_read_where_the_folder_is_relative_and_the_process_goes_elsewhere(run, monkeypatch):
    monkeypatch.chdir(run.path.parent)
    relative = Run("abc", "abc")
    monkeypatch.chdir("/")
    assert relative.path == run.path
    assert relative.read("notes.md") == b"three"
    assert list(relative.read_all("data/*").values()) == [b"one", b"two"]
    assert relative.save("new.pkl", "four").parent == run.path


def test_files_are_saved_by_a_function(run):
    run.save("array.npy", np.arange(3), np.save)
    np.testing.assert_array_equal(run.read("array.npy", np.load), np.arange(3))
    run.save("values.json", {"a": 1}, lambda path, data: path.write_text(json.dumps(data)))
    assert run.read("values.json") == b'{"a": 1}'
    run.save("deep/notes.txt", "four", write_fn=Path.write_text)
    assert run.read("deep/notes.txt", Path.read_text) == "four"


def test_a_run_is_called_by_its_name(run):
    assert str(run) == repr(run) == "Run(a run)"
    assert str(Run("abc", run.path)) == "Run(abc)"


def test_a_folder_is_emptied_and_the_whole_run_never_is(run):
    assert run.clear_dir("data") == run.path / "data"
    assert list((run.path / "data").iterdir()) == []
    assert run.clear_dir("new/folder").is_dir()
    for name in ("", ".", "data/.."):
        with pytest.raises(ValueError, match="whole run") as error:
            run.clear_dir(name)
        assert str(error.value) == f"clear_dir({name!r}) would empty the whole run 'abc'; name a folder inside it"
    assert run.read("notes.md") == b"three"


def test_no_path_leads_out_of_a_run(run, tmp_path):
    (tmp_path / "abcd").mkdir()
    (run.path / "link").symlink_to(tmp_path)
    absolute = str(tmp_path / "secret.txt")
    for name in ("../secret.txt", absolute, "../abcd", "data/../../abcd", "link/secret.txt"):
        for call in (run.read, run.clear_dir, lambda name: run.save(name, "mine")):
            with pytest.raises(ValueError, match="outside") as error:
                call(name)
            assert str(error.value) == f"{name!r} is outside of the run's folder {run.path}"
    with pytest.raises(ValueError, match=r"'.*/link/secret\.txt' is outside of the run's folder "):
        run.read_all("link/*.txt")
    for pattern in ("../*.txt", "data/../../*.txt", absolute, ""):
        with pytest.raises(ValueError, match="pattern") as error:
            run.read_all(pattern)
        assert str(error.value) == (
            f"read_all({pattern!r}): a pattern is matched inside of the run's folder {run.path}"
        )
    assert (tmp_path / "secret.txt").read_text() == "secret"
    assert (tmp_path / "abcd").is_dir()


# ---- the registry


def test_a_registry_takes_its_folder_from_the_argument_or_the_variable(registry_path, tmp_path, monkeypatch):
    assert Registry("tests").path == registry_path / "tests"
    assert Registry("tests", tmp_path).path == tmp_path / "tests"
    assert Registry("tests", base_path=str(tmp_path)).checkpoints("abc") == tmp_path / "tests" / "abc" / "checkpoints"
    for unset in (lambda: monkeypatch.setenv("TRAINAX_REGISTRY_PATH", ""), monkeypatch.undo):
        unset()
        monkeypatch.delenv("TRAINAX_REGISTRY_PATH", raising=False)
        with pytest.raises(ValueError, match="no folder") as error:
            Registry("tests")
        assert str(error.value) == (
            "registry 'tests': no folder to keep runs in; set the environment variable TRAINAX_REGISTRY_PATH, "
            "or give Registry a base_path"
        )


@pytest.mark.processes
def test_a_registry_makes_restores_and_fetches_its_runs(registry_path):
    registry = Registry("tests")
    run = registry.new_run(CONFIG)
    assert run.path == registry_path / "tests" / run.id
    assert run.wandb_run.project == "tests"
    save_checkpoints(run.path)

    for read in (registry.fetch_run(run.id), registry.restore_run(run.id, read_only=True)):
        assert (read.id, read.path, read.wandb_run) == (run.id, run.path, None)
        assert read.get_config() == run.get_config()
        assert read.get_train_state("best").step == 2
    assert wandb.run is run.wandb_run  # reading has ended nothing

    restored = registry.restore_run(run.id)
    assert (restored.id, restored.path, restored.wandb_run.id) == (run.id, run.path, run.id)
    assert restored.wandb_run is wandb.run
    assert registry.restore_run(run.id, read_only=False).wandb_run.id == run.id


def test_a_run_that_is_missing_is_an_error_with_those_there_are(registry_path):
    registry = Registry("tests")
    with pytest.raises(FileNotFoundError) as error:
        registry.fetch_run("abc")
    assert str(error.value) == f"no run 'abc' in {registry_path}/tests; there are: none"

    for name, kept in (("with_config", "config.yml"), ("of_a_trainer", "checkpoints"), ("wandb", "latest-run")):
        (registry_path / "tests" / name / kept).mkdir(parents=True)
    (registry_path / "elsewhere" / "checkpoints").mkdir(parents=True)
    for get in (registry.fetch_run, registry.restore_run):
        for missing in ("abc", "", ".", "..", "../elsewhere", "wandb", str(registry_path / "elsewhere")):
            with pytest.raises(FileNotFoundError) as error:
                get(missing)
            assert str(error.value) == (
                f"no run {missing!r} in {registry_path}/tests; there are: of_a_trainer, with_config"
            )
    assert registry.fetch_run("of_a_trainer").path == registry_path / "tests" / "of_a_trainer"


@pytest.mark.processes
def test_a_trainer_takes_a_run_and_its_checkpoints_are_the_runs(registry_path):
    run = Registry("tests").new_run(CONFIG)
    trainer = make_trainer(run=run, registry="tests", num_epochs=1)
    assert trainer.train() is run
    run.finish()
    fetched = Registry("tests").fetch_run(run.id)
    assert_trees_equal(fetched.get_train_state()["state"], trainer.train_state)
    assert_trees_equal(fetched.get_weights(5), trainer.train_state.params)
