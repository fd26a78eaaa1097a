"""A notebook trains with workers on what its cells define, and shows its own progress bar."""

import nbformat
import pytest
from nbclient import NotebookClient

from learnax.trainer import in_notebook
from tests.helpers import ROOT

pytestmark = pytest.mark.processes

CELLS = [
    """
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from learnax.loss import LossFunction, LossPipe
from learnax.trainer import Trainer, in_notebook

print("in a notebook:", in_notebook())
""",
    """
@jax.tree_util.register_pytree_node_class
class Pair:
    def __init__(self, x, y, name):
        self.x, self.y, self.name = x, y, name

    def tree_flatten(self):
        return (self.x, self.y, self.name), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


class Pairs:
    def __len__(self):
        return 40

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        return Pair(rng.normal(size=4).astype(np.float32), rng.normal(size=2).astype(np.float32), f"pair {index}")
""",
    """
class Model(nn.Module):
    @nn.compact
    def __call__(self, pair):
        return nn.Dense(2)(pair.x)


class Distance(LossFunction):
    def _call(self, output, batch):
        return output, jnp.mean((output - batch[0].y) ** 2), {}


def train(num_workers):
    trainer = Trainer(Model(), 1e-2, LossPipe([Distance()]), 0, Pairs(), 3, 8, num_workers)
    trainer.train()
    return trainer.metrics["train/loss"]
""",
    "losses = train(2)",
    "print(losses == train(0), len(losses))",
]
INTERRUPTED = [
    *CELLS[:3],
    """
import os, signal, threading

class Interrupting(Pairs):
    left = 1

    def __getitem__(self, index):
        if index == 21 and self.left:
            self.left = 0
            os.kill(os.getpid(), signal.SIGINT)  # what the stop button sends to a kernel
        return super().__getitem__(index)

trainer = Trainer(
    Model(), 1e-2, LossPipe([Distance()]), 0, Interrupting(), 3, 8, 0, registry="notebook", steps_per_execution=1
)
try:
    trainer.train()
except KeyboardInterrupt:
    print("interrupted at", trainer.log.step, trainer.checkpointer.load_latest()["step"])
""",
    """
trainer.train()
untouched = Trainer(Model(), 1e-2, LossPipe([Distance()]), 0, Pairs(), 3, 8, 0, steps_per_execution=1)
untouched.train()
print(trainer.metrics["train/loss"] == untouched.metrics["train/loss"], len(trainer.metrics["train/loss"]))
""",
]


# What the packages of the notebook itself deprecate is not ours.
@pytest.mark.filterwarnings("default")
def test_a_notebook_trains_with_workers_and_shows_its_own_bar(tmp_path, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    client = NotebookClient(notebook, timeout=100, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()

    first, *_, with_workers, without = [cell.outputs for cell in notebook.cells]
    assert text_of(first) == "in a notebook: True\n"
    assert text_of(without).splitlines()[-1] == "True 15"
    widgets = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    for outputs in (with_workers, without):
        shown = [out.data for out in outputs if "application/vnd.jupyter.widget-view+json" in out.get("data", {})]
        assert len(shown) == 1
        box = widgets[shown[0]["application/vnd.jupyter.widget-view+json"]["model_id"]]["state"]
        description, bar, numbers = [widgets[child.removeprefix("IPY_MODEL_")]["state"] for child in box["children"]]
        assert description["value"].replace("\u2007", " ") == "epoch 3/3: 100%"
        assert (bar["value"], bar["max"], bar["bar_style"]) == (15, 15, "success")
        assert "15/15" in numbers["value"]
        for name in ("loss ", " steps/s", " items/s", "data ", "rate "):
            assert name in numbers["value"].replace("\u2007", " ")
        assert not [out for out in outputs if out.get("name") == "stderr"]
        assert text_of(outputs).startswith("start: ")  # the ledger
    assert not in_notebook()


@pytest.mark.filterwarnings("default")
def test_an_interrupted_cell_saves_and_the_next_one_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in INTERRUPTED])
    NotebookClient(notebook, timeout=100, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    *_, stopped, went_on = [cell.outputs for cell in notebook.cells]
    assert text_of(stopped) == "interrupted at 2 2\n"  # amid the third batch
    assert text_of(went_on).splitlines()[-1] == "True 15"


def text_of(outputs):
    return "".join(out.text for out in outputs if out.get("name") == "stdout")
