import pytest
import torch

import foveate
from foveate import ops
from ops_tools import largest_output
from sparse_checks import check_common, qkv, softmax_over


def sinklora(**options):
    return foveate.create("sinklora", **{"block": 8} | options)


def plain_keep(lq, lk, size, shifted, sinks):
    """Pairs read by heads that are shifted or not: groups spelled out as lists of starts."""
    keep = torch.zeros(1, len(shifted), lq, lk, dtype=torch.bool)
    for h, moved in enumerate(shifted):
        starts = [0, *range(size // 2 if moved else size, lk, size)]
        for row in range(lq):
            pos = row + lk - lq
            first = max(x for x in starts if x <= pos)
            keep[0, h, row, first : pos + 1] = True
            keep[0, h, row, : min(sinks, pos + 1)] = True
    return keep


@pytest.mark.parametrize(("lq", "lk"), [(96, 96), (93, 93), (40, 93)])
@pytest.mark.parametrize(
    ("rho", "sinks", "moved"), [(1.0, 0, [0, 0, 1, 1]), (0.5, 4, [0, 0, 0, 1]), (0.0, 4, [0] * 4)]
)
def test_equals_the_definition(lq, lk, rho, sinks, moved):
    q, k, v = qkv(lk, lq, batch=2)
    keep = plain_keep(lq, lk, 24, moved, sinks)
    out = sinklora(rho=rho, sinks=sinks)(q, k, v)
    torch.testing.assert_close(out, softmax_over(q, k, v, keep), atol=1e-5, rtol=1e-4)


def test_one_group_is_dense_but_for_shifted_heads():
    q, k, v = qkv(90)
    want = ops.attend(q, k, v, causal=True)
    out = sinklora(ratio=1.0, rho=1.0, sinks=0)(q, k, v)
    torch.testing.assert_close(out[:, :2], want[:, :2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out[:, :, :45], want[:, :, :45], atol=1e-5, rtol=1e-4)
    second = ops.attend(q[:, :, 45:], k[:, :, 45:], v[:, :, 45:], causal=True)
    torch.testing.assert_close(out[:, 2:, 45:], second[:, 2:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"rho": 1.0, "sinks": 0}, {}])
def test_no_head_sees_the_future(options):
    q, k, v = qkv(96)
    want = sinklora(**options)(q, k, v)
    for cut in (6, 12, 30, 84):
        x, y, z = (t.clone() for t in (q, k, v))
        for t in (x, y, z):
            t[:, :, cut:] = 50 * torch.randn_like(t[:, :, cut:])
        got = sinklora(**options)(x, y, z)[:, :, :cut]
        torch.testing.assert_close(got, want[:, :, :cut], atol=1e-5, rtol=1e-4)


def test_weights_add_up_to_one():
    q, k, _ = qkv(93)
    ones = torch.ones(1, 2, 93, 16)
    torch.testing.assert_close(sinklora()(q, k, ones), torch.ones(1, 4, 93, 16))


def test_layout_of_shifted_groups_matches_its_mask_tile_by_tile():
    from foveate.attention.sparse.sinklora import _groups

    mask = _groups(10, torch.tensor([0, 5])) & ops.causal()
    tiles = mask.to_layout(43, 43, 4).to_bool()
    pairs = torch.nn.functional.pad(mask.to_dense(43, 43), (0, 1, 0, 1))
    want = pairs.unflatten(3, (11, 4)).unflatten(2, (11, 4)).flatten(0, 1).any(-1).any(2)
    assert torch.equal(tiles.flatten(0, 1), want)


def test_common_claims():
    check_common(sinklora(), *qkv(90, batch=2))


def test_decoding_is_dense():
    q, k, v = qkv(93, 1)
    torch.testing.assert_close(sinklora()(q, k, v), ops.attend(q, k, v, causal=True))


def test_no_quadratic_tensor():
    q, k, v = qkv(4096, heads=2, kv_heads=1)
    m = foveate.create("sinklora", ratio=0.1)
    assert largest_output(lambda: m(q, k, v)) < 4096 * 4096 // 8


@pytest.mark.parametrize("option", [{"ratio": 0.0}, {"ratio": 1.5}, {"rho": -0.1}, {"sinks": -1}])
def test_refuses_bad_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        sinklora(**option)
