"""`python -m learnax.profiling`: real py-spy around real programs, the command lines of nsys and ncu, and refusals."""

import ast
import ctypes
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import jax
import pytest

import bench.train
from learnax.profiling import __main__ as command
from learnax.profiling import cudart, nsight, spy
from learnax.profiling.spy import Frame, Stack
from tests.helpers import ROOT

pytestmark = pytest.mark.processes

SPIN = """
import sys, time

def burn(seconds):
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        sum(range(100))

def middle(seconds):
    burn(seconds)

def outer(seconds):
    middle(seconds)

outer(float(sys.argv[1]))
print("done", *sys.argv[2:])
sys.exit(int(sys.argv[2]))
"""

TRAIN = """
import flax.linen as nn
import numpy as np
from learnax.trainer import Trainer

data = [np.full(8, i, "float32") for i in range(1024)]
model = nn.Dense(8)
losses = lambda output, datum: (output, ((output - datum[0]) ** 2).mean(), {})
trainer = Trainer(model, 1e-3, losses, 0, data, num_epochs=100_000, batch_size=8, num_workers=0, max_seconds=1.5)
trainer.train()
"""

SAVES = """
import pathlib, time

def burn():
    while True:
        sum(range(100))

try:
    pathlib.Path("begun").touch()
    burn()
except KeyboardInterrupt:
    time.sleep(0.5)
    pathlib.Path("saved").touch()
    raise SystemExit(3)
"""


@pytest.fixture(scope="module")
def py_spy():
    """Skips where py-spy is not, or is not permitted."""
    found = spy.find()
    if found is None:
        pytest.skip("no py-spy")
    if why := spy.refusal(found):
        pytest.skip(why)
    return found


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder of the test, which commands run in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv(nsight.VARIABLE, raising=False)
    (tmp_path / "spin.py").write_text(SPIN)
    return tmp_path


