"""Real signals to real processes, time limits, and whatever else ends a run before its time: nothing is lost."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from learnax.cluster.processes import OneProcess
from learnax.cluster.stops import Stops, TimeUpError
from tests.helpers import ROOT, MemoryRun, make_data, make_trainer, run_script
from tests.test_resume import assert_same_run, make, on_disk, trained
from tests.victim import PHASES, Diary

pytestmark = pytest.mark.processes


def start(folder, options):
    folder.mkdir(exist_ok=True)
    (folder / "ready").unlink(missing_ok=True)
    # Its only saves are those of its stops.
    command = [sys.executable, "-m", "tests.victim", str(folder), json.dumps({"save_every": 100_000} | options)]
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={options.get('devices', 1)}"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_for_step(folder, process, step):
    while process.poll() is None and not ((folder / "ready").exists() and Diary(folder / "diary")["step"] >= step):
        time.sleep(0.005)
    assert process.poll() is None, process.stderr.read()
    return Diary(folder / "diary")


def stop(folder, options, number, step, *, in_validation=False):
    """Starts a run, or goes on with it, and ends it by a signal from a step on; the step that it says it saved."""
    process = start(folder, options)
    diary = wait_for_step(folder, process, step)
    while in_validation and diary["phase"] != PHASES.index("validation"):
        time.sleep(0.001)
    os.killpg(process.pid, number)  # as a terminal or a queue does: to the workers, too
    _, errors = process.communicate(timeout=100)
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGINT)
    assert ("KeyboardInterrupt" in errors) is (number == signal.SIGINT)
    stopped = re.search(
        rf"stopped at step (\d+) by {number.name}, and saved: load_checkpoint=True goes on from here\n", errors
    )
    assert stopped, errors
    assert int(stopped[1]) == diary["step"] >= step
    return int(stopped[1])


def result(folder, options):
    """What came of a run that was left alone from here on."""
    process = start(folder, options)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    return json.loads((folder / "result.json").read_text())


ONE_BY_ONE = {"trainer": {"steps_per_execution": 1}, "seconds": 4e-3, "epochs": 6}
"""72 steps, 12 an epoch; a validation takes 0.1 s."""
FUSED = {"trainer": {"steps_per_execution": 16}, "devices": 4, "workers": 1, "seconds": 1e-3, "epochs": 24}
"""288 steps, 12 a dispatch, on four devices, of data that workers read."""


@pytest.mark.parametrize(
    ("options", "first", "second", "in_validation"),
    [
        (ONE_BY_ONE, (signal.SIGINT, 15), (signal.SIGTERM, 36), True),
        (FUSED, (signal.SIGTERM, 40), (signal.SIGINT, 140), False),
    ],
    ids=["one by one, then in a validation", "fused, four devices, workers"],
)
def test_a_signal_saves_and_leaves_as_it_asks_and_the_run_goes_on_bit_for_bit(
    options, first, second, in_validation, tmp_path
):
    untouched, folder = tmp_path / "untouched", tmp_path / "stopped"
    left = stop(folder, options, *first)
    diary = Diary(folder / "diary")
    left_again = stop(folder, options, *second, in_validation=in_validation)
    assert diary["resumed"] == left
    assert left_again % 12 == 0 or not in_validation  # the state before the validation
    alone = options | {"workers": 0}  # who reads the data makes no difference
    assert result(folder, alone) == result(untouched, alone)
    assert diary["resumed"] == left_again


HANGING = """
import os, signal, sys, threading, time
import numpy as np
from learnax.trainer import Trainer
import flax.linen as nn

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x)

class Run:
    id = name = "hanging"
    def log(self, row):
        threading.Event().wait()

class Data(list):
    def __getitem__(self, index):
        if index == 20:
            for _ in range(2):
                os.kill(os.getpid(), signal.{0})
                time.sleep(0.2)
        return super().__getitem__(index)

loss = lambda output, datum: (output, (output ** 2).mean(), {{}})
data = Data([np.ones(2, np.float32)] * 40)
trainer = Trainer(Net(), 1e-2, loss, 0, data, 2, 4, 0, run=Run(), registry="x")
try:
    trainer.train()
finally:
    print("left", flush=True)
