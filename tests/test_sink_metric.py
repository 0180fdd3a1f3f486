import pytest
import torch

from analysis_tools import attending, banded, uniform
from attached import left_padded, prompt
from foveate.analysis.sink_metric import SinkMetric, importance
from foveate.hf.parts import run
from foveate.hf.watch import watch
from test_watch import eager_maps
from tiny_models import build


def of(p, **options):
    """Statistics of one layer with weights p."""
    return SinkMetric(**options).of_layer(attending(p))


def test_all_on_the_first_token_is_a_sink_and_uniform_attention_is_none():
    sink, none = of(banded(64, 63)), of(uniform(64))
    assert float(sink["sink"]) == 1 and float(sink["elsewhere"]) == 0
    want = float((1 / torch.arange(1.0, 65)).mean())
    assert want == pytest.approx(0.074, abs=1e-3)
    assert float(none["importance"][0, 0]) == pytest.approx(want, rel=1e-4)
    assert float(none["sink"]) == 0
    assert float(of(uniform(64), eps=0.07)["sink"]) == 1


def test_the_last_position_is_what_the_last_row_gives_itself():
    p = torch.rand(1, 3, 20, 20).tril()
    p = p / p.sum(-1, keepdim=True)
    got = of(p)["importance"]
    torch.testing.assert_close(got[:, -1], p[0, :, -1, -1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got, importance(p)[0], rtol=1e-4, atol=1e-6)


def test_late_positions_are_left_out_of_elsewhere():
    own = of(banded(20, 0))  # every token looks at itself: column j is 1 / (20 - j)
    assert float(own["elsewhere"]) == 0
    assert float(of(banded(20, 0), late=0)["elsewhere"]) == pytest.approx(3 / 19)


def test_unnormalised_weights_are_rescaled():
    sigmoid = torch.full((1, 1, 16, 16), 0.5).tril()
    torch.testing.assert_close(importance(sigmoid), importance(uniform(16)))
    raw = importance(sigmoid, rescale=False)
    torch.testing.assert_close(raw, torch.full_like(raw, 0.5))
    assert float(importance(torch.zeros(1, 8, 8)).abs().max()) == 0


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_importance_is_that_of_the_models_own_map(family):
    model, ids = build(family), torch.cat([prompt(40), prompt(40, 1)])
    record = SinkMetric(eps=0.1)(model, ids)
    for layer, p in enumerate(eager_maps(model, ids)):
        own = p.sum(-2) / (p > 0).sum(-2)
        torch.testing.assert_close(record["importance"][layer], own.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(record["share"][layer], (own > 0.1).float().mean(0))
    assert bool((record["sink"] == record["share"][..., 0]).all())


def test_norms_and_cosines_are_those_of_queries_keys_values_and_stream():
    model, ids, held = build("llama"), prompt(20), {}
    record = SinkMetric()(model, ids)
    with (
        torch.no_grad(),
        watch(
            model,
            attention=lambda s: held.__setitem__(("qkv", s.layer), (s.q, s.k, s.v)),
            block_in=lambda i, x: held.__setitem__(("x", i), x),
        ),
    ):
        run(model, ids)
    for layer in range(4):
        (q, k, v), x = held["qkv", layer], held["x", layer]
        for name, vectors in (("residual", x), ("key", k[0]), ("value", v[0])):
            norm = vectors.norm(dim=-1)
            want = norm[..., 0] / norm[..., 1:].mean(-1)
            torch.testing.assert_close(record[name][layer], want.squeeze(), rtol=1e-4, atol=1e-5)
        keys = k[0].repeat_interleave(2, 0)
        cosine = torch.cosine_similarity(q[0][:, :, None], keys[:, None], dim=-1)
        torch.testing.assert_close(
            record["cosine"][layer], cosine[..., 0].mean(-1), rtol=1e-4, atol=1e-5
        )
        per_key = [cosine[:, j:, j].mean(1) for j in range(1, 20)]
        torch.testing.assert_close(
            record["cosine_others"][layer], sum(per_key) / 19, rtol=1e-4, atol=1e-5
        )


def test_padded_texts_count_as_they_do_alone():
    model, rows = build("llama"), (prompt(30, 1), prompt(30, 1)[:, 9:])
    ids, mask = left_padded(*rows)
    both = SinkMetric(eps=0.1)(model, {"input_ids": ids, "attention_mask": mask})
    one, two = (SinkMetric(eps=0.1)(model, row) for row in rows)
    for name in ("sink", "residual", "key", "value", "cosine"):
        want = (one[name] + two[name]) / 2
        torch.testing.assert_close(both[name], want, rtol=1e-4, atol=1e-5, msg=name)
    want = (one["importance"][..., :21] + two["importance"]) / 2
    torch.testing.assert_close(both["importance"][..., :21], want, rtol=1e-4, atol=1e-5)
    want = (21 * one["elsewhere"] + 12 * two["elsewhere"]) / 33
    torch.testing.assert_close(both["elsewhere"], want)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="texts of at least 2 tokens"):
        SinkMetric()(build("llama"), prompt(1))
    with pytest.raises(ValueError, match=r"eps must be in \(0, 1\), got 1"):
        SinkMetric(eps=1.0)
    with pytest.raises(ValueError, match="late must be at least 0, got -1"):
        SinkMetric(late=-1)
    with pytest.raises(ValueError, match=r"causal maps \(…, L, L\), got \(3, 4\)"):
        importance(torch.zeros(3, 4))
