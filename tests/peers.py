"""Processes that train together: `together` starts, watches and kills them.

Each of them connects to the others, and calls the scenario, a function of this module, with a dict that it fills; what
is in there when it ends comes back. They are forks of one process that has imported this module and done nothing else,
and end as any Python program does.
"""

import atexit
import contextlib
import functools
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import numpy as np
import optax
from flax import nnx
from jax._src import xla_bridge

from learnax.checkpoint import files, pieces
from learnax.data import Batches, Stream
from learnax.hooks import At, Every, Hook, Probe
from learnax.loss import LossPipe
from learnax.metrics import Max, Mean
from learnax.models import NNX, Linen
from learnax.registry import Registry
from learnax.sinks import JsonLines, Report, TensorBoard
from tests.cells import cells
from tests.helpers import (
    MLP,
    ROOT,
    Convolution,
    MemoryRun,
    Noisy,
    Poisonable,
    Streamed,
    host,
    make_data,
    make_trainer,
)

BACKENDS_BY_IMPORT = xla_bridge.backends_are_initialized()
"""Whether what is imported here, learnax above all, has asked JAX for its devices."""


class Ended(NamedTuple):
    """How a process ended, and what it left."""

    code: int
    out: str
    err: str
    results: dict[str, Any]

    @property
    def said(self):
        """Its lines on stderr that are not of JAX's collectives."""
        return [line for line in self.err.splitlines() if line.strip() and not line.startswith("[Gloo]")]


def together(scenario, folder, count, devices=1, *, env=None, seconds=90, codes=(0,)):
    """Runs a scenario in `count` processes of so many devices each; what is left of them after it is killed.

    Raises:
        AssertionError: one did not end in time, or with another exit status; the text has what each of them printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        **(env or {}),
    }
    asked = {
        "processes": [[scenario, index, count, port, str(folder)] for index in range(count)],
        "environment": {name: value for name, value in environment.items() if value is not None},
        "seconds": seconds,
    }
    statuses, late = _server("TQDM_DISABLE" in asked["environment"]).ask(asked)
    ended = [_ended(folder, index, status) for index, status in enumerate(statuses)]
    what = f"after {seconds} s, processes {late} were still there" if late else ""
    if not late and any(one.code not in codes for one in ended):
        what = f"exit statuses {[one.code for one in ended]}, expected {codes}"
    if what:
        texts = [f"---- process {index}\n{one.out}\n{one.err}" for index, one in enumerate(ended)]
        raise AssertionError("\n".join([f"{scenario} on {count} processes: {what}", *texts]))
    return ended


def _ended(folder, index, code):
    results = folder / f"{index}.pickle"
    return Ended(
        code,
        (folder / f"{index}.out").read_text(errors="replace"),
        (folder / f"{index}.err").read_text(errors="replace"),
        pickle.loads(results.read_bytes()) if results.exists() else {},
    )


class Server:
    """The process that forks.

    Args:
        quiet: whether there are no progress bars, which tqdm decides when it is imported.
    """

    def __init__(self, quiet):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
        if not quiet:
            environment.pop("TQDM_DISABLE", None)
        command = [sys.executable, "-m", "tests.peers"]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self._process.communicate)

    def ask(self, asked):
        """Has processes run together; their exit statuses, and the indices of those that had to be killed."""
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


_server = functools.cache(Server)


def serve():
    """Answers `Server`, until its end of the pipe is closed."""
    for line in sys.stdin:
        asked = json.loads(line)
        pids = []
        for arguments in asked["processes"]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # JAX warns of forks, but none of its threads run yet
                pid = os.fork()
            if pid == 0:
                return begin(asked["environment"], *arguments)
            pids.append(pid)
        print(json.dumps(outcome(pids, asked["seconds"])), flush=True)
    return None


def outcome(pids, seconds):
    """Waits for processes, and kills what is left of them, with the processes that read data for them."""
    deadline = time.monotonic() + seconds
    codes = {}
    while len(codes) < len(pids) and time.monotonic() < deadline:
        for pid in pids:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.01)
    late = [index for index, pid in enumerate(pids) if pid not in codes]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # JAX keeps a SIGTERM for itself
        if pid not in codes:
            codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [codes[pid] for pid in pids], late


def begin(environment, scenario, index, count, port, folder):
    """What a fork does."""
    os.setsid()  # so that processes that read data die with it
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder) / f"{index}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.distributed.initialize(f"localhost:{port}", count, index, heartbeat_timeout_seconds=10)
    results = {"backends by import": BACKENDS_BY_IMPORT}
    try:
        SCENARIOS[scenario](results)
    finally:
        (Path(folder) / f"{index}.pickle").write_bytes(pickle.dumps(results))


# ---- what is trained


class Shown:
    """A user's functions, and what they were called with."""

    def __init__(self):
        self.plots, self.outputs, self.samples, self.saved, self.measured = [], [], [], [], []
        self.run = MemoryRun()

    def options(self):
        return {
            "run": self.run,
            "plot_pipe": lambda run, outputs, batch: self.plots.append((run is self.run, outputs, batch)),
            "plot_model": self.plot_model,
            "plot_every": 3,
            "sample_every": 4,
            "sample_batch_size": 5,
            "sample_model": sample,
            "sample_plot": lambda run, samples, nothing: self.samples.append((run is self.run, samples, nothing)),
            "sample_metrics": self.measure,
            "save_model": self.saved.append,
            "save_every": 4,
        }

    def plot_model(self, output):
        self.outputs.append(output)
        return 2 * output

    def measure(self, sample, datum):
        self.measured.append(1)
        return {"sampled": np.abs(sample - datum[1]).mean()}


