import math

import pytest
import torch

from foveate.analysis.scan_snap import ScanSnap
from foveate.tasks.scan_snap import context_table, scan_snap

TABLE = context_table()
INPUTS = scan_snap(TABLE, 200, seed=0).inputs


def of(*rows):
    """What is measured of logits (vocabulary,) at one step after the other."""
    return ScanSnap()(torch.stack(rows)[:, None], TABLE, INPUTS)


def test_uniform_attention_weighs_tokens_as_they_occur():
    record = of(torch.zeros(30))
    common = (INPUTS[:, :-1] >= 12).float().mean()
    assert float(record["common"]) == pytest.approx(float(common), rel=1e-5)
    assert float(record["largest"]) == pytest.approx(1 / 31, rel=1e-5)
    assert float(record["gap"]) == 0 and math.isnan(float(record["order"]))


def test_logits_in_the_order_of_occurrence_and_against_it():
    z = torch.zeros(30)
    z[:12] = torch.arange(1.0, 7).repeat(2)
    record = of(z, -z, z + 5)
    torch.testing.assert_close(record["order"], torch.tensor([1.0, -1.0, 1.0]))
    torch.testing.assert_close(record["gap"], torch.tensor([3.5, -3.5, 3.5]))
    torch.testing.assert_close(record["common"][0], record["common"][2])
    assert float(record["common"][0]) < float(record["common"][1])


def test_attention_on_distinct_tokens_alone_is_even():
    z = torch.zeros(30)
    z[12:] = -1e4
    record = of(z)
    assert float(record["common"]) == 0
    torch.testing.assert_close(record["largest"], record["even"])
    counts = (INPUTS[:, :-1] < 12).sum(1).float()
    assert float(record["even"]) == pytest.approx(float((1 / counts).mean()), rel=1e-5)


def test_every_last_token_has_distinct_tokens_of_its_own_order():
    table = context_table(last_tokens=2)
    inputs = scan_snap(table, 50, seed=1).inputs
    z = table.sum(1)[None]
    assert float(ScanSnap()(z, table, inputs)["order"]) == pytest.approx(1)
    assert float(ScanSnap()(z.flip(1), table, inputs)["order"]) < 0.9


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"logits must be \(steps, 1, 30\), got \(2, 30\)"):
        ScanSnap()(torch.zeros(2, 30), TABLE, INPUTS)
    with pytest.raises(ValueError, match="needs distinct and common tokens"):
        ScanSnap()(torch.zeros(1, 1, 30), context_table(common=0), INPUTS)
