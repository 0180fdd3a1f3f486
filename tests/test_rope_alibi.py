"""Rotary positions and a linear penalty on distance."""

import pytest
import torch

import foveate
from attached import check_equals_plain, check_padded_row_equals_row_alone
from foveate import ops
from foveate.attention.base import Call
from ops_tools import largest_output
from sparse_checks import causal_keep, check_common, qkv


def by_definition(q, k, v, slope, scale=None, softcap=None, keep=None):
    """Outputs and log-sums of the logits with their penalties, written out."""
    (_, heads, lq, dim), lk = q.shape, k.shape[2]
    k, v = (x.double().repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    logits = q.double() @ k.transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    distance = (torch.arange(lq)[:, None] + lk - lq - torch.arange(lk)).abs()
    for h in range(heads):
        logits[:, h] -= slope / (h + 1) * distance
    keep = causal_keep(lq, lk) if keep is None else keep & causal_keep(lq, lk)
    logits = logits.masked_fill(~keep, -torch.inf)
    out = torch.softmax(logits, -1).nan_to_num(0) @ v
    return out.to(q.dtype), torch.logsumexp(logits, -1).to(q.dtype)


@pytest.mark.parametrize(("lq", "lk"), [(75, 75), (33, 75), (1, 75), (600, 600), (300, 700)])
@pytest.mark.parametrize("slope", [1.0, 0.05])
def test_equals_the_definition(lq, lk, slope):
    q, k, v = qkv(lk, lq, batch=2)
    mechanism = foveate.create("rope_alibi", slope=slope)
    want, sums = by_definition(q, k, v, slope)
    torch.testing.assert_close(mechanism(q, k, v), want, atol=2e-5, rtol=1e-4)
    lse = mechanism.compute(q, k, v, Call()).lse
    torch.testing.assert_close(lse, sums, atol=5e-5, rtol=1e-5)


def test_a_slope_of_zero_is_plain_attention():
    q, k, v = qkv(75)
    out = foveate.create("rope_alibi", slope=0.0)(q, k, v)
    assert torch.equal(out, ops.attend(q, k, v, causal=True))


def test_scale_softcap_and_mask_are_honoured():
    q, k, v = qkv(75)
    ids = torch.arange(75) // 20
    mechanism = foveate.create("rope_alibi", slope=0.2)
    got = mechanism(q, k, v, scale=0.3, mask=ops.documents(ids), call=Call(softcap=2.0))
    want, _ = by_definition(q, k, v, 0.2, 0.3, 2.0, ids[:, None] == ids)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_far_along_the_sequence_it_is_as_exact_as_at_its_start():
    """A bias that grew with the position would be rounded to a thousandth here."""
    q, k, v = qkv(9000, 2, heads=2, kv_heads=1)
    want, _ = by_definition(q, k, v, 1.0)
    torch.testing.assert_close(foveate.create("rope_alibi")(q, k, v), want, atol=2e-6, rtol=1e-5)


def test_no_quadratic_tensor():
    q, k, v = qkv(4096, heads=2, kv_heads=1)
    mechanism = foveate.create("rope_alibi")
    assert largest_output(lambda: mechanism(q, k, v)) < 4096 * 4096 // 4


def test_gradients_are_exact():
    q, k, v = qkv(7, heads=2, kv_heads=1, dim=2, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(foveate.create("rope_alibi"), leaves)


def test_common_claims():
    check_common(foveate.create("rope_alibi", slope=0.3), *qkv(90, batch=2))


def test_inside_a_model(tiny_llama):
    check_equals_plain(tiny_llama, prefill="rope_alibi:slope=0.0", decode="rope_alibi:slope=0.0")
    check_padded_row_equals_row_alone(tiny_llama, prefill="rope_alibi", decode="rope_alibi")


def test_refuses_what_it_cannot_serve():
    with pytest.raises(ValueError, match="slope must be at least 0"):
        foveate.create("rope_alibi", slope=-1.0)
    with pytest.raises(ValueError, match="causal"):
        foveate.create("rope_alibi")(*qkv(10), causal=False)
