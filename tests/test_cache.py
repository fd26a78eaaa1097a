"""Compiled programs on disk: whose folder, who may write to it, and that a second start finds them."""

import json
import logging
import os
import shutil
import stat
import tempfile
import time
import zlib
from pathlib import Path

import pytest

from learnax.engine import cache
from tests.forks import Forks
from tests.helpers import run_script

pytestmark = pytest.mark.processes

# Nothing of the tests' own cache.
CLEAN = {"LEARNAX_COMPILATION_CACHE": None, "JAX_COMPILATION_CACHE_DIR": None}


@pytest.fixture(scope="module")
def forks():
    """Processes that have imported all there is, and that have nothing of the tests' own cache."""
    made = Forks("import jax, learnax.engine.cache, tests.helpers", CLEAN)
    yield made
    made.end()


TRAINS = """
import json, sys
import jax

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rsplit("/", 1)[-1]))
jax.numpy.arange(3) + 1  # JAX has compiled before the trainer is there
from tests.helpers import make_data, make_trainer

trainer = make_trainer(val_datasets=[make_data(9, 1)], num_epochs=1)
trainer.train()
print(json.dumps({
    "folder": jax.config.jax_compilation_cache_dir,
    "hits": events.count("cache_hits"),
    "misses": events.count("cache_misses"),
    "losses": trainer.metrics["train/loss"] + trainer.metrics["val/loss"],
}))
"""


def start(tmp_path, **env):
    return json.loads(run_script(TRAINS, tmp_path, env=CLEAN | env).stdout)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The caches of a first start, and what it said."""
    folder = tmp_path_factory.mktemp("caches")
    return folder, start(folder, XDG_CACHE_HOME=str(folder))


def test_a_second_start_finds_its_programs_and_computes_the_same(started, tmp_path):
    home, first = started
    (folder,) = (home / "learnax").iterdir()
    assert first["folder"] == str(folder)
    assert folder.name.startswith("programs-")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    programs = sorted(path.name.split("-")[0] for path in folder.iterdir() if path.name.endswith("-cache"))
    assert "jit_train" in programs
    assert "jit_evaluate" in programs
    assert (first["hits"], first["misses"]) == (0, len(programs))
    assert start(tmp_path, XDG_CACHE_HOME=str(home)) == first | {"hits": len(programs), "misses": 0}
    without = start(tmp_path, XDG_CACHE_HOME=str(home), LEARNAX_COMPILATION_CACHE="off")
    assert without == first | {"folder": None, "misses": 0}


def cut_short(path):
    os.truncate(path, 300)  # a process was killed while it wrote


def empty(path):
    os.truncate(path, 0)


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def one_bit(path):
    content, middle = path.read_bytes(), path.stat().st_size // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 10**12))  # by a copy that keeps old dates


@pytest.mark.parametrize("damages", [(cut_short, empty), (zeros, one_bit)])
def test_entries_that_are_damaged_are_written_anew(started, tmp_path, damages):
    home, first = started
    entries = sorted((home / "learnax").glob("*/*-cache"))
    for path, damage in zip(entries, damages, strict=False):
        damage(path)
    assert start(tmp_path, XDG_CACHE_HOME=str(home)) == first | {"hits": first["misses"] - 2, "misses": 2}
    for path in entries:
        zlib.decompress(path.read_bytes())


def test_each_entry_is_looked_at_once_and_what_others_do_meanwhile_is_no_error(tmp_path, monkeypatch, caplog):
    good, bad = tmp_path / "jit_good-1-cache", tmp_path / "jit_bad-2-cache"
    good.write_bytes(zlib.compress(b"program"))
    bad.write_bytes(zlib.compress(b"program")[:-1])
    (tmp_path / "notes").write_text("no entry")
    reads, read = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path.name) or read(path))
    with caplog.at_level(logging.INFO, "learnax"):
        cache._remove_damaged(tmp_path)
    assert caplog.messages == [
        "damaged entries of the compilation cache were removed, and will be written anew: jit_bad"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checked", good.name, "notes"]
    assert sorted(reads) == sorted([good.name, bad.name])
    os.utime(tmp_path / "checked", (time.time() + 60,) * 2)
    cache._remove_damaged(tmp_path)
    assert len(reads) == 2
    for path in (good, tmp_path / "checked"):
        path.unlink()  # a link to nowhere: an entry that is gone when it is looked at
    good.symlink_to(tmp_path / "gone")
    cache._remove_damaged(tmp_path)
    assert (tmp_path / "checked").exists()


USES = """
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
import jax
from learnax.engine.cache import use_cache
{prepare}
print(use_cache({asked}))
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.fixture
def used(tmp_path, forks):
    """What `use_cache` says in a process of its own, and what JAX has after it."""

    def use(asked=None, prepare="", **env):
        # JAX reads its own variables when it is imported.
        run = run_script if "JAX_COMPILATION_CACHE_DIR" in env else forks.run
        env = CLEAN | {"XDG_CACHE_HOME": str(tmp_path / "caches")} | env
        result = run(USES.format(asked=asked, prepare=prepare), tmp_path, env=env)
        assert "Traceback" not in result.stderr
        lines = [line for line in result.stderr.splitlines() if "compilation cache" in line]
        return [*result.stdout.splitlines(), *lines]

    return use


