"""The notebooks run in a real kernel, and come to what they say."""

import re
import shutil

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers import ROOT

pytestmark = [pytest.mark.processes, pytest.mark.thorough, pytest.mark.filterwarnings("default")]


def said(name, tmp_path, monkeypatch):
    """All that a notebook prints, and the values of its cells."""
    for path in (ROOT / "examples").glob("*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    texts = [out.get("text", "") or out.get("data", {}).get("text/plain", "") for out in outputs]
    return "\n".join(texts), len(pictures)


def test_digits_in_ten_minutes(tmp_path, monkeypatch):
    text, pictures = said("digits", tmp_path, monkeypatch)
    assert float(re.search(r"held out: ([\d.]+)%", text)[1]) > 93
    assert pictures == 2
    assert "start: compile" in text


def test_a_transformer_is_streamed_to_and_resumed(tmp_path, monkeypatch):
    text, pictures = said("text", tmp_path, monkeypatch)
    before, after = re.search(r"\(40, ([\d.]+)\)", text), re.search(r"\(40, 80, ([\d.]+)\)", text)
    assert float(after[1]) < float(before[1])
    assert pictures == 1


def test_a_graph_network_on_molecules(tmp_path, monkeypatch):
    text, pictures = said("molecules", tmp_path, monkeypatch)
    first, last = re.search(r"error: ([\d.]+) after one epoch, ([\d.]+) at the end", text).groups()
    assert float(last) < 0.1 * float(first)
    assert float(re.search(r"change by turning: (\S+)", text)[1]) < 1e-4
    assert pictures == 1


def test_what_is_kept_of_them_is_small():
    for path in (ROOT / "examples").glob("*.ipynb"):
        assert path.stat().st_size < 100_000, path
