"""The README's example mechanism is complete: it registers, passes the audit, fits in 40 lines."""

import re
import sys
from pathlib import Path

import pytest

from foveate import registry
from foveate.bench.audit import properties, verdict

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "@register" in block]
    path = tmp_path_factory.mktemp("readme") / "every_other.py"
    path.write_text(code, encoding="utf-8")
    registry.load_plugin(path)
    yield code
    registry._classes.pop("every_other")
    sys.modules.pop("every_other")


def test_the_example_has_at_most_forty_lines(example):
    assert len(example.splitlines()) <= 40


@pytest.mark.parametrize("prop", properties("attention"))
def test_the_example_passes_the_audit(example, prop):
    assert verdict("every_other", prop).state == "passed"


def test_every_command_the_readme_names_exists():
    from typer.main import get_command

    from foveate.cli import app

    known = set(get_command(app).commands)
    text = README.read_text(encoding="utf-8")
    named = set(re.findall(r"foveate (?:--plugin \S+ )?([a-z]+)", text))
    assert (
        named & known and {"compare", "audit", "doctor", "list", "show", "papers", "model"} <= named
    )


def test_the_story_of_retrieval_heads_is_forty_lines_of_python():
    text = (README.parent / "docs" / "retrieval_heads.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) <= 40
    compile(code, "retrieval_heads.md", "exec")
