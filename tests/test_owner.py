"""One process at a time writes into a folder of saves: real processes, real locks, real kills."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from learnax.checkpoint import Checkpointer, OwnedError, SaveError, locks, owner
from learnax.checkpoint.record import Record, read
from learnax.step.state import TrainState
from tests.helpers import ROOT

pytestmark = pytest.mark.processes

SCRIPT = """
import contextlib, errno, logging, os, sys
import numpy as np
from learnax.checkpoint import Checkpointer, locks
from learnax.step.state import TrainState

logging.basicConfig(format="%(message)s", stream=sys.stdout)
path, lockless = sys.argv[1], sys.argv[2] == "lockless"
if lockless:
    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")
    locks.fcntl.lockf = none
made = {}
print("ready", flush=True)
for line in sys.stdin:
    command, *rest = line.split()
    try:
        if command == "build":
            made["it"] = Checkpointer.at(path)
            made["it"].check_free()
        elif command == "save":
            step = int(rest[0])
            it = made.setdefault("it", None) or made.update(it=Checkpointer.at(path)) or made["it"]
            it.save_latest(TrainState({"w": np.full(3, step, np.float32)}, {}, step))
            it.wait()
        elif command == "close":
            made["it"].close()
        elif command == "fork":
            child = os.fork()
            if not child:
                try:
                    Checkpointer.at(path).save_latest(TrainState({"w": np.zeros(3, np.float32)}, {}, 0))
                    print("the child saved", flush=True)
                except Exception as error:
                    print(f"the child: {error}", flush=True)
                os._exit(0)
            os.waitpid(child, 0)
        print("done", flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
"""


class Peer:
    """Another process with a checkpointer on a folder, told what to do line by line."""

    def __init__(self, path, *, lockless=False):
        command = [sys.executable, "-c", SCRIPT, str(path), "lockless" if lockless else "locks"]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
        )
        self.pid = self._process.pid

    def send(self, text):
        self._process.stdin.write(f"{text}\n")
        self._process.stdin.flush()

    def hear(self):
        """What it says until it has done what it was told."""
        lines = []
        for line in self._process.stdout:
            lines.append(line.strip())
            if lines[-1] in ("ready", "done") or re.match(r"\w+Error: ", lines[-1]):
                return "\n".join(lines)
        raise AssertionError(f"it ended with {self._process.wait()}: {lines}")

    def do(self, text):
        self.send(text)
        return self.hear()

    def signal(self, which):
        os.kill(self.pid, which)
        if which == signal.SIGKILL:
            self._process.wait()

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._process.communicate()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def peers(folder):
    """Starts processes, all at once, and lets none of them outlast the test."""
    started = []

    def start(count=1, **options):
        fresh = [Peer(folder, **options) for _ in range(count)]
        started.extend(fresh)
        for peer in fresh:
            assert peer.hear() == "ready"
        return fresh

    yield start
    for peer in started:
        peer.end()


@pytest.fixture
def here(folder):
    """Checkpointers of this process."""
    made = []

    def make():
        made.append(Checkpointer.at(folder))
        return made[-1]

    yield make
    for checkpointer in made:
        checkpointer.close()


@pytest.fixture
def lockless(monkeypatch):
    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", none)


def save(checkpointer, step):
    checkpointer.save_latest(TrainState({"w": np.full(3, step, np.float32)}, {}, step))
    checkpointer.wait()


def record_of(folder, **changed):
    """What another process would have left beside the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    record = Record.of_this_process(locked=True)._replace(pid=2**22 + 1, started="1")._replace(**changed)
    folder.with_name("checkpoints.owner").write_text(json.dumps(record._asdict()))
    return record


# ---- one owner


@pytest.mark.parametrize("locked", [True, False], ids=["locks", "no locks"])
def test_a_second_process_is_refused_with_who_since_when_and_what_to_do(folder, peers, here, request, locked):
    if not locked:
        request.getfixturevalue("lockless")
    (peer,) = peers(lockless=not locked)
    assert peer.do("save 1") == "done"
    for attempt in (lambda: here().check_free(), lambda: save(here(), 2)):
        with pytest.raises(OwnedError) as refused:
            attempt()
        text = str(refused.value)
        assert text.startswith(f"checkpoints in {folder} belong to process {peer.pid} on host {socket.gethostname()} (")
        assert re.search(
            r"\(since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\)\. Two processes in one folder would delete each other's saves: "
            r"wait for its end, stop it, or give this one another `run` or `registry`$",
            text,
        )
    # Who only reads waits for nobody and leaves no trace.
    before = sorted(path.name for path in folder.parent.iterdir())
    reader = here()
    assert reader.load_latest()["step"] == 1
    assert list(reader.list_available_checkpoints()) == ["latest", 1]
    assert sorted(path.name for path in folder.parent.iterdir()) == before
    assert peer.do("close") == "done"
    free = here()
    free.check_free()
    save(free, 2)
    assert peer.do("save 3").startswith("OwnedError: ")
    assert here().load_latest()["step"] == 2


def test_of_several_that_start_at_once_one_saves(folder, peers):
    started = peers(3)
    for peer in started:
        peer.send("save 1")
    heard = [peer.hear() for peer in started]
    assert heard.count("done") == 1
    assert sum(text.startswith(f"OwnedError: checkpoints in {folder} belong to ") for text in heard) == 2


def test_a_process_that_is_stopped_still_owns_and_one_that_is_killed_does_not(peers, here, caplog):
    (peer,) = peers()
    peer.do("save 1")
    peer.signal(signal.SIGSTOP)
    with pytest.raises(OwnedError, match=rf"belong to process {peer.pid} on host"):
        here().check_free()
    with pytest.raises(OwnedError, match=rf"belong to process {peer.pid} on host"):
        save(here(), 2)
    peer.signal(signal.SIGKILL)
    after = here()
    after.check_free()
    save(after, 2)
    assert list(after.list_available_checkpoints()) == ["latest", 1, 2]
    assert not caplog.messages


def test_checkpointers_of_one_process_share_the_folder_and_give_no_number_twice(peers, here):
    first, second = here(), here()
    paths = [each.save_latest(TrainState({"w": np.zeros(3)}, {}, 1)) for each in (first, second, first, second)]
    assert [path.name for path in paths] == ["0", "1", "2", "3"]
    first.wait()
    first.close()
    (peer,) = peers()
    assert peer.do("save 5").startswith(f"OwnedError: checkpoints in {first.path} belong to process {os.getpid()} ")
    second.close()
    assert list(second.list_available_checkpoints()) == ["latest", 1]
    (late,) = peers()
    assert late.do("save 5") == "done"


def test_a_forked_child_is_another_process(folder, peers):
    (peer,) = peers()
    peer.do("save 1")
    assert f"the child: checkpoints in {folder} belong to process {peer.pid} on host" in peer.do("fork")
    assert peer.do("save 2") == "done"  # the child's end has not taken the lock away
    (other,) = peers()
    assert other.do("save 3").startswith("OwnedError: ")


# ---- one that was there first, and comes too late


def test_what_was_built_before_another_process_trained_is_to_be_built_again(folder, peers, here):
    stale = here()
    (peer,) = peers()
    peer.do("save 7")
    peer.do("close")
    for _ in range(2):
        with pytest.raises(OwnedError) as refused:
            save(stale, 1)
        assert str(refused.value).startswith(
            f"another process has trained in {folder} since this trainer was built: process {peer.pid} on host "
        )
        assert str(refused.value).endswith("Build it again, with load_checkpoint=True to go on from its saves")
    fresh = here()
    save(fresh, 8)
    with pytest.raises(OwnedError, match="since this trainer was built"):
        save(stale, 1)  # though this process owns it now
    fresh.close()
    save(fresh, 9)  # its own time before is no other's
    assert list(fresh.list_available_checkpoints()) == ["latest", 8, 9]


def test_one_that_lost_the_folder_saves_renames_and_removes_nothing(folder, here, lockless, caplog):
    """As where a lock server forgets, or a process sleeps for long where there are no locks."""
    mine = here()
    for step in (1, 2):
        save(mine, step)
    other = record_of(folder, token="another", host="elsewhere", pid=77)
    there = sorted(folder.rglob("*"))
    for step in (3, 4):
        mine.save_latest(TrainState({"w": np.zeros(3)}, {}, step))
    with pytest.raises(SaveError) as raised:
        mine.wait()
    lost = f"checkpoints in {folder} were taken over by {other}: this process saves no more"
    assert str(raised.value) == (
        f"the checkpoint of step 4 could not be saved: {lost}; the newest whole one is {folder / '1'}"
    )
    assert caplog.messages == [f"{lost}; training goes on, and nothing there is renamed or removed"]
    assert sorted(folder.rglob("*")) == there
    mine.close()
    assert read(folder.with_name("checkpoints.owner")) == other  # and its owner's word is left as it is
    with pytest.raises(OwnedError, match=r"belong to process 77 on host elsewhere|trained in"):
        mine.prepare(TrainState({"w": np.zeros(3)}, {}, 0))


def test_a_folder_that_is_lost_in_the_midst_of_a_save_gets_none(folder, here, monkeypatch):
    from learnax.checkpoint import files

    mine, write = here(), files.write
    save(mine, 1)
    monkeypatch.setattr(
        files, "write", lambda *args: (write(*args), record_of(folder, token="another", host="elsewhere"))
    )
    with pytest.raises(SaveError, match="were taken over by process"):
        save(mine, 2)
    assert [path.name for path in folder.iterdir() if path.name.isdecimal()] == ["0"]


def test_files_that_somebody_cleans_up_are_made_again_and_a_lock_that_was_closed_is_taken_again(folder, peers, here):
    mine, (peer,) = here(), peers()
    record, lock = folder.with_name("checkpoints.owner"), folder.with_name("checkpoints.lock")
    harms = {
        "the record": record.unlink,
        "the lock": lock.unlink,
        "both": lambda: (record.unlink(), lock.unlink()),
        "the run": lambda: shutil.rmtree(folder.parent),
        "another part of the program": lock.read_bytes,  # closing it gives a POSIX lock up
    }
    save(mine, 1)
    for step, (what, harm) in enumerate(harms.items(), 2):
        harm()
        save(mine, step)
        assert here().load_latest()["step"] == step, what
        assert f"belong to process {os.getpid()}" in peer.do("build"), what
        assert f"belong to process {os.getpid()}" in peer.do("save 99"), what


def test_without_locks_a_record_that_vanished_is_written_again(folder, here, lockless):
    mine = here()
    save(mine, 1)
    folder.with_name("checkpoints.owner").unlink()
    save(mine, 2)
    assert read(folder.with_name("checkpoints.owner")).pid == os.getpid()


# ---- what a record says, with a lock and without


def test_with_the_lock_an_old_record_is_nothing_but_worth_a_line_if_it_is_of_another_host(folder, here, caplog):
    other = record_of(folder, place="elsewhere", host="elsewhere")
    save(here(), 1)
    assert caplog.messages == [f"checkpoints in {folder} were not given back by {other}: taken over"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": 1}', "null", "x" * 100_000])
def test_garbage_is_no_record_where_there_is_a_lock_and_refused_by_name_where_there_is_none(
    folder, here, monkeypatch, text
):
    folder.parent.mkdir(parents=True)
    beside = folder.with_name("checkpoints.owner")
    beside.write_text(text)
    with monkeypatch.context() as patched:
        patched.setattr(locks, "fcntl", None)
        with pytest.raises(OwnedError) as refused:
            save(here(), 1)
    assert str(refused.value) == (
        f"checkpoints in {folder} may be another process's: {beside} does not say whose they are, and this file "
        "system has no locks to ask. If no process trains there, delete that file"
    )
    save(here(), 1)


@pytest.mark.parametrize(
    "changed",
    [{}, {"pid": os.getpid(), "started": "1"}, {"given_back": True, "host": "elsewhere", "place": "elsewhere"}],
    ids=["its process is gone", "its number is another process's now", "it was given back"],
)
def test_without_locks_what_is_known_to_be_over_is_taken_over_at_once(folder, here, lockless, changed):
    record_of(folder, locked=False, **changed)
    mine = here()
    mine.check_free()
    save(mine, 1)


def test_without_locks_another_host_or_container_is_refused_with_what_to_delete(folder, here, lockless):
    # The number of this very process, in another container.
    record = record_of(folder, locked=False, place="another container", pid=os.getpid())
    with pytest.raises(OwnedError) as refused:
        save(here(), 1)
    assert str(refused.value) == (
        f"checkpoints in {folder} belong to {record}. This file system has no locks, so whether that process still "
        f"runs is not known here: if it does not, delete {folder.with_name('checkpoints.owner')}"
    )


def test_a_lock_says_nothing_of_an_owner_that_had_none(folder, peers, here):
    (peer,) = peers(lockless=True)
    peer.do("save 1")
    with pytest.raises(OwnedError, match=rf"belong to process {peer.pid} on"):
        save(here(), 2)


@pytest.mark.parametrize("name", ["checkpoints.lock", "checkpoints.owner"])
def test_a_folder_where_a_file_should_be_is_named_and_ends_no_training(folder, here, caplog, name):
    folder.with_name(name).mkdir(parents=True)
    (folder.with_name(name) / "full").touch()
    mine = here()
    mine.prepare(TrainState({"w": np.zeros(3)}, {}, 0))
    for step in (1, 2):
        path = mine.save_latest(TrainState({"w": np.zeros(3)}, {}, step))
        assert path.parent == folder
    with pytest.raises(SaveError, match=rf"step 2 could not be saved: IsADirectoryError: .*{name}'; there is no"):
        mine.wait()
    assert len(caplog.messages) == 1
    shutil.rmtree(folder.with_name(name))
    save(mine, 3)


def test_a_pipe_in_place_of_the_record_is_not_waited_for(folder, here):
    folder.parent.mkdir(parents=True)
    os.mkfifo(folder.with_name("checkpoints.owner"))
    save(here(), 1)


# This process is root, whom no permission binds: another user's is what others have.
NOBODY = """
import logging, os, sys
import numpy as np
from learnax.checkpoint import Checkpointer, SaveError
from learnax.step.state import TrainState

logging.basicConfig(format="%(message)s", stream=sys.stdout)
folder = {folder!r}
def save(checkpointer, step):
    checkpointer.save_latest(TrainState({{"w": np.full(3, step, np.float32)}}, {{}}, step))
Checkpointer.at(folder).load_latest()  # with all that is imported on the way
os.setuid(65534)
"""
READER = """
try:
    open(os.path.join(folder, "x"), "w")
except PermissionError:
    reader = Checkpointer.at(folder)
    reader.check_free()
    print(reader.load_latest()["step"], list(reader.list_available_checkpoints()))
"""
UNREADABLE = """
it = Checkpointer.at(folder, keep_best=True)
state = TrainState({"w": np.full(3, 0, np.float32)}, {}, 0)
it.prepare(state)
save(it, 2)
it.close()
os.chmod(folder, 0)
it.prepare(state)  # a second session
print(it.update_best_checkpoint(state, 1.0, 3))
for step in (3, 4):
    save(it, step)
try:
    it.wait()
except SaveError as error:
    print("raised:", error)
try:
    Checkpointer.at(folder).load_latest()
except PermissionError as error:
    print("not taken for empty:", error)
os.chmod(folder, 0o700)
save(it, 5)
it.wait()
print(list(it.list_available_checkpoints()))
"""


def as_nobody(tmp_path, folder, source):
    """What a script prints that gives up its rights."""
    for path in (tmp_path, *tmp_path.parents[:3]):
        path.chmod(0o755)
    script = NOBODY.format(folder=str(folder)) + source
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=100)
    return done.stdout.splitlines(), done.stderr


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="gives up the rights of root")


