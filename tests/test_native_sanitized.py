"""The kernels under the address and undefined-behaviour sanitisers, on random calls."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from foveate import native

ROOT = Path(__file__).parents[1]
SECONDS = 20
NO_KERNEL = {"use_omp", "cpu_has", "skip_fits"}


def runtime(name):
    """Path of a runtime library of the compiler, None where it has none."""
    asked = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
    path = Path(asked.stdout.strip())
    return path if path.is_absolute() else None


def what_is_missing():
    tools = [tool for tool in ("g++", "cmake", "ninja", "nm") if shutil.which(tool) is None]
    return tools or [name for name in ("libasan.so", "libubsan.so") if runtime(name) is None]


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(what_is_missing()), reason=f"needs {', '.join(what_is_missing())}"),
]


def run(*command, **env):
    done = subprocess.run(
        [str(part) for part in command], env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return done.stdout


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """A folder with the libraries that run here, built with the sanitisers."""
    folder = tmp_path_factory.mktemp("sanitized")
    options = ["-DFOVEATE_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_COMPILER=g++"]
    run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options)
    run("ninja", "-C", folder, *(f"foveate_{isa}" for isa in native.runnable() or ["portable"]))
    return folder


def fuzzed(folder, **env):
    """Random calls of the kernels of a folder; fails unless each was called."""
    symbols = run("nm", "-D", "--defined-only", folder / "kernels_portable.so")
    kernels = set(re.findall(r" T foveate_(\w+)", symbols)) - NO_KERNEL
    said = run(sys.executable, ROOT / "tests" / "native_fuzz.py", folder, SECONDS, **env)
    calls = json.loads(said.splitlines()[-1])["calls"]
    assert set(calls) == kernels and min(calls.values()) >= 10, calls


def test_random_calls_of_every_kernel_are_clean_and_right(libraries):
    fuzzed(
        libraries,
        LD_PRELOAD=f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}",
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )


@pytest.mark.skipif("avx2" not in native.runnable(), reason="needs AVX2")
def test_the_sources_for_avx512_are_right_where_it_is_missing(tmp_path):
    """They are compiled for AVX2, and the library takes the place of all others."""
    options = ["-std=gnu++17", "-O1", "-fPIC", "-shared", "-pthread", "-Wno-psabi", "-mavx2"]
    options += ["-mfma", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    options += ["-include", ROOT / "tests" / "emulated_avx512.hpp"]
    sources = sorted((ROOT / "src" / "foveate" / "native" / "src").glob("*.cpp"))
    run("g++", *options, *sources, "-o", tmp_path / "kernels_portable.so")
    fuzzed(tmp_path)
