"""Training over processes: the trajectory of one process, each reading its share, with one voice."""

import collections
import json
import logging
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import learnax.cluster.processes
from learnax.data import Order
from learnax.sinks import page
from tests import peers
from tests.helpers import assert_trees_close, assert_trees_equal, make_trainer

pytestmark = pytest.mark.processes

BATCH, SIZE, EPOCHS = 8, 43, 2
"""Data of a batch and of the training set, and epochs, where a run says nothing else."""


@pytest.fixture(scope="module")
def one():
    """What each run comes to in one process of four devices."""
    return {name: peers.trained(name) for name in peers.RUNS}


LAYOUTS = {2: list(peers.RUNS), 4: ["fused", "read again", "guarded", "shown"]}
"""Processes, and the runs that are made there: all of them in two, in four those to which a share's size matters."""


@pytest.fixture(scope="module", params=LAYOUTS, ids=["2x2", "4x1"])
def several(request, tmp_path_factory):
    """The same runs, one after another, in processes that have four devices together."""
    folder = tmp_path_factory.mktemp("peers")
    return peers.together(
        "train_all",
        folder,
        request.param,
        4 // request.param,
        seconds=120,
        # One of them shows a progress bar.
        env={"TQDM_DISABLE": None, "PEERS": ",".join(LAYOUTS[request.param]), "PEERS_FILES": str(folder / "files")},
    )


@pytest.fixture(scope="module")
def misused(tmp_path_factory):
    """Two processes that give their trainers arguments that differ."""
    return peers.together("misuse", tmp_path_factory.mktemp("peers"), 2, seconds=40, codes=(1,))


def real(size, index, count, batches=None):
    """The indices that a process reads in one pass: its rows of each batch, or the last datum where it has none."""
    rows = BATCH // count
    for start in range(0, size, BATCH)[:batches]:
        first = min(start + index * rows, size - 1)
        yield from range(first, min(start + (index + 1) * rows, size))


# ---- the trajectory


def test_a_run_over_processes_is_that_of_one_process(one, several):
    for name, peer in ((name, peer) for name in LAYOUTS[len(several)] for peer in several):
        expected, got = one[name], peer.results[name]
        assert expected["step"] > 0, name
        assert_trees_close(got["params"], expected["params"])
        np.testing.assert_array_equal(got["rng"], expected["rng"], err_msg=name)
        assert (name, got["step"]) == (name, expected["step"])
        assert (name, got["times"]) == (name, expected["times"])
        assert list(got["metrics"]) == list(expected["metrics"]), name
        for metric, values in expected["metrics"].items():
            said = f"{metric} of {name}"
            np.testing.assert_allclose(got["metrics"][metric], values, rtol=1e-5, atol=1e-6, err_msg=said)
        # Between processes, there is no rounding: all have the same bits.
        assert_trees_equal(got["params"], several[0].results[name]["params"])
        np.testing.assert_equal(got["metrics"], several[0].results[name]["metrics"], err_msg=name)