def sample(params, key, datum):
    return MLP().apply({"params": params}, *datum) + 0.1 * jax.random.normal(key, (3,))


def poisoned():
    """Five batches of 8: of the second and the fourth, a datum of the last process is bad."""
    data = make_data(43)
    for number in (15, 31):
        data[number][1] = np.full(3, 7, np.float32)
    return data


TAIL = 19
"""Data of a validation set: two whole batches, and one that leaves nothing for the last process."""
STEPS = 6
"""Steps of an epoch on a single batch."""

RUNS = {
    "fused": lambda: {"model": Noisy(), "val_datasets": [make_data(TAIL, 1), make_data(1, 2)]},
    "read again": lambda: {"train_dataset": Streamed(make_data(43)), "val_datasets": [Streamed(make_data(TAIL, 1))]},
    "shuffled": lambda: {"shuffle": True},
    "shuffled by index": lambda: {"shuffle": True, "train_dataset": Streamed(make_data(43))},
    "worker": lambda: {"steps_per_execution": 1, "num_workers": 1},
    "accumulated": lambda: {"accumulate_steps": 2},
    "single batch": lambda: {"single_batch": True},
    "guarded": lambda: {"train_dataset": poisoned(), "losses": LossPipe([Poisonable()])},
    "shown": lambda: Shown().options(),
    "convolution": lambda: {"model": Convolution(), **sinks()},
    "batches": lambda: {
        "model": Linen(Normed(), batched=True, train={"train": True}, eval={"train": False}),
        "losses": whole_share,
        "val_datasets": [make_data(TAIL, 1)],
    },
    "nnx": lambda: {"model": NNX(OfNNX(nnx.Rngs(0))), "val_datasets": [make_data(TAIL, 1)], "ema": 0.9},
}


def sinks():
    """Sinks, the same on all processes, where there is a folder for them."""
    folder = os.environ.get("PEERS_FILES")
    if folder is None:
        return {}
    return {"run": [JsonLines(f"{folder}/a.jsonl"), TensorBoard(f"{folder}/tb"), Report(f"{folder}/report")]}


class Told:
    """A stream that tells where it stands."""

    def __init__(self, data):
        self._data, self._at = data, 0

    def state_dict(self):
        return {"at": self._at}

    def load_state_dict(self, state):
        self._at = state["at"]

    def __iter__(self):
        while self._at < len(self._data):
            self._at += 1
            yield self._data[self._at - 1]
        self._at = 0


def stacked(data, size=8):
    return [
        [np.stack([datum[place] for datum in data[start : start + size]]) for place in (0, 1)]
        for start in range(0, len(data), size)
    ]


