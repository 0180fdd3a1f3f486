"""Installing without a compiler: it succeeds, says once what is missing, and computes right."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (find_spec("pip") and find_spec("scikit_build_core")),
        reason="needs pip and the extra dev",
    ),
]

USE_IT = """
import torch
import foveate
from foveate import ops

q, k, v = torch.randn(3, 1, 2, 40, 16)
for _ in range(2):
    out = ops.attend(q, k, v)
want = torch.softmax(q @ k.mT / 4, -1) @ v
print(foveate.__file__, float((out - want).abs().max()))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built where CMake finds no compiler."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    options = ["--wheel-dir", folder, f"--config-settings=build-dir={folder / 'build'}", ROOT]
    hidden = {**os.environ, "CXX": str(folder / "no-such-compiler")}
    run = subprocess.run([*command, *options], env=hidden, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_is_pure_python(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "foveate/ops/api.py" in names and "foveate/py.typed" in names
    assert not [name for name in names if name.endswith((".so", ".cpp", ".hpp"))]


def test_it_warns_once_and_computes_right(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    # Without the module `site`, which would put the tree under test before the wheel.
    paths = os.pathsep.join([str(tmp_path), sysconfig.get_path("purelib")])
    env = {**os.environ, "PYTHONPATH": paths, "FOVEATE_ISA": ""}
    run = subprocess.run(
        [sys.executable, "-S", "-W", "always", "-c", USE_IT],
        env=env,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    where, error = run.stdout.split()
    assert Path(where).is_relative_to(tmp_path) and float(error) < 1e-5
    assert run.stderr.count("foveate runs without its CPU kernels") == 1
