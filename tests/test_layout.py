"""The rooms: imports point downward only, and importing learnax costs little."""

import ast
import re
import subprocess
import sys

import pytest

import learnax
from docs import draw
from docs.draw import PACKAGE, imported, modules, room_of
from tests.helpers import ROOT, run_script

# From the top down: a room imports rooms of later rows only, or of its own folder.
ROOMS = [
    ["__main__"],
    ["commands"],
    ["trainer"],
    ["loop", "inference"],
    ["session"],
    ["parts"],
    ["hooks"],
    ["checks"],
    ["engine"],
    ["registry"],
    ["run"],
    ["log", "checkpoint", "data"],
    ["step"],
    ["models", "loss"],
    ["cluster"],
    ["metrics", "profiling", "sinks"],
    ["utils"],
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def test_imports_point_down():
    assert len(modules()) > 15
    for path in modules():
        for other in imported(path):
            mine = room_of(path)
            assert mine == other or LEVEL[mine] < LEVEL[other], f"{path.name} ({mine}) imports {other}, not below it"


def test_what_users_import_beside_the_trainer_knows_no_trainer():
    for room in ("loss", "metrics", "utils", "profiling"):
        for path in modules():
            if room_of(path) == room:
                assert set(imported(path)) <= {room, "utils"}, path
    for path in modules():
        if room_of(path) in ("run", "registry", "checkpoint"):
            below = {"run", "registry", "checkpoint", "step", "utils", "cluster", "log"}
            assert set(imported(path)) <= below, path


def test_each_room_says_what_it_is_for_and_what_it_must_not_know():
    folders = [path for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()]
    assert len(folders) > 8
    for folder in folders:
        words = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        assert "may import" in words or "imports no other" in words, folder.name
    assert len([path for path in PACKAGE.iterdir() if path.suffix == ".py"]) <= 10


def test_the_picture_of_the_rooms_is_that_of_the_code():
    assert draw.PICTURE.read_text() == draw.picture(), "run python docs/draw.py"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_pages_name_files_that_there_are(page):
    text = (ROOT / page).read_text()
    names = re.findall(r"`([a-z_]+/[a-z_]+\.py)`", text)
    assert page != "docs/architecture.md" or len(names) > 10
    for name in names:
        assert (PACKAGE / name).is_file() or (ROOT / name).is_file(), f"{page} names {name}"
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}"


def length(node):
    """Lines of a function without its signature and docstring."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return node.end_lineno - body[0].lineno + 1 if body else 0


def test_a_run_is_read_on_a_page():
    text = (PACKAGE / "trainer.py").read_text()
    assert len(text.splitlines()) <= 460  # an argument takes two lines
    assert len(set(imported(PACKAGE / "trainer.py"))) <= 9
    loop = ast.parse((PACKAGE / "loop.py").read_text())
    (cls,) = [node for node in loop.body if isinstance(node, ast.ClassDef)]
    methods = {node.name: node for node in cls.body if isinstance(node, ast.FunctionDef)}
    assert methods["_end_epoch"].end_lineno - methods["run"].lineno <= 105


def test_functions_are_short():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert length(node) <= 50, f"{path.name}: {node.name} has {length(node)} lines"


def test_the_top_level_is_as_documented():
    for name in ("trainer", "loss", "metrics", "checkpoint", "registry", "run", "utils", "profiling"):
        assert hasattr(learnax, name)
    from learnax.checkpoint import Checkpointer
    from learnax.loss import LossFunction, LossPipe
    from learnax.metrics import Metric, MetricPipe
    from learnax.registry import Registry
    from learnax.run import Run
    from learnax.trainer import Trainer, TrainState, in_notebook, libcudart
    from learnax.utils import tree_stack, tree_unstack

    names = [Trainer, TrainState, in_notebook, LossFunction, LossPipe, Metric, MetricPipe, Checkpointer, Registry, Run]
    assert all(callable(name) for name in (*names, tree_stack, tree_unstack))
    assert libcudart is None or hasattr(libcudart, "cudaProfilerStart")


@pytest.mark.processes
def test_importing_loads_none_of_what_is_used_later():
    source = (
        "import sys, learnax\n"
        "later = ('wandb', 'orbax', 'grain', 'omegaconf', 'matplotlib', 'IPython', 'sklearn', 'tensorboardX')\n"
        "print([name for name in later if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert result.stdout == "[]\n", result.stderr


BARE = """
import socket, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("wandb", "orbax", "grain", "omegaconf", "matplotlib", "cloudpickle"):
            raise ModuleNotFoundError(f"{name} is not installed")

sys.meta_path.insert(0, Missing())

def no_network(*args):
    raise OSError("no network")

socket.socket.connect = no_network
import numpy as np
import flax.linen as nn
from learnax.trainer import Trainer, libcudart

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x)

data = [np.full(3, i, np.float32) for i in range(8)]
trainer = Trainer(Net(), 1e-2, lambda output, datum: (output, (output[0] - 1) ** 2, {}), 0, data, 2, 4, 0,
                  val_datasets=[data])
print(trainer.train(), len(trainer.metrics["val/loss"]))
"""


@pytest.mark.processes
def test_the_core_runs_without_cuda_without_network_and_without_what_it_does_not_use(tmp_path):
    result = run_script(BARE, tmp_path, env={"XLA_FLAGS": ""})
    assert result.stdout == "None 2\n"
