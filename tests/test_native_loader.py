"""Choosing and opening the kernel library: every wrong turn ends in one clear sentence."""

import _ctypes
import ctypes
import shutil
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from foveate import native, ops
from foveate.native import loader
from foveate.native.loader import ISAS, Record

RAN = native.runnable()
needs_kernels = pytest.mark.skipif(not RAN, reason="this installation has no kernels")


@pytest.fixture
def fresh(monkeypatch):
    """The loader as in a new process that does not set FOVEATE_ISA."""
    monkeypatch.setattr(loader, "_opened", {})
    monkeypatch.delenv("FOVEATE_ISA", raising=False)
    return monkeypatch


@pytest.fixture
def holding(fresh, tmp_path):
    """Make the package hold these libraries and no others; each is a copy of a file."""

    def hold(libraries):
        fresh.setattr(native, "__path__", [str(tmp_path)])
        for name, source in libraries.items():
            shutil.copy(source, tmp_path / f"kernels_{name}.so")

    return hold


def processor(monkeypatch, able):
    """Pretend a processor that runs `able`; returns the list of kernel libraries opened since."""
    opened = []

    class Library:
        foveate_cpu_has = staticmethod(lambda number: ISAS[number] in able)

        def __init__(self, path):
            if "kernels_" in path:
                opened.append(Path(path).stem.removeprefix("kernels_"))

    monkeypatch.setattr(ctypes, "CDLL", Library)
    return opened


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_an_installation_with_a_compiler_has_its_kernels():
    assert "portable" in RAN, "the kernels did not compile: pip install -v -e . shows why"


@needs_kernels
@pytest.mark.parametrize("name", RAN)
def test_the_environment_chooses_the_instruction_set(fresh, name):
    fresh.setenv("FOVEATE_ISA", name)
    assert native.isa() == name


@needs_kernels
def test_the_fastest_that_runs_is_the_default(fresh):
    assert native.isa() == RAN[-1]
    assert native.kernels() is native.kernels()


def test_none_switches_the_kernels_off_without_a_warning(fresh, recwarn):
    fresh.setenv("FOVEATE_ISA", "none")
    assert native.kernels() is None and native.isa() == "none"
    assert not recwarn.list


@pytest.mark.parametrize("name", ["AVX2", "sse", " "])
def test_an_unknown_instruction_set_is_refused(fresh, name):
    fresh.setenv("FOVEATE_ISA", name)
    with pytest.raises(ValueError, match=f"FOVEATE_ISA is '{name}'; known: avx512, avx2, portable"):
        native.kernels()


@pytest.mark.parametrize("able", [["portable"], ["portable", "avx2"], list(ISAS)])
def test_only_the_portable_library_is_opened_before_the_processor_was_asked(holding, fresh, able):
    holding(dict.fromkeys(ISAS, __file__))
    opened = processor(fresh, able)
    assert native.runnable() == tuple(able)
    assert native.isa() == able[-1]
    assert opened[0] == "portable" and set(opened) == {"portable", able[-1]}


def test_an_instruction_set_that_cannot_run_is_refused_before_it_is_opened(holding, fresh):
    holding(dict.fromkeys(ISAS, __file__))
    opened = processor(fresh, ["portable", "avx2"])
    fresh.setenv("FOVEATE_ISA", "avx512")
    with pytest.raises(
        RuntimeError, match="avx512 cannot run here; what can: avx2, portable, none"
    ):
        native.kernels()
    assert set(opened) == {"portable"}


def test_asking_for_kernels_that_were_not_built_says_how_to_get_them(holding, fresh):
    holding({})
    fresh.setenv("FOVEATE_ISA", "portable")
    with pytest.raises(RuntimeError, match=r"portable cannot run here; what can: none\. .*pip"):
        native.kernels()


def test_without_kernels_one_warning_and_right_results(holding):
    holding({})
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outs = [ops.attend(q, k, v) for _ in range(3)]
        assert native.isa() == "none"
    (warning,) = caught
    text = str(warning.message)
    assert "without its CPU kernels" in text and "C++17 compiler" in text and "pip install" in text
    with ops.backend("reference"):
        torch.testing.assert_close(outs[2], ops.attend(q, k, v))


def test_native_cannot_be_forced_without_kernels(holding, fresh):
    holding({})
    fresh.setenv("FOVEATE_ISA", "none")
    with pytest.raises(RuntimeError, match="no CPU kernels"), ops.backend("native"):
        pass


def test_a_library_the_system_cannot_open_is_a_warning_with_its_reason(holding):
    holding({"portable": __file__})
    with pytest.warns(UserWarning, match=r"kernels \(.*kernels_portable.so.*\), so more slowly"):
        assert native.kernels() is None


def test_a_library_without_our_functions_is_refused(holding):
    holding({"portable": _ctypes.__file__})
    with pytest.raises(RuntimeError, match=r"other sources .*\(cpu_has does not fit\): install"):
        native.kernels()


@needs_kernels
def test_a_kernel_that_is_missing_or_takes_another_record_is_refused():
    found = native.kernels()
    if found is None:
        pytest.skip("FOVEATE_ISA=none")
    with pytest.raises(RuntimeError, match=r"other sources .*\(unheard_of does not fit\)"):
        found.call("unheard_of", Record())
    with pytest.raises(RuntimeError, match=r"other sources .*\(prefill does not fit\)"):
        found.call("prefill", Record())


@pytest.mark.parametrize(("status", "error"), [(1, MemoryError), (2, RuntimeError)])
def test_a_status_of_a_kernel_becomes_an_error(status, error):
    class Library:
        foveate_kernel = staticmethod(lambda record, size: status)

    with pytest.raises(error, match="kernel"):
        native.Kernels(Library(), "portable").call("kernel", Record())


def test_threads_that_come_first_together_open_once(fresh):
    opened = []

    def slow(wanted):
        time.sleep(0.05)
        opened.append(wanted)

    fresh.setattr(loader, "_open", slow)
    barrier = threading.Barrier(8)
    threads = [
        threading.Thread(target=lambda: (barrier.wait(), native.kernels())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == [""]
