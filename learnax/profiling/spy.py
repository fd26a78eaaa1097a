"""py-spy around a program: a flame graph, the same stacks for speedscope, and the hottest functions.

py-spy writes one format a run, and a training is not to be run twice: the stacks are read back from its flame graph,
which has the exact number of samples of each frame.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

RATE = 100
"""Samples a second, by default."""

ROWS = 10
"""Functions in the table."""

_LAUNCH = Path(__file__).with_name("launch.py")

_SVG = "{http://www.w3.org/2000/svg}"
_COUNTS = "{http://github.com/jonhoo/inferno}"
_TITLE = re.compile(r"(?P<frame>.*) \([\d,]+ samples?, [\d.]+%\)", re.DOTALL)
_FRAME = re.compile(r"(?P<name>.+?) \((?P<file>.+?)(?::(?P<line>\d+))?\)")
_FORBIDDEN = re.compile(r"permission denied|not permitted|SYS_PTRACE|os error 1\b|os error 13\b", re.IGNORECASE)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_READY = "Sampling process"


class Frame(NamedTuple):
    """A place in a stack.

    Attributes:
        name: the function, or the process that a stack begins with.
        file: where it is, as short as py-spy makes it; None for a process.
        line: the line that runs.
    """

    name: str
    file: str | None = None
    line: int | None = None


class Stack(NamedTuple):
    """A stack, outermost frame first, and how many samples found exactly it."""

    frames: tuple[Frame, ...]
    samples: int


# ---- running


def find() -> str | None:
    """Where py-spy is: beside this Python, or else on PATH; None if nowhere."""
    return shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")


def refusal(py_spy: str) -> str | None:
    """Why py-spy cannot look into a Python process here, what to do about it included; None if it can."""
    idle = [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()"]
    said = ""
    with subprocess.Popen(
        [py_spy, "record", "--format", "raw", "--output", os.devnull, "--", *idle],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if _READY in line:
                process.communicate()  # closes its input, which ends it
                return None
            said += line
    said = _gist(said) or f"it ended with {process.returncode}"
    if _FORBIDDEN.search(said) is None:
        return f"{py_spy} cannot look into {sys.executable}: {said}"
    return (
        f"py-spy is not permitted to look into processes here: {said}\n"
        "a container needs --cap-add=SYS_PTRACE, macOS needs sudo; elsewhere, /proc/sys/kernel/yama/ptrace_scope must "
        "be 0 or 1"
    )


def record(py_spy: str, command: Sequence[str], svg: Path, rate: int) -> tuple[int, str]:
    """Runs a program below py-spy, which needs no privileges for its descendants, to the program's end.

    py-spy gives no exit status away, it reaps the program or kills it, and when it is not permitted to look it kills it
    after a second. So `launch` is between both: it starts the program once py-spy is ready, and tells its status.

    SIGINT, SIGTERM, SIGHUP and SIGQUIT go to the program, which may take its time to save. py-spy is in a session of
    its own, for a Ctrl-C not to end the sampling.

    Args:
        py_spy: where it is.
        command: the program with its arguments.
        svg: the flame graph to be written.
        rate: samples a second.

    Returns:
        The program's exit status as a shell has it, 128 and the signal for one that a signal ended; and what py-spy
        said.

    Raises:
        SystemExit: py-spy cannot look into it; the program was not started.
    """
    wait, go = os.pipe()
    told, tell = os.pipe()
    theirs = (wait, tell, os.dup(1), os.dup(2))
    launch = [sys.executable, "-I", "-S", str(_LAUNCH), ",".join(map(str, theirs))]
    options = ["--format", "flamegraph", "--rate", str(rate), "--subprocesses", "--output", str(svg)]
    with tempfile.TemporaryFile() as said, open(go, "wb", buffering=0) as begin, open(told) as answers:
        spy = subprocess.Popen(
            [py_spy, "record", *options, "--", *launch, *command],
            stdout=said,
            stderr=said,
            pass_fds=theirs,
            start_new_session=True,
        )
        for descriptor in theirs:
            os.close(descriptor)
        while _READY not in _text(said):
            if spy.poll() is not None:
                raise SystemExit(refusal(py_spy) or f"py-spy did not start; start it again: {_gist(_text(said))}")
            time.sleep(0.005)
        begin.write(b"!")
        program = int(answers.readline() or 0)
        if not program:
            raise SystemExit(f"the program could not be started: {_gist(_text(said))}")
        ended = False

        def forward(signum: int) -> None:
            with contextlib.suppress(ProcessLookupError):
                # py-spy waits for processes that the program left behind, too.
                os.kill(*(spy.pid, signal.SIGINT) if ended else (program, signum))

        with _handled(forward):
            answer = answers.readline()
            ended = True
            spy.wait()
        status = int(answer) if answer else spy.returncode  # nothing, where `launch` was killed
        return 128 - status if status < 0 else status, _text(said)


def profile(command: Sequence[str], out: Path, rate: int = RATE) -> int:
    """Runs a program under py-spy, writes `flame.svg` and `speedscope.json`, and prints the hottest functions.

    Args:
        command: the program with its arguments.
        out: the folder for both files; it is made.
        rate: samples a second.

    Returns:
        The program's exit status, or 1 if that is 0 but there are no samples.

    Raises:
        SystemExit: py-spy or the folder is missing; what to do is in the text. The program was not started.
    """
    svg, scope = out / "flame.svg", out / "speedscope.json"
    py_spy = find()
    if py_spy is None:
        from learnax.utils.extras import missing  # here, for the room of it imports JAX

        raise SystemExit(missing("profiling", "py-spy"))
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in (svg, scope):  # what an earlier run left is not to be taken for this one's
            path.touch()
            path.unlink()
    except OSError as error:
        raise SystemExit(f"--out {out} cannot be written to: {error}") from None
    began = time.perf_counter()
    status, said = record(py_spy, command, svg, rate)
    seconds = time.perf_counter() - began
    stacks = read(svg) if svg.exists() else []
    if not any(map(_of_program, stacks)):
        svg.unlink(missing_ok=True)
        print(
            f"no samples: the program ended with {status} after {seconds:.1f} s, and time in which it sleeps or waits "
            f"is not sampled; profile a longer run, or raise --rate. {_gist(said)}".rstrip(),
            file=sys.stderr,
        )
        return status or 1
    scope.write_text(json.dumps(speedscope(stacks, shlex.join(command))))
    print(f"\n{table(stacks)}\n")
    if late := [line for line in said.splitlines() if "behind in sampling" in line]:
        print(f"py-spy could not keep up, and was {late[-1].partition('> ')[2]}")
    print(f"{svg}: a flame graph, for a browser\n{scope}: the same for https://www.speedscope.app", flush=True)
    return status


@contextlib.contextmanager
def _handled(forward: Callable[[int], None]) -> Iterator[None]:
    before = {signum: signal.signal(signum, lambda signum, frame: forward(signum)) for signum in _SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _text(said: BinaryIO) -> str:
    """What was written to a file so far; it is read without moving the place at which py-spy goes on."""
    return os.pread(said.fileno(), 1 << 20, 0).decode(errors="replace")


def _gist(said: str) -> str:
    """What py-spy said of an error, in a line."""
    lines = said.partition("Stack backtrace")[0].splitlines()
    return " ".join(" ".join(line for line in lines if not line.startswith(("py-spy>", "["))).split())


# ---- reading


def read(svg: Path) -> list[Stack]:
    """The stacks of a flame graph that py-spy wrote; none if it holds none.

    Frames that are too narrow to be drawn, less than one in some ten thousand samples, count for their callers.
    """
    drawn = []
    for group in ElementTree.parse(svg).iter(f"{_SVG}g"):
        title, rect = group.find(f"{_SVG}title"), group.find(f"{_SVG}rect")
        if title is None or rect is None or title.text is None:
            continue
        match = _TITLE.fullmatch(title.text)
        begin, width = (int(rect.attrib[f"{_COUNTS}{name}"]) for name in ("x", "w"))
        drawn.append((begin, float(rect.attrib["y"]), width, match["frame"] if match else title.text))
    drawn.sort()  # by where they begin, callers first: each one's callers are the last ones above it
    stacks: list[Stack] = []
    open_: list[tuple[float, Frame, int]] = []  # depth, frame, and samples that none of its callees has

    def close(depth: float) -> None:
        while open_ and open_[-1][0] >= depth:
            own = open_[-1][2]
            if own > 0 and len(open_) > 1:
                stacks.append(Stack(tuple(frame for _, frame, _ in open_[1:]), own))  # without inferno's "all"
            open_.pop()

    for _, depth, width, text in drawn:
        close(depth)
        if open_:
            above, frame, own = open_[-1]
            open_[-1] = (above, frame, own - width)
        open_.append((depth, _frame(text), width))
    close(-1)
    return stacks


def _of_program(stack: Stack) -> bool:
    """Whether a function of the program ran: not one of `launch`, nor the interpreter before there is any."""
    outermost = next((frame.file for frame in stack.frames if frame.file), None)
    return outermost is not None and not outermost.endswith(f"{_LAUNCH.parent.name}/{_LAUNCH.name}")


def _frame(text: str) -> Frame:
    match = _FRAME.fullmatch(text)
    if match is None or text.startswith("process "):
        return Frame(text)
    return Frame(match["name"], match["file"], int(match["line"]) if match["line"] else None)


# ---- telling


def speedscope(stacks: Sequence[Stack], name: str) -> dict[str, object]:
    """The stacks as a file of https://www.speedscope.app; weights are samples."""
    numbers: dict[Frame, int] = {}
    samples = [[numbers.setdefault(frame, len(numbers)) for frame in stack.frames] for stack in stacks]
    weights = [stack.samples for stack in stacks]
    frames = [{key: value for key, value in frame._asdict().items() if value is not None} for frame in numbers]
    profile = {
        "type": "sampled",
        "name": name,
        "unit": "none",
        "startValue": 0,
        "endValue": sum(weights),
        "samples": samples,
        "weights": weights,
    }
    return {
        "$schema": "https://www.speedscope.app/file-format-schema.json",
        "exporter": "learnax.profiling",
        "name": name,
        "shared": {"frames": frames},
        "profiles": [profile],
    }


