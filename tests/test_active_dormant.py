import pytest
import torch

from analysis_tools import attending, banded, uniform
from attached import left_padded, prompt
from foveate.analysis._columns import first_weight
from foveate.analysis._loss import next_token_loss
from foveate.analysis.active_dormant import ActiveDormant, gap_of_logits, loss_changes
from foveate.hf.parts import run
from foveate.hf.watch import watch
from test_watch import eager_maps
from tiny_models import build


def test_a_head_on_the_first_token_is_dormant_and_one_on_itself_is_not():
    assert float(first_weight(attending(banded(32, 31)), 2)) == pytest.approx(1)
    assert float(first_weight(attending(banded(32, 0)), 2)) == pytest.approx(0, abs=1e-6)
    want = float((1 / torch.arange(3.0, 33)).mean())
    assert float(first_weight(attending(uniform(32)), 2)) == pytest.approx(want, rel=1e-4)


def test_gap_of_constructed_logits():
    p = torch.full((12, 12), 0.1).tril()
    p[:, 0] = 0.4
    p = (p / p.sum(-1, keepdim=True))[None, None]
    # every logit of a row is log p, the first one log 4 above the others
    assert float(gap_of_logits(attending(p))) == pytest.approx(1.386294, abs=1e-4)
    assert float(gap_of_logits(attending(uniform(12)))) == pytest.approx(0, abs=1e-4)


def test_values_are_those_of_the_models_own_maps_queries_keys_values_and_stream():
    model, ids, held = build("llama"), prompt(20), {}
    other = prompt(20, 3)
    record = ActiveDormant()(model, {"one": ids, "other": other})
    with (
        torch.no_grad(),
        watch(
            model,
            attention=lambda s: held.__setitem__(("qkv", s.layer), (s.q, s.k, s.v)),
            block_in=lambda i, x: held.__setitem__(("x", i), x),
        ),
    ):
        run(model, ids)
    first, second = eager_maps(model, ids), eager_maps(model, other)
    for layer in range(4):
        weights = torch.stack([p[layer][0, :, 2:, 0].mean(-1) for p in (first, second)], -1)
        torch.testing.assert_close(record["dormancy"][layer], weights, rtol=1e-4, atol=1e-6)
        gap = (weights[:, 0] - weights[:, 1]).abs()
        torch.testing.assert_close(record["activity"][layer], gap, rtol=1e-3, atol=1e-6)
        (q, k, v), x = held["qkv", layer], held["x", layer]
        s = q[0] @ k[0].repeat_interleave(2, 0).transpose(1, 2) / 4
        gaps = [s[:, i, 0] - s[:, i, 1 : i + 1].mean(-1) for i in range(2, 20)]
        torch.testing.assert_close(
            record["gap_of_logits"][layer, :, 0], sum(gaps) / 18, rtol=1e-3, atol=1e-4
        )
        norm, stream = v[0].norm(dim=-1), x[0].norm(dim=-1)
        torch.testing.assert_close(
            record["drain"][layer, :, 0], norm[:, 0] / norm[:, 1:].mean(1), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(record["peak"][layer, 0], stream[0] / stream[1:].mean())


def test_sliding_windows_count_rows_that_see_all():
    record = ActiveDormant()(build("gemma2"), {"text": prompt(30)})
    assert bool(record["gap_of_logits"].isfinite().all())


def test_padded_texts_are_measured_as_they_are_alone():
    model, rows = build("llama"), (prompt(24, 1), prompt(15, 2))
    ids, mask = left_padded(*rows)
    both = ActiveDormant()(model, {"": {"input_ids": ids, "attention_mask": mask}})
    alone = [ActiveDormant()(model, {"": row}) for row in rows]
    for name in ("dormancy", "drain", "peak"):
        want = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(both[name], want, rtol=1e-4, atol=1e-5, msg=name)
    want = (22 * alone[0]["gap_of_logits"] + 13 * alone[1]["gap_of_logits"]) / 35
    torch.testing.assert_close(both["gap_of_logits"], want, rtol=1e-3, atol=1e-4)
    losses = [next_token_loss(model, row) for row in rows]
    padded = next_token_loss(model, {"input_ids": ids, "attention_mask": mask})
    assert padded == pytest.approx((23 * losses[0] + 14 * losses[1]) / 37, rel=1e-4)


def test_a_head_that_only_reads_the_first_token_costs_nothing_to_send_there():
    model, ids = build("llama"), prompt(20)

    def dormant(seen):
        if seen.layer == 1:
            out = seen.out.clone()
            out[:, 2] = seen.v[:, 1, :1]
            return out
        return None

    with watch(model, attention=dormant):
        changes = loss_changes(model, ids, [(1, 2), (1, 1)], "sink")
    assert float(changes[0]) == pytest.approx(0, abs=1e-5)
    assert abs(float(changes[1])) > 1e-3


def test_loss_is_the_models_own():
    model, ids = build("llama"), prompt(20)
    with torch.no_grad():
        want = float(model(ids, labels=ids).loss)
    assert next_token_loss(model, ids) == pytest.approx(want, rel=1e-4)


def test_bad_input_is_named():
    model = build("llama")
    with pytest.raises(ValueError, match="at least one domain"):
        ActiveDormant()(model, {})
    with pytest.raises(ValueError, match="a text of 'code' has fewer than 3 tokens"):
        ActiveDormant()(model, {"code": prompt(2)})
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\), got 1"):
        ActiveDormant(threshold=1.0)
