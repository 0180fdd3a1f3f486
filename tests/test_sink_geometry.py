import pytest
import torch

from analysis_tools import attending, banded, uniform
from attached import left_padded, prompt
from foveate.analysis.sink_geometry import (
    SinkGeometry,
    around,
    classify,
    divergence,
    gini,
    mean_map,
    spectrum,
)
from test_watch import eager_maps, tiny_encoder
from tiny_models import build


def star(length):
    """All rows look at the first key."""
    p = torch.zeros(1, 1, length, length)
    p[..., 0] = 1
    return p


def kind(p, causal=False, **options):
    """What the sinks of a layer with weights p are."""
    ((share, sink),) = SinkGeometry(**options).shares(attending(p, causal))
    return classify(share, sink)


def test_kinds_of_constructed_maps():
    both = torch.zeros(1, 1, 32, 32)
    both[..., 0], both[..., -1] = 0.6, 0.4
    several = torch.zeros(1, 1, 32, 32)
    several[..., :5] = 0.2
    assert [kind(p) for p in (star(8), both, several)] == [1, 2, 0]
    assert kind(torch.full((1, 1, 16, 16), 1 / 16)) == 0


@pytest.mark.parametrize("length", [16, 64, 100, 200, 500])
def test_uniform_causal_attention_is_distributed_at_any_length(length):
    p = uniform(length)
    assert kind(p, causal=True) == 0
    ((_, sink),) = SinkGeometry().shares(attending(p))
    assert not bool(sink.any())


def test_late_keys_that_few_rows_see_are_no_sinks():
    own = banded(64, 0)  # every token looks at itself: the last column has one row, of weight 1
    ((_, sink),) = SinkGeometry().shares(attending(own))
    assert not bool(sink[-7:].any())


def test_spectra_of_star_ring_and_uniform_graphs():
    eight = torch.full((8, 8), 1 / 8)
    ring = torch.eye(8).roll(1, 1)
    assert spectrum(star(8)[0, 0]) == pytest.approx((1, 1.778), abs=1e-3)
    assert spectrum(eight) == pytest.approx((1, 1), abs=1e-6)
    assert spectrum(ring)[0] == pytest.approx(1 - 0.5**0.5, abs=1e-6)
    no_loops = (torch.ones(8, 8) - torch.eye(8)) / 7
    assert spectrum(no_loops)[0] == pytest.approx(8 / 7, abs=1e-6)


def test_only_first_and_last_depend_on_how_tokens_are_numbered():
    made = torch.Generator().manual_seed(0)
    p = torch.rand(1, 2, 20, 20, generator=made) ** 8
    p = p / p.sum(-1, keepdim=True)
    order = torch.randperm(20, generator=made)
    x, geometry = torch.randn(20, 8, generator=made), SinkGeometry()

    def of(weights, stream):
        seen = attending(weights, causal=False)
        ((share, sink),) = geometry.shares(seen)
        return geometry.of_text(share, sink, stream, mean_map(seen)[0])

    plain, moved = of(p, x), of(p[..., order, :][..., order], x[order])
    for name in plain.keys() - {"first", "last", "kind"}:
        torch.testing.assert_close(moved[name], plain[name], rtol=1e-4, atol=1e-5, msg=name)


def test_concentration_and_divergence_of_shares():
    even, one = torch.full((10,), 0.1), torch.eye(10)[3]
    assert float(gini(even)) == pytest.approx(0, abs=1e-6)
    assert float(gini(one)) == pytest.approx(0.9)
    assert float(divergence(even, even)) == pytest.approx(0, abs=1e-6)
    assert float(divergence(one, even)) == pytest.approx(2.302585, abs=1e-5)


def test_stream_around_a_token():
    x = torch.tensor([[10.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    along, angle = around(x, 0)
    assert float(angle) == pytest.approx(90)
    assert float(along) == pytest.approx(100 / 101, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_shares_are_those_of_the_models_own_map(family):
    model, ids = build(family), prompt(30)
    record = SinkGeometry()(model, ids)
    before = None
    for layer, p in enumerate(eager_maps(model, ids)):
        column = (p.sum(-2) / (p > 0).sum(-2)).mean(1)[0]
        share = column / column.sum()
        ranked = share.sort(descending=True).values.cumsum(0)
        want = {
            "largest": share.max(),
            "first": share[0],
            "last": share[-1],
            "half": 1.0 + (ranked < 0.5).sum(),
            "connectivity": torch.tensor(spectrum(p[0].mean(0))[0]),
            "drift": divergence(share, share if before is None else before),
        }
        for name, value in want.items():
            got = record[name][layer, 0]
            torch.testing.assert_close(got, value.float(), rtol=1e-3, atol=1e-5, msg=name)
        before = share


def test_padded_texts_are_measured_as_they_are_alone():
    model, rows = build("llama"), (prompt(24, 1), prompt(15, 2))
    ids, mask = left_padded(*rows)
    both = SinkGeometry()(model, {"input_ids": ids, "attention_mask": mask})
    for i, row in enumerate(rows):
        alone = SinkGeometry()(model, row)
        for name in alone.values:
            torch.testing.assert_close(
                both[name][:, i], alone[name][:, 0], rtol=1e-3, atol=1e-4, msg=name
            )


def test_encoders_are_measured_and_long_texts_have_no_spectrum():
    model, inputs = tiny_encoder("vit")
    record = SinkGeometry(map_limit=4)(model, inputs)
    assert record["gini"].shape == (2, 2) and bool(record["gini"].isfinite().all())
    assert bool(record["connectivity"].isnan().all())


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="times must be above 1, got 1"):
        SinkGeometry(times=1.0)
    with pytest.raises(ValueError, match="seen_by must be at least 1, got 0"):
        SinkGeometry(seen_by=0)
    with pytest.raises(ValueError, match="map_limit must be at least 0, got -1"):
        SinkGeometry(map_limit=-1)
