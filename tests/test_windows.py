"""Windows of steps: the grammar, exactly one pair of calls each, between the right steps, with nothing in flight."""

import collections
import ctypes
import math
import os
import random
import shutil
import subprocess
import sys
import warnings

import jax
import pytest

from learnax.loss import LossPipe
from learnax.profiling import cudart
from learnax.profiling.phases import Phases
from learnax.profiling.profiler import WindowProfiler
from learnax.profiling.windows import Window, covered, parse
from learnax.registry import Registry
from tests.helpers import Poisonable, StopAt, assert_trees_equal, make_data, make_trainer, run_script

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.mark.parametrize(
    ("text", "windows"),
    [
        (None, []),
        ("", []),
        ("off", []),
        ("cuda:100-110", [Window("cuda", 100, 110)]),
        ("trace : 0 - 3", [Window("trace", 0, 3)]),
        ("cuda:100-110 every 1000", [Window("cuda", 100, 110, 1000)]),
        ("trace:epoch 2", [Window("trace", 2, 3, None, True)]),
        ("cuda:epoch 0 every 5, trace:7-8", [Window("cuda", 0, 1, 5, True), Window("trace", 7, 8)]),
    ],
)
def test_what_is_written_is_what_is_read(text, windows):
    assert parse(text, "profile") == windows
    if windows:
        assert parse(", ".join(map(str, windows)), "profile") == windows


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("cuda", "profile: 'cuda' is no window of steps; expected for instance 'cuda:100-110', 'trace:100-110 every"),
        ("nsys:1-2", "profile: 'nsys:1-2' is no window"),
        ("cuda:5", "profile: 'cuda:5' is no window"),
        ("cuda:1-2,", "profile: '' is no window"),
        ("cuda:-1-2", "profile: 'cuda:-1-2' is no window"),
        ("cuda:9-9", "profile: 'cuda:9-9' ends before it begins; 'cuda:100-110' holds the steps 101 to 110"),
        ("cuda:0-9 every 5", "profile: 'cuda:0-9 every 5' begins again before its 9 steps are over; use every 9 or mo"),
        ("trace:epoch 1 every 0", "profile: 'trace:epoch 1 every 0' begins again before its 1 steps are over"),
    ],
)
def test_what_cannot_be_read_is_an_error_before_anything_else(text, error, monkeypatch):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        make_trainer(profile=text)
    assert str(raised.value).startswith(error)
    monkeypatch.setenv("LEARNAX_PROFILE", text)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        make_trainer(batch_size=-1)
    assert str(raised.value).startswith(error.replace("profile:", "LEARNAX_PROFILE:"))
    make_trainer(profile="off")


def test_what_is_no_text_is_an_error():
    with pytest.raises(TypeError, match="profile must be text, 'cuda:100-110' for instance, or None, but is 100"):
        make_trainer(profile=100)


def test_edges_are_where_the_cover_changes():
    rng = random.Random(0)
    for _ in range(200):
        begin = rng.randrange(20)
        length = rng.randrange(1, 8)
        every = rng.choice([None, length + rng.randrange(5)])
        window = Window("cuda", begin, begin + length, every)
        changes = [step for step in range(1, 80) if window.covers(step, 0) != window.covers(step - 1, 0)]
        for step in range(60):
            edge = window.next_edge(step)
            coming = [change for change in changes if change > step]
            # Windows without a gap have edges where nothing changes.
            assert edge <= (coming[0] if coming else math.inf)
            assert edge > step
            if every != length and coming:
                assert edge == coming[0]
    assert Window("cuda", 2, 3, epochs=True).next_edge(2) == math.inf


SPY = r"""
static void (*told)(int);
void spy_on(void (*tell)(int)) { told = tell; }
int cudaProfilerStart(void) { told(1); return 0; }
int cudaProfilerStop(void) { told(0); return 0; }
const char *cudaGetErrorName(int code) { return "cudaErrorSpy"; }
const char *cudaGetErrorString(int code) { return "spied"; }
"""


@pytest.fixture(scope="module")
def spy(tmp_path_factory):
    """A libcudart of the tests' own, found as any other that the process has loaded."""
    folder = tmp_path_factory.mktemp("spy")
    (folder / "spy.c").write_text(SPY)
    path = folder / "libcudart.so.99"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, folder / "spy.c"], check=True)
    library = ctypes.CDLL(str(path))
    assert str(path) in cudart.find()
    return library


