import math

import pytest
import torch

from attached import left_padded, prompt
from foveate.analysis.attention_floating import AttentionFloating, correlation
from test_watch import eager_maps, tiny_encoder
from tiny_models import build


def of(columns, **options):
    """Of columns (step, position) of one text."""
    return AttentionFloating(**options).of_columns(columns[:, None])


def test_a_fixed_first_token_sink_does_not_move():
    columns = torch.zeros(8, 10)
    columns[:, 0] = 1
    stats = of(columns)
    assert float(stats["overlap"]) == 1 and float(stats["wander"]) == 0
    assert stats["absorption"].tolist() == [1] * 8 == stats["first"].tolist()


def test_anchors_that_move_overlap_nowhere():
    stats = of(torch.eye(8))
    assert float(stats["overlap"]) == 0
    assert float(stats["wander"]) == pytest.approx(math.log(8))
    assert stats["absorption"].tolist() == [1] * 8
    assert stats["first"].tolist() == [1] + [0] * 7


def test_uniform_attention_absorbs_one_key():
    stats = of(torch.full((4, 10), 0.1))
    assert stats["absorption"].tolist() == pytest.approx([0.1] * 4)
    assert stats["anchors"].tolist() == [1] * 4


def test_a_margin_of_3_leaves_the_largest_column_alone():
    columns = torch.full((1, 40), 0.0)
    columns[0, [3, 30]] = torch.tensor([0.55, 0.45])
    assert float(of(columns)["anchors"]) == 2
    assert float(of(columns, rule="margin")["anchors"]) == 1
    assert float(of(columns, rule="margin", margin=0.3)["anchors"]) == 2


def test_correlation_over_the_real_keys():
    made = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 1, 3, 12, generator=made)
    real = torch.arange(12)[None] >= 4
    want = [float(torch.corrcoef(torch.stack([x[0, h, 4:], y[0, h, 4:]]))[0, 1]) for h in range(3)]
    assert correlation(x, y, real)[0].tolist() == pytest.approx(want, abs=1e-5)
    assert correlation(x, 2 * x + 1, real)[0].tolist() == pytest.approx([1] * 3, abs=1e-5)


def test_columns_are_those_of_the_models_own_map():
    model, steps = build("llama"), [prompt(30, i) for i in range(3)]
    record = AttentionFloating()(model, steps)
    maps = [eager_maps(model, ids) for ids in steps]
    for layer in range(4):
        own = [(p[layer].sum(-2) / (p[layer] > 0).sum(-2)).mean(1) for p in maps]
        want = AttentionFloating().of_columns(torch.stack(own))
        for name, value in want.items():
            got = record[name][layer]
            torch.testing.assert_close(got, value.float(), rtol=1e-3, atol=1e-5, msg=name)
    assert 0 <= float(record["absorption"].min()) <= float(record["absorption"].max()) <= 1


def test_padded_texts_are_measured_as_they_are_alone():
    model, rows = build("llama"), (prompt(24, 1), prompt(15, 2))
    ids, mask = left_padded(*rows)
    both = AttentionFloating()(model, [{"input_ids": ids, "attention_mask": mask}] * 2)
    alone = [AttentionFloating()(model, [row] * 2) for row in rows]
    for name in both.values:
        want = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(both[name], want, rtol=1e-3, atol=1e-4, msg=name)


def test_encoders_are_measured_and_one_step_has_no_overlap():
    model, inputs = tiny_encoder("bert")
    record = AttentionFloating()(model, [inputs])
    assert bool(record["overlap"].isnan().all()) and bool(record["wander"].isfinite().all())


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="at least one step"):
        AttentionFloating()(build("llama"), [])
    with pytest.raises(ValueError, match="rule must be one of multiple, margin, got 'mean'"):
        AttentionFloating(rule="mean")
    with pytest.raises(ValueError, match="times must be above 1, got 1"):
        AttentionFloating(times=1.0)
