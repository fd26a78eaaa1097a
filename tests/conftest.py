"""Four CPU devices, no accelerator, no network, no progress bars, strict dtype promotion, a compilation cache."""

import atexit
import os
import shutil
import signal
import tempfile

# One for all processes of the tests, so that each program is compiled once.
if "LEARNAX_COMPILATION_CACHE" not in os.environ:
    os.environ["LEARNAX_COMPILATION_CACHE"] = tempfile.mkdtemp(prefix="learnax-tests-")
    atexit.register(shutil.rmtree, os.environ["LEARNAX_COMPILATION_CACHE"], ignore_errors=True)
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TQDM_DISABLE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Where the tests are started in the background of a shell, SIGINT is ignored, and would be in all their processes.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=[1, 2, 4])
def devices(request):
    return jax.devices()[: request.param]


@pytest.fixture
def one_device():
    return jax.devices()[:1]


@pytest.fixture(autouse=True)
def registry_path(tmp_path, monkeypatch):
    """A registry folder of the test's own."""
    path = tmp_path / "registry"
    monkeypatch.setenv("TRAINAX_REGISTRY_PATH", str(path))
    return path