@pytest.fixture
def cuda(spy, monkeypatch):
    """Keeps what the library is told of a trainer: `calls(trainer)` is a list that grows as it trains."""
    found = [path for path in cudart.find() if path.endswith("libcudart.so.99")]
    monkeypatch.setattr(cudart, "find", lambda: found)  # the wheel's is loaded, too, and comes first
    monkeypatch.setattr(cudart, "libcudart", cudart.load())
    kept = []

    def calls(trainer):
        events, made, train = [], 0, trainer.programs.train

        def tell(starts):
            assert all(leaf.is_ready() for leaf in jax.tree.leaves(trainer.parts.progress.live))
            events.append(("start" if starts else "stop", made))

        def counted(state, seq, block, start, count):
            nonlocal made
            made += count
            return train(state, seq, block, start, count)

        kept.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(tell))
        spy.spy_on(kept[-1])
        trainer.programs.train = counted
        return events

    return calls


@pytest.mark.processes
@needs_cc
@pytest.mark.parametrize("room", [1, 16])
@pytest.mark.parametrize("number", [1, 4])
def test_each_window_is_one_pair_between_its_steps(cuda, room, number):
    options = {"steps_per_execution": room, "devices": jax.devices()[:number], "train_dataset": make_data(320)}
    plain = make_trainer(**options)
    plain.train()
    trainer = make_trainer(profile="cuda:3-13, cuda:20-22 every 30", val_datasets=[make_data(9)], **options)
    calls = cuda(trainer)
    trainer.train()
    pairs = [(3, 13), (20, 22), (50, 52)]
    assert calls == [event for begin, end in pairs for event in (("start", begin), ("stop", end))]
    # It trains to the same bits however it is cut.
    assert_trees_equal(trainer.train_state, plain.train_state)


@pytest.mark.processes
@needs_cc
def test_windows_at_the_ends_of_runs_and_epochs(cuda):
    trainer = make_trainer(profile="cuda:0-2,cuda:5-8,cuda:9-99", val_datasets=[make_data(9)])
    calls = cuda(trainer)
    evaluate = trainer.programs.evaluate
    trainer.programs.evaluate = lambda *args: (calls.append("validates"), evaluate(*args))[1]
    trainer.train()  # an epoch has 5 steps
    assert calls == [
        ("start", 0), ("stop", 2), "validates",  # not in the window that begins after it
        ("start", 5), ("stop", 8), ("start", 9), "validates", ("stop", 10),
    ]  # fmt: skip


@pytest.mark.processes
@needs_cc
def test_a_window_of_epochs_has_their_validation(cuda):
    trainer = make_trainer(profile="cuda:epoch 1 every 2", num_epochs=5, val_datasets=[make_data(8)])
    calls = cuda(trainer)
    evaluate = trainer.programs.evaluate
    trainer.programs.evaluate = lambda *args: (calls.append("validates"), evaluate(*args))[1]
    trainer.train()
    epoch = ["validates"]
    inside = lambda begin, end: [("start", begin), "validates", ("stop", end)]  # noqa: E731
    assert calls == epoch + inside(5, 10) + epoch + inside(15, 20) + epoch


@pytest.mark.processes
@needs_cc
def test_windows_that_touch_or_overlap_are_one(cuda):
    trainer = make_trainer(profile="cuda:1-3,cuda:3-5,cuda:4-7")
    calls = cuda(trainer)
    trainer.train()
    assert calls == [("start", 1), ("stop", 7)]


@pytest.mark.processes
@needs_cc
@pytest.mark.parametrize("room", [1, 16])
def test_what_is_raised_inside_a_window_ends_it(cuda, room, tmp_path):
    trainer = make_trainer(profile="cuda:2-9", steps_per_execution=room, registry=Registry("tests", tmp_path))
    calls = cuda(trainer)
    trainer.hooks.shows.append(StopAt(4))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert calls == [("start", 2), ("stop", 4)]
    trainer.train()  # in the midst of the window: what is left of it is captured
    assert calls[2:] == [("start", 4), ("stop", 9)]


@pytest.mark.processes
@needs_cc
def test_dropped_updates_do_not_count(cuda):
    data = make_data(80)
    data[16][1][:] = 7  # the third batch
    trainer = make_trainer(losses=LossPipe([Poisonable()]), train_dataset=data, num_epochs=1, profile="cuda:1-4")
    calls = cuda(trainer)
    trainer.train()
    assert calls == [("start", 1), ("stop", 5)]  # four batches, three steps
    assert trainer.log.step == 9


