"""Runs over processes that are stopped, killed and resumed: saved by all, ended by all, gone on with by any layout."""

import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from learnax.registry import Registry
from learnax.step.packing import SMALL
from tests import peers
from tests.helpers import MLP, assert_trees_close, assert_trees_equal, host, make_data, make_trainer

pytestmark = pytest.mark.processes

WIDTH = 2 * SMALL // 8
"""Of a layer that is worth dividing."""


def run(folder, name, count, devices, *, codes=(0,), registry="registry", **options):
    options |= {"registry": str(folder / registry)}
    env = {"PEERS": json.dumps(options)}
    return peers.together("resumed", folder / name, count, devices, env=env, codes=codes)


def whole_run(epochs, width=16):
    """The same run in this process, left alone, on four devices."""
    data = {"train_dataset": make_data(43), "val_datasets": [make_data(peers.TAIL, 1)], "model": MLP(width)}
    trainer = make_trainer(num_epochs=epochs, devices=jax.devices()[:4], **data)
    trainer.train()
    return trainer


def assert_same_run(results, trainer):
    assert_trees_close(results["state"], trainer.train_state, atol=1e-5)
    for name, values in results["metrics"].items():
        np.testing.assert_allclose(values, trainer.metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("sharded", "layouts"),
    [(True, [(2, 2), (1, 4), (4, 1)]), pytest.param(False, [(4, 1), (2, 1)], marks=pytest.mark.soak)],
)
def test_each_layout_goes_on_where_another_one_stopped(sharded, layouts, tmp_path):
    options = {"save_every": 4, "shard_state": sharded, "width": WIDTH if sharded else 16}
    for epochs, (count, devices) in enumerate(layouts, 1):
        ended = run(tmp_path, f"{epochs}", count, devices, num_epochs=epochs, **options)
        assert [peer.results["begins"] for peer in ended] == [5 * (epochs - 1)] * count
        for peer in ended:
            assert peer.results["checkpoints"][0] == "latest"
            assert peer.results["checkpoints"][-1] == 5 * epochs
        for peer in ended[1:]:
            assert_trees_equal(peer.results["state"], ended[0].results["state"])
            assert not [line for line in peer.said if "learnax" in line]
    assert_same_run(ended[0].results, whole_run(len(layouts), options["width"]))


def test_random_keys_in_a_divided_state_go_on_from_a_folder_of_an_odd_name(tmp_path):
    odd = "lr=[0.1]*"
    (saved, _) = run(tmp_path, "saved", 2, 2, num_epochs=1, shard_state=True, width=WIDTH, noise=True, registry=odd)
    data = {"train_dataset": make_data(43), "val_datasets": [make_data(peers.TAIL, 1)], "model": MLP(WIDTH)}
    resumed = make_trainer(
        **data, optimizer=peers.noisy(), registry=Registry("tests", tmp_path / odd), load_checkpoint=True
    )
    state, before = resumed.train_state, saved.results["state"]
    assert_trees_equal(state.params, before.params)
    key, left = state.opt_state[0].rng_key, before.opt_state[0].rng_key
    assert key.dtype == left.dtype
    assert (jax.random.key_data(key) == jax.random.key_data(left)).all()
    assert {entry.name for entry in tmp_path.iterdir()} <= {odd, "saved", "registry"}


def test_a_peer_that_is_killed_ends_the_others_and_the_next_start_ends_with_the_same_bits(tmp_path):
    options = {"num_epochs": 3, "save_every": 2, "steps_per_execution": 1}
    untouched = run(tmp_path, "untouched", 2, 1, registry="other", **options)
    began = time.monotonic()
    first, second = run(tmp_path, "killed", 2, 1, acts={"1": [9, "SIGKILL"]}, codes=(1, -9, -6), **options)
    assert time.monotonic() - began < 60
    assert second.code == -signal.SIGKILL
    # Whichever notices first: the collective, or JAX's heartbeats.
    assert "process 1 of 2 is gone. Start all processes again" in first.err or "unhealthy" in first.err
    resumed = run(tmp_path, "resumed", 2, 1, **options)
    assert 0 < resumed[0].results["begins"] <= 9  # it was killed once a save was on disk
    for peer, other in zip(resumed, untouched, strict=True):
        assert_trees_equal(peer.results["state"], other.results["state"])
        assert peer.results["metrics"] == other.results["metrics"]


@pytest.mark.parametrize("kind", ["streamed", pytest.param("own", marks=pytest.mark.soak)])
def test_streams_of_processes_go_on_where_each_stood(kind, tmp_path):
    options = {"num_epochs": None, "kind": kind, "save_every": 3, "steps_per_execution": 1}
    run(tmp_path, "stopped", 2, 1, num_steps=7, **options)
    resumed = run(tmp_path, "resumed", 2, 1, num_steps=13, **options)
    assert [peer.results["begins"] for peer in resumed] == [7, 7]
    alone = make_trainer(num_epochs=None, num_steps=13, devices=jax.devices()[:2])
    alone.train()
    for peer in resumed:
        np.testing.assert_allclose(peer.results["metrics"]["train/loss"], alone.metrics["train/loss"], rtol=1e-5)
        assert_trees_close(peer.results["state"].params, alone.train_state.params)


