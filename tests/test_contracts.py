"""Every mechanism of the registry against everything its kind owes."""

import pytest

from foveate.bench.audit import audited, properties, verdict

CELLS = [(name, prop) for name, kind in audited() for prop in properties(kind)]


@pytest.mark.parametrize(("name", "prop"), CELLS)
def test_holds_or_says_why_it_does_not_apply(name, prop):
    cell = verdict(name, prop)
    assert cell.state in ("passed", "n/a"), cell.reason
    assert cell.state == "passed" or cell.reason
