"""The example trains, resumes, and leaves what it says."""

import os
import re
import shutil
import subprocess
import sys

import jax
import pytest

from examples import text
from learnax.registry import Registry
from learnax.sinks import page
from tests.helpers import ROOT, assert_trees_equal

pytestmark = pytest.mark.processes


def run_digits(out, *args):
    env = {**os.environ, "XLA_FLAGS": "", "WANDB_MODE": "offline"}
    del env["TRAINAX_REGISTRY_PATH"]  # the example says itself where its runs are
    command = [sys.executable, str(ROOT / "examples" / "digits.py"), "--out", str(out), *args]
    result = subprocess.run(command, env=env, cwd=out, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return result.stdout


def accuracy(text):
    return float(re.search(r"validation accuracy: ([\d.]+)% at the end", text)[1])


def pictures(out):
    found = sorted((out / "plots").glob("*.png"))
    for path in found:
        assert path.read_bytes().startswith(b"\x89PNG"), path
        assert path.stat().st_size > 10_000, path
    return [path.name for path in found]


def test_the_digits_are_read_without_any_run(tmp_path):
    text = run_digits(tmp_path, "--epochs", "1")
    assert "\nfrom epoch 0 of 1, step 0\n" in text
    assert accuracy(text) > 80
    assert page.read(tmp_path / "report.html")["state"] == "complete"
    assert pictures(tmp_path) == ["curves.png", "held_out.png", "ledger.png"]  # the others come each 100 steps
    assert not list(tmp_path.rglob("*.wandb"))


def test_the_digits_log_to_an_offline_run_and_a_second_run_goes_on_with_a_worker(tmp_path):
    options = ["--wandb", "--epochs", "6"]
    first = run_digits(tmp_path, *options)
    assert re.search(r"^memory +[\d.]+ MB on each device", first, re.MULTILINE)  # the preflight
    assert "\nfrom epoch 0 of 6, step 0\n" in first
    assert accuracy(first) >= 98
    assert "['latest', 'best', " in first
    assert pictures(tmp_path) == ["curves.png", "held_out.png", "ledger.png", "samples.png", "training.png"]
    assert list(tmp_path.rglob("*.wandb"))
    for path in (tmp_path / "plots").iterdir():
        path.unlink()
    second = run_digits(tmp_path, *options, "--resume", "--num-workers", "1")
    assert "\nfrom epoch 6 of 8, step 174\n" in second
    assert accuracy(second) >= 98
    told = page.read(tmp_path / "report.html")
    assert [event["what"] for event in told["events"]] == ["started", "ended", "resumed", "ended"]
    assert pictures(tmp_path) == ["curves.png", "held_out.png", "ledger.png", "samples.png", "training.png"]


@jax.numpy_dtype_promotion("standard")  # optax's schedules need it
def test_streamed_text_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fail(params):
        if len(calls := [*saved, params]) == 2:
            raise OSError("the disk is gone")
        saved[:] = calls

    saved = []
    options = {"save_every": 4, "val_every_steps": 8}
    straight = text.build(12, Registry("text", tmp_path / "straight"), **options)
    straight.train()
    with pytest.raises(OSError, match="the disk is gone"):
        text.build(12, Registry("text", tmp_path / "stopped"), save_model=fail, **options).train()
    resumed = text.build(12, Registry("text", tmp_path / "stopped"), **options)
    assert resumed.log.step == 8
    resumed.train()
    assert_trees_equal(resumed.train_state, straight.train_state)
    assert resumed.metrics["val/loss"] == straight.metrics["val/loss"]
    said = text.generated(jax.device_get(resumed.train_state.params), "Permission", 120)
    assert said.startswith("Permission")
    assert len(said) == 130
    text.draw(resumed.metrics, 8, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_knows_its_targets():
    for target in (
        "train",
        "text",
        "test",
        "check",
        "test-floor",
        "test-browser",
        "soak",
        "bench",
        "profile",
        "nsys",
        "ncu",
    ):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True, timeout=60)
