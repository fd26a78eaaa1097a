"""Many processes: what a step moves, as the compiled program has it; the estimate's arithmetic; the benchmark, once."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from bench import scaling
from bench.estimate import DISCLAIMER, Cluster, estimate, main, one_pass
from bench.results import Results
from learnax.step.packing import ROW, SMALL
from tests.helpers import ROOT, dry, make_trainer

# ---- bytes of a step


def train_program(**options):
    """A trainer with its one program, and that program's text."""
    trainer = make_trainer(compile=True, **options)
    (program,) = trainer.engine.programs.values()
    return trainer, program.compiled.as_text()


@pytest.mark.parametrize("count", [2, 4])
def test_a_step_reduces_its_gradients_and_three_scalars_on_any_number_of_devices(count):
    trainer, text = train_program(devices=jax.devices()[:count])
    sizes = [leaf.size for leaf in jax.tree.leaves(trainer.train_state.params)]
    assert max(sizes) <= SMALL
    # Small leaves lie in one vector, in whole rows; the scalars are the loss, its metric and the part of NaN.
    widths = [size if size < ROW else math.ceil(size / ROW) * ROW for size in sizes]
    assert scaling.all_reduce_bytes(text) == 4 * sum(widths) + 4 * 3
    assert len(scaling._ALL_REDUCE.findall(text)) == 1


@pytest.mark.parametrize("count", [2, 4])
def test_a_large_model_s_step_moves_its_parameters_and_next_to_nothing_else(count):
    work = scaling.workload("mlp-2048", 2, count)
    given = {"model": work.model, "losses": work.losses, "train_dataset": work.data, "batch_size": work.batch_size}
    trainer, text = train_program(devices=jax.devices()[:count], **given)
    leaves = jax.tree.leaves(trainer.train_state.params)
    params = sum(leaf.nbytes for leaf in leaves)
    assert all(leaf.size % ROW == 0 or leaf.size < ROW for leaf in leaves)  # so none is filled up to whole rows
    assert scaling.all_reduce_bytes(text) == params + 4 * 2  # the loss, and the part of NaN


def test_a_step_of_one_device_moves_nothing():
    assert scaling.all_reduce_bytes(train_program()[1]) == 0


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("  %all-reduce.9 = (f32[512]{0}, f32[], /*index=2*/bf16[3,5]{1,0}) all-reduce(%a, %b, %c)", 2082),
        ("  ROOT %x = f32[128]{0:T(1024)} all-reduce-start(%a), to_apply=%add", 512),
        ("  %d = f32[128]{0} all-reduce-done(%x)", 0),
        ("  %y = pred[7]{0} all-reduce(%a), to_apply=%or", 7),
        ("  %z = f8e4m3fn[10,10]{1,0} all-reduce(%a)", 100),
        ("  %g = f32[128]{0} get-tuple-element(%all-reduce.9), index=0", 0),
    ],
)
def test_bytes_are_read_off_a_line(line, size):
    assert scaling.all_reduce_bytes(line) == size


# ---- the estimate


def test_a_node_is_a_ring():
    # 8 GPUs, 800 MB at 100 GB/s: seven eighths of 8 ms.
    assert one_pass(800e6, 8, Cluster(8, 100e9, 10e9)) == pytest.approx(7e-3)
    assert one_pass(800e6, 4, Cluster(8, 100e9, 10e9)) == pytest.approx(6e-3)
    assert one_pass(800e6, 1, Cluster(8, 100e9, 10e9)) == 0


def test_nodes_share_what_goes_between_them():
    # 7 ms inside as above; an eighth, 100 MB at 10 GB/s, past 3 of 4 nodes: 7.5 ms.
    assert one_pass(800e6, 32, Cluster(8, 100e9, 10e9)) == pytest.approx(14.5e-3)
    # 7 steps in the node and 3 between nodes.
    assert one_pass(800e6, 32, Cluster(8, 100e9, 10e9, 1e-3)) == pytest.approx(24.5e-3)


