"""With wandb, offline and without an account, in processes of their own; and without it."""

import json
import struct

import pytest
from wandb.proto import wandb_internal_pb2

from learnax.checkpoint import Checkpointer
from tests.helpers import run_script

pytestmark = pytest.mark.processes

_HEADER, _BLOCK, _RECORD_HEADER, _FULL, _LAST = 7, 32768, 7, 1, 4
"""A `.wandb` file: a header, then blocks of records in pieces, as LevelDB writes its log."""


def records(path):
    """The records of an offline run, oldest first."""
    data, at, pieces = path.read_bytes(), _HEADER, []
    while at + _RECORD_HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _RECORD_HEADER:
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        pieces.append(data[at + _RECORD_HEADER : at + _RECORD_HEADER + length])
        at += _RECORD_HEADER + length
        if kind in (_FULL, _LAST):
            yield wandb_internal_pb2.Record.FromString(b"".join(pieces))
            pieces = []


def _values(items):
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def axes(folder, run_id):
    """The column that each metric, or pattern of metrics, is plotted over."""
    (path,) = folder.glob(f"wandb/offline-run-*/run-{run_id}.wandb")
    metrics = [record.metric for record in records(path) if record.HasField("metric")]
    return {metric.name or metric.glob_name: metric.step_metric for metric in metrics}


def offline_run(folder, run_id):
    """An offline run's config and the rows of its history, from all of its sessions."""
    config, rows = {}, []
    for path in sorted(folder.glob(f"wandb/offline-run-*/run-{run_id}.wandb")):
        for record in records(path):
            config |= _values(record.run.config.update)
            rows += [_values(record.history.item)] * record.HasField("history")
    return config, rows