@pytest.mark.parametrize("off", ["OFF", ""])
def test_the_variable_turns_it_off(tmp_path, used, off):
    assert used(LEARNAX_COMPILATION_CACHE=off) == ["None", "None"]
    assert not (tmp_path / "caches").exists()


def test_the_variable_moves_it_and_the_argument_moves_it_again(tmp_path, used):
    moved, asked = tmp_path / "moved" / "deep", tmp_path / "asked"
    assert used(LEARNAX_COMPILATION_CACHE=str(moved)) == [str(moved)] * 2
    assert stat.S_IMODE(moved.stat().st_mode) == 0o700
    assert used("True", LEARNAX_COMPILATION_CACHE=str(moved)) == [str(moved)] * 2
    assert used(repr(str(asked)), LEARNAX_COMPILATION_CACHE=str(moved)) == [str(asked)] * 2
    assert stat.S_IMODE(asked.stat().st_mode) == 0o700
    assert not (tmp_path / "caches").exists()


def test_home_and_variables_are_put_in(tmp_path, used):
    home = {"HOME": str(tmp_path / "home"), "SCRATCH": str(tmp_path / "scratch")}
    assert used(LEARNAX_COMPILATION_CACHE="~/cache", **home) == [f"{tmp_path}/home/cache"] * 2
    assert used("'$SCRATCH/cache'", **home) == [f"{tmp_path}/scratch/cache"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "scratch"]


def test_false_leaves_everything_as_it_is(tmp_path, used):
    theirs = str(tmp_path / "theirs")
    assert used("False") == ["None", "None"]
    assert used("False", JAX_COMPILATION_CACHE_DIR=theirs) == ["None", theirs]
    assert not (tmp_path / "caches").exists()


def test_a_cache_that_the_user_gave_to_jax_stays(tmp_path, used):
    theirs = str(tmp_path / "theirs")
    kept = "print(jax.config.jax_persistent_cache_min_compile_time_secs)"
    assert used(prepare=kept, JAX_COMPILATION_CACHE_DIR=theirs) == ["1.0", theirs, theirs]
    configured = f"jax.config.update('jax_compilation_cache_dir', {theirs!r})"
    assert used("True", prepare=configured) == [theirs, theirs]
    assert not (tmp_path / "caches").exists()


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path, forks, mode):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    source = f"from tests.helpers import make_trainer; make_trainer(compilation_cache={str(folder)!r})"
    result = forks.run(source, tmp_path, env=CLEAN)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        f"PermissionError: the compilation cache {folder} must be its user's alone: it is owned by user {os.getuid()} "
        f"with mode {stat.filemode(stat.S_IFDIR | mode)}; cached programs are code. Choose another folder, or "
        "`chmod go-w` it"
    )
    assert not list(folder.iterdir())


