import pytest
import torch

from attached import left_padded, prompt
from foveate.hf.ablate import MODES, ablate, force, head_outputs
from foveate.hf.parts import run
from foveate.hf.watch import watch
from tiny_models import build


def ablated(model, ids, heads, mode, **options):
    """Outputs (B, Hq, L, Dv) of all heads while some are out of action."""
    with ablate(model, heads, mode, **options):
        return head_outputs(model, ids)


def values(model, ids):
    """Values (B, Hkv, L, Dv) by layer."""
    held = {}
    with torch.no_grad(), watch(model, attention=lambda s: held.__setitem__(s.layer, s.v)):
        run(model, ids)
    return held


def test_every_mode_gives_what_it_says():
    model, ids, other = build("llama"), prompt(12), prompt(12, 5)
    v = values(model, ids)[0][:, 1]  # heads 2 and 3 read kv head 1
    plain, reference = head_outputs(model, ids)[0], head_outputs(model, other)[0]
    count = torch.arange(1, 13).view(-1, 1)
    want = {
        "zero": torch.zeros_like(v),
        "mean": reference[:, 3].mean(1, keepdim=True).expand_as(v),
        "resample": reference[:, 3],
        "sink": v[:, :1].expand_as(v),
        "uniform": v.cumsum(1) / count,
        "value": v,
    }
    for mode in MODES:
        given = {"reference": other} if mode in ("mean", "resample") else {}
        out = ablated(model, ids, [(0, 3)], mode, **given)[0]
        torch.testing.assert_close(out[:, 3], want[mode], rtol=1e-4, atol=1e-5)
        assert torch.equal(out[:, :3], plain[:, :3])


@pytest.mark.parametrize("mode", ["sink", "uniform", "value"])
def test_padded_rows_are_ablated_as_they_are_alone(mode):
    model, rows = build("llama"), (prompt(12, 1), prompt(7, 2))
    ids, mask = left_padded(*rows)
    heads = [(1, 0), (2, 3)]
    together = ablated(model, {"input_ids": ids, "attention_mask": mask}, heads, mode)
    alone = ablated(model, rows[1], heads, mode)
    for layer in range(4):
        torch.testing.assert_close(together[layer][1:, :, 5:], alone[layer], rtol=1e-4, atol=1e-5)


def test_no_heads_change_nothing_and_one_head_changes_the_rest_of_the_model():
    model, ids = build("llama"), prompt(12)
    with torch.no_grad():
        plain = run(model, ids)
        with ablate(model, []):
            same = run(model, ids)
        with ablate(model, [(0, 0)]):
            other = run(model, ids)
        assert torch.equal(run(model, ids), plain)
    torch.testing.assert_close(same, plain, rtol=1e-5, atol=1e-5)
    assert float((other - plain).abs().max()) > 1e-3


def test_forcing_the_weights_a_head_has_changes_nothing_and_others_only_the_last_row():
    model, ids, maps = build("llama"), prompt(12), {}

    def attention(seen):
        rows = torch.tensor([11])
        from foveate import ops

        maps[seen.layer] = ops.attention_rows(seen.q, seen.k, rows, **seen.options())

    with torch.no_grad(), watch(model, attention=attention):
        plain = run(model, ids)
    with torch.no_grad(), force(model, [(3, 2)], maps[3][0, 2, 0]):
        torch.testing.assert_close(run(model, ids), plain, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), force(model, [(3, 2)], {4: 1.0}):
        forced, outs = run(model, ids), head_outputs(model, ids, [3])[3]
    torch.testing.assert_close(outs[0, 2, -1], values(model, ids)[3][0, 1, 4])
    assert torch.allclose(forced[:, :-1], plain[:, :-1], atol=1e-5)
    assert not torch.allclose(forced[:, -1], plain[:, -1], atol=1e-3)


def test_bad_input_is_named():
    model = build("llama")
    for given, error, match in (
        (([(0, 9)],), IndexError, r"no head \(0, 9\)"),
        (([(0, 0)], "zeros"), ValueError, "unknown mode 'zeros'; did you mean 'zero'"),
        (([(0, 0)], "mean"), ValueError, "mode 'mean' needs reference"),
    ):
        with pytest.raises(error, match=match), ablate(model, *given):
            pass
    with (
        pytest.raises(ValueError, match="resample needs the same"),
        ablate(model, [(0, 0)], "resample", reference=prompt(9)),
    ):
        run(model, prompt(12))
    with (
        pytest.raises(IndexError, match="there are 12 keys, none at position 12"),
        force(model, [(0, 0)], {12: 1.0}),
    ):
        run(model, prompt(12))
