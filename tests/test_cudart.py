"""The CUDA runtime through ctypes: the real library of the wheel, and what is said where there is no driver."""

import ctypes
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from learnax.profiling import cudart
from tests.helpers import ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the wheel is for Linux")


def has_driver():
    count = ctypes.c_int()
    return cudart.libcudart.cudaGetDeviceCount(ctypes.byref(count)) == 0


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(cudart, "_said", set())


@pytest.mark.processes
def test_the_wheels_library_is_found_loaded_and_called():
    paths = [Path(name) for name in cudart.find() if "nvidia" in name]
    assert paths
    assert all(path.exists() for path in paths)
    assert isinstance(cudart.libcudart, ctypes.CDLL)
    version = ctypes.c_int()
    assert cudart.libcudart.cudaRuntimeGetVersion(ctypes.byref(version)) == 0
    assert version.value >= 12000


def test_codes_become_words():
    assert cudart.error_text(0) == "cudaSuccess"
    assert cudart.error_text(1).startswith("cudaErrorInvalidValue (1: ")
    assert cudart.error_text(35).startswith("cudaErrorInsufficientDriver (35: ")


def test_without_a_driver_one_line_then_silence(caplog):
    if has_driver():
        pytest.skip("there is a driver")
    with caplog.at_level(logging.WARNING):
        status = cudart.profiler_start()
        assert status.startswith("cudaErrorInsufficientDriver (35: ")
        cudart.profiler_start()
    (record,) = caplog.records
    assert record.message == f"cudaProfilerStart: {status}; nothing is collected for a CUDA profiler"


def test_a_profiled_block_runs_and_raises_what_it_raises():
    statuses = []

    def block():
        with cudart.profiled() as status:
            statuses.append(status)
            raise KeyError

    with pytest.raises(KeyError):
        block()
    assert statuses == [cudart.SUCCESS if has_driver() else cudart.error_text(35)]


def test_without_a_library_all_is_words(monkeypatch, caplog):
    monkeypatch.setattr(cudart, "libcudart", None)
    assert cudart.profiler_start() == cudart.profiler_stop() == "no libcudart"
    assert cudart.error_text(35) == "CUDA error 35"
    assert [record.message for record in caplog.records] == [
        "cudaProfilerStart: no libcudart; nothing is collected for a CUDA profiler"
    ]


def test_nothing_to_load_is_none(monkeypatch):
    monkeypatch.setattr(cudart, "find", lambda: ["/nonexistent/libcudart.so.12", "libm.so.6"])
    assert cudart.load() is None


SPY = r"""
static int calls[2];
int cudaProfilerStart(void) { calls[0]++; return 0; }
int cudaProfilerStop(void) { calls[1]++; return 0; }
int spy_calls(int which) { return calls[which]; }
const char *cudaGetErrorName(int code) { return "cudaErrorSpy"; }
const char *cudaGetErrorString(int code) { return "spied"; }
"""


@pytest.mark.processes
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_start_and_stop_are_one_pair_and_what_the_process_has_loaded_comes_first(tmp_path):
    """A library of the test's own, loaded before learnax looks, is the one that is called."""
    source, library = tmp_path / "spy.c", tmp_path / "libcudart.so.99"
    source.write_text(SPY)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    script = f"""
import ctypes
spy = ctypes.CDLL({str(library)!r})
from learnax.profiling import cudart
assert cudart.find()[0] == {str(library)!r}, cudart.find()
try:
    with cudart.profiled() as status:
        assert status == "cudaSuccess" and (spy.spy_calls(0), spy.spy_calls(1)) == (1, 0)
        raise KeyError
except KeyError:
    pass
print(spy.spy_calls(0), spy.spy_calls(1))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert result.stdout == "1 1\n", result.stderr
