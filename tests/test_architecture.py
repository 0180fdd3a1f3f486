"""The house rules that a machine can hold: import arrows, a light import, small files."""

import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]
HEAVY = ["transformers", "gguf", "accelerate", "plotly", "jinja2", "rich", "typer", "importlinter"]


def test_imports_follow_the_arrows(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", HEAVY)
def test_import_foveate_stays_light(name, loaded_by_foveate):
    assert name not in loaded_by_foveate


@pytest.fixture(scope="module")
def loaded_by_foveate():
    """Top-level modules that `import foveate` loads beyond those of `import torch`."""
    code = (
        "import sys, torch; before = set(sys.modules); import foveate; "
        "print(*(set(sys.modules) - before))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {module.partition(".")[0] for module in run.stdout.split()}


def test_no_source_file_exceeds_400_lines():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / "src").rglob("*.py")
    }
    assert {path: length for path, length in lengths.items() if length > 400} == {}
