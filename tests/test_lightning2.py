import math

import pytest
import torch

import foveate
from foveate import ops
from foveate.nn.linear.lightning2 import decay_slopes, lightning
from layer_checks import tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("lightning2", **{"dim": 32, "heads": 4} | options)


def plain(q, k, v, slopes):
    """The definition with explicit matrices, in float64."""
    q, k, v = (y.double() for y in (q, k, v))
    distance = (torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])).clamp(min=0)
    kept = torch.stack([torch.exp(-s * distance.double()) for s in slopes])
    return ((q @ k.mT) * kept).tril() @ v


def drawn(length=150, seed=0):
    return torch.randn(3, 2, 4, length, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [16, 64, 256])
@pytest.mark.parametrize("slopes", [(0.0, 0.01, 0.5, 4.0), (30.0, 90.0, 0.25, 0.1)])
def test_any_block_gives_the_definition(block, slopes):
    q, k, v = drawn()
    got, _ = lightning(q, k, v, slopes, block=block)
    torch.testing.assert_close(got.double(), plain(q, k, v, slopes), atol=2e-4, rtol=1e-5)


def test_without_decay_it_is_linear_attention_without_a_denominator():
    q, k, v = drawn()
    got, state = lightning(q, k, v, (0.0,) * 4)
    want, (s, _) = ops.linear_attention_causal(q, k, v, normalize=False)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(state, s, atol=1e-4, rtol=1e-5)


def test_goes_on_from_a_state_as_if_in_one_piece():
    (q, k, v), slopes = drawn(), decay_slopes("alibi", 4)
    want, last = lightning(q, k, v, slopes)
    outs, state = [], None
    for part in zip(*(y.split((70, 1, 79), 2) for y in (q, k, v)), strict=True):
        out, state = lightning(*part, slopes, state=state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), want, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(state, last, atol=1e-4, rtol=1e-5)


def test_the_layer_is_its_definition():
    layer, x = build(decay=(0.1, 0.2, 0.0, 2.0)), tokens(70)
    with torch.no_grad():
        parts = layer.qkv(x).unflatten(-1, (4, 3, 8)).permute(3, 0, 2, 1, 4)
        q, k = (y * y.sigmoid() for y in parts[:2])
        heads = plain(q, k, parts[2], layer.slopes).transpose(1, 2)
        heads = heads / (heads.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        gate = layer.readout.gate(x)
        want = layer.readout.out((heads.flatten(2) * gate * gate.sigmoid()).float())
        torch.testing.assert_close(layer(x), want, atol=2e-5, rtol=1e-4)


def test_presets_are_the_published_slopes():
    assert decay_slopes("alibi", 8) == tuple(2.0**-n for n in range(1, 9))
    assert decay_slopes("alibi", 6) == (2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3)
    assert decay_slopes("alibi", 1) == (2**-8,)
    first, last = (decay_slopes("minimax", 4, index, 3) for index in (0, 2))
    assert first == pytest.approx([2 ** (-2 * n) for n in range(1, 5)], rel=1e-4)
    assert all(0 < s < 1e-4 for s in last)
    assert decay_slopes("tnl", 4, 0, 2) == (0.0, 2.0, 4.0, 6.0)
    assert decay_slopes("tnl", 4, 1, 2) == (0.0, 1.0, 2.0, 3.0)
    assert decay_slopes((0.5, 1), 2) == (0.5, 1)


def test_slopes_of_alibi_are_those_of_transformers():
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    for heads in (1, 5, 8, 12):
        alibi = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)
        want = alibi[:, 0, 1]
        torch.testing.assert_close(torch.tensor(decay_slopes("alibi", heads)), want)


def test_the_decay_may_be_written_in_a_pattern():
    made = foveate.create("lightning2:decay=0.5/0.25", dim=32, heads=2)
    assert made.slopes == (0.5, 0.25)
    assert foveate.create("lightning2:decay=tnl", dim=32, heads=2).slopes == (0.0, 4.0)
    assert math.isclose(
        build(decay="minimax", index=1, layers=2).slopes[0], 2**-2 * 2e-5, rel_tol=1e-4
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decay": "slow"}, "unknown decay 'slow'; known: alibi, minimax, tnl"),
        ({"decay": (0.1, 0.2)}, "decay must be 4 slopes of at least 0"),
        ({"decay": (0.1, 0.2, 0.3, -0.1)}, "decay must be 4 slopes of at least 0"),
        ({"index": 1}, r"index must be in \[0, layers\), got 1 of 1"),
        ({"heads": 5}, "multiple of heads, got 5 heads"),
    ],
)
def test_refuses_what_does_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)