@needs_root
def test_a_reader_needs_no_right_to_write(folder, here, tmp_path):
    save(here(), 1)
    printed, said = as_nobody(tmp_path, folder, READER)
    assert printed == ["1 ['latest', 1]"], said


@needs_root
def test_a_folder_that_becomes_unreadable_is_as_a_full_disk(folder, here, tmp_path):
    mine = here()
    save(mine, 1)
    mine.close()
    for path in (folder.parent, *folder.parent.rglob("*")):
        os.chown(path, 65534, 65534)
    printed, said = as_nobody(tmp_path, folder, UNREADABLE)
    assert printed[-1:] == ["['latest', 2, 5]"], (printed, said)
    denied = f"PermissionError: [Errno 13] Permission denied: '{folder}"
    assert printed[0] == (
        f"checkpoints cannot be saved now: PermissionError: [Errno 13] checkpoints cannot be saved to this folder: "
        f"'{folder}'; the next save tries again"
    )
    assert "False" in printed
    (raised,) = [line for line in printed if line.startswith("raised: ")]
    assert raised.startswith("raised: the checkpoint of step 4 could not be saved: PermissionError: [Errno 13] ")
    assert f"which ones there are cannot be seen: {denied}" in raised
    assert any(line.startswith("not taken for empty: [Errno 13] ") for line in printed)


