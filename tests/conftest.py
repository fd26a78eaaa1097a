"""Four CPU devices, no accelerator, no network, no progress bars, strict dtype promotion, a compilation cache.

`LEARNAX_TEST_PLATFORM=cuda,cpu` has the tests run on a GPU instead, as far as they ask for no second device.
"""

import atexit
import gc
import multiprocessing.process
import os
import platform
import shutil
import signal
import sys
import tempfile

# What compiles for GPUs; see the Makefile.
if os.path.isdir(os.path.join(sys.prefix, "gpu-compile")):
    sys.path.append(os.path.join(sys.prefix, "gpu-compile"))

# One for all processes of the tests, so that each program is compiled once.
if "LEARNAX_COMPILATION_CACHE" not in os.environ:
    os.environ["LEARNAX_COMPILATION_CACHE"] = tempfile.mkdtemp(prefix="learnax-tests-")
    atexit.register(shutil.rmtree, os.environ["LEARNAX_COMPILATION_CACHE"], ignore_errors=True)
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = os.environ.get("LEARNAX_TEST_PLATFORM", "cpu")
os.environ["TQDM_DISABLE"] = "1"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each of hundreds of processes would compile the sources again
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
platform.processor()  # by a process, the first time; some libraries ask for it where they are imported
# Where the tests are started in the background of a shell, SIGINT is ignored, and would be in all their processes.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=[4, pytest.param(1, marks=pytest.mark.thorough), pytest.param(2, marks=pytest.mark.soak)])
def devices(request):
    """One device is what most other tests have."""
    return jax.devices()[: request.param]


@pytest.fixture(scope="module", autouse=True)
def what_stays_is_looked_through_once():
    """Programs and traces pile up over hundreds of tests, and each full collection would look through all of them."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_device():
    return jax.devices()[:1]


@pytest.fixture(autouse=True)
def registry_path(tmp_path, monkeypatch):
    """A registry folder of the test's own."""
    path = tmp_path / "registry"
    monkeypatch.setenv("TRAINAX_REGISTRY_PATH", str(path))
    return path


_started: list[str] = []
"""The processes that a test has started so far."""


def _note_start(event, args):
    if event in ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn"):
        _started.append(f"{event}{args[:2]}")


def _noting_start(process, start=multiprocessing.process.BaseProcess.start):  # which no event tells of
    _started.append(f"{type(process).__name__} {process.name}")
    start(process)


sys.addaudithook(_note_start)
multiprocessing.process.BaseProcess.start = _noting_start


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    _started.clear()


@pytest.fixture(autouse=True)
def processes_are_marked(request):
    """`make test-quick` leaves out what is marked `processes`: nothing else may start one."""
    yield
    if _started and request.node.get_closest_marker("processes") is None:
        pytest.fail(f"mark this test with @pytest.mark.processes: it has started {_started[0]}")