def own_batches(count):
    """Of a list's batches, this process's rows, in so many batches."""
    share = 8 // jax.process_count()
    rows = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    batches = [[leaf[rows] for leaf in batch] for batch in stacked(make_data(43))[:count]]
    return Batches(Told(batches), per_process=True)


class Normed(nn.Module):
    """Its statistics are those of all devices, of all processes."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(16, use_bias=False)(x)
        return nn.Dense(3)(nn.relu(nn.BatchNorm(use_running_average=not train, axis_name="devices")(x)))


def whole_share(output, batch):
    """One number for all that a device sees; a metric over all data; what is there of them."""
    error = (output - batch[1]) ** 2
    return output, error.mean(), {"far": Mean(error.sum(), 3.0 * len(error)), "largest": Max(error.max())}


class OfNNX(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.relu(self.first(x))))


def trained(name):
    """What came of a run, and how."""
    options = {"devices": None, **RUNS[name]()}
    with mock.patch("learnax.checks.settings._SINGLE_BATCH_STEPS", STEPS):
        trainer = make_trainer(**options)
    returned = trainer.train()
    programs = trainer.engine.programs.values()
    results = {
        "params": host(trainer.train_state.params),
        "step": int(trainer.train_state.step),
        "metrics": {name: values for name, values in trainer.metrics.items() if "update_time" not in name},
        "times": len(trainer.metrics["train/update_time"]),
        "rng": np.array(jax.random.key_data(trainer.rng_seq)),
        "kinds": sorted(program.kind for program in programs),
        "calls": trainer.engine.calls,
        "room": trainer.plan.room,
    }
    if name in ("fused", "accumulated"):
        results["resident"] = {split: resident(loader) for split, loader in trainer.loaders.items()}
    if name in ("read again", "shuffled by index"):
        results["reads"] = {split: loader.dataset.reads for split, loader in trainer.loaders.items()}
    if name == "shown":
        shown = options["plot_model"].__self__
        assert returned is shown.run
        results |= {key: getattr(shown, key) for key in ("plots", "outputs", "samples", "saved", "measured")}
        results["rows"] = shown.run.rows
    return results


def resident(loader):
    """Of each leaf that is kept on the devices: its own shape, and the part that each device of this process holds."""
    return [
        (leaf.shape, leaf_of_host.shape, [(shard.device.id, shard.data.shape, shard.index) for shard in shards])
        for block in loader._resident
        for leaf, leaf_of_host in zip(jax.tree.leaves(block.device), jax.tree.leaves(block.host), strict=True)
        for shards in [leaf.addressable_shards]
    ]


def failure(**options):
    """The error that building a trainer ends by, and the seconds that it takes."""
    began = time.monotonic()
    try:
        make_trainer(**{"devices": None, **options})
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "nothing", "", time.monotonic() - began


# ---- scenarios


def train_all(results):
    results["files"] = Path(os.environ["PEERS_FILES"])
    for name in os.environ["PEERS"].split(","):
        results[name] = trained(name)
    results["devices of some"] = failure(devices=jax.devices()[: jax.local_device_count() + 1], batch_size=6)


DIFFERENT = {
    "batch_size": ({"batch_size": 8}, {"batch_size": 16}),
    "seed": ({"seed": 0}, {"seed": 1}),
    "learning_rate": ({"learning_rate": 0.01}, {"learning_rate": 0.02}),
    "len(train)": ({"train_dataset": make_data(43)}, {"train_dataset": make_data(42)}),
    "len(val_1)": ({"val_datasets": [make_data(TAIL)]}, {"val_datasets": [make_data(TAIL), make_data(5)]}),
    "steps_per_execution": ({"steps_per_execution": "auto"}, {"steps_per_execution": 1}),
    "params/Dense_1/kernel": ({"model": MLP(16)}, {"model": MLP(17)}),
    "plot_pipe": ({"plot_pipe": print}, {}),
}
"""What two processes give, and differs."""


def misuse(results):
    for name, options in DIFFERENT.items():
        results[name] = failure(**options[jax.process_index()])
    results["not divided"] = failure(batch_size=9)
    results["of one"] = failure(devices=jax.devices()[:1])
    try:
        make_trainer(devices=None).preflight()
    except Exception as error:
        results["preflight"] = repr(error)
    make_trainer(devices=None, seed=jax.process_index())


def _peer_fails(results, spoil):
    try:
        if jax.process_index() == 1:
            spoil()
        began = time.monotonic()
        make_trainer(devices=None)
    except Exception as error:
        results["seconds"] = time.monotonic() - began if jax.process_index() == 0 else 0
        results["error"] = type(error).__name__, str(error)
        raise


def fails_before(results):
    def spoil():
        raise LookupError("no data on this machine")

    _peer_fails(results, spoil)


def fails_while(results):
    class Broken(Streamed):
        def __getitem__(self, index):
            raise LookupError("no data on this machine")

    _peer_fails(results, lambda: make_trainer(devices=None, train_dataset=Broken(make_data(43))))


class Act:
    """Does something to this process, once, right after a step."""

    def __init__(self, trainer, step, what):
        self._trainer, self._step, self._what = trainer, step, what

    def next_due(self, step):
        return self._step if step < self._step else math.inf

    def __call__(self, moment):
        if self._what == "raise":
            raise LookupError("the disk of this machine is gone")
        if self._what == "leave":
            sys.exit(7)
        if self._what == "SIGKILL":
            deadline = time.monotonic() + 30
            while not self._trainer.checkpointer.list_available_checkpoints() and time.monotonic() < deadline:
                time.sleep(0.01)
        os.kill(os.getpid(), getattr(signal, self._what))


def noisy():
    """An optimiser with a random key in its state."""
    return optax.chain(optax.add_noise(0.01, 0.55, jax.random.key(0)), optax.sgd(1e-2))


def resumed(results):
    """A run on a registry; PEERS says what of it, and who does what to itself at which step."""
    options = json.loads(os.environ["PEERS"])
    acts = options.pop("acts", {})
    width = options.pop("width", 16)
    registry = Registry("tests", options.pop("registry"))
    data = {"train_dataset": make_data(43), "val_datasets": [make_data(TAIL, 1)], "model": MLP(width)}
    if kind := options.pop("kind", None):
        data["train_dataset"] = {"streamed": lambda: Stream(Told(make_data(43))), "own": lambda: own_batches(5)}[kind]()
    if options.pop("noise", False):
        data["optimizer"] = noisy()
    results["parts read"] = []

    def spread(array):
        results["parts read"].append((array.shape, pieces.part_of(array)))
        return pieces.spread(array)

    with mock.patch.object(files, "spread", spread):
        trainer = make_trainer(**data, **{"devices": None, "registry": registry, "load_checkpoint": True} | options)
    results["begins"] = trainer.log.step
    for who, (step, what) in acts.items():  # a signal that nobody heeds: dispatches are cut alike on all
        trainer.hooks.saves.append(Act(trainer, step, what if int(who) == jax.process_index() else "SIGCHLD"))
    try:
        trainer.train()
    finally:
        results["ends"] = trainer.log.step
    results["state"] = jax.tree.map(trainer.engine.whole, trainer.train_state)
    results["metrics"] = {name: values for name, values in trainer.metrics.items() if "update_time" not in name}
    results["checkpoints"] = list(trainer.checkpointer.list_available_checkpoints())


def named_runs(results):
    """A run of wandb's, which each process starts; and a preflight."""
    run = Registry("named", os.environ["PEERS"]).new_run({"a": 1})
    trainer = make_trainer(devices=None, run=run, registry=Registry("named", os.environ["PEERS"]))
    results["preflight"] = str(trainer.preflight())
    trainer.train()
    results |= {"id": run.id, "session": run.wandb_run is not None, "path": str(trainer.checkpointer.path)}
    run.finish()


