"""Sinks: JSON lines, tables and event files, beside each other and beside runs; after kills, on full disks."""

import csv
import json
import logging
import math
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from learnax.checkpoint import Checkpointer
from learnax.loss import LossPipe
from learnax.sinks import Csv, Histogram, Image, JsonLines, Report, Sink, TensorBoard
from learnax.sinks.appended import Appended
from tests.helpers import ROOT, MemoryRun, Poisonable, StopAt, make_data, make_trainer


@pytest.fixture(autouse=True)
def warnings(caplog):
    caplog.set_level(logging.WARNING, "learnax")
    return caplog


def json_rows(path):
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def csv_rows(path):
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def masked(data):
    """The checksum of event files, by another way: CRC-32C bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(folder):
    """The events of a folder, oldest first, with their checksums looked at."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("*tfevents*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            body = data[at + 12 : at + 12 + length]
            assert struct.unpack_from("<I", data, at + 8) == (masked(data[at : at + 8]),)
            assert struct.unpack_from("<I", data, at + 12 + length) == (masked(body),)
            found.append(Event.FromString(body))
            at += 16 + length
    return found


def event_rows(folder):
    return [
        {"step": event.step, **{value.tag: value.simple_value for value in event.summary.value}}
        for event in events(folder)
        if event.summary.value
    ]


def steps_of(rows):
    return [row["step"] for row in rows if "train/loss" in row]


def epochs_of(rows):
    return [(row["epoch"], row["step"]) for row in rows if "train_epoch/loss" in row]


# ---- what is written


def test_all_sinks_and_a_run_get_every_row_in_order(tmp_path):
    run = MemoryRun()
    given = [run, JsonLines(tmp_path / "new/a.jsonl"), Csv(tmp_path / "a.csv"), TensorBoard(tmp_path / "tb")]
    trainer = make_trainer(run=given, val_datasets=[make_data(9, 1)], steps_per_execution=4)
    assert trainer.train() is given
    assert json_rows(tmp_path / "new/a.jsonl") == run.rows
    assert len(run.rows) == 15
    of_steps = [row for row in run.rows if "step" in row]
    assert csv_rows(tmp_path / "a.csv") == of_steps
    rounded = [{name: pytest.approx(float(np.float32(value))) for name, value in row.items()} for row in of_steps]
    assert event_rows(tmp_path / "tb")[1:] == rounded
    assert event_rows(tmp_path / "tb")[0] == {"step": 0, "model/num_params": 195}
    assert next(event.file_version for event in events(tmp_path / "tb")) == "brain.Event:2"


def test_a_sink_alone_is_a_run(tmp_path, registry_path):
    sink, seen = JsonLines(tmp_path / "a.jsonl"), []
    plot = {"plot_every": 5, "plot_pipe": lambda run, *_: seen.append(run)}
    trainer = make_trainer(run=sink, registry="tests", **plot)
    assert trainer.train() is sink
    assert (registry_path / "tests" / "trainer" / "checkpoints").is_dir()
    with pytest.raises(AttributeError, match="the run of this training is sinks alone, which have no 'config'"):
        seen[0].config  # noqa: B018


def test_what_is_no_number_in_json_is_text_that_float_reads(tmp_path):
    data = make_data(16)
    trainer = make_trainer(
        run=[JsonLines(tmp_path / "a.jsonl"), Csv(tmp_path / "a.csv")],
        train_dataset=data,
        num_epochs=1,
        losses=lambda output, datum: (output, ((output - datum[1]) ** 2).mean(), {"odd": jnp.log(0.0 * output[0])}),
    )
    trainer.train()
    for rows in (json_rows(tmp_path / "a.jsonl"), csv_rows(tmp_path / "a.csv")):
        found = [float(row["train/odd"]) for row in rows if "train/odd" in row]
        assert found == trainer.metrics["train/odd"] == [-math.inf] * 2
    assert "NaN" in JsonLines("a")._line({"step": 1, "x": math.nan}).decode()


def test_a_table_gets_columns_as_names_come_up(tmp_path):
    path = tmp_path / "a.csv"
    sampled = {"sample_every": 3, "sample_model": lambda params, key, datum: datum[0].sum()}
    measure = {"sample_metrics": lambda sample, datum: {"size": float(sample)}}
    trainer = make_trainer(run=Csv(path), val_datasets=[make_data(9, 1)], **sampled, **measure)
    trainer.train()
    lines = path.read_text().splitlines()
    assert {line.count(",") for line in lines} == {lines[0].count(",")}
    assert lines[0].startswith("step,epoch,train/rmse,train/loss,")
    rows = csv_rows(path)
    assert [row["step"] for row in rows if "train/size" in row] == [3, 6, 9]
    assert [row["train/size"] for row in rows if "train/size" in row] == trainer.metrics["train/size"]
    assert steps_of(rows) == list(range(1, 11))
    assert [path.name for path in tmp_path.iterdir() if "csv" in path.name] == ["a.csv"]