@pytest.mark.parametrize(("what", "who"), [("raise", 1), ("leave", 0)])
def test_a_peer_that_fails_ends_the_others_who_say_why(what, who, tmp_path):
    ended = run(
        tmp_path, "failed", 2, 2, num_epochs=40, acts={str(who): [7, what]}, codes=(1, 7, -6), steps_per_execution=1
    )
    why = "LookupError: the disk of this machine is gone" if what == "raise" else "SystemExit: 7"
    assert ended[who].code == (1 if what == "raise" else 7)
    assert ended[who].results["ends"] == 7
    assert f"process {who} of 2 failed: {why}. Start all processes again: with a registry and" in ended[1 - who].err
    if what == "raise":
        assert f"learnax: process {who} of 2" in ended[who].err


@pytest.mark.parametrize(("signum", "code"), [("SIGTERM", 143), ("SIGINT", -2)])
def test_a_signal_to_one_process_makes_all_save_the_same_step_and_leave(signum, code, tmp_path):
    options = {"num_epochs": 200, "save_every": 100_000, "steps_per_execution": 1}
    # In a group of their own, so that the signal comes to one of them alone.
    ended = run(tmp_path, "stopped", 2, 1, acts={"1": [7, signum]}, codes=(code, 130), **options)
    (step,) = {peer.results["ends"] for peer in ended}
    assert 7 <= step < 1000
    assert f"stopped at step {step} by {signum}, and saved: load_checkpoint=True goes on from here" in ended[0].err
    assert "stopped at" not in ended[1].err
    if signum == "SIGTERM":  # what is saved does not depend on the signal
        return
    epochs = -(-(step + 1) // 5)
    resumed = run(tmp_path, "resumed", 2, 1, **{**options, "num_epochs": epochs})
    assert [peer.results["begins"] for peer in resumed] == [step, step]
    assert_same_run(resumed[0].results, whole_run(epochs))


def test_the_end_of_the_time_of_one_process_is_that_of_all(tmp_path):
    options = {"num_epochs": 100_000, "save_every": 100_000, "max_seconds": 1}
    ended = run(tmp_path, "timed", 2, 1, **options)
    (step,) = {peer.results["ends"] for peer in ended}
    assert step > 0
    assert f"stopped at step {step} by TimeUpError: max_seconds=1 are over, and saved" in ended[0].err
    assert all(peer.results["checkpoints"] == ["latest", step] for peer in ended)


def test_one_process_starts_the_run_and_all_save_in_its_folder(tmp_path):
    first, second = peers.together("named_runs", tmp_path / "peers", 2, env={"PEERS": str(tmp_path)})
    assert first.results["id"] == second.results["id"]
    assert (first.results["session"], second.results["session"]) == (True, False)
    expected = str(tmp_path / "named" / first.results["id"] / "checkpoints")
    assert first.results["path"] == second.results["path"] == expected
    for peer in (first, second):
        assert "each device, which has" in peer.results["preflight"]
        assert "a save" not in peer.results["preflight"]  # a temporary folder is not shared


def test_where_the_folder_is_anothers_all_are_refused(tmp_path):
    from learnax.checkpoint import Checkpointer
    from learnax.step.state import TrainState

    here = Checkpointer.at(tmp_path / "registry" / "tests" / "trainer" / "checkpoints")
    here.save_latest(TrainState({"w": np.zeros(3)}, {}, 1))
    here.wait()
    try:
        for peer in run(tmp_path, "refused", 2, 1, codes=(1,)):
            assert f"OwnedError: checkpoints in {here.path} belong to process {os.getpid()} on host" in peer.err
    finally:
        here.close()


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """A folder in which two processes of a device each have saved a divided state, and that state."""
    folder = tmp_path_factory.mktemp("divided")
    ended = run(folder, "saved", 2, 1, num_epochs=1, shard_state=True, width=WIDTH)
    return folder, ended[0].results["state"]


def test_a_process_alone_reads_what_several_have_saved(divided):
    from learnax.checkpoint import Checkpointer

    folder, state = divided
    loaded = Checkpointer.at(folder / "registry" / "tests" / "trainer" / "checkpoints").load_latest()
    assert_trees_equal(host(loaded["state"].params), state.params)


def test_a_piece_that_was_changed_is_noticed(divided):
    from learnax.checkpoint import files, seals

    folder = divided[0] / "registry" / "tests" / "trainer" / "checkpoints"
    save = max(path for path in folder.iterdir() if path.name.isdecimal())
    meta = files.read_meta(save)
    array = np.array(files.read(save, meta)["params/Dense_1/kernel"])
    assert meta["pieces"]["params/Dense_1/kernel"][0] == 0  # along its first axis
    sums = meta["pieces"]["params/Dense_1/kernel"][1]
    assert seals._piece_sums(array, 0, sums) == (sums, sums)
    array[-1, 3] += 1
    written, changed = seals._piece_sums(array, 0, sums)
    assert [start for start in sums if written[start] != changed[start]] == [str(len(array) // 2)]
    # A process that has the first half alone looks at nothing else.
    written, found = seals._piece_sums(array, 0, sums, slice(0, len(array) // 2))
    assert written == found == {"0": sums["0"]}


def test_each_process_reads_its_own_part_of_a_divided_state(divided, tmp_path):
    shutil.copytree(divided[0] / "registry", tmp_path / "registry")
    ended = run(tmp_path, "read", 2, 2, num_epochs=2, shard_state=True, width=WIDTH)
    for index, peer in enumerate(ended):
        part = (slice(index * 4, (index + 1) * 4), slice(None))
        assert peer.results["parts read"] == [((8, WIDTH), part)] * 3  # a kernel and its two moments
    assert_same_run(ended[0].results, whole_run(2, WIDTH))
