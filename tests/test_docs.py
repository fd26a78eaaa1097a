"""The pages: every block of Python in them runs, what they say of its result holds, and links and names are there.

A page's blocks run in order in one namespace, in a folder of their own, as a reader would paste them. Behind a block, a
line `<!-- holds: EXPRESSION -->` is what has to be true by then; readers do not see it.
"""

import importlib
import inspect
import os
import re
import subprocess
import sys

import jax
import pytest

from tests.helpers import ROOT

DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]}
PART = re.compile(r"^```python[^\n]*\n(?P<block>.*?)^```$|^<!-- holds: (?P<holds>.+?) -->$", re.DOTALL | re.MULTILINE)
NEEDS = {"docs/coming-from/keras.md": "keras"}
"""What a page's code imports beside the test's own packages: the page is skipped without."""
APART = {"docs/devices.md"}
"""Pages that start JAX in a way of their own."""


def parts(path):
    """The blocks and claims of a page, in order, each with its line."""
    text = path.read_text()
    for found in PART.finditer(text):
        yield found.lastgroup, found[found.lastgroup], text[: found.start()].count("\n") + 2


def with_code(pages):
    """Those that have blocks."""
    return [name for name in pages if any(kind == "block" for kind, _, _ in parts(PAGES[name]))]


@pytest.mark.parametrize("page", with_code(name for name in PAGES if name not in APART))
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    if page in NEEDS:
        monkeypatch.setenv("KERAS_BACKEND", "jax")
        pytest.importorskip(NEEDS[page])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["page.py"])
    names = {"__name__": "__main__"}
    with jax.numpy_dtype_promotion("standard"):  # as readers have it
        for kind, source, line in parts(PAGES[page]):
            if kind == "block":
                exec(compile("\n" * (line - 1) + source, page, "exec"), names)
            else:
                assert eval(source, names), f"{page}, line {line - 1}: {source}"


# What srun sets for the one task of a job.
SLURM = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}


@pytest.mark.processes
@pytest.mark.parametrize("page", sorted(APART))
def test_the_code_of_a_page_that_starts_jax_runs_in_a_process_of_its_own(page, tmp_path):
    lines = []
    for kind, source, line in parts(PAGES[page]):
        lines += [
            "\n" * (line - 1 - len("\n".join(lines).splitlines())) + source if kind == "block" else f"assert {source}"
        ]
    (tmp_path / "page.py").write_text("\n".join([*lines, "print('ran')\n"]))
    env = os.environ | SLURM | {"SLURM_LOCALID": "0", "PYTHONPATH": str(ROOT)}
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        env.pop(name, None)
    result = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200
    )
    assert result.stdout.endswith("ran\n"), result.stderr


def test_each_page_with_code_says_what_holds():
    assert len(with_code(PAGES)) >= 12
    for name in with_code(PAGES):
        assert any(kind == "holds" for kind, _, _ in parts(PAGES[name])), name


def test_blocks_are_python_that_runs_or_say_that_they_are_none():
    for name, path in PAGES.items():
        fences = re.findall(r"^```(.*)$", path.read_text(), re.MULTILINE)
        assert len(fences) % 2 == 0, name
        for language in fences[::2]:
            assert language.split(" ")[0] in ("", "python", "yaml"), f"{name}: a block of {language}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


# ---- names and links


def documented():
    """The names that the page of the API shows."""
    return re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE)


def test_each_name_of_the_api_has_a_docstring_and_so_has_what_it_shows():
    assert len(documented()) > 25
    for name in documented():
        module, _, attribute = name.rpartition(".")
        thing = getattr(importlib.import_module(module), attribute)
        assert inspect.getdoc(thing), name
        for member, value in vars(thing).items() if inspect.isclass(thing) else ():
            if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                assert inspect.getdoc(value), f"{name}.{member}"


def test_the_api_has_all_that_a_star_gives_and_all_adapters():
    import learnax
    import learnax.models

    shown = {name.rpartition(".")[2] for name in documented()}
    assert set(learnax.__all__) <= shown
    adapters = {n for n in learnax.models.__all__ if inspect.isclass(getattr(learnax.models, n))}
    assert adapters - {"Adapter"} <= shown


def test_every_page_is_in_the_navigation_and_the_readme_leads_to_it():
    navigation = (ROOT / "mkdocs.yml").read_text()
    readme = (ROOT / "README.md").read_text()
    for path in DOCS.rglob("*.md"):
        name = str(path.relative_to(DOCS))
        assert f": {name}\n" in navigation, name
        assert f"](docs/{name})" in readme, name


def slugs(path):
    """The anchors that a page's headings have."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = PAGES[page]
    for link, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)", path.read_text()):
        target = (path.parent / link) if link else path
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in slugs(target), f"{page} links to {link}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_are_there(page):
    places = [ROOT, ROOT / "tests", ROOT / "learnax"]
    for name in re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md|json))`", PAGES[page].read_text()):
        mine = name in ("train.py", "page.py")
        assert mine or any((place / name).exists() for place in places), f"{page} names {name}"


def test_the_extras_that_pages_name_are_there():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, path in PAGES.items():
        for asked in re.findall(r"install '(?:\.|learnax)\[([\w,-]+)\]'", path.read_text()):
            assert set(asked.split(",")) <= set(extras), f"{name}: {asked}"
