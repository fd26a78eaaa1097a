"""The benchmark: statistics on samples with known answers, contenders on the same losses, and all of it once."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from bench import compare, report, table
from bench.opponents import HANDS, OPPONENTS, Learnax, why_not
from bench.results import Compared, Results
from bench.stats import Ratio, bootstrap_ratio
from bench.workloads import SIZES, makers, mlp
from tests.helpers import ROOT, dry, run_script

pytestmark = pytest.mark.processes

STEP = "step"
UNCLIPPED = 1e9


def results(**samples):
    """A result of steps on one workload; names with `_` for `-`."""
    machine = {"cpu": "a CPU", "cores": 2, "devices": "1 x cpu", "python": "3.11", "date": "2026-01-02T03:04:05"}
    made = Results({**machine, "jax": "0.10", "flax": "0.12", "optax": "0.2", "keras": None}, {"scale": "10m"})
    for name, values in samples.items():
        rate = 1 / np.median(values)
        made.add("mlp-128", name.replace("_", "-"), STEP, "s", values, steps_per_s=rate, items_per_s=64 * rate)
    for name in samples:
        if name != "learnax":
            made.compare("mlp-128", STEP, "learnax", name.replace("_", "-"))
    return made


# ---- statistics


def test_equal_samples_have_a_ratio_of_their_size():
    assert bootstrap_ratio([3.0, 3.0, 3.0], [2.0, 2.0, 2.0], paired=True) == Ratio(1.5, 1.5, 1.5)
    assert bootstrap_ratio([3.0], [2.0], paired=False) == Ratio(1.5, 1.5, 1.5)


def test_what_slows_both_of_a_pair_cancels():
    machine = np.random.default_rng(0).uniform(1, 10, 15)
    paired = bootstrap_ratio(2 * machine, machine, paired=True)
    assert paired == pytest.approx((2.0, 2.0, 2.0))
    loose = bootstrap_ratio(2 * machine, machine, paired=False)
    assert loose.low < 1.5 < 2.5 < loose.high


def test_the_interval_holds_the_truth_nineteen_times_in_twenty():
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(80):
        above, below = rng.normal(1.2, 0.1, 30), rng.normal(1.0, 0.1, 30)
        ratio = bootstrap_ratio(above, below, paired=False, seed=trial)
        assert ratio.low <= ratio.value <= ratio.high
        held += ratio.low <= 1.2 <= ratio.high
    assert 72 <= held <= 80


def test_the_same_samples_give_the_same_interval():
    above, below = np.random.default_rng(2).uniform(1, 2, (2, 9))
    assert bootstrap_ratio(above, below, paired=True) == bootstrap_ratio(above, below, paired=True)


@pytest.mark.parametrize(
    ("above", "below", "text"), [([], [1.0], "at least one sample"), ([1.0], [1.0, 2.0], "but are 1 and 2")]
)
def test_samples_that_make_no_ratio_are_refused(above, below, text):
    with pytest.raises(ValueError, match=text):
        bootstrap_ratio(above, below, paired=True)


# ---- comparing two results


def compared(tmp_path, capsys, base, new):
    base.write(tmp_path / "base.json")
    new.write(tmp_path / "new.json")
    code = compare.main([str(tmp_path / "base.json"), str(tmp_path / "new.json")])
    return code, capsys.readouterr().out


def noisy(median, seed, size=15):
    return median * np.random.default_rng(seed).normal(1, 0.03, size)


def test_what_got_slower_is_named(tmp_path, capsys):
    base, new = (
        results(learnax=noisy(1e-3, 0), hand=noisy(1e-3, 1)),
        results(learnax=noisy(1.3e-3, 2), hand=noisy(1e-3, 3)),
    )
    code, out = compared(tmp_path, capsys, base, new)
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("slower: ")]
    assert line.startswith("slower: mlp-128, learnax, step: ")
    assert "996 µs to 1.29 ms, 1.29 (" in line
    assert "the hand-written loop meanwhile " in line
    assert "1 of 1 figures got slower" in out


def test_noise_is_not_named(tmp_path, capsys):
    for seed in range(20):
        base, new = results(learnax=noisy(1e-3, seed)), results(learnax=noisy(1e-3, 100 + seed))
        code, out = compared(tmp_path, capsys, base, new)
        assert (code, out.splitlines()) == (0, ["0 of 1 figures got slower (95 % interval of new / base beyond 1.05)"])


def test_a_change_within_the_margin_is_not_named(tmp_path, capsys):
    assert compared(tmp_path, capsys, results(learnax=[1e-3] * 9), results(learnax=[1.04e-3] * 9))[0] == 0
    assert compared(tmp_path, capsys, results(learnax=[1e-3] * 9), results(learnax=[1.06e-3] * 9))[0] == 1


def test_what_got_faster_is_named_and_is_no_failure(tmp_path, capsys):
    code, out = compared(tmp_path, capsys, results(learnax=noisy(2e-3, 0)), results(learnax=noisy(1e-3, 1)))
    assert code == 0
    assert out.startswith("faster: mlp-128, learnax, step: 1.99 ms to 1.01 ms, 0.51 (")


def test_two_samples_prove_nothing(tmp_path, capsys):
    assert compared(tmp_path, capsys, results(learnax=[1e-3] * 2), results(learnax=[2e-3] * 2))[0] == 0


def test_an_opponent_that_got_slower_is_not_ours(tmp_path, capsys):
    base, new = results(learnax=[1e-3] * 9, hand=[1e-3] * 9), results(learnax=[1e-3] * 9, hand=[2e-3] * 9)
    assert compared(tmp_path, capsys, base, new)[0] == 0


def test_another_machine_is_told_of(tmp_path, capsys):
    base, new = results(learnax=[1e-3] * 9), results(learnax=[1e-3] * 9)
    base.machine["cpu"] = "another CPU"
    assert "not the same cpu: another CPU and a CPU\n" in compared(tmp_path, capsys, base, new)[1]


def test_a_file_that_is_no_result_is_named(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"machine": {}}')
    with pytest.raises(ValueError, match=r"other\.json is no result of `python -m bench`"):
        Results.read(path)


def test_a_result_is_read_as_it_was_written(tmp_path):
    made = results(learnax=[1e-3, 2e-3, 3e-3], hand=[2e-3, 2e-3, 2e-3])
    made.notes.append("something was left out")
    made.write(tmp_path / "result.json")
    assert Results.read(tmp_path / "result.json") == made
    assert json.loads((tmp_path / "result.json").read_text())["figures"][0]["median"] == 2e-3


# ---- tables


def test_the_terminal_table_has_units_in_every_number():
    made = results(learnax=[1e-4] * 3, hand=[2e-4] * 3)
    assert made.ratios == [Compared("mlp-128", STEP, "learnax", "hand", Ratio(0.5, 0.5, 0.5), 0.60)]
    lines = report.table(made).splitlines()
    (own,) = [line for line in lines if line.startswith("  learnax ")]
    assert own.split() == ["learnax", "100", "µs", "10,000", "/s", "640,000", "/s"]
    (other,) = [line for line in lines if line.startswith("  hand ")]
    assert other.endswith("0.50 (0.50 to 0.50), aim 0.60: met")


@pytest.mark.parametrize(
    ("value", "text"),
    [(9.87654e-5, "98.8 µs"), (1.5e-6, "1.50 µs"), (0.0123, "12.3 ms"), (0.5, "500 ms"), (12.0, "12.0 s")],
)
def test_seconds_come_in_their_unit(value, text):
    assert report.seconds(value) == text


def test_the_table_is_written_between_its_markers(tmp_path):
    page, result = tmp_path / "speed.md", tmp_path / "result.json"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    results(learnax=[1e-4] * 3, hand=[2e-4] * 3).write(result)
    for _ in range(2):  # writing it again changes nothing
        table.main([str(result), "--page", str(page)])
        text = page.read_text()
        assert text.startswith(f"before\n{table.BEGIN}\n| a step of | learnax | hand-written |\n|---|---|---|\n")
        assert "\n| MLP, width 128 | **100 µs** | 200 µs (2.00x) |\n" in text
        assert text.endswith(f"Python 3.11, jax 0.10, flax 0.12, optax 0.2; 2026-01-02.\n{table.END}\nafter\n")
        assert "old" not in text


def test_a_page_without_markers_is_refused(tmp_path):
    (tmp_path / "speed.md").write_text("nothing here\n")
    with pytest.raises(ValueError, match="must have the lines <!-- bench:begin --> and <!-- bench:end -->"):
        table.write(tmp_path / "speed.md", results(learnax=[1e-4]))


def test_the_page_is_ready_for_its_table():
    text = (ROOT / "docs" / "speed.md").read_text()
    assert text.index(table.BEGIN) < text.index(table.END)


# ---- contenders


def workload(name):
    """A workload with few steps."""
    return makers("10m", quick=True)[name]()


# Fused loops are compared where they take little to compile.
@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("tiny-26", False),
        ("mlp-128", True),
        ("digits", False),
        ("gpt", True),
        ("nested-0", False),
        pytest.param("resnet", False, marks=pytest.mark.soak),
        pytest.param("nnx-mlp", True, marks=pytest.mark.soak),
        pytest.param("equinox-mlp", True, marks=pytest.mark.soak),
    ],
    ids=["tiny-26", "mlp-128", "digits", "gpt", "nested-0", "resnet", "nnx-mlp", "equinox-mlp"],
)
def test_learnax_and_the_hand_written_loop_compute_the_same_losses(name, fused, one_device, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: one_device)
    monkeypatch.setitem(SIZES, "small", SIZES["10m"]._replace(layers=1, width=64, context=16))
    with jax.numpy_dtype_promotion("standard"):
        work = makers("small", quick=True)[name]()
        ours = Learnax(work, max_grad=UNCLIPPED, compilation_cache=False, devices=one_device)
        params = jax.tree.map(np.array, ours.trainer.train_state.params)
        hand = HANDS[work.kind]
        contenders = [hand(work, params=params)] + [hand(work, 16, params)] * fused
        theirs = [hand.losses() for hand in contenders]
        ours.round()
        losses = ours.trainer.metrics["train/loss"]
        ours.close()
    assert len(losses) == work.steps
    assert not fused or why_not("hand-fused", work) is None
    for each in theirs:
        np.testing.assert_allclose(losses[:16], each[:16], rtol=1e-4, atol=1e-4)
    half = len(losses) // 2
    assert np.mean(losses[half:]) < np.mean(losses[:half])


@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="no keras")
def test_keras_computes_the_same_losses(tmp_path):
    source = """