def test_the_runs_are_what_their_names_say(one):
    assert one["fused"]["room"] == SIZE // BATCH
    assert one["worker"]["room"] == one["convolution"]["room"] == 1
    assert one["accumulated"]["step"] == EPOCHS * (SIZE // BATCH // 2)
    assert one["single batch"]["step"] == EPOCHS * peers.STEPS
    assert one["guarded"]["step"] == EPOCHS * (SIZE // BATCH - 2)
    assert one["guarded"]["metrics"]["train/has_nan"] == EPOCHS * [0, 1, 0, 1, 0]
    assert len(one["fused"]["metrics"]["val_1/loss"]) == EPOCHS
    assert one["shown"]["metrics"]["train/sampled"]


def test_each_process_compiles_and_dispatches_what_one_process_does(one, several):
    for name, peer in ((name, peer) for name in LAYOUTS[len(several)] for peer in several):
        expected = one[name]
        assert len(set(expected["kinds"])) == len(expected["kinds"]), name
        assert (name, peer.results[name]["kinds"]) == (name, expected["kinds"])
        assert (name, peer.results[name]["calls"]) == (name, expected["calls"])


# ---- each its share


def test_each_process_reads_its_rows_and_no_others(several):
    count = len(several)
    training = collections.Counter()
    validation = collections.Counter()
    for index, peer in enumerate(several):
        reads = peer.results["read again"]["reads"]
        assert reads["train"] == [0, *EPOCHS * [*real(SIZE, index, count, SIZE // BATCH)]]
        assert reads["val"] == [0, *EPOCHS * [*real(peers.TAIL, index, count)]]
        training.update(reads["train"][1:])
        validation.update(reads["val"][1:])
    assert training == dict.fromkeys(range(SIZE - SIZE % BATCH), EPOCHS)
    empty = count - -(-(peers.TAIL % BATCH) // (BATCH // count))  # they read the last datum, for its shape
    assert empty > 0
    assert validation.pop(peers.TAIL - 1) == EPOCHS * (1 + empty)
    assert validation == dict.fromkeys(range(peers.TAIL - 1), EPOCHS)


def test_each_process_reads_its_rows_of_the_order_of_all(several):
    count = len(several)
    if "shuffled by index" not in LAYOUTS[count]:
        return
    orders = [Order(SIZE, 0, epoch)[: SIZE - SIZE % BATCH].tolist() for epoch in range(EPOCHS)]
    for index, peer in enumerate(several):
        places = [*real(SIZE, index, count, SIZE // BATCH)]
        reads = peer.results["shuffled by index"]["reads"]["train"]
        assert reads == [0, *(order[place] for order in orders for place in places)]


def test_what_stays_on_the_devices_is_of_their_own_rows(one, several):
    count = len(several)
    runs = [run for run in ("fused", "accumulated") if run in LAYOUTS[count]]
    for name, split, blocks in ((run, *item) for run in runs for item in one[run]["resident"].items()):
        assert blocks
        held = [peer.results[name]["resident"][split] for peer in several]
        for number, (shape, _, _) in enumerate(blocks):
            devices, rows = [], []
            for own_shape, host_shape, shards in (blocks[number] for blocks in held):
                assert own_shape == shape
                assert host_shape == (shape[0], BATCH // count, *shape[2:])
                assert len(shards) == 4 // count
                for device, shard_shape, part in shards:
                    assert shard_shape == (shape[0], BATCH // 4, *shape[2:])
                    devices.append(device)
                    rows += range(BATCH)[part[1]]
            assert len(set(devices)) == 4
            assert rows == list(range(BATCH))


def test_unequal_numbers_of_batches_are_an_error_on_all_processes(tmp_path):
    for peer in peers.together("unequal_batches", tmp_path, 2, seconds=60, codes=(1,)):
        assert peer.results["error"] == (
            "dataset 'train': the processes have unequal numbers of batches by now: 5 on process 0, 4 on process 1; "
            "with per_process=True all of them must yield as many"
        )


# ---- one voice


def test_only_the_first_process_calls_the_users_functions(one, several):
    expected = one["shown"]
    first, *others = (peer.results["shown"] for peer in several)
    for other in others:
        assert not any(other[name] for name in ("plots", "outputs", "samples", "saved", "rows"))
        assert len(other["measured"]) == len(expected["measured"])  # all of them have the metrics
    assert len(first["plots"]) == EPOCHS * (SIZE // BATCH) // 3
    for (of_run, outputs, batch), (_, other_outputs, other_batch) in zip(
        first["plots"], expected["plots"], strict=True
    ):
        assert of_run
        assert len(outputs) == len(batch) == BATCH
        assert_trees_close(outputs, other_outputs)
        assert_trees_equal(batch, other_batch)
    for name in ("outputs", "samples", "saved"):
        assert len(first[name]) == len(expected[name]) > 0
        assert_trees_close(first[name], expected[name])


def test_only_the_first_process_logs(one, several):
    def timeless(row):
        return {name: value for name, value in row.items() if not name.endswith("update_time")}

    rows, expected = several[0].results["shown"]["rows"], one["shown"]["rows"]
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        assert_trees_close(timeless(row), timeless(other))


def test_only_the_first_process_writes_to_sinks(one, several):
    folder = several[0].results["files"]
    if len(several) == 2:
        rows = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
        losses = [row["train/loss"] for row in rows if "train/loss" in row]
        np.testing.assert_allclose(losses, one["convolution"]["metrics"]["train/loss"], rtol=1e-5)
        assert sorted(path.name for path in folder.iterdir()) == ["a.jsonl", "report", "tb"]
        assert [len(list((folder / name).iterdir())) for name in ("report", "tb")] == [1, 1]
        assert page.read(folder / "report" / "report.html")["processes"] == 2


def test_only_the_first_process_is_heard(several):
    first, *others = several
    assert [peer.said for peer in others] == [[]] * len(others)
    assert first.err.count("the update would put NaN into the parameters and was dropped") == 2 * EPOCHS
    assert re.search(r"epoch 2/2: \d+/\d+ \(100%\), loss ", first.err)
    names = LAYOUTS[len(several)]
    assert first.err.count("waiting for data") == len(names) + sum(
        "evaluate" in first.results[name]["kinds"] for name in names
    )
    for peer in several:
        # Threads of one process write these lines side by side.
        assert (
            re.sub(r"\[Gloo\]|Rank|is connected to|Expected number of connected|peer|ranks|is|[\d.:\s]", "", peer.out)
            == ""
        )


# ---- misuse


def test_the_import_asks_jax_for_nothing(misused):
    assert [peer.results["backends by import"] for peer in misused] == [False, False]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("batch_size", ("8", "16")),
        ("seed", ("0", "1")),
        ("learning_rate", ("0.01", "0.02")),
        ("len(train)", ("43", "42")),
        ("len(val_1)", ("nothing", "5")),
        ("steps_per_execution", ("'auto'", "1")),
        ("plot_pipe", ("given", "None")),
    ],
)
def test_arguments_that_differ_are_named_on_each_process(name, values, misused):
    for peer in misused:
        kind, text, seconds = peer.results[name]
        assert kind == "ValueError"
        assert text.startswith("the processes of this run differ in arguments:\n")
        assert f"  {name}: {values[0]} on process 0, {values[1]} on process 1\n" in text
        assert seconds < 10


def test_a_model_that_differs_is_named_by_its_parameters(misused):
    for peer in misused:
        kind, text, _ = peer.results["params/Dense_1/kernel"]
        assert kind == "ValueError"
        assert "  params/Dense_1/kernel: float32[8, 16] on process 0, float32[8, 17] on process 1\n" in text
        assert "  params/Dense_0/bias" not in text  # what is the same is left out


def test_what_is_not_caught_ends_every_process(misused):
    for peer in misused:
        assert "ValueError: the processes of this run differ in arguments:\n  seed: 0 on process 0, 1 on" in peer.err


def test_a_batch_that_does_not_divide_is_an_error_on_each_process(misused):
    for peer in misused:
        kind, text, _ = peer.results["not divided"]
        assert kind == "ValueError"
        assert text.startswith("batch_size 9 does not divide over 2 devices; use a multiple of 2 (8 or 10)")


def test_devices_of_some_processes_are_an_error(several, misused):
    if len(several) == 4:
        for index, peer in enumerate(several):
            kind, text, _ = peer.results["devices of some"]
            assert kind == "ValueError"
            assert text == (
                f"devices belong to the processes [0, 1], expected all 4 of them, or this one ({index}) alone; leave "
                "`devices` out to take all"
            )
    kind, text, _ = misused[1].results["of one"]
    assert kind == "ValueError"
    assert text.startswith("devices belong to the processes [0], expected all 2 of them, or this one (1) alone")


def test_shares_of_different_sizes_are_an_error_before_the_first_step(several, request):
    if len(several) == 4:
        pytest.skip("processes of one device have equal shares")
    for peer in several:
        kind, text, _ = peer.results["devices of some"]  # two of the first process and one of the second
        assert kind == "ValueError"
        assert text == "each process must have as many of the devices, but they have [1, 2] of them"


def test_a_preflight_looks_at_the_devices_of_its_own_process(misused):
    assert [peer.results.get("preflight") for peer in misused] == [None, None]


def test_random_keys_among_the_data_can_be_shown():
    engine = make_trainer(devices=jax.devices()[:4]).engine
    engine.spans = True  # what several processes have; a program of one process takes the same way
    keys = engine.whole(jax.random.split(jax.random.key(0), 4))
    assert_trees_equal(jax.random.key_data(keys), jax.random.key_data(jax.random.split(jax.random.key(0), 4)))


@pytest.mark.parametrize(
    "package",
    [
        "/usr/lib/python3/site-packages",
        "/home/someone/learnax",
        "/learnax/data",
    ],
)
def test_what_other_processes_say_is_told_by_the_file_wherever_the_package_lies(package, monkeypatch):
    monkeypatch.setattr(learnax.cluster.processes, "_PACKAGE", Path(package) / "learnax")

    def heard(file):
        record = logging.LogRecord("learnax", logging.WARNING, f"{package}/learnax/{file}", 1, "said", (), None)
        return learnax.cluster.processes._Own().filter(record)

    assert heard("checkpoint/checkpointer.py")
    assert not heard("log/log.py")


@pytest.mark.parametrize(
    ("scenario", "told"),
    [
        ("fails_before", "LookupError: no data on this machine"),
        ("fails_while", "DatasetError: dataset 'train' raised at index 0: LookupError: no data on this machine"),
    ],
)
def test_a_process_whose_script_fails_ends_the_others(scenario, told, tmp_path):
    first, second = peers.together(scenario, tmp_path, 2, seconds=15, codes=(1,))
    assert first.results["error"] == ("PeerError", f"process 1 of 2 failed: {told}")
    assert first.results["seconds"] < 10
    assert "LookupError: no data on this machine" in second.err


def test_to_connect_after_a_trainer_was_built_is_jaxs_error():
    make_trainer()
    with pytest.raises(RuntimeError, match=r"jax.distributed.initialize\(\) must be called before any JAX calls"):
        jax.distributed.initialize("localhost:1", 1, 0)


@pytest.mark.parametrize("variable", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_that_were_not_connected_are_told_of_once(variable, monkeypatch, caplog):
    for name in learnax.cluster.processes._TASKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "2")
    monkeypatch.setattr(learnax.cluster.processes, "_warned", [])
    with caplog.at_level(logging.WARNING, "learnax"):
        make_trainer()
        make_trainer()
    assert [record.getMessage() for record in caplog.records] == [
        f"{variable} is 2, but JAX knows of one process: each task trains on its own. To train together, call "
        "jax.distributed.initialize() before anything else"
    ]


@pytest.mark.parametrize("tasks", ["1", "", "a few"])
def test_one_task_is_nothing_to_tell_of(tasks, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    monkeypatch.setattr(learnax.cluster.processes, "_warned", [])
    with caplog.at_level(logging.WARNING, "learnax"):
        make_trainer()
    assert not caplog.records