def test_users_log_beside_the_trainer_numbers_images_and_histograms(tmp_path):
    run = MemoryRun()
    pixels, numbers = np.arange(12, dtype=np.float32).reshape(3, 4) / 12, np.linspace(-1, 1, 100)

    def plot(given, outputs, batch):
        assert given.id == "memory"
        given.log({"mine": np.float32(trainer.log.step), "word": "even", "img": Image(pixels), "h": Histogram(numbers)})
        given.log({"later": 1}, step=100)

    given = [JsonLines(tmp_path / "a.jsonl"), run, TensorBoard(tmp_path / "tb"), Csv(tmp_path / "a.csv")]
    trainer = make_trainer(run=given, plot_pipe=plot, plot_every=4)
    trainer.train()
    own = [row for row in json_rows(tmp_path / "a.jsonl") if "mine" in row or "later" in row]
    once = [{"step": 4, "mine": 4, "word": "even"}, {"step": 100, "later": 1}]
    assert own == [*once, {"step": 8, "mine": 8, "word": "even"}, {"step": 100, "later": 1}]
    assert [row["step"] for row in run.rows if "mine" in row] == [4, 8]
    assert [row["mine"] for row in csv_rows(tmp_path / "a.csv") if "mine" in row] == [4, 8]
    values = {value.tag: value for event in events(tmp_path / "tb") for value in event.summary.value}
    assert (values["img"].image.height, values["img"].image.width) == (3, 4)
    png = values["img"].image.encoded_image_string
    size = struct.unpack_from(">I", png, 33)[0]
    lines = np.frombuffer(zlib.decompress(png[41 : 41 + size]), np.uint8).reshape(3, 5)
    np.testing.assert_array_equal(lines[:, 1:], np.rint(pixels.astype(float) * 255))
    assert (values["h"].histo.num, values["h"].histo.min, values["h"].histo.max) == (100, -1, 1)
    steps = steps_of(json_rows(tmp_path / "a.jsonl"))
    assert steps == list(range(1, 11))


def test_an_image_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"an image is \(height, width\) or .* but this has the shape \(2, 2, 5\)"):
        Image(np.zeros((2, 2, 5))).array()


# ---- going on


def interrupted(tmp_path, *sinks, stop, **options):
    """A run that is stopped after some step, and then goes on in another trainer."""
    options = {"registry": "tests", "val_datasets": [make_data(9, 1)], "run": list(sinks), **options}
    first = make_trainer(**options)
    first.parts.hooks.saves.append(StopAt(stop))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = make_trainer(load_checkpoint=True, **options)
    second.train()
    return second


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_run_that_goes_on_has_each_step_once(tmp_path, stop):
    sinks = [JsonLines(tmp_path / "a.jsonl"), Csv(tmp_path / "a.csv"), TensorBoard(tmp_path / "tb")]
    trainer = interrupted(tmp_path, *sinks, stop=stop)
    for rows in (json_rows(tmp_path / "a.jsonl"), csv_rows(tmp_path / "a.csv"), event_rows(tmp_path / "tb")):
        assert steps_of(rows) == list(range(1, 11))
        assert epochs_of(rows) == [(0, 5), (1, 10)]
        assert [row["val/loss"] for row in rows if "val/loss" in row] == pytest.approx(trainer.metrics["val/loss"])
    assert [row["train/loss"] for row in json_rows(tmp_path / "a.jsonl") if "train/loss" in row] == trainer.metrics[
        "train/loss"
    ]
    assert len([row for row in json_rows(tmp_path / "a.jsonl") if "model/num_params" in row]) == 1


