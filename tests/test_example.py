"""The example trains, resumes, and leaves what it says."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT

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


def test_the_digits_are_read_and_a_second_run_goes_on(tmp_path):
    first = run_digits(tmp_path)
    assert re.search(r"^memory +[\d.]+ MB on each device", first, re.MULTILINE)  # the preflight
    assert "\nfrom epoch 0 of 30, step 0\n" in first
    assert accuracy(first) >= 98
    assert "['latest', 'best', " in first
    assert pictures(tmp_path) == ["curves.png", "held_out.png", "ledger.png", "samples.png", "training.png"]
    for path in (tmp_path / "plots").iterdir():
        path.unlink()
    second = run_digits(tmp_path, "--resume")
    assert "\nfrom epoch 30 of 40, step 870\n" in second
    assert accuracy(second) >= 98
    assert pictures(tmp_path) == ["curves.png", "held_out.png", "ledger.png", "samples.png", "training.png"]


def test_the_digits_log_to_an_offline_run_and_are_read_by_workers(tmp_path):
    options = ["--wandb", "--num-workers", "2", "--epochs", "3"]
    assert accuracy(run_digits(tmp_path, *options)) > 80
    assert list(tmp_path.rglob("*.wandb"))
    assert run_digits(tmp_path, *options, "--resume").find("\nfrom epoch 3 of 4, step 87\n") > 0


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_knows_its_targets():
    for target in ("train", "test", "check", "test-floor", "soak", "bench", "profile", "nsys", "ncu"):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True, timeout=60)