import numpy as np
from bench.opponents import Hand, Keras
from bench.workloads import makers

for name in ("mlp-128", "digits"):
    work = makers("10m", quick=True)[name]()
    keras = Keras(work, 16)
    values = iter(keras._model.get_weights())
    names = {"mlp-128": "Dense_0 Dense_1 Dense_2", "digits": "Conv_0 Conv_1 Dense_1 Dense_0"}[name].split()
    params = {each: {"kernel": next(values), "bias": next(values)} for each in names}
    mean = Hand(work, params=params).losses().mean()
    history = keras._model.fit(keras._x, keras._y, batch_size=64, shuffle=False, verbose=0).history["loss"]
    print(abs(history[0] / mean - 1) < 1e-3)
"""
    result = run_script(source, tmp_path, env={"KERAS_BACKEND": "jax", "XLA_FLAGS": ""})
    assert result.stdout.split() == ["True", "True"]


def test_the_state_of_the_wide_mlp_is_as_large_as_it_says(one_device):
    work = mlp(2048, 1)
    params = jax.eval_shape(work.model.init, jax.random.key(0), *work.data[0])
    assert 3 * 4 * sum(leaf.size for leaf in jax.tree.leaves(params)) == pytest.approx(52e6, rel=0.01)


@pytest.mark.parametrize(("scale", "size"), [("10m", 1e7), ("124m", 1.24e8), ("1b", 1e9)])
def test_a_gpt_is_about_as_large_as_its_scale_says(scale, size):
    from bench.workloads import GPT

    tokens = np.zeros(SIZES[scale].context, np.int32)
    with jax.numpy_dtype_promotion("standard"):
        params = jax.eval_shape(GPT(SIZES[scale]).init, jax.random.key(0), tokens, tokens)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == pytest.approx(size, rel=0.12)


def test_who_does_not_take_part_is_told_why():
    assert set(OPPONENTS) == {"hand", "hand-fused", "linen", "keras-1", "keras-16"}
    assert why_not("linen", workload("mlp-128")) == "it is of linen itself"
    assert why_not("hand", workload("nested-0")) is None
    assert why_not("hand-fused", workload("nested-0")) == "its data are read as it goes"
    assert why_not("keras-1", workload("nested-0")) == "it has no Keras form"


def test_an_error_in_training_is_raised_by_the_round(one_device, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: one_device)
    ours = Learnax(workload("mlp-128"), compilation_cache=False)
    ours.trainer.loaders["train"].blocks = lambda *given: iter([None])
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'first'"):
        ours.round()


# ---- all of it


def test_it_runs_and_leaves_a_table_a_file_and_a_chart(tmp_path):
    command = [
        sys.executable,
        "-m",
        "bench",
        "--quick",
        "--workloads",
        "mlp-128",
        "--rounds",
        "1",
        "--out",
        str(tmp_path),
    ]
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for word in ("learnax", "hand", "hand-fused", "host work per step", "synchronous step, hand"):
        assert f"  {word}" in done.stdout
    made = Results.read(tmp_path / "bench.json")
    assert {"cpu", "cores", "python", "jax", "jaxlib", "flax", "optax", "keras", "date"} <= set(made.machine)
    assert all(figure.samples for figure in made.figures)
    assert {r.opponent for r in made.ratios} >= {"hand", "hand-fused"}
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert compare.main([str(tmp_path / "bench.json")] * 2) == 0


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_knows_its_targets():
    assert "-m bench --quick" in dry("bench", "ARGS=--quick")
    assert "--xla_force_host_platform_device_count=4" in dry("bench", "DEVICES=4")
    assert "device_count" not in dry("bench")
    assert "-m bench.compare a.json b.json" in dry("bench-compare", "BASE=a.json", "NEW=b.json")


# ---- programs for GPUs


def test_a_count_that_grows_or_is_no_longer_none_is_slower(tmp_path, capsys):
    paths = []
    for kernels, loops in ((30, 0), (31, 1)):
        made = results(learnax=[1.0] * 3)
        made.add("mlp-128 on h100", "learnax", "kernels", "n", [kernels])
        made.add("mlp-128 on h100", "learnax", "unknown loops", "n", [loops])
        paths.append(tmp_path / f"{kernels}.json")
        made.write(paths[-1])
    assert compare.main([str(path) for path in paths]) == 1
    told = capsys.readouterr().out
    assert "unknown loops: 0 to 1" in told
    assert compare.main([str(path) for path in reversed(paths)]) == 0


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the extra gpu-compile")
def test_programs_for_gpus_are_counted_beside_a_hand_written_one(tmp_path, capsys):
    from bench import gpu

    gpu.main(["--workloads", "mlp-128", "--targets", "h100", "h100:3", "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert "h100:3: left out, a batch of 64 does not divide over it" in told
    found = Results.read(tmp_path / "gpu.json")
    own, hand = (found.find("mlp-128 on h100", who, "kernels") for who in ("learnax", "hand"))
    assert own.median <= hand.median
    for measure in ("unknown loops", "branches", "copies of state"):
        assert found.find("mlp-128 on h100", "learnax", measure).median == 0