def test_going_back_to_an_older_checkpoint_cuts_what_was_behind_it(tmp_path):
    sinks = [JsonLines(tmp_path / "a.jsonl"), Csv(tmp_path / "a.csv"), TensorBoard(tmp_path / "tb")]
    options = {"registry": "tests", "run": sinks, "save_every": 100, "checkpoint_every": 4}
    make_trainer(**options).train()
    trainer = make_trainer(**options, load_checkpoint=4, num_epochs=3)
    for path in (tmp_path / "a.jsonl", tmp_path / "a.csv"):
        with path.open("a") as file:
            file.write('{"train/loss": 0.')  # torn
    with next((tmp_path / "tb").glob("*tfevents*")).open("ab") as file:
        file.write(b"\x09\0\0\0")
    trainer.train()
    for rows in (json_rows(tmp_path / "a.jsonl"), csv_rows(tmp_path / "a.csv"), event_rows(tmp_path / "tb")):
        assert steps_of(rows) == list(range(1, 16))
        assert epochs_of(rows) == [(0, 5), (1, 10), (2, 15)]


def test_dropped_updates_have_their_rows_once_too(tmp_path):
    """An update that is dropped has a row under the step before it, and so has the end of an epoch."""
    data = make_data(40)
    for place in (16, 17, 24, 32):  # in the batches 2, 3 and 4 of each epoch
        data[place][1][0] = 7
    options = {"train_dataset": data, "losses": LossPipe([Poisonable()]), "save_every": 1}
    sinks = [JsonLines(tmp_path / "a.jsonl"), TensorBoard(tmp_path / "tb")]
    trainer = interrupted(tmp_path, *sinks, stop=3, **options)
    assert trainer.metrics["train/has_nan"] == [0, 0, 1, 1, 1] * 2
    for rows in (json_rows(tmp_path / "a.jsonl"), event_rows(tmp_path / "tb")):
        assert steps_of(rows) == [1, 2, 2, 2, 2, 3, 4, 4, 4, 4]
        assert epochs_of(rows) == [(0, 2), (1, 4)]


def test_a_loop_over_epochs_goes_on_in_its_files(tmp_path):
    trainer = make_trainer(run=[JsonLines(tmp_path / "a.jsonl"), Csv(tmp_path / "a.csv"), TensorBoard(tmp_path / "tb")])
    trainer.epoch(0)
    assert steps_of(json_rows(tmp_path / "a.jsonl")) == list(range(1, 6))
    trainer.epoch(1)
    for rows in (json_rows(tmp_path / "a.jsonl"), csv_rows(tmp_path / "a.csv"), event_rows(tmp_path / "tb")):
        assert steps_of(rows) == list(range(1, 11))


def test_a_fresh_run_moves_the_rows_of_another_one_aside(tmp_path, caplog):
    sinks = [JsonLines(tmp_path / "a.jsonl"), Csv(tmp_path / "a.csv"), TensorBoard(tmp_path / "tb")]
    make_trainer(run=sinks).train()
    make_trainer(run=sinks, num_epochs=1).train()
    for old, new in (("a.1.jsonl", "a.jsonl"), ("a.1.csv", "a.csv")):
        read = json_rows if new.endswith("jsonl") else csv_rows
        assert steps_of(read(tmp_path / old)) == list(range(1, 11))
        assert steps_of(read(tmp_path / new)) == list(range(1, 6))
    assert steps_of(event_rows(tmp_path / "tb" / "before.1")) == list(range(1, 11))
    assert steps_of(event_rows(tmp_path / "tb")) == list(range(1, 6))
    path = tmp_path / "a.1.jsonl"
    assert caplog.messages[0] == f"JsonLines('{tmp_path / 'a.jsonl'}'): the rows of another run are moved to {path}"


VICTIM = """
import sys, time
sys.path.insert(0, {root!r})
from tests.helpers import make_data, make_trainer
from learnax.sinks import Csv, JsonLines, Report, TensorBoard

class Slow(list):
    def __getitem__(self, index):
        time.sleep(1e-3)
        return super().__getitem__(index)

run = [JsonLines("a.jsonl"), Csv("a.csv"), TensorBoard("tb"), Report("report")]
trainer = make_trainer(
    run=run, registry="killed", load_checkpoint=True, save_every=7, num_epochs=12, steps_per_execution={room},
    train_dataset=Slow(make_data(80)), val_datasets=[make_data(9, 1)], keep_best_checkpoint=True,
)
print(trainer.log.step, flush=True)
trainer.train()
"""