def inferred(results):
    """Evaluation and prediction, of a state that each process has whole and of one that is divided."""
    data = make_data(TAIL, 1)
    for kind, width in (("plain", 16), ("divided", 16384)):
        options = {
            "model": MLP(width),
            "shard_state": kind == "divided",
            "registry": Registry(kind, os.environ["PEERS"]),
        }
        trainer = make_trainer(devices=None, val_datasets=[data], **options)
        trainer.train()
        results[kind] = {
            "width": width,
            "validated": {name: trainer.metrics[f"val/{name}"][-1] for name in ("loss", "rmse")},
            "evaluated": trainer.evaluate(Streamed(data)),
            "of the latest": trainer.evaluate(data, params="latest"),
            "outputs": trainer.predict(data, stacked=True),
            "listed": np.stack(list(trainer.predict(Streamed(data)))),
            "params": jax.tree.map(trainer.engine.whole, trainer.train_state.params),
        }
    try:
        trainer.evaluate(data[: TAIL - jax.process_index()])
    except ValueError as error:
        results["differ"] = str(error)

    class Broken(Streamed):
        def __getitem__(self, index):
            if index > 8 and jax.process_index() == 1:
                raise LookupError("no data on this machine")
            return super().__getitem__(index)

    try:
        trainer.predict(Broken(make_data(43)), stacked=True)
    except Exception as error:
        results["failed"] = type(error).__name__, str(error)
        raise