def test_nodes_of_one_are_the_ring_of_the_textbook():
    for gpus in (2, 8, 64, 512):
        ring = 2 * (gpus - 1) / gpus * 400e6 / 50e9
        made = estimate(100e6, 4, 1.0, gpus, sharded=False, cluster=Cluster(1, 450e9, 50e9))
        assert made.communication == pytest.approx(ring)
        assert made.alone == pytest.approx(1 + ring)


def test_replicated_state_overlaps_with_the_backward_pass_alone():
    cluster = Cluster(8, 100e9, 10e9)  # a pass of 200 M parameters over 32 GPUs takes 14.5 ms
    slow = estimate(200e6, 4, 30e-3, 32, sharded=False, cluster=cluster)
    assert slow.communication == pytest.approx(29e-3)
    assert slow.alone == pytest.approx(59e-3)
    assert slow.overlapped == pytest.approx(10e-3 + 29e-3)  # longer than the 20 ms of a backward pass
    assert estimate(200e6, 4, 60e-3, 32, sharded=False, cluster=cluster).overlapped == pytest.approx(60e-3)
    assert slow.state == 3 * 800e6


def test_sharded_state_moves_half_as_much_again_and_keeps_a_share():
    cluster = Cluster(8, 100e9, 10e9)
    made = estimate(200e6, 4, 30e-3, 32, sharded=True, cluster=cluster)
    assert made.communication == pytest.approx(43.5e-3)
    assert made.alone == pytest.approx(73.5e-3)
    assert made.overlapped == pytest.approx(14.5e-3 + 29e-3)  # forward 10 ms, backward 20 ms
    assert made.state == 3 * 800e6 / 32


def test_gpus_that_do_not_fill_their_nodes_are_refused(capsys):
    with pytest.raises(ValueError, match="12 GPUs do not fill nodes of 8"):
        one_pass(1.0, 12, Cluster())
    with pytest.raises(SystemExit):
        main(["--params", "1e6", "--step-ms", "1", "--gpus", "12"])
    assert "12 GPUs do not fill nodes of 8" in capsys.readouterr().err


def test_the_estimate_is_a_table_that_says_what_it_is(capsys):
    main(["--params", "124e6", "--step-ms", "180"])
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.split()[1:2] in (["replicated"], ["sharded"])]
    assert [row[:2] for row in rows] == [[n, kind] for n in ("8", "64", "512") for kind in ("replicated", "sharded")]
    # Two passes of seven eighths of 496 MB at 450 GB/s.
    assert rows[0][2:] == ["1.488", "GB", "1.93", "ms", "181.9", "ms", "(99%)", "180.0", "ms", "(100%)"]
    assert DISCLAIMER in out


# ---- the benchmark, and the example on two processes


@pytest.mark.processes
def test_two_processes_are_measured_beside_one(tmp_path):
    command = [sys.executable, "-m", "bench.scaling", "--quick", "--rounds", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "\n1 process " in done.stdout
    assert "\n2 processes " in done.stdout
    made = Results.read(tmp_path / "scaling.json")
    one, two = (made.find("mlp-128", name, scaling.STEP) for name in ("1 process", "2 processes"))
    assert (one.more["all_reduce_bytes"], one.more["dispatches"]) == (0, 4)
    assert two.more["dispatches"] == 4  # of 16 steps each, as alone
    assert two.more["parameter_bytes"] < two.more["all_reduce_bytes"] < 1.01 * two.more["parameter_bytes"]
    assert two.more["items_per_s"] == pytest.approx(128 / np.median(two.samples))
    assert [compared.contender for compared in made.ratios] == ["2 processes"]
    assert json.loads((tmp_path / "scaling.json").read_text())["settings"]["quick"] is True


@pytest.mark.processes
def test_a_process_that_ends_is_not_waited_for(tmp_path):
    with contextlib.ExitStack() as stack, open(tmp_path / "log", "w+") as log:
        both = scaling.Set(stack, log, "mlp-128", 16, 1, 2)
        both.kill()
        with pytest.raises(RuntimeError, match="one of 2 processes has ended, or hung"):
            both.answers()


@pytest.mark.processes
@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_knows_its_targets():
    assert "examples/digits.py --distributed $1/2 --epochs 3" in dry("train-2", "ARGS=--epochs 3")
    assert "-m bench.scaling --quick" in dry("bench-scaling", "ARGS=--quick")