def table(stacks: Sequence[Stack], rows: int = ROWS) -> str:
    """The program's functions that run most: in themselves, and with what they call, in percent of its samples.

    The lines of a function are added up; the one that is shown is its hottest.
    """
    stacks = [stack for stack in stacks if _of_program(stack)]
    own: collections.Counter[tuple[str, str | None]] = collections.Counter()
    total: collections.Counter[tuple[str, str | None]] = collections.Counter()
    lines: collections.defaultdict[tuple[str, str | None], collections.Counter[int | None]]
    lines = collections.defaultdict(collections.Counter)
    for frames, samples in stacks:
        functions = [frame for frame in frames if frame.file is not None]
        own[functions[-1][:2]] += samples
        for function in {frame[:2] for frame in functions}:  # once, where it calls itself
            total[function] += samples
        for frame in set(functions):
            lines[frame[:2]][frame.line] += samples
    everything = sum(stack.samples for stack in stacks)
    hottest = sorted(total, key=lambda function: (-own[function], -total[function], function[0]))[:rows]
    cells = [("own", "total", "function", "where")]
    for function in hottest:
        line = lines[function].most_common(1)[0][0]
        where = f"{function[1]}:{line}" if line else str(function[1])
        percents = (f"{100 * count[function] / everything:.1f}%" for count in (own, total))
        cells.append((*percents, function[0], where))  # type: ignore[arg-type]
    width = max(len(cell[2]) for cell in cells)
    body = "\n".join(f"{own:>6}  {total:>6}  {name:<{width}}  {where}" for own, total, name, where in cells)
    return f"{everything} samples of code that ran\n{body}"
