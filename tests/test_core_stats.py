import pytest
import torch

from analysis_tools import attending, banded, uniform
from attached import left_padded, prompt
from foveate.analysis.core_stats import CoreStats, of_stream
from test_watch import eager_maps, tiny_encoder
from tiny_models import build


def of(p, **options):
    """Statistics of one head with weights p."""
    return {k: float(v) for k, v in CoreStats(**options).of_layer(attending(p)).items()}


def test_uniform_attention():
    stats, seen = of(uniform(32)), torch.arange(2, 33).float()
    assert stats["entropy"] == pytest.approx(1, abs=1e-5)
    assert stats["span"] == pytest.approx(float(seen.mean()), rel=1e-4)
    assert stats["participation"] == pytest.approx(float(seen.mean()), rel=1e-4)
    assert stats["largest"] == pytest.approx(float((1 / seen).mean()), rel=1e-4)
    assert stats["sink"] == pytest.approx(float((1 / torch.arange(1.0, 33)).mean()), rel=1e-4)
    assert stats["sparsity"] == pytest.approx(1, abs=0.05)
    assert stats["diversity"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(("offset", "name"), [(0, "diagonal"), (1, "previous"), (31, "sink")])
def test_one_hot_attention(offset, name):
    stats = of(banded(32, offset))
    assert stats["entropy"] == pytest.approx(0, abs=1e-4)
    assert stats["span"] == pytest.approx(1, abs=1e-4)
    assert stats["participation"] == pytest.approx(1, abs=1e-4)
    assert stats[name] == pytest.approx(1, abs=1e-4)
    assert stats["largest"] == pytest.approx(1, abs=1e-4)
    want = torch.arange(1.0, 32).clamp_max(offset).mean()
    assert stats["locality"] == pytest.approx(float(want), abs=1e-3)


def test_two_heads_that_differ_are_diverse():
    apart = torch.cat([banded(16, 0), banded(16, 1)], 1)
    stats = CoreStats().of_layer(attending(apart))
    assert float(stats["diversity"]) == pytest.approx(0.6931**0.5, abs=1e-3)


def test_collapse_of_streams():
    same = of_stream(torch.ones(8, 4))
    assert float(same["collapse"]) == pytest.approx(0, abs=1e-9)
    assert float(same["cosine"]) == pytest.approx(1)
    assert float(same["rank"]) == pytest.approx(1, abs=1e-4)
    apart = of_stream(torch.eye(4))
    assert float(apart["cosine"]) == pytest.approx(0, abs=1e-9)
    assert float(apart["rank"]) == pytest.approx(4, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_statistics_are_those_of_the_models_own_map(family):
    model, ids = build(family), prompt(40)
    record = CoreStats()(model, ids)
    for layer, p in enumerate(eager_maps(model, ids)):
        p = p[0].double()
        seen = (p > 0).sum(-1)
        several = seen > 1
        entropy = -torch.xlogy(p, p).sum(-1)
        norm = torch.where(several, entropy / seen.clamp_min(2).log(), 0).sum(-1)
        want = {
            "entropy": norm / several.sum(-1),
            "span": (entropy.exp() * several).sum(-1) / several.sum(-1),
            "participation": (several / p.square().sum(-1)).sum(-1) / several.sum(-1),
            "largest": (p.amax(-1) * several).sum(-1) / several.sum(-1),
            "sink": p[:, :, 0].sum(-1) / (p[:, :, 0] > 0).sum(-1),
        }
        for name, value in want.items():
            torch.testing.assert_close(
                record[name][layer].double(), value, rtol=2e-5, atol=2e-5, msg=f"{layer} {name}"
            )


def test_padded_rows_count_as_they_do_alone():
    model, rows = build("llama"), (prompt(20, 1), prompt(20, 1)[:, 8:])
    ids, mask = left_padded(*rows)
    both = CoreStats()(model, {"input_ids": ids, "attention_mask": mask})
    alone = [CoreStats()(model, row) for row in rows]
    want = sum(r["sink"] for r in alone) / 2
    torch.testing.assert_close(both["sink"], want, rtol=1e-4, atol=1e-5)
    counts = torch.tensor([19.0, 11.0])
    want = (alone[0]["entropy"] * counts[0] + alone[1]["entropy"] * counts[1]) / counts.sum()
    torch.testing.assert_close(both["entropy"], want, rtol=1e-4, atol=1e-5)


def test_encoders_are_measured_too():
    model, inputs = tiny_encoder("bert")
    record = CoreStats()(model, inputs)
    assert record["entropy"].shape == (2, 4) and bool(record["entropy"].isfinite().all())


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="at least 2 tokens"):
        CoreStats()(build("llama"), prompt(1))
    with pytest.raises(ValueError, match=r"eps must be in \(0, 1\), got 0"):
        CoreStats(eps=0.0)
    with pytest.raises(ValueError, match="rows must be at least 1"):
        CoreStats(rows=0)