def unequal_batches(results):
    """The second process has a batch less than the first."""
    trainer = make_trainer(devices=None, train_dataset=own_batches(5 - jax.process_index()), steps_per_execution=2)
    try:
        trainer.train()
    except ValueError as error:
        results["error"] = str(error)
        raise


class Count(Hook):
    """Counts its calls, every third step."""

    calls = 0

    def next_due(self, step):
        return step - step % 3 + 3 if jax.process_index() == 0 else 1 / 0  # nobody asks the others

    def __call__(self, moment):
        self.calls += 1
        return {"calls": self.calls}

    def state(self):
        return {"calls": self.calls}

    def restore(self, state):
        self.calls = state["calls"]


def hooked(results):
    """Hooks of the first process, and of both, that see and ask for all there is; then the run goes on."""
    seen = results["seen"] = []

    def first(moment):
        seen.append(("first", moment.step, jax.tree.map(np.sum, moment.params)))
        try:
            moment.batch  # noqa: B018
        except ValueError as error:
            results["error"] = str(error)
        if moment.step == 4:
            moment.save("fourth")
            moment.scale_rate(0.5)

    def both(moment):
        seen.append(("both", moment.step, len(moment.batch), len(moment.outputs)))
        return {"index": jax.process_index()}

    def norm(view):
        return {"norm": optax.tree_utils.tree_norm(view.grads), "rows": len(view.outputs)}

    registry = Registry("tests", os.environ["PEERS"])
    hooks = lambda: [  # noqa: E731
        Every(4, first),
        Count(),
        At([5], both, everywhere=True, outputs=True),
        Probe(2, norm),
    ]
    options = {"devices": None, "registry": registry, "val_datasets": [make_data(8)]}
    stop = At([7], lambda moment: moment.stop("that is all"), "judge")
    trainer = make_trainer(hooks=[*hooks(), stop], **options)
    trainer.train()
    results["stopped"] = trainer.log.step, list(trainer.checkpointer.list_available_checkpoints())
    again = make_trainer(hooks=hooks(), load_checkpoint=True, **options)
    again.train()
    results["metrics"] = {name: values for name, values in again.metrics.items() if "update_time" not in name}
    results["params"] = host(again.train_state.params)


def hook_fails(results):
    """A hook raises on the second process alone, then next_due of one on the first; the run goes on after each."""
    registry = Registry("tests", os.environ["PEERS"])
    options = {"devices": None, "registry": registry, "save_every": 100}

    def broken(moment):
        if jax.process_index() == 1:
            raise LookupError("the disk of this machine is gone")

    class Late(Hook):
        def next_due(self, step):
            if step >= 6:
                raise LookupError("no idea")
            return 6

    results["errors"] = []
    for hook in (At([4], broken, everywhere=True), Late()):
        trainer = make_trainer(hooks=[hook], load_checkpoint=True, **options)
        try:
            trainer.train()
        except RuntimeError as error:
            results["errors"].append((trainer.log.step, str(error)))
    trainer = make_trainer(load_checkpoint=True, **options)
    results["begins"] = trainer.log.step
    trainer.train()
    results["params"] = host(trainer.train_state.params)


ALL = (unequal_batches, train_all, misuse, fails_before, fails_while, resumed, named_runs, inferred, hooked, hook_fails)
SCENARIOS = {function.__name__: function for function in (*ALL, cells)}

if __name__ == "__main__":
    serve()