"""


# Python ends by the signal itself after a KeyboardInterrupt, but with 1 where another thread calls `exec` meanwhile.
@pytest.mark.parametrize(("name", "statuses"), [("SIGINT", (-2, 1)), ("SIGTERM", (-15,))])
def test_a_second_signal_leaves_at_once(name, statuses, tmp_path):
    began = time.monotonic()
    done = run_script(HANGING.format(name), tmp_path, check=False)
    assert done.returncode in statuses
    assert done.stderr.endswith("\nKeyboardInterrupt\n") is (name == "SIGINT")
    assert time.monotonic() - began < 30  # a run.log that hangs is waited for 60 s
    assert ("left" in done.stdout) is (name == "SIGINT")
    assert "saved" not in done.stderr


@pytest.fixture(scope="module")
def untouched():
    """A run of this process, step by step, that was left alone."""
    return trained(registry=None, steps_per_execution=1)


def test_an_interrupted_trainer_goes_on_where_it_stopped(untouched):
    class Data(list):
        interrupts = 1

        def __getitem__(self, index):
            if index == 20 and self.interrupts:
                self.interrupts -= 1
                signal.raise_signal(signal.SIGINT)
            return super().__getitem__(index)

    trainer = make(registry=None, train_dataset=Data(make_data(43)), steps_per_execution=1)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.position.batch == trainer.log.step == 2  # the batch that was read when it came is read again
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    trainer.train()
    assert_same_run(trainer, untouched)


def test_the_time_limit_saves_and_returns(registry_path, caplog, untouched):
    class Slow(list):
        def __getitem__(self, index):
            time.sleep(0.05)
            return super().__getitem__(index)

    run = MemoryRun()
    options = {"train_dataset": Slow(make_data(43)), "steps_per_execution": 1, "save_every": 1000}
    with caplog.at_level(logging.WARNING, "learnax"):
        trainer = make(run=run, max_seconds=1.5, **options)
        trainer.parts.compile()
        assert trainer.train() is run
    step = trainer.log.step
    assert 1 <= step < 15
    assert caplog.messages == [
        f"stopped at step {step} by TimeUpError: max_seconds=1.5 are over, and saved: load_checkpoint=True goes on "
        "from here"
    ]
    assert [row["step"] for row in run.rows if "train/loss" in row] == list(range(1, step + 1))
    resumed = make(load_checkpoint=True, steps_per_execution=1)
    assert resumed.log.step == step
    resumed.train()
    assert_same_run(resumed, untouched)


@pytest.mark.parametrize("bad", [0, -1.0, "1", True])
def test_a_time_limit_that_is_none_is_an_error(bad):
    with pytest.raises(
        ValueError, match=r"^max_seconds must be a number of seconds above 0, or None for no limit, but"
    ):
        make_trainer(max_seconds=bad)


def test_what_is_raised_inside_ends_the_run_after_a_save(registry_path, caplog):
    untouched = trained(registry=None)

    class Broken(list):
        broken = True

        def __getitem__(self, index):
            if index == 29 and self.broken:
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    data = Broken(make_data(43))
    trainer = make(train_dataset=data, save_every=1000)
    with pytest.raises(RuntimeError, match="dataset 'train' raised at index 29: OSError: the disk is gone"):
        trainer.train()
    assert on_disk(registry_path).load_latest()["step"] == 3
    assert caplog.messages[-1].startswith("stopped at step 3 by DatasetError: dataset 'train' raised at index 29: OSE")
    data.broken = False
    resumed = make(train_dataset=data, load_checkpoint=True)
    resumed.train()
    assert_same_run(resumed, untouched)


def test_a_run_that_has_not_begun_saves_nothing_when_it_is_stopped(registry_path):
    trained(num_epochs=1)
    before = on_disk(registry_path).list_available_checkpoints()

    class Stopping(list):
        def __getitem__(self, index):
            signal.raise_signal(signal.SIGTERM)
            raise OSError("as a reader that got the signal, too")

    trainer = make(num_epochs=1)  # fresh: its first save would move the others aside
    trainer.loaders["train"].dataset = trainer.loaders["train"]._reader._dataset = Stopping(make_data(43))
    with pytest.raises(SystemExit) as stopped:
        trainer.train()
    assert stopped.value.code == 143
    assert isinstance(stopped.value.__cause__, RuntimeError)
    assert on_disk(registry_path).list_available_checkpoints() == before


def test_a_handler_of_the_users_own_is_called_after_all_is_done():
    calls = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    stops = Stops(None, OneProcess())
    try:
        with pytest.raises(SystemExit), stops.watched():  # noqa: PT012
            signal.raise_signal(signal.SIGTERM)
            assert stops.reason == "SIGTERM"
            assert not calls
        assert calls == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_is_ignored_stays_so_and_other_threads_take_none_over():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stops(None, OneProcess()).watched():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    seen = []

    def elsewhere():
        with Stops(None, OneProcess()).watched():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]


FORKING = """
import multiprocessing, os, signal, sys, warnings
warnings.simplefilter("ignore")
from learnax.cluster.processes import OneProcess
from learnax.cluster.stops import Stops

fork = multiprocessing.get_context("fork")

def wait(ready):
    try:
        ready.set()
        signal.pause()
    except KeyboardInterrupt:
        sys.exit(7)

def ended_by(number):
    ready = fork.Event()
    child = fork.Process(target=wait, args=(ready,))
    child.start()
    ready.wait()
    os.kill(child.pid, number)
    child.join(20)
    ended, _ = child.exitcode, child.kill()
    return ended

def handler(number, frame):
    os._exit(9)

stops = Stops(None, OneProcess())
for own in (None, handler):
    if own is not None:
        signal.signal(signal.SIGTERM, own)
        signal.signal(signal.SIGINT, own)
    with stops.watched():
        print(ended_by(signal.SIGTERM), ended_by(signal.SIGINT), stops.reason)
        stops.check()
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with stops.watched():
        os.kill(os.getpid(), signal.SIGINT)
        print(ended_by(signal.SIGTERM), stops.reason)  # forked with a signal pending
        stops.check()
except KeyboardInterrupt:
    print("left")
"""


def test_a_process_that_is_forked_inside_ends_by_its_signals_and_the_run_goes_on(tmp_path):
    # The child's default, what Python does with SIGINT, and a handler of the user's own.
    assert run_script(FORKING, tmp_path).stdout.splitlines() == ["-15 7 None", "9 9 None", "-15 SIGINT", "left"]


def test_time_is_up_only_when_it_is():
    stops = Stops(0.2, OneProcess())
    with stops.watched():
        stops.check()
        time.sleep(0.25)
        with pytest.raises(TimeUpError, match=r"^max_seconds=0.2 are over$"):
            stops.check()


def test_a_stop_costs_no_step_when_nothing_asks_for_it():
    """The same programs and dispatches, whatever may stop the run."""
    plain, limited = make(registry=None), make(registry=None, max_seconds=1e6)
    for trainer in (plain, limited):
        trainer.train()
    calls = [{kind: program.calls for (kind, _), program in t.engine.programs.items()} for t in (plain, limited)]
    assert calls[0] == calls[1]
    assert jax.tree.structure(plain.train_state) == jax.tree.structure(limited.train_state)
