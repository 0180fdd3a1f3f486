import pytest
import torch
from torch.nn.functional import cross_entropy

from analysis_tools import attending, uniform
from attached import left_padded, prompt
from foveate.analysis.sink_survey import SinkSurvey
from test_watch import eager_maps
from tiny_models import build

LOSSES = ("plain", "window", "window_sinks", "hidden", "silent")


def seen_by(edit, **options):
    """Outputs (L, Dv) of uniform attention of 6 tokens under an edit, and its values."""
    seen = attending(uniform(6))
    changed = getattr(SinkSurvey(**options), edit)(seen)
    return (seen.out if changed is None else changed)[0, 0], seen.v[0, 0]


def mean(v, *keys):
    return v[list(keys)].mean(0)


def test_windows_with_and_without_the_first_tokens():
    out, v = seen_by("_windowed", window=2)
    torch.testing.assert_close(out[5], mean(v, 4, 5), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[0], v[0], rtol=1e-4, atol=1e-5)
    out, v = seen_by("_windowed_with_sinks", window=2, sinks=2)
    torch.testing.assert_close(out[5], mean(v, 0, 1, 4, 5), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[2], mean(v, 0, 1, 2), rtol=1e-4, atol=1e-5)


def test_hidden_tokens_are_seen_by_their_own_row_alone():
    out, v = seen_by("_hidden", sinks=2)
    torch.testing.assert_close(out[1], v[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[5], mean(v, 2, 3, 4, 5), rtol=1e-4, atol=1e-5)


def test_silent_tokens_keep_their_weight_and_say_nothing():
    out, v = seen_by("_silent", sinks=1)
    torch.testing.assert_close(out[0], v[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[5], v[1:].sum(0) / 6, rtol=1e-4, atol=1e-5)


def test_losses_of_a_model_and_mass_of_its_own_maps():
    model, ids = build("llama"), prompt(40)
    record = SinkSurvey(window=8, sinks=2)(model, ids)
    with torch.no_grad():
        want = cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(record["plain"], want, rtol=1e-4, atol=1e-4)
    assert len({round(float(record[name]), 4) for name in LOSSES}) == 5
    counts = torch.arange(40, 0, -1)
    for layer, p in enumerate(eager_maps(model, ids)):
        mass = (p[0].sum(1) / counts)[:, :2].sum(-1)
        torch.testing.assert_close(record["mass"][layer], mass, rtol=1e-4, atol=1e-5)


def test_next_token_while_the_first_are_hidden():
    model, ids = build("llama"), prompt(20)
    record = SinkSurvey(window=8, sinks=2)(model, ids)
    p = eager_maps(model, ids)[0][0].clone()
    p[:, 2:, :2] = 0  # the layer that no edit has reached yet
    mass = (p / p.sum(-1, keepdim=True))[:, 2:, 2].mean(1)
    torch.testing.assert_close(record["moved"][0], mass, rtol=1e-4, atol=1e-5)


def test_padded_texts_have_first_tokens_of_their_own():
    model, rows = build("llama"), (prompt(24, 1), prompt(17, 2))
    ids, mask = left_padded(*rows)
    survey = SinkSurvey(window=6)
    both = survey(model, {"input_ids": ids, "attention_mask": mask})
    alone = [survey(model, row) for row in rows]
    for name in LOSSES:
        want = (23 * alone[0][name] + 16 * alone[1][name]) / 39
        torch.testing.assert_close(both[name], want, rtol=1e-4, atol=1e-4)
    for name in ("mass", "moved"):
        want = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(both[name], want, rtol=1e-4, atol=1e-5)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="more than 65 tokens, got 20"):
        SinkSurvey()(build("llama"), prompt(20))
    for name in ("window", "sinks"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            SinkSurvey(**{name: 0})