@pytest.fixture(scope="module")
def spun(py_spy, tmp_path_factory):
    """A script that spins for a while, profiled from the command line: its folder, and what was printed."""
    folder = tmp_path_factory.mktemp("spun")
    (folder / "spin.py").write_text(SPIN)
    arguments = ["--out", "profile", "--rate", "200", "--", "spin.py", "1.5", "0", "--rate", "x y"]
    result = subprocess.run(
        [sys.executable, "-m", "learnax.profiling", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return folder / "profile", result.stdout


def named(svg):
    """The titles of a flame graph's frames, and its samples."""
    (frames,) = [each for each in ElementTree.parse(svg).iter() if each.get("id") == "frames"]
    return [each.text for each in frames.iter() if each.tag.endswith("}title")], int(frames.attrib["total_samples"])


def rows(printed):
    """The table's rows: own, total, function, where."""
    lines = printed.splitlines()
    (head,) = [number for number, line in enumerate(lines) if line.split() == ["own", "total", "function", "where"]]
    return [line.split() for line in lines[head + 1 : lines.index("", head)]]


# ---- py-spy


def test_a_program_runs_once_as_it_stands(spun):
    _, printed = spun
    assert printed.startswith("done 0 --rate x y\n")
    assert printed.count("done") == 1
    assert "py-spy>" not in printed


def test_the_flame_graph_is_py_spys_and_names_the_function(spun):
    folder, _ = spun
    titles, samples = named(folder / "flame.svg")
    assert samples > 100  # of about 300
    assert any(title.startswith("burn (spin.py:") for title in titles)
    assert any(re.fullmatch(r'process \d+:".*spin\.py 1\.5 0 --rate x y" \(.*\)', title) for title in titles)


def test_speedscope_has_the_same_samples_and_the_same_hottest_stack(spun):
    folder, _ = spun
    scope = json.loads((folder / "speedscope.json").read_text())
    assert scope["$schema"] == "https://www.speedscope.app/file-format-schema.json"
    (profile,) = scope["profiles"]
    assert (profile["type"], profile["unit"], profile["startValue"]) == ("sampled", "none", 0)
    assert sum(profile["weights"]) == profile["endValue"] == named(folder / "flame.svg")[1]
    assert len(profile["weights"]) == len(profile["samples"])
    own = {}
    for stack, weight in zip(profile["samples"], profile["weights"], strict=True):
        names = [scope["shared"]["frames"][number]["name"] for number in stack]
        own[tuple(names[2:])] = own.get(tuple(names[2:]), 0) + weight  # without the processes
    assert max(own, key=own.get) == ("<module>", "outer", "middle", "burn")
    files = {(frame["name"], frame.get("file")) for frame in scope["shared"]["frames"]}
    assert {("burn", "spin.py"), ("outer", "spin.py")} <= files
    assert all(isinstance(frame.get("line", 1), int) for frame in scope["shared"]["frames"])


def test_the_table_begins_with_the_hottest_function(spun):
    folder, printed = spun
    table = rows(printed)
    assert len(table) <= spy.ROWS
    own, total, name, where = table[0]
    assert name == "burn"
    assert where in {f"spin.py:{line}" for line in (5, 6, 7)}
    assert float(own[:-1]) > 80
    assert float(total[:-1]) >= float(own[:-1])
    totals = {row[2]: float(row[1][:-1]) for row in table}
    assert totals["outer"] == totals["middle"] == totals["burn"]
    assert str(folder.name) in printed.splitlines()[-1]


def test_what_a_failing_program_did_is_written_and_its_status_passed_on(py_spy, here, capfd):
    assert command.main(["spin.py", "0.6", "7"]) == 7
    assert rows(capfd.readouterr().out)[0][2] == "burn"
    assert any("burn" in title for title in named("out/profile/flame.svg")[0])


def test_a_program_that_a_signal_ended_has_the_status_of_a_shell(py_spy, here):
    (here / "dies.py").write_text(SPIN.replace("print(", "import os; os.kill(os.getpid(), 15); print("))
    assert command.main(["dies.py", "0.4", "0"]) == 128 + 15


def test_a_training_shows_learnaxs_own_functions(py_spy, here, capfd):
    (here / "train.py").write_text(TRAIN)
    assert command.main(["--out", "profile", "train.py"]) == 0, capfd.readouterr().err
    titles, _ = named("profile/flame.svg")
    assert any(re.match(r"(Trainer\.)?train \(learnax/trainer\.py:", title) for title in titles)


def test_ctrl_c_goes_to_the_program_which_may_take_its_time(py_spy, here):
    (here / "saves.py").write_text(SAVES)
    arguments = [sys.executable, "-m", "learnax.profiling", "--out", "profile", "saves.py"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        while not (here / "begun").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.6)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=30)
    assert process.returncode == 3
    assert (here / "saved").exists()
    assert rows(printed)[0][2] == "burn"


def test_a_run_that_is_too_short_has_no_samples(py_spy, here, capfd):
    (here / "out" / "profile").mkdir(parents=True)
    (here / "out" / "profile" / "flame.svg").write_text("of an earlier run")
    (here / "short.py").touch()
    for _ in range(5):  # Python's own start may be seen, where it is slow
        status = command.main(["short.py"])
        if status:
            break
    assert status == 1
    said = capfd.readouterr().err
    assert "no samples: the program ended with 0 after " in said
    assert "profile a longer run, or raise --rate" in said
    assert list((here / "out" / "profile").iterdir()) == []
    (here / "short.py").write_text("raise SystemExit(5)")
    assert command.main(["short.py"]) == 5


# ---- what is missing


def test_py_spy_is_looked_for_beside_this_python_then_on_path(tmp_path, monkeypatch):
    beside, on_path = tmp_path / "venv" / "py-spy", tmp_path / "bin" / "py-spy"
    monkeypatch.setattr(sys, "executable", str(beside.with_name("python")))
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert spy.find() is None
    for path in (on_path, beside):
        path.parent.mkdir()
        path.touch(mode=0o755)
        assert spy.find() == str(path)


def test_without_py_spy_it_says_how_to_install_it(here, monkeypatch):
    monkeypatch.setattr(spy, "find", lambda: None)
    said = "profiling by py-spy and Nsight needs py-spy, which is not installed; pip install 'learnax[profiling]'"
    with pytest.raises(SystemExit, match=re.escape(said)):
        command.main(["spin.py", "1", "0"])


FORBID = """
import ctypes, os, sys

ptrace, process_vm_readv = {"x86_64": (101, 310), "aarch64": (117, 270)}[os.uname().machine]

class Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint)]

class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.POINTER(Instruction))]

lines = [(0x20, 0, 0, 0), (0x15, 2, 0, ptrace), (0x15, 1, 0, process_vm_readv)]
lines += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050001)]  # allowed, or else EPERM
program = Program(len(lines), (Instruction * len(lines))(*(Instruction(*line) for line in lines)))
libc = ctypes.CDLL(None)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program), 0, 0):
    sys.exit(99)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64") or sys.platform != "linux", reason="no seccomp")
def test_where_py_spy_is_not_permitted_the_program_is_not_started(py_spy, here):
    """Real py-spy behind a filter of system calls, as a container has."""
    (here / "forbid.py").write_text(FORBID)
    (here / "marks.py").write_text("open('started', 'w')")
    arguments = ["forbid.py", "-m", "learnax.profiling", "--out", "profile", "marks.py"]
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)
    if result.returncode == 99:
        pytest.skip("no filters of system calls here")
    assert result.returncode == 1
    assert "py-spy is not permitted to look into processes here: " in result.stderr
    assert "a container needs --cap-add=SYS_PTRACE" in result.stderr
    assert not (here / "started").exists()


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (
            "Permission Denied: Try running again with elevated permissions by going 'sudo env \"PATH=$PATH\" !!'",
            "py-spy is not permitted to look into processes here: Permission Denied: Try running again",
        ),
        (
            "Permission Denied\n\nIt looks like you are running in a docker container. Please make sure you started "
            "your container with the SYS_PTRACE capability. See "
            "https://github.com/benfred/py-spy#how-do-i-run-py-spy-in-docker for more details",
            "here: Permission Denied It looks like you are running in a docker container.",
        ),
        ("Error: Unsupported version of Python\n\nStack backtrace:\n 0: main", "Unsupported version of Python"),
        ("", "cannot look into {python}: it ended with 1"),
    ],
)
def test_what_py_spy_says_when_it_refuses_is_passed_on(here, monkeypatch, said, text):
    stand_in = here / "py-spy"
    stand_in.write_text(f"#!/bin/sh\necho {shlex.quote(said)} >&2\nexit 1\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(spy, "find", lambda: str(stand_in))
    with pytest.raises(SystemExit) as raised:
        command.main(["spin.py", "1", "0"])
    assert text.replace("{python}", sys.executable) in str(raised.value)
    assert "backtrace" not in str(raised.value)


def test_a_folder_that_cannot_be_written_to_is_named(py_spy, here):
    with pytest.raises(SystemExit, match=r"--out spin\.py/x cannot be written to: .*Not a directory"):
        command.main(["--out", "spin.py/x", "spin.py", "1", "0"])


@pytest.mark.parametrize("tool", command.TOOLS)
def test_a_script_that_is_not_there_is_named(here, tool):
    with pytest.raises(SystemExit, match=r"there is no script trian\.py in .*; expected a script, or -m and a module"):
        command.main([tool, "trian.py"])


# ---- nsys and ncu

NSYS = (
    "nsys profile --capture-range=cudaProfilerApi --capture-range-end=repeat --cuda-graph-trace=node "
    "--trace=cuda,nvtx --output=out/profile/nsys --force-overwrite=true"
)
NCU = "ncu --profile-from-start off --target-processes all --nvtx --export out/profile/ncu --force-overwrite"


@pytest.mark.parametrize(("tool", "line", "product"), [("nsys", NSYS, "systems"), ("ncu", NCU, "compute")])
def test_without_the_tool_the_line_to_run_is_printed(here, monkeypatch, capsys, tool, line, product):
    monkeypatch.setattr(nsight, "find", lambda tool: None)
    with pytest.raises(SystemExit) as raised:
        command.main([tool, "spin.py", "1", "a b"])
    assert capsys.readouterr().out == f"LEARNAX_PROFILE=cuda:100-110 {line} {sys.executable} spin.py 1 'a b'\n"
    lines = str(raised.value).splitlines()
    assert lines[0].startswith(f"no {tool} on PATH, nor /usr/local/cuda*/bin/{tool}, /opt/nvidia/nsight-{product}*/")
    assert lines[0].endswith(f"it is at https://developer.nvidia.com/nsight-{product}")
    assert lines[-1] == f"the line above is what to run where {tool} and a CUDA device are"
    assert not (here / "out").exists()


def test_without_a_driver_cudas_words_are_passed_on(here, monkeypatch, capsys):
    monkeypatch.setattr(nsight, "find", lambda tool: "/opt/bin/nsys")
    if cudart.libcudart is not None and cudart.libcudart.cudaGetDeviceCount(ctypes.byref(ctypes.c_int())) == 0:
        assert nsight.missing("nsys") == []
        pytest.skip("there is a driver")
    with pytest.raises(SystemExit, match=r"no CUDA device: cudaGetDeviceCount says (cudaError|no libcudart)"):
        command.main(["nsys", "--out", "o", "--steps", "5-9 every 100, 20-30", "-m", "package.train", "--out", "x"])
    printed = capsys.readouterr().out
    assert printed.startswith("LEARNAX_PROFILE='cuda:5-9 every 100,cuda:20-30' /opt/bin/nsys profile --capture-range=")
    assert printed.endswith(f" --output=o/nsys --force-overwrite=true {sys.executable} -m package.train --out x\n")
    monkeypatch.setattr(cudart, "libcudart", None)
    assert nsight.missing("nsys") == ["no CUDA device: cudaGetDeviceCount says no libcudart"]


def test_steps_that_the_environment_names_go_first(here, monkeypatch, capsys):
    monkeypatch.setenv(nsight.VARIABLE, "cuda:epoch 2")
    monkeypatch.setattr(nsight, "missing", lambda tool: ["no device"])
    with pytest.raises(SystemExit):
        command.main(["ncu", "spin.py"])
    assert capsys.readouterr().out.startswith("LEARNAX_PROFILE='cuda:epoch 2' ")


def test_a_tool_on_path_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "nsys").touch(mode=0o755)
    assert nsight.find("nsys") == str(tmp_path / "nsys")


def test_a_tool_beside_cuda_is_found_by_its_last_version(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(nsight._PLACES, "ncu", (f"{tmp_path}/*/ncu",))
    assert nsight.find("ncu") is None
    for version in ("2024.1", "2025.3", "2026.1"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "ncu").touch(mode=0o644 if version == "2026.1" else 0o755)
    assert nsight.find("ncu") == str(tmp_path / "2025.3" / "ncu")


# ---- the command line


@pytest.mark.parametrize(
    ("line", "tool", "out", "program"),
    [
        ("a.py", "py-spy", "out/profile", ["a.py"]),
        ("py-spy a.py --rate 5", "py-spy", "out/profile", ["a.py", "--rate", "5"]),
        ("--out=x --rate 5 -m pkg.mod --out y", "py-spy", "x", ["-m", "pkg.mod", "--out", "y"]),
        ("nsys --out x -- a.py -- -h", "nsys", "x", ["a.py", "--", "-h"]),
        ("-- nsys b", "py-spy", "out/profile", ["nsys", "b"]),
        ("ncu --steps 1-2 a.py ncu", "ncu", "out/profile", ["a.py", "ncu"]),
    ],
)
def test_a_command_line_is_split_where_the_program_begins(line, tool, out, program):
    args = command.parse(line.split())
    assert (args.tool, str(args.out), args.program) == (tool, out, program)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("", "no program: expected a script, or -m and a module, at the end"),
        ("nsys --steps 1-2 -m", "no program: expected a script"),
        ("nsys --rate 5 a.py", "--rate 5: nsys does not sample"),
        ("--rate 0 a.py", "--rate 0: expected 1 or more"),
        ("--steps 1-2 a.py", "--steps: py-spy looks at the whole run; nsys and ncu look at steps"),
        ("ncu --steps 9-5 a.py", "--steps: 'cuda:9-5' ends before it begins"),
        ("ncu --steps ten a.py", "--steps: 'cuda:ten' is no window of steps"),
        ("--speed 5 a.py", "unrecognized arguments: --speed 5"),
    ],
)
def test_a_command_line_that_is_wrong_is_told_of(capsys, line, text):
    with pytest.raises(SystemExit) as raised:
        command.parse(line.split())
    assert raised.value.code == 2
    assert text in capsys.readouterr().err


def test_the_help_names_the_tools_and_the_defaults(capsys):
    with pytest.raises(SystemExit) as raised:
        command.parse(["--help"])
    assert raised.value.code == 0
    text = capsys.readouterr().out
    for part in (*command.TOOLS, "out/profile", "100-110", "SCRIPT|-m MODULE [ARGS ...]"):
        assert part in text


def test_the_command_itself_imports_no_jax():
    """Apart from what the package learnax imports on the way to it."""
    source = f"""
import sys, types
package = types.ModuleType("learnax")
package.__path__ = [{str(ROOT / "learnax")!r}]
sys.modules["learnax"] = package
import learnax.profiling.__main__
print(sorted({{"jax", "matplotlib", "numpy"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert result.stdout == "[]\n", result.stderr


def test_what_launches_the_program_imports_next_to_nothing():
    tree = ast.parse((ROOT / "learnax" / "profiling" / "launch.py").read_text())
    imported = [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    assert imported == ["os", "sys"]
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))


# ---- reading and telling, on stacks with known answers

PROCESS = Frame('process 7:"python a.py"')
A, B3, B4 = Frame("a", "m.py", 1), Frame("b", "m.py", 3), Frame("b", "m.py", 4)


def test_a_functions_lines_are_added_up_and_one_that_calls_itself_counts_once():
    stacks = [
        Stack((PROCESS, A, B3), 20),
        Stack((PROCESS, A, B4), 30),
        Stack((PROCESS, A, B4, B3), 10),
        Stack((PROCESS, A), 40),
        Stack((Frame('process 6:"python launch.py"'), Frame("<module>", "learnax/profiling/launch.py", 30)), 900),
    ]
    lines = spy.table(stacks).splitlines()
    assert lines[0] == "100 samples of code that ran"
    assert [line.split() for line in lines[2:]] == [
        ["60.0%", "60.0%", "b", "m.py:4"],
        ["40.0%", "100.0%", "a", "m.py:1"],
    ]
    assert len(spy.table(stacks, rows=1).splitlines()) == 3


def test_a_graph_is_read_whatever_its_names_are(tmp_path):
    def group(title, x, y, width):
        return f'<g><title>{title}</title><rect y="{y}" fg:x="{x}" fg:w="{width}"/><text/></g>'

    groups = [  # in no order, as inferno writes them
        group("&lt;lambda&gt; (C:/Program Files (x86)/m.py:12) (1,000 samples, 50.00%)", 0, 84, 1000),
        group("all (2,000 samples, 100%)", 0, 52, 2000),
        group("&lt;frozen&gt; (&lt;frozen importlib._bootstrap&gt;:241) (1 sample, 0.05%)", 1500, 84, 1),
        group("process 7:&quot;python a (b:1).py&quot; (1,990 samples, 99.50%)", 0, 68, 1990),
        group("process 8:&quot;python&quot; (10 samples, 0.50%)", 1990, 68, 10),
    ]
    path = tmp_path / "flame.svg"
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:fg="http://github.com/jonhoo/inferno"'
    path.write_text(f'<svg {names}><svg id="frames">{"".join(groups)}</svg></svg>')
    process = Frame('process 7:"python a (b:1).py"')
    assert sorted(spy.read(path), key=lambda stack: stack.samples) == [
        Stack((process, Frame("<frozen>", "<frozen importlib._bootstrap>", 241)), 1),
        Stack((Frame('process 8:"python"'),), 10),
        Stack((process,), 989),
        Stack((process, Frame("<lambda>", "C:/Program Files (x86)/m.py", 12)), 1000),
    ]


def test_a_graph_without_stacks_has_none(tmp_path):
    (tmp_path / "flame.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><text>ERROR</text></svg>')
    assert spy.read(tmp_path / "flame.svg") == []


# ---- what the targets of the Makefile run


def test_a_workload_trains_for_as_long_as_it_is_told(capsys, one_device, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: one_device)
    with jax.numpy_dtype_promotion("standard"):
        bench.train.main(["mlp-128", "--seconds", "0.5"])
    assert re.fullmatch(r"mlp-128: [\d,]+ steps in 0\.\d s, [\d,]+ steps/s\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("profile", "py-spy --out out/profile --rate 50 -m bench.train gpt"),
        ("nsys", "nsys --out out/profile --rate 50 -m bench.train gpt"),
        ("ncu", "ncu --out out/profile --rate 50 -m bench.train gpt"),
    ],
)
def test_the_targets_run_what_they_are_told(target, line):
    arguments = ["make", "-n", target, "WORKLOAD=gpt", "ARGS=--rate 50"]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert f"/python -m learnax.profiling {line}\n" in result.stdout