@pytest.mark.processes
@pytest.mark.parametrize("room", [4, pytest.param(1, marks=pytest.mark.soak)])
def test_after_kills_each_file_has_each_step_once(tmp_path, registry_path, room):
    """SIGKILL at some step behind a checkpoint, twice; then the run comes to its end."""
    script = tmp_path / "script.py"
    script.write_text(VICTIM.format(root=str(ROOT), room=room))
    path, began = tmp_path / "a.jsonl", []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for until in (30, 75, None):
        process = subprocess.Popen(
            [sys.executable, str(script)], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        began.append(int(process.stdout.readline()))
        end = time.monotonic() + 100
        while until is not None:
            assert time.monotonic() < end
            assert process.poll() is None
            lines = path.read_bytes().split(b"\n") if path.exists() else []
            if any(b'"step": %d,' % until in line for line in lines):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(2e-3)
        process.communicate(timeout=100)
        assert process.returncode == (-signal.SIGKILL if until else 0)
    assert 0 == began[0] < began[1] <= began[2] < 120
    metrics = Checkpointer.at(registry_path / "killed" / "trainer" / "checkpoints").load()["resume"]["history"]
    for rows in (json_rows(path), csv_rows(tmp_path / "a.csv"), event_rows(tmp_path / "tb")):
        assert steps_of(rows) == list(range(1, 121))
        assert epochs_of(rows) == [(epoch, 10 * epoch + 10) for epoch in range(12)]
        losses = [row["train/loss"] for row in rows if "train/loss" in row]
        np.testing.assert_array_equal(losses, np.asarray(metrics["train/loss"]))
    from learnax.sinks import page

    told = page.read(tmp_path / "report" / "report.html")
    assert [event["what"] for event in told["events"]] == ["started", "ended", "resumed", "ended", "resumed", "ended"]
    assert [event["text"][:12] for event in told["events"]][1::2] == ["without a wo", "without a wo", ""]
    assert told["state"] == "complete"


# ---- what goes wrong


def test_what_cannot_be_written_is_an_error_when_the_trainer_is_built(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    wrong = {
        r"run: JsonLines\('.*folder'\) needs a file, but .*folder is a folder; name a file in it, ": JsonLines(
            tmp_path / "folder"
        ),
        r"run: Csv\('.*'\) cannot be made: .*file is a file, and no folder": Csv(tmp_path / "file" / "in" / "a.csv"),
        r"run: TensorBoard\('.*'\) needs a folder, but .*/file is a file; name another": TensorBoard(tmp_path / "file"),
        r"run: Report\('.*'\) needs a folder, but .*/file is a file; name another": Report(tmp_path / "file" / "in"),
        r"run: the folder of JsonLines\('/proc/none/a'\) cannot be made: No such file": JsonLines("/proc/none/a"),
    }
    for text, sink in wrong.items():
        with pytest.raises(OSError, match=text):
            make_trainer(run=sink)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users")
def test_no_permission_is_named():
    folder = tempfile.TemporaryDirectory()  # pytest's own are closed to other users
    tmp_path = Path(folder.name)
    tmp_path.chmod(0o755)
    (tmp_path / "mine").mkdir(mode=0o555)
    (tmp_path / "mine.jsonl").write_text("")
    (tmp_path / "mine.jsonl").chmod(0o444)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may write anywhere
    try:
        with pytest.raises(PermissionError, match=r"run: TensorBoard\('.*'\) cannot write into .*mine: no permission"):
            TensorBoard(tmp_path / "mine").check()
        with pytest.raises(OSError, match=r"run: JsonLines\('.*'\) cannot be written to: Permission denied"):
            JsonLines(tmp_path / "mine.jsonl").check()
    finally:
        os.seteuid(user)
        folder.cleanup()


def test_two_runs_on_one_file_are_an_error_when_the_second_trainer_is_built(tmp_path):
    text = r"run: another run is writing to {}\('.*'\); give each run a place of its own"
    makers = {JsonLines: "a.jsonl", Csv: "a.csv", TensorBoard: "tb", Report: "report"}

    def save_model(params):
        for kind, name in makers.items():
            with pytest.raises(BlockingIOError, match=text.format(kind.__name__)):
                make_trainer(run=kind(tmp_path / name))
            tried.append(name)

    tried = []
    given = [kind(tmp_path / name) for kind, name in makers.items()]
    make_trainer(run=given, save_every=10, save_model=save_model).train()
    assert tried == list(makers.values())
    make_trainer(run=given)  # it has ended


def test_a_run_that_began_meanwhile_is_an_error_of_train(tmp_path):
    """Both trainers could be built: nothing was written then."""
    second = make_trainer(run=[JsonLines(tmp_path / "c"), Csv(tmp_path / "b")])
    tried = []

    def save_model(params):
        with pytest.raises(BlockingIOError, match=r"another run is writing to Csv\('.*b'\)"):
            second.train()
        tried.append(first.log.step)

    first = make_trainer(run=[JsonLines(tmp_path / "a"), Csv(tmp_path / "b")], save_every=10, save_model=save_model)
    first.train()
    assert tried == [10]
    second.train()  # its first sink was given back
    assert steps_of(json_rows(tmp_path / "c")) == list(range(1, 11))


def test_one_place_twice_in_a_run_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = JsonLines("a")
    with pytest.raises(ValueError, match=r"run\[1\] is JsonLines\('a'\) a second time; each row would be logged twice"):
        make_trainer(run=[one, one])
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match=r"JsonLines\('link'\) and JsonLines\('a'\) of run= are one place; give"):
        make_trainer(run=[one, JsonLines("link")])


def test_what_is_no_sink_is_named_with_its_place(tmp_path):
    sink = JsonLines(tmp_path / "a")
    with pytest.raises(TypeError, match=r"run\[1\] must be a sink, or a wandb run .* but is 'wandb', which has no log"):
        make_trainer(run=[sink, "wandb"])
    with pytest.raises(TypeError, match=r"but is the class JsonLines; write JsonLines\(\.\.\.\)"):
        make_trainer(run=JsonLines)
    with pytest.raises(TypeError, match="JsonLines takes a path, but got 3"):
        JsonLines(3)

    class NoId:
        def log(self, row):
            raise AssertionError

    with pytest.raises(TypeError, match=r"run\[1\] must be a sink, or .* which has no id; the registry"):
        make_trainer(run=[sink, NoId()], registry="tests")


class Failing(Sink):
    """Raises for some rows."""

    def __init__(self, *rows):
        self.rows, self.seen = rows, 0

    def __repr__(self):
        return "Failing()"

    def log(self, row):
        self.seen += 1
        if self.seen in self.rows:
            raise OSError("no room")


def test_a_sink_that_raises_is_told_of_and_is_in_no_other_ones_way(tmp_path, caplog):
    failing = Failing(2, 3)
    trainer = make_trainer(run=[failing, JsonLines(tmp_path / "a.jsonl")])
    trainer.train()
    assert failing.seen == 13
    assert steps_of(json_rows(tmp_path / "a.jsonl")) == list(range(1, 11))
    assert caplog.messages == [
        "Failing() raised OSError: no room; training goes on",
        "Failing() raised for 2 of 13 rows",
    ]


def test_a_run_that_hangs_is_in_no_sinks_way(tmp_path, monkeypatch, caplog):
    from learnax.log import sender as module

    monkeypatch.setattr(module, "PATIENCE_S", 0.2)
    gate = threading.Event()

    class Hangs(MemoryRun):
        def log(self, values):
            assert gate.wait(60)

    try:
        make_trainer(run=[Hangs(), JsonLines(tmp_path / "a.jsonl")]).train()
        assert steps_of(json_rows(tmp_path / "a.jsonl")) == list(range(1, 11))
        assert [message[:26] for message in caplog.messages] == ["run.log has not returned f"]
    finally:
        gate.set()


def test_a_disk_that_is_full_for_a_while_tears_no_line(tmp_path, caplog):
    import resource

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "a.jsonl"

    def save_model(params):
        step = int(trainer.train_state.step)
        full = step == 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100 if full else limit[0], limit[1]))

    trainer = make_trainer(run=JsonLines(path), save_every=2, save_model=save_model, steps_per_execution=1)
    try:
        trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert steps_of(json_rows(path)) == list(range(1, 11))
    assert all("File too large; training goes on" in message for message in caplog.messages)


def test_what_a_full_disk_never_takes_is_told(tmp_path):
    file = Appended(tmp_path / "a", "the file")
    os.close(file._file)
    file._file = os.open("/dev/full", os.O_WRONLY)
    file.add(b"a line\n")
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            file.flush()
    with pytest.raises(OSError, match="7 bytes of the file could not be written: No space left"):
        file.close()


def test_without_tensorboardx_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'learnax\[tensorboard\]'"):
        TensorBoard(tmp_path)


@pytest.mark.parametrize("size", [0, 10, 1 << 16, (1 << 16) + 5, 200_000])
def test_lines_are_read_from_the_end(tmp_path, size):
    lines = [b"x" * (place * 37 % 900) for place in range(size // 450)]
    (tmp_path / "a").write_bytes(b"".join(line + b"\n" for line in lines) + b"torn")
    file = Appended(tmp_path / "a", "the file")
    found = list(file.lines_backwards())
    file.close()
    assert [line for _, line in found] == lines[::-1]
    ends = np.cumsum([len(line) + 1 for line in lines])
    assert [end for end, _ in found] == ends.tolist()[::-1]
