"""`python -m learnax`: what is said without a command, what can be asked for, and of what is not installed."""

import os
import subprocess
import sys
import tomllib

import pytest

import learnax
from learnax import __main__ as command
from learnax.commands import overview
from learnax.utils import extras, lowest
from tests.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def ask(*arguments, code=None, **env):
    """What `python -m learnax` says, or a line of code, in a process whose environment is no more than this."""
    call = [sys.executable, *(["-c", code] if code else ["-m", "learnax"]), *arguments]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | env
    return subprocess.run(call, capture_output=True, text=True, cwd=ROOT, timeout=100, env=env)


@pytest.mark.processes
def test_without_a_command_it_says_what_is_here(tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path), "TRAINAX_REGISTRY_PATH": str(tmp_path)}
    result = ask(XLA_FLAGS="--xla_force_host_platform_device_count=3", **env)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == f"learnax {learnax.__version__}"
    assert f"jax {extras.version_of('jax')}, " in lines[2]
    assert lines[lines.index("devices") + 1] == "  3 x cpu"
    (programs,) = [line for line in lines if line.startswith("  programs ")]
    assert programs.endswith("(not made yet)")
    assert str(tmp_path / "learnax" / "programs-") in programs
    assert f"  runs          {tmp_path} (0 entries)" in lines
    assert len(lines[lines.index("to try") + 1 :]) == 3
    assert list(tmp_path.iterdir()) == []  # it looks only


# A process whose user has no entry in the list of users, and packages that are not installed.
NOTHING = """
import importlib.metadata, os, pwd, sys
os.environ.pop("HOME", None)

def getpwuid(uid):
    raise KeyError(uid)

pwd.getpwuid = getpwuid
version = importlib.metadata.version

def without(name):
    if name in ("wandb", "nvtx", "jax-cuda12-plugin", "tensorboardX"):
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.metadata.version = without
from learnax.__main__ import main
sys.exit(main([]))
"""


@pytest.mark.processes
def test_it_says_what_is_missing_and_ends_well_anywhere():
    result = ask(code=NOTHING, JAX_PLATFORMS="cuda")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[lines.index("devices") + 1].startswith("  none: JAX finds no device with JAX_PLATFORMS=cuda (")
    assert "wandb not installed" in lines[2]
    absent = "\n".join(lines[lines.index("not installed") : lines.index("folders")])
    for name in ("profiling", "gpu-compile", "cuda12", "tensorboard"):
        assert f"pip install 'learnax[{name}]'" in absent
    assert "  equinox " not in absent
    assert (
        "  programs      none: the user has no home folder: set LEARNAX_COMPILATION_CACHE to a folder for compiled "
        "programs" in lines
    )
    assert "  runs          where a Registry is told to; TRAINAX_REGISTRY_PATH is not set" in lines


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("off", "off, by LEARNAX_COMPILATION_CACHE"),
        ("$NOWHERE/x", "none: LEARNAX_COMPILATION_CACHE is '$NOWHERE/x', but the variable NOWHERE is not set"),
    ],
)
def test_what_is_said_of_the_cache(monkeypatch, value, said):
    monkeypatch.setenv("LEARNAX_COMPILATION_CACHE", value)
    assert f"  programs      {said}" in overview.text("1").splitlines()


def test_folders_that_are_there(monkeypatch, tmp_path):
    (tmp_path / "a").touch()
    monkeypatch.setenv("LEARNAX_COMPILATION_CACHE", str(tmp_path))
    monkeypatch.setenv("TRAINAX_REGISTRY_PATH", "$NOWHERE")
    lines = overview.text("1").splitlines()
    assert f"  programs      {tmp_path} (1 entry)" in lines
    assert "  runs          none: TRAINAX_REGISTRY_PATH is '$NOWHERE', but the variable NOWHERE is not set" in lines


@pytest.mark.parametrize(
    ("driver", "extra"),
    [
        ("NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "cuda12"),
        ("NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "cuda13"),
        ("something else", "cuda12"),
    ],
)
def test_a_gpu_that_jax_does_not_see_is_told_of_with_the_extra_for_its_driver(monkeypatch, tmp_path, driver, extra):
    said = tmp_path / "version"
    said.write_text(f"NVRM version: {driver}\nGCC version:  gcc version 12.2.0\n")
    monkeypatch.setattr(overview, "_DRIVER", said)
    line = f"  an NVIDIA GPU is here that JAX does not use; pip install 'learnax[{extra}]'"
    assert line in overview.text("1").splitlines()


def test_help_names_each_command(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert len(command.COMMANDS) > 0
    for name, (text, _) in command.COMMANDS.items():
        assert f"  {name:14}{text}" in said


@pytest.mark.parametrize("name", command.COMMANDS)
def test_each_command_has_a_help_of_its_own(name, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m learnax {name} ")


def test_the_version_is_said_and_an_unknown_command_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"{learnax.__version__}\n")
    with pytest.raises(SystemExit) as ended:
        command.main(["prefligt", "--target", "h100"])
    assert ended.value.code == 2
    assert "argument COMMAND: invalid choice: 'prefligt' (choose from" in capsys.readouterr().err


@pytest.mark.processes
@pytest.mark.parametrize("version", ["0.9.2", "0.4.38.dev20250101"])
def test_an_older_jax_is_told_of_in_one_line(tmp_path, version):
    older = tmp_path / f"jax-{version}.dist-info"
    older.mkdir()
    (older / "METADATA").write_text(f"Metadata-Version: 2.1\nName: jax\nVersion: {version}\n")
    result = ask(code="import learnax.trainer", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert lines[-1] == (
        f"ImportError: learnax needs jax 0.10.0 or newer, but jax {version} is installed: "
        "pip install --upgrade 'jax>=0.10.0'"
    )
    assert sum(line.startswith("Traceback") for line in lines) == 1
    assert not any("site-packages" in line for line in lines)


def test_the_oldest_jax_is_that_of_the_package():
    assert f"jax>={lowest.JAX}" in PROJECT["dependencies"]
    for name in ("cuda12", "cuda13"):
        assert PROJECT["optional-dependencies"][name] == [f"jax[{name}]>={lowest.JAX}"]


def test_a_missing_package_is_told_of_by_the_feature():
    for extra in extras.EXTRAS.values():
        for package in extra.packages:
            said = extras.missing(extra.name, package)
            assert said == (
                f"{extra.feature} needs {package}, which is not installed; pip install 'learnax[{extra.name}]'"
            )


def test_the_extras_are_those_of_the_package():
    declared = PROJECT["optional-dependencies"]
    for name, extra in extras.EXTRAS.items():
        for package in extra.packages:
            # CUDA's plugins are chosen by JAX's own extras.
            wanted = f"jax[{name}]" if name in ("cuda12", "cuda13") else package
            assert any(line.startswith(wanted) for line in declared[name]), name
    assert set(declared) - set(extras.EXTRAS) == {"docs", "test"}


def test_the_version_is_the_same_everywhere():
    assert PROJECT["version"] == learnax.__version__
    assert f"\nversion: {learnax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {learnax.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert (ROOT / "learnax" / "py.typed").read_text() == ""