def test_a_default_folder_that_others_may_write_to_is_not_used(used):
    folder, _ = used()
    os.chmod(folder, 0o777)
    line = (
        f"no compilation cache: the compilation cache {folder} must be its user's alone: it is owned by user "
        f"{os.getuid()} with mode drwxrwxrwx; cached programs are code. Choose another folder, or `chmod go-w` it"
    )
    assert used() == ["None", "None", line]


@pytest.fixture
def refused(tmp_path, forks):
    """What is said when a folder is asked for, in a process whose user may change once all is imported."""

    def ask(folder, change=""):
        return forks.run(REFUSED.format(folder=str(folder), change=change), tmp_path, env=CLEAN).stdout

    return ask


REFUSED = """
import os
import learnax.engine.cache
{change}
try:
    learnax.engine.cache.use_cache({folder!r})
except OSError as error:
    print(type(error).__name__, error)
"""


def test_a_folder_that_cannot_be_made_is_said_where_it_was_asked_for_and_is_none_by_default(tmp_path, used, refused):
    file = tmp_path / "file"
    file.write_text("")
    assert refused(file / "cache") == f"NotADirectoryError [Errno 20] Not a directory: '{file / 'cache'}'\n"
    folder, configured, line = used(XDG_CACHE_HOME=str(file))
    assert (folder, configured) == ("None", "None")
    assert line.startswith("no compilation cache: [Errno 20] Not a directory: ")


def test_a_user_without_a_home_has_no_cache(used):
    lost = "import pathlib\ndef home():\n    raise RuntimeError('no home')\npathlib.Path.home = home"
    folder, configured, line = used(prepare=lost, XDG_CACHE_HOME="")
    assert (folder, configured) == ("None", "None")
    assert line == (
        "no compilation cache: the user has no home folder: set LEARNAX_COMPILATION_CACHE to a folder for compiled "
        "programs"
    )


@pytest.fixture
def elsewhere():
    """A folder that another user can reach."""
    folder = Path(tempfile.mkdtemp(prefix="learnax-tests-"))
    yield folder
    shutil.rmtree(folder)


def test_a_folder_that_cannot_be_written_to_is_refused(refused, elsewhere):
    elsewhere.chmod(0o500)
    change = ""
    if os.getuid() == 0:  # who may write anywhere
        os.chown(elsewhere, 65534, -1)
        change = "os.setuid(65534)"
    assert refused(elsewhere, change) == (f"PermissionError the compilation cache {elsewhere} cannot be written to\n")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(refused, elsewhere):
    os.chown(elsewhere, 65534, -1)
    assert refused(elsewhere) == (
        f"PermissionError the compilation cache {elsewhere} must be its user's alone: it is owned by user 65534 with "
        "mode drwx------; cached programs are code. Choose another folder, or `chmod go-w` it\n"
    )


TWO = """
from pathlib import Path
from tests.helpers import MLP, make_trainer
for name, width in (("one", 16), ("two", 24)):
    make_trainer(model=MLP(width), compilation_cache=name, compile=True)
    print(name, sorted({path.name.split("-")[0] for path in Path(name).glob("*-cache")}))
"""


def test_a_trainer_that_asks_for_another_folder_gets_it(tmp_path, forks):
    shown = forks.run(TWO, tmp_path, env=CLEAN).stdout.splitlines()
    assert [line.split(" ", 1)[0] for line in shown] == ["one", "two"]
    assert all("'jit_train'" in line for line in shown)


OFF_AGAIN = """
import jax
from tests.helpers import make_trainer
for asked in ("one", False, None, True, False):
    make_trainer(compilation_cache=asked)
    folder = jax.config.jax_compilation_cache_dir
    print(folder and folder.rsplit("/", 1)[-1].split("-")[0])
"""


def test_a_trainer_that_asks_for_none_has_none_whatever_an_earlier_one_asked_for(tmp_path, forks):
    shown = forks.run(OFF_AGAIN, tmp_path, env=CLEAN | {"XDG_CACHE_HOME": str(tmp_path / "caches")}).stdout
    assert shown.splitlines() == ["one", "None", "programs", "programs", "None"]