def run_without_account(source, tmp_path):
    """Runs a script whose user has no wandb account; what it printed, as lines."""
    home = tmp_path / "home"
    home.mkdir()
    env = {"HOME": str(home), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    return run_script(source, tmp_path, env=env).stdout.splitlines()


SCRIPT = """
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from learnax.loss import LossFunction, LossPipe
from learnax.trainer import Trainer


class Squared(LossFunction):
    def _call(self, output, batch):
        error = jnp.mean((output - batch[1]) ** 2)
        return output, error, {"rmse": jnp.sqrt(error)}


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, y):
        return nn.Dense(3)(nn.relu(nn.Dense(16)(x)))


def make_data(n, seed):
    rng = np.random.default_rng(seed)
    return [[rng.normal(size=8).astype(np.float32), rng.normal(size=3).astype(np.float32)] for _ in range(n)]


def make_trainer(num_epochs=2, **options):
    return Trainer(
        Model(), 1e-2, LossPipe([Squared()]), 0, make_data(43, 0), num_epochs, 8, 0,
        val_datasets={"val": make_data(21, 1)}, devices=jax.devices()[:1], **options
    )
"""


def assert_whole_history(rows, losses, val_losses):
    """Every step, every validation and the size of the model, in their order."""
    assert [row["model/num_params"] for row in rows if "model/num_params" in row] == [195]
    assert "model/num_params" in rows[0]
    steps = [row for row in rows if "train/loss" in row]
    assert [row["train/loss"] for row in steps] == losses
    assert [row["step"] for row in steps] == list(range(1, len(losses) + 1))
    assert [row["epoch"] for row in steps] == [i // 5 for i in range(len(losses))]
    for row in steps:
        assert {"train/rmse", "train/gradient norm", "train/learning_rate", "train/update_time"} <= set(row)
        grads = {name: value for name, value in row.items() if name.startswith("grads/")}
        assert sorted(grads) == [f"grads/Dense_{i}/{leaf}" for i in (0, 1) for leaf in ("bias", "kernel")]
        assert all(value > 0 for value in grads.values())
    epochs = [row for row in rows if "val/loss" in row]
    assert [row["val/loss"] for row in epochs] == [row["val_epoch/loss"] for row in epochs] == val_losses
    assert [row["step"] for row in epochs] == list(range(5, len(losses) + 1, 5))
    assert len([row for row in rows if "train_epoch/loss" in row]) == len(val_losses)


def test_a_run_of_wandb_has_the_whole_history(tmp_path):
    source = f"""{SCRIPT}
import json
import wandb

run = wandb.init(project="tests", config={{"width": 16}})

def plot(given, outputs, batch):
    assert isinstance(given, wandb.Run) and given.id == run.id and given.config["width"] == 16
    given.log({{"plotted": len(outputs)}}, step=trainer.log.step)
    given.log({{"later": 1.0, "step": trainer.log.step + 100}}, commit=True)
    given.summary["plots"] = 3
    given.notes = "plotted"

trainer = make_trainer(run=run, plot_pipe=plot, plot_every=2)
assert trainer.train() is run
assert (run.summary["plots"], run.notes) == (3, "plotted")
print(json.dumps([run.id, trainer.metrics["train/loss"], trainer.metrics["val/loss"]]))
run.finish()
"""
    run_id, losses, val_losses = json.loads(run_without_account(source, tmp_path)[-1])
    config, rows = offline_run(tmp_path, run_id)
    assert config["width"] == 16
    assert len(losses) == 10
    plotted = [row for row in rows if "plotted" in row or "later" in row]
    assert_whole_history([row for row in rows if row not in plotted], losses, val_losses)
    # Whatever wandb counts, here twice as many rows as steps.
    assert [(row["plotted"], row["step"]) for row in plotted[::2]] == [(8, step) for step in (2, 4, 6, 8, 10)]
    assert [(row["later"], row["step"]) for row in plotted[1::2]] == [(1.0, step + 100) for step in (2, 4, 6, 8, 10)]
    assert axes(tmp_path, run_id) == {"*": "step"}


def test_a_run_of_wandb_beside_a_file_has_the_same_rows_and_its_own_pictures(tmp_path):
    source = f"""{SCRIPT}
import wandb
from learnax.sinks import Histogram, Image, JsonLines

run = wandb.init(project="tests", config={{"width": 16}})

def plot(given, outputs, batch):
    assert given.config["width"] == 16
    given.log({{"plotted": len(outputs), "picture": Image(np.zeros((4, 4))), "spread": Histogram(outputs[0])}})

make_trainer(run=[run, JsonLines("rows.jsonl")], plot_pipe=plot, plot_every=4).train()
print(run.id)
run.finish()
"""
    run_id = run_without_account(source, tmp_path)[-1]
    _, rows = offline_run(tmp_path, run_id)
    kept = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]
    kinds = [(row["picture._type"], row["spread._type"]) for row in rows if "plotted" in row]
    assert kinds == [("image-file", "histogram")] * 2
    mine = [{name: row[name] for name in row if not name.startswith(("picture", "spread"))} for row in rows]
    assert mine[1:] == kept[1:]  # the first is of no step, and wandb gives it one
    assert [(row["plotted"], row["step"]) for row in rows if "plotted" in row] == [(8, 4), (8, 8)]
    assert axes(tmp_path, run_id) == {"*": "step"}


def test_a_run_of_the_registry_has_its_history_its_checkpoints_and_a_way_back(tmp_path, registry_path):
    source = f"""{SCRIPT}
import json
from learnax.registry import Registry

registry = Registry("tests")
run = registry.new_run({{"width": 16, "data": {{"size": 43}}}})
def plot(given, outputs, batch):
    given.log({{"plotted": len(outputs)}}, trainer.log.step)

options = {{"plot_pipe": plot, "plot_every": 5}}
trainer = make_trainer(run=run, registry="tests", save_every=4, load_checkpoint=run.id, **options)
assert trainer.train() is run
run.finish()

again = registry.restore_run(run.id)
trainer = make_trainer(3, run=again, registry=registry, save_every=4, load_checkpoint=again.id)
assert trainer.train_state.step == 10
trainer.train()
again.finish()
weights = registry.fetch_run(run.id).get_weights()
jax.tree.map(np.testing.assert_array_equal, weights, trainer.train_state.params)
print(json.dumps([run.id, trainer.metrics["train/loss"], trainer.metrics["val/loss"]]))
"""
    run_id, losses, val_losses = json.loads(run_without_account(source, tmp_path)[-1])
    checkpointer = Checkpointer.at(registry_path / "tests" / run_id / "checkpoints")
    assert list(checkpointer.list_available_checkpoints()) == ["latest", 12, 15]
    config, rows = offline_run(registry_path / "tests", run_id)
    assert config["data"] == {"size": 43}
    assert len(losses) == 15
    assert [row["model/num_params"] for row in rows if "model/num_params" in row] == [195, 195]  # of two sessions
    assert [(row["plotted"], row["step"]) for row in rows if "plotted" in row] == [(8, 5), (8, 10)]
    rows = [row for row in rows if "plotted" not in row]
    once = [row for i, row in enumerate(rows) if i == 0 or "model/num_params" not in row]
    assert_whole_history(once, losses, val_losses)


def test_a_trainer_alone_needs_none_of_the_optional_libraries(tmp_path):
    source = f"""
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"wandb", "orbax", "grain", "omegaconf", "matplotlib"}}:
            raise ImportError(f"{{name}} is not installed")


sys.meta_path.insert(0, Blocker())
{SCRIPT}
import learnax.registry, learnax.run, learnax.checkpoint, learnax.metrics, learnax.utils

trainer = make_trainer(compile=True)
assert trainer.train() is None
print(trainer.train_state.step, len(trainer.metrics["val/loss"]))
"""
    assert run_without_account(source, tmp_path) == ["10 2"]