def test_a_process_is_told_from_all_others():
    own = Record.of_this_process(locked=True)
    assert own.is_own
    assert own.is_here
    assert own.lives()
    child = subprocess.Popen(["sleep", "100"])
    other = own._replace(pid=child.pid, started="")
    assert other.lives()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, but nobody has asked for its status
    assert not other.lives()
    child.wait()
    assert not other.lives()
    assert not own._replace(pid=2**40).lives()


def test_nothing_is_held_that_was_given_back(folder, here):
    mine = here()
    save(mine, 1)
    held = set(owner._holds)
    mine.close()
    assert len(held - set(owner._holds)) == 1


# ---- whole trainers

TRAINER = """
import logging, sys
from learnax.checkpoint import OwnedError
from tests.helpers import make_data, make_trainer

logging.basicConfig(format="%(message)s", stream=sys.stdout)

class Waiting(list):
    def __getitem__(self, index):
        if index == 20:
            print("trains", flush=True)
            sys.stdin.readline()
        return super().__getitem__(index)

try:
    trainer = make_trainer(registry="tests", save_every=1, num_epochs=1, train_dataset=Waiting(make_data(43)))
    print("built", flush=True)
    sys.stdin.readline()
    trainer.train()
    print("trained", trainer.checkpointer.load_latest(resume=False)["step"], flush=True)
except OwnedError as error:
    print("OwnedError:", error, flush=True)
"""


def test_of_two_trainers_that_start_at_once_one_trains_and_the_other_is_refused(registry_path, tmp_path):
    command = [sys.executable, "-c", TRAINER]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    first, second = (subprocess.Popen(command, env=env, **pipes) for _ in range(2))
    try:
        for each in (first, second):
            assert each.stdout.readline() == "built\n"
        first.stdin.write("\n")
        first.stdin.flush()
        assert first.stdout.readline() == "trains\n"
        second.stdin.write("\n")
        second.stdin.flush()
        folder = registry_path / "tests" / "trainer" / "checkpoints"
        assert f"OwnedError: checkpoints in {folder} belong to process {first.pid} on host" in second.stdout.read()
        third = subprocess.run(command, env=env, input="", capture_output=True, text=True, timeout=100)
        assert third.stdout.startswith(f"OwnedError: checkpoints in {folder} belong to process {first.pid} on host")
        first.stdin.write("\n")
        first.stdin.flush()
        assert first.stdout.read().splitlines()[-1] == "trained 5"
        assert list(Checkpointer.at(folder).list_available_checkpoints()) == ["latest", 5]
    finally:
        for each in (first, second):
            each.kill()
            each.communicate()
