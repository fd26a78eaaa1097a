"""What users install, tried as they would: `python -m tests.wheel`, or `make test-wheel`.

It builds the source distribution, and the wheel from that; installs the wheel into bare environments, with the lowest
versions that are supported on Python 3.11 and with the newest on the newest Python here; and there runs the README's
ten lines, the command and the help of each of its commands, and lets type checkers read a user's script.
"""

import argparse
import concurrent.futures
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
FLOOR = ROOT / ".ci" / "constraints-floor.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@dataclasses.dataclass(frozen=True)
class Place:
    """A bare environment to install into.

    Attributes:
        python: its version.
        interpreter: a path.
        lowest: whether the lowest versions go there; else the newest.
        beside: what else is asked of pip, for the newest of a line that is not the newest.
    """

    python: str
    interpreter: str
    lowest: bool = False
    beside: tuple[str, ...] = ()

    @property
    def name(self):
        versions = "lowest versions" if self.lowest else "newest versions"
        return ", ".join([f"Python {self.python}", versions, *(f"of {asked}" for asked in self.beside)])


def interpreter(python):
    """An interpreter of a version that runs: on PATH, or where pyenv keeps its own; None where there is none."""
    found = [shutil.which(f"python{python}"), *sorted(Path.home().glob(f".pyenv/versions/{python}.*/bin/python"))]
    for path in filter(None, found):
        if subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0:
            return str(path)
    return None


def places(every):
    """The environments: the lowest versions, and the newest on the newest Python; or on every one, and jax 0.11."""
    here = {python: interpreter(python) for python in PYTHONS}
    for python, path in here.items():
        if path is None:
            print(f"skipped: there is no Python {python} here", flush=True)
    there = {python: path for python, path in here.items() if path}
    if PYTHONS[0] in there:
        yield Place(PYTHONS[0], there[PYTHONS[0]], lowest=True)
    for python in list(there) if every else list(there)[-1:]:
        yield Place(python, there[python])
    if every and "3.12" in there:
        yield Place("3.12", there["3.12"], beside=("jax==0.11.*",))


def call(command, where, **env):
    """Runs a command in a folder, and gives its output; its failure ends all, with what it said."""
    # Nothing of this process's environment that could lend the package something that it lacks.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "JAX", "XLA"))}
    env = kept | {"JAX_PLATFORMS": "cpu", "WANDB_MODE": "offline", "LEARNAX_COMPILATION_CACHE": "off"} | env
    result = subprocess.run([str(word) for word in command], cwd=where, env=env, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{result.stdout[-3000:]}{result.stderr[-6000:]}")
    return result.stdout


def build(out):
    """The wheel, made of the source distribution; what is in both is looked at."""
    shutil.rmtree(out, ignore_errors=True)
    call([sys.executable, "-m", "build", "--outdir", out, ROOT], ROOT)
    (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    files = [path for path in (ROOT / "learnax").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    lacking = {str(path.relative_to(ROOT)) for path in files} - set(names)
    strange = [name for name in names if not name.startswith(("learnax/", "learnax-"))]
    if lacking or strange:
        raise SystemExit(f"{wheel.name} lacks {sorted(lacking)} and has {strange}")
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    lacking = {"README.md", "LICENSE", "pyproject.toml"} - inside
    if lacking:
        raise SystemExit(f"{source.name} lacks {sorted(lacking)}")
    return wheel


def ten_lines():
    """The README's first example."""
    return re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]


def tried(place, wheel):
    """Installs the wheel in a bare environment, and uses it; what was found there, and the seconds of each part."""
    with tempfile.TemporaryDirectory(prefix="learnax-wheel-") as folder:
        versions, seconds = try_in(place, wheel, Path(folder))
    parts = ", ".join(f"{part} {taken:.0f} s" for part, taken in seconds.items())
    return f"{place.name}: {versions}\n  {parts}"


def try_in(place, wheel, folder):
    """Installs the wheel, and uses it; the versions there, and the seconds of each part."""
    began, seconds = time.perf_counter(), {}

    def done(part):
        nonlocal began
        seconds[part], began = time.perf_counter() - began, time.perf_counter()

    call([place.interpreter, "-m", "venv", folder / "venv"], folder)
    python = folder / "venv" / "bin" / "python"
    constraints = ["--constraint", FLOOR] if place.lowest else []
    # Without bytecode: Python compiles what is imported here, a small part of it all.
    call([python, "-m", "pip", "install", "--quiet", "--no-compile", *constraints, wheel, *place.beside], folder)
    done("install")
    call([python, "-m", "pip", "check"], folder)
    (folder / "ten_lines.py").write_text(ten_lines())
    said = call([python, "ten_lines.py"], folder)
    if not 0 < float(said.split()[-1]) < 1:
        raise SystemExit(f"{place.name}: the README's ten lines said {said!r}")
    done("ten lines")
    versions = call([python, "-m", "learnax"], folder)
    if not versions.startswith(f"learnax {PROJECT['version']}\n"):
        raise SystemExit(f"{place.name}: python -m learnax said {versions!r}")
    commands = call([python, "-c", "from learnax.__main__ import COMMANDS; print(*COMMANDS)"], folder).split()
    for words in (
        ["learnax", "--help"],
        ["learnax.profiling", "--help"],
        *(["learnax", c, "--help"] for c in commands),
    ):
        if not call([python, "-m", *words], folder).startswith("usage: "):
            raise SystemExit(f"{place.name}: {words} gave no usage")
    done("commands")
    check_types(place, python, folder, constraints)
    done("types")
    return versions.splitlines()[2].strip(), seconds


def check_types(place, python, folder, constraints):
    """Lets mypy, and pyright at the newest versions, read a user's script beside the installed package."""
    checkers = ["mypy"] if place.lowest else ["mypy", "basedpyright"]
    call([python, "-m", "pip", "install", "--quiet", "--no-compile", *constraints, *checkers], folder)
    shutil.copy(ROOT / "tests" / "typed_user.py", folder)
    call([python, "-m", "mypy", "--strict", "typed_user.py"], folder)
    if "basedpyright" in checkers:
        # The analysis of pyright, which as a package of its own fetches node from outside the index.
        (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
        call([python.parent / "basedpyright", "--pythonpath", python, "typed_user.py"], folder)


def main(arguments=None):
    """Builds and tries; the exit status is that of the first thing that fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.wheel", description=__doc__)
    parser.add_argument("--every", action="store_true", help="the newest versions on each Python here, and jax 0.11")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "dist", help="where the wheel goes")
    args = parser.parse_args(arguments)
    began = time.perf_counter()
    wheel = build(args.out)
    print(f"{wheel.name}: built in {time.perf_counter() - began:.0f} s", flush=True)
    # Two side by side: while one waits for the index, the other one computes.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for said in pool.map(lambda place: tried(place, wheel), places(args.every)):
            print(said, flush=True)


if __name__ == "__main__":
    main()
