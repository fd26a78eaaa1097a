"""Before the run: what it will take is found out, and the trainer is left as it was."""

import re
import tempfile

import jax
import numpy as np
import pytest

from learnax.engine import preflight
from learnax.registry import Registry
from tests.helpers import MemoryRun, Streamed, assert_trees_equal, host, make_data, make_trainer


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (1, {}),
        pytest.param(4, {"num_workers": 1}, marks=pytest.mark.processes),
        (2, {"accumulate_steps": 2}),
        pytest.param(4, {"single_batch": True}, marks=pytest.mark.soak),
    ],
)
def test_the_trainer_is_left_as_it_was_and_trains_to_the_same_bits(count, options, tmp_path):
    run = MemoryRun()
    given = {"devices": jax.devices()[:count], "val_datasets": [make_data(9, 1)], "num_epochs": 1, **options}
    trainer = make_trainer(run=run, registry=Registry("tests", tmp_path), **given)
    before = host(trainer.train_state)
    seq = np.asarray(jax.random.key_data(trainer.rng_seq))
    report = trainer.preflight()
    assert_trees_equal(trainer.train_state, before)
    assert_trees_equal(jax.random.key_data(trainer.rng_seq), seq)
    assert trainer.metrics == {}
    assert run.rows == []
    assert trainer.position.batch == 0
    assert not trainer.checkpointer.path.exists()
    assert report.params == 195
    assert report.state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(before))
    assert report.arrays == len(jax.tree.leaves(before))
    trainer.train()
    plain = make_trainer(**given)
    plain.train()
    assert_trees_equal(trainer.train_state, plain.train_state)
    assert trainer.metrics["train/loss"] == plain.metrics["train/loss"]


@pytest.mark.thorough
def test_in_the_midst_of_a_run_it_leaves_all_as_it_was(tmp_path):
    given = {"registry": Registry("tests", tmp_path), "val_datasets": [make_data(9, 1)]}
    trainer = make_trainer(**given)
    trainer.epoch(0)
    trainer.preflight()
    trainer.epoch(1)
    plain = make_trainer(num_epochs=2, val_datasets=given["val_datasets"])
    plain.train()
    assert_trees_equal(trainer.train_state, plain.train_state)
    assert trainer.metrics["val/loss"] == plain.metrics["val/loss"]


@pytest.mark.parametrize("count", [1, 4])
def test_the_report_says_what_it_found(count):
    devices = jax.devices()[:count]
    data = {"train_dataset": Streamed(make_data(83)), "val_datasets": {"held out": make_data(9, 1)}}
    trainer = make_trainer(devices=devices, **data)
    report = trainer.preflight()
    assert report.copied == ()
    lines = str(report).splitlines()
    for pattern in (
        r"parameters +195; the training state takes 2\.\d+ kB",
        r"plan +10 step\(s\) per dispatch: ",
        r"program: train +\d.*FLOP a batch, .* of it updated in place",
        r"program: evaluate +\d",
        r"memory +[\d.]+ kB on each device, which has [\d.]+ GB",
        r"data +train: 83 data in 10 batches, read by this process in each pass",
        r"data +held out: 9 data in 2 batches, read by this process once, kept on the devices",
        r"updated in place +(\d+) of the state's \1 arrays",
        r"a step +[\d.]+ [mµ]?s; its data are read in [\d.]+ [mµ]?s",
        r"a validation +[\d.]+ [mµ]?s",
        r"an epoch +[\d.]+ [mµ]?s, 10 steps and a validation",
        r"a save +[\d.]+ m?s; read again in [\d.]+ m?s, bit for bit",
    ):
        assert any(re.match(pattern, line) for line in lines), (pattern, lines)
    assert report.programs["train"].flops > report.programs["evaluate"].flops > 0
    step_s = max(report.step_s, report.read_s) if len(devices) == 1 else report.step_s + report.read_s
    assert report.epoch_s == pytest.approx(10 * step_s + report.validation_s)


@pytest.mark.thorough
def test_its_estimate_of_an_epoch_is_about_what_one_takes():
    import time

    class Slow(Streamed):
        def __getitem__(self, index):
            time.sleep(0.002)
            return self.data[index]

    trainer = make_trainer(train_dataset=Slow(make_data(320)), num_epochs=1)
    expected = trainer.preflight().epoch_s
    began = time.perf_counter()
    trainer.epoch(0)
    assert expected == pytest.approx(time.perf_counter() - began, rel=0.3)


def test_a_run_that_the_devices_cannot_hold_is_an_error_and_nothing_is_dispatched(monkeypatch):
    monkeypatch.setattr(preflight, "memory_of", lambda device: 1000)
    trainer = make_trainer()
    before = host(trainer.train_state)
    with pytest.raises(
        MemoryError, match=r"^the run takes [\d.]+ kB on each device, which has 1 kB: a smaller batch_s"
    ):
        trainer.preflight()
    assert_trees_equal(trainer.train_state, before)
    assert trainer.engine.calls == 0


def test_a_checkpoint_that_does_not_come_back_is_an_error_by_name(monkeypatch):
    load = preflight.Checkpointer.load_latest

    def other(self, *, target):
        loaded = load(self, target=target)
        return {**loaded, "state": loaded["state"]._replace(step=loaded["state"].step + 1)}

    monkeypatch.setattr(preflight.Checkpointer, "load_latest", other)
    with pytest.raises(OSError, match=r"^a checkpoint did not come back as it was saved: step; is .* sound\?"):
        make_trainer().preflight()


def test_no_room_for_a_checkpoint_is_an_error_before_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    trainer = make_trainer()
    before = host(trainer.train_state)
    with pytest.raises(NotADirectoryError):
        trainer.preflight()
    assert_trees_equal(trainer.train_state, before)


def test_it_is_for_before_the_run():
    trainer = make_trainer(plot_every=1, plot_pipe=lambda *_: trainer.preflight(), steps_per_execution=1)
    with pytest.raises(RuntimeError, match=r"^preflight\(\) is for before train\(\): the run is under way$"):
        trainer.train()
