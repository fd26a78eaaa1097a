"""Paths and names that users give, wherever they give them."""

import os
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from learnax.registry import Registry
from learnax.run import Run
from learnax.utils.names import expanded, folder_name
from tests.helpers import MemoryRun, make_trainer


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A home, a variable and a working folder of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("~", "home"),
        ("~/runs", "home/runs"),
        (Path("~/runs"), "home/runs"),
        ("$HOME/runs", "home/runs"),
        ("${SCRATCH}/$USERS_RUNS/x", "scratch/of/me/x"),
        ("runs", "work/runs"),
        ("./~", "work/~"),
        ("a~b/~", "work/a~b/~"),
        ("costs 5$", "work/costs 5$"),
    ],
)
def test_a_path_is_what_its_user_means(given, meant, elsewhere, monkeypatch):
    monkeypatch.setenv("USERS_RUNS", "of/me")
    assert expanded(given) == elsewhere / meant


def test_an_absolute_path_that_is_there_is_taken_as_it_stands(elsewhere):
    for name in ("$HOME", "${NONE}", "~"):
        path = elsewhere / "work" / name
        path.mkdir()
        assert expanded(path) == path
    assert expanded("~") == elsewhere / "home"  # what an earlier start made by mistake is not gone on with


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("$NOWHERE/runs", "but the variable NOWHERE is not set"),
        ("/data/${NOWHERE}", "but the variable NOWHERE is not set"),
        (
            "~nobody-of-us/runs",
            "but there is no such user; a folder of that name is './~nobody-of-us/runs'",
        ),
        ("", "which names no folder"),
        ("a\0b", "which names no folder"),
    ],
)
def test_a_path_that_stands_for_none_is_an_error(given, why):
    with pytest.raises(ValueError, match="base_path") as error:
        expanded(given, "base_path")
    assert str(error.value) == f"base_path is {given!r}, {why}"


@pytest.mark.parametrize("given", ["~/runs", "$SCRATCH/runs", "relative"])
def test_a_registry_is_where_its_user_means_it_and_stays_there(given, elsewhere, monkeypatch):
    monkeypatch.setenv("TRAINAX_REGISTRY_PATH", given)
    folder = expanded(given)
    by_variable, by_argument = Registry("p"), Registry("p", base_path=given)
    trainer = make_trainer(registry="p", run=MemoryRun(), num_epochs=1)
    monkeypatch.chdir("/")
    trainer.train()
    assert by_variable.path == by_argument.path == folder / "p"
    weights = Run(MemoryRun.id, folder / "p" / MemoryRun.id).get_weights()
    jax.tree.map(np.testing.assert_array_equal, weights, jax.device_get(trainer.train_state.params))
    assert by_argument.fetch_run(MemoryRun.id).path == folder / "p" / MemoryRun.id
    assert os.listdir(elsewhere / "work") == (["relative"] if given == "relative" else [])

    monkeypatch.chdir(elsewhere / "work")
    checkpoints = f"{given}/p/{MemoryRun.id}/checkpoints"
    over = make_trainer(
        train_dataset=[np.ones(8, np.float32)] * 8,
        losses=lambda output, datum: (output, output.mean(), {}),
        sample_model=lambda params, key, datum: datum,
        sample_every=2,
        sample_params=checkpoints,
    )
    (sampler,) = over.hooks.shows
    jax.tree.map(np.testing.assert_array_equal, sampler._params, jax.device_get(trainer.train_state.params))


def test_a_variable_that_is_not_set_is_named_with_what_named_it(monkeypatch):
    monkeypatch.setenv("TRAINAX_REGISTRY_PATH", "$NOWHERE/runs")
    with pytest.raises(ValueError, match=r"^TRAINAX_REGISTRY_PATH is '\$NOWHERE/runs', but the variable NOWHERE is "):
        Registry("p")
    with pytest.raises(ValueError, match=r"^base_path is '\$NOWHERE'"):
        Registry("p", "$NOWHERE")
    with pytest.raises(ValueError, match=r"^sample_params is '\$NOWHERE'"):
        make_trainer(sample_model=lambda p, k, d: d, sample_every=2, sample_params="$NOWHERE")
    with pytest.raises(ValueError, match=r"^compilation_cache is '\$NOWHERE'"):
        make_trainer(compilation_cache="$NOWHERE")
    with pytest.raises(ValueError, match=r"^a run's path is '~nobody-of-us/x'"):
        Run("x", "~nobody-of-us/x")


BAD = ["", ".", "..", "../x", "a\0b", "/etc", "a/../../b", "a//b", "x" * 256, "é" * 128]


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_is_no_folders_is_refused_when_something_is_built_with_it(name):
    text = (
        f"{{}} becomes the name of a folder and cannot be {name!r}; allowed is any text but '', '.' and '..', of at "
        "most 255 bytes, without NUL"
    )
    with pytest.raises(ValueError, match="a run's id") as error:
        Run(name, "folder")
    assert str(error.value) == text.format("a run's id") + " and without '/'"
    with pytest.raises(ValueError, match="a registry's project") as error:
        Registry(name)
    assert str(error.value) == text.format("a registry's project") + ", also with '/' between such"
    with pytest.raises(ValueError, match="a run's id"):
        make_trainer(registry="p", run=SimpleNamespace(id=name, name="x", log=print))
    with pytest.raises(ValueError, match="a registry's project"):
        make_trainer(registry=name)


@pytest.mark.parametrize("name", [None, b"x", 1.5, True])
def test_a_name_that_is_no_text_is_refused(name):
    with pytest.raises(TypeError) as error:
        folder_name(name, "a run's id")
    assert str(error.value) == f"a run's id must be text, but is {name!r}"


@pytest.mark.parametrize(
    "name", ["lr=[0.1]", "a*b?", "back\\slash", "~", "$HOME", "two words", "ü", ".hidden", "x" * 255]
)
def test_odd_names_are_taken_as_they_are(name, registry_path):
    registry = Registry(name)
    assert registry.path == registry_path / name
    assert registry.checkpoints(name) == registry_path / name / name / "checkpoints"
    registry.checkpoints(name).mkdir(parents=True)
    run = registry.fetch_run(name)
    assert (run.id, run.path) == (name, registry_path / name / name)
    run.save("x.pkl", 1)
    assert list(run.read_all("*.pkl").values()) == [1]


def test_a_project_may_be_a_folder_in_a_folder_and_a_number_is_its_digits(registry_path):
    assert Registry(Path("group/project")).path == registry_path / "group" / "project"
    assert Registry("group/project").path == registry_path / "group" / "project"
    assert Registry(2024).checkpoints(np.int64(7)) == registry_path / "2024" / "7" / "checkpoints"
    assert Run(7, "folder").id == "7"
    Registry(2024).checkpoints(7).mkdir(parents=True)
    assert Registry(2024).fetch_run(7).id == "7"