@pytest.mark.processes
@needs_cc
@pytest.mark.parametrize("seed", range(4))
def test_random_windows_capture_exactly_the_steps_that_they_cover(cuda, seed):
    rng = random.Random(seed)
    items = []
    for _ in range(rng.randrange(1, 4)):
        begin, length = rng.randrange(25), rng.randrange(1, 9)
        every = rng.choice(["", f" every {length + rng.randrange(1, 9)}"])
        items.append(f"cuda:{begin}-{begin + length}{every}")
    items += rng.choice([[], [f"cuda:epoch {rng.randrange(3)}"]])
    profile = ", ".join(items)
    trainer = make_trainer(profile=profile, num_epochs=3, train_dataset=make_data(83), steps_per_execution=4)
    calls = cuda(trainer)
    trainer.train()
    windows = parse(profile, "")
    expected = {step + 1 for step in range(30) if covered(windows, "cuda", step, step // 10)}
    starts, stops = ([made for name, made in calls if name == which] for which in ("start", "stop"))
    assert len(starts) == len(stops)
    captured = [step for begin, end in zip(starts, stops, strict=True) for step in range(begin + 1, end + 1)]
    assert captured == sorted(expected), profile


def test_a_window_that_the_run_does_not_come_to_is_named(caplog):
    make_trainer(profile="cuda:100-110, cuda:epoch 7").train()
    assert caplog.messages == [
        "profile: the run ended before cuda:100-110 began",
        "profile: the run ended before cuda:epoch 7 began",
    ]


def test_the_variable_serves_where_the_script_says_nothing(monkeypatch):
    monkeypatch.setenv("LEARNAX_PROFILE", "cuda:1-2")
    assert isinstance(make_trainer().profiler, WindowProfiler)
    assert not isinstance(make_trainer(profile="").profiler, WindowProfiler)


# ---- traces


def traced(folder):
    """Of each trace: the steps that are annotated, what the device made, and the ranges of phases."""
    (path,) = folder.glob("plugins/profile/*/*.xplane.pb")
    steps, kernels, ranges = [], collections.Counter(), collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name == "train":
                    with warnings.catch_warnings():  # of jaxlib's own types; raised there, it would end the process
                        warnings.simplefilter("ignore")
                        steps.append(dict(event.stats)["step_num"])
                elif line.name.startswith("tf_XLA") and "fusion" in event.name and not event.name.startswith("end"):
                    kernels[event.name] += 1
                elif line.name == "python":
                    ranges[event.name] += 1
    return sorted(steps), kernels, ranges


@pytest.mark.parametrize("number", [1, 4])
def test_a_trace_holds_exactly_its_steps(number, tmp_path):
    devices = jax.devices()[:number]
    windows = "trace:2-7, trace:20-35"
    registry = Registry("tests", tmp_path)
    trainer = make_trainer(train_dataset=make_data(320), devices=devices, registry=registry, profile=windows)
    trainer.train()
    folder = trainer.checkpointer.path.parent / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["step-2", "step-20"]
    few, kernels_few, _ = traced(folder / "step-2")
    many, kernels_many, ranges = traced(folder / "step-20")
    assert few == list(range(3, 8))
    assert many == list(range(21, 36))
    # The device made each kernel once a step and device, or as often in each: nothing else ran inside.
    assert kernels_few
    assert {name: 3 * count for name, count in kernels_few.items()} == dict(kernels_many)
    assert all(count % (5 * number) == 0 for count in kernels_few.values())
    assert ranges["step 21"] == 1
    assert ranges["dispatch"] == 15


@pytest.mark.thorough
def test_validation_and_saves_inside_a_trace_are_labelled(tmp_path):
    trainer = make_trainer(
        registry=Registry("tests", tmp_path),
        val_datasets=[make_data(9)],
        save_every=4,
        profile="trace:3-7",
        plot_pipe=lambda *_: None,
        plot_every=6,
    )
    trainer.train()
    steps, _, ranges = traced(trainer.checkpointer.path.parent / "profile" / "step-3")
    assert steps == [4, 5, 6, 7]
    # A save at step 4, and after the validation a look at whether it is the best.
    assert [ranges[name] for name in ("save", "validate", "plot")] == [2, 1, 1]


def test_a_trace_that_cannot_be_written_is_told_of_and_training_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "learnax-profile").touch()
    trainer = make_trainer(profile="trace:2-4")
    trainer.train()
    (line,) = caplog.messages
    assert line.startswith("profile: no trace is taken in learnax-profile/step-2: ")
    assert trainer.log.step == 10


# ---- what it costs


def test_a_run_that_is_not_profiled_calls_none_of_it(monkeypatch):
    """Counts the calls into the profiling room: for each dispatch as many, and none that reaches a profiler."""

    def profile_of(steps):
        trainer = make_trainer(train_dataset=make_data(8 * steps), num_epochs=1, steps_per_execution=1)
        trainer.parts.compile()
        calls = collections.Counter()

        def count(frame, event, arg):
            if event == "call" and "/learnax/profiling/" in frame.f_code.co_filename:
                calls[f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_code.co_name}"] += 1
            elif event == "c_call" and "nvtx" in str(getattr(arg, "__module__", "")):
                calls["nvtx"] += 1

        sys.setprofile(count)
        try:
            trainer.epoch(0)
        finally:
            sys.setprofile(None)
        return calls

    before, after = profile_of(100), profile_of(200)
    more = {name: (after[name] - before[name]) / 100 for name in after if after[name] != before[name]}
    # Each dispatch: one look at what is due, one at the room, one range of nothing; the phases of waiting for the
    # device and of dispatching, and a part of that of logging.
    assert more.pop("profiler.py:next_due") == 1
    assert more.pop("profiler.py:room") == 1
    assert more.pop("profiler.py:steps") == 1
    assert 1 <= more["phases.py:__enter__"] == more["phases.py:__exit__"] < 3.5
    assert set(more) == {"phases.py:__enter__", "phases.py:__exit__", "phases.py:waiting"} - (
        set() if "phases.py:waiting" in more else {"phases.py:waiting"}
    )


def test_a_run_that_is_not_profiled_makes_the_same_dispatches(monkeypatch):
    counts = []
    for profile in (None, "cuda:1000-1010"):
        trainer = make_trainer(train_dataset=make_data(320), profile=profile)
        trainer.train()
        counts.append(trainer.engine.calls)
    assert counts == [2 * math.ceil(40 / 16)] * 2


# ---- NVTX, by a library that takes a profiler's place

NVTX = r"""
#include <stdio.h>
#include <string.h>
#include <stdint.h>
typedef struct { uint16_t version, size; uint32_t category; int32_t color_type; uint32_t color; int32_t payload_type,
    reserved; uint64_t payload; int32_t message_type; const char *message; } attributes;
typedef struct { size_t size; int (*table)(int, void ****, unsigned *); } callbacks;
static void *domain(const char *name) { return strdup(name); }
static void *string(void *domain, const char *text) { return strdup(text); }
static int push(const char *domain, const attributes *event) {
    if (!strcmp(domain, "learnax")) { printf("push %s\n", event->message); fflush(stdout); }
    return 0;
}
static int pop(const char *domain) {
    if (!strcmp(domain, "learnax")) { puts("pop"); fflush(stdout); }
    return 0;
}
int InitializeInjectionNvtx2(const void *(*get)(uint32_t)) {
    const callbacks *all = get(1);
    void ***table; unsigned size;
    if (!all->table(5, &table, &size)) return 0;
    *table[4] = (void *)push; *table[5] = (void *)pop; *table[10] = (void *)string; *table[12] = (void *)domain;
    return 1;
}
"""

RANGES = """
import os
from tests.helpers import *
from learnax.registry import Registry
trainer = make_trainer(num_epochs=1, val_datasets=[make_data(8)], registry=Registry("tests", "."), save_every=4,
                       plot_pipe=lambda *_: print("plotting", flush=True), plot_every=4, profile={profile!r})
trainer.train()
"""


@pytest.mark.processes
@needs_cc
def test_ranges_are_seen_by_an_nvtx_tool(tmp_path):
    pytest.importorskip("nvtx")
    (tmp_path / "tool.c").write_text(NVTX)
    tool = tmp_path / "libtool.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tool, tmp_path / "tool.c"], check=True)
    env = {"NVTX_INJECTION64_PATH": str(tool)}
    lines = run_script(RANGES.format(profile="cuda:3-5"), tmp_path, env=env).stdout.splitlines()
    stack, seen = [], []
    for line in lines:
        if line.startswith("push "):
            stack.append(line.removeprefix("push "))
            seen.append(" > ".join(stack))
        elif line == "pop":
            stack.pop()
        else:
            assert (line, stack) == ("plotting", ["plot"])
    assert not stack
    names = collections.Counter(seen)
    assert [name for name in names if name.startswith("step") and "dispatch" not in name and "first" not in name] == [
        "steps 1-3",
        "step 4",
        "step 5",
    ]
    assert names["step 4 > dispatch"] == names["step 5 > dispatch"] == 1
    for name in ("data", "save", "plot", "validate", "validate > validate, data", "log > drain", "profile"):
        assert names[name], name
    # Nothing is marked in a run that is not profiled, whatever tool looks on.
    assert run_script(RANGES.format(profile=None), tmp_path, env=env).stdout == "plotting\n"


@pytest.mark.processes
def test_without_nvtx_installed_windows_work_all_the_same(tmp_path):
    source = """
import sys
sys.modules["nvtx"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "nvtx" else find(name, *rest)
from tests.helpers import make_trainer
trainer = make_trainer(profile="trace:2-4")
trainer.train()
print(trainer.log.step)
"""
    assert run_script(source, tmp_path).stdout == "10\n"
    assert list((tmp_path / "learnax-profile" / "step-2").glob("plugins/profile/*/*.xplane.pb"))


def test_marks_are_only_made_for_what_is_profiled():
    trainer = make_trainer()
    assert type(trainer.phases.dispatch) is type(Phases().dispatch)
    assert trainer.profiler.next_due(3) == math.inf
