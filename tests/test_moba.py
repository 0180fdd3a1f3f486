import pytest
import torch

import foveate
from foveate import ops
from foveate.attention.base import Call
from ops_tools import largest_output
from sparse_checks import causal_keep, check_common, chosen, qkv, softmax_over, tokens_of


def plain_routes(q, k, block, top_k):
    """Pairs read, by the definition and token by token: (B, Hq, Lq, Lk)."""
    (b, h, lq, _), (_, kv, lk, _) = q.shape, k.shape
    keep = torch.zeros(b, h, lq, lk, dtype=torch.bool)
    for i in range(b):
        for head in range(h):
            keys = k[i, head // (h // kv)]
            for row in range(lq):
                pos = row + lk - lq
                own = pos // block
                gates = [
                    float(q[i, head, row] @ keys[j * block :][:block].mean(0)) for j in range(own)
                ]
                best = sorted(range(own), key=lambda j: -gates[j])[: top_k - 1]
                for j in [*best, own]:
                    keep[i, head, row, j * block : min((j + 1) * block, pos + 1)] = True
    return keep


@pytest.mark.parametrize(("lq", "lk"), [(80, 80), (75, 75), (33, 75)])
@pytest.mark.parametrize(("block", "top_k"), [(8, 3), (10, 2)])
def test_equals_the_definition_token_by_token(lq, lk, block, top_k):
    q, k, v = qkv(lk, lq, batch=2)
    mechanism = foveate.create("moba", block=block, top_k=top_k)
    keep = plain_routes(q, k, block, top_k)
    read = tokens_of(chosen(mechanism, q, k)) & causal_keep(lq, lk)
    assert torch.equal(read, keep)
    out = mechanism(q, k, v)
    torch.testing.assert_close(out, softmax_over(q, k, v, keep), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("top_k", [10, 30])
def test_full_budget_equals_dense(top_k):
    q, k, v = qkv(75)
    out = foveate.create("moba", block=8, top_k=top_k)(q, k, v)
    torch.testing.assert_close(out, ops.attend(q, k, v, causal=True), atol=1e-5, rtol=1e-4)


def test_top_1_is_attention_inside_blocks():
    q, k, v = qkv(75)
    inside = torch.arange(75) // 8
    keep = (inside[:, None] == inside) & causal_keep(75, 75)
    out = foveate.create("moba", block=8, top_k=1)(q, k, v)
    torch.testing.assert_close(out, softmax_over(q, k, v, keep), atol=1e-5, rtol=1e-4)


def test_choice_never_sees_later_tokens():
    q, k, v = qkv(80)
    mechanism = foveate.create("moba", block=8, top_k=3)
    want = mechanism(q, k, v)
    for cut in (50, 56):
        x, y, z = (t.clone() for t in (q, k, v))
        for t in (x, y, z):
            t[:, :, cut:] = 50 * torch.randn_like(t[:, :, cut:])
        assert torch.equal(
            chosen(mechanism, x, y).to_bool()[:, :, :cut],
            chosen(mechanism, q, k).to_bool()[:, :, :cut],
        )
        got = mechanism(x, y, z)[:, :, :cut]
        torch.testing.assert_close(got, want[:, :, :cut], atol=1e-5, rtol=1e-4)


def test_every_token_reads_its_own_block_and_early_tokens_read_fewer():
    q, k, _ = qkv(75)
    layout = chosen(foveate.create("moba", block=8, top_k=4), q, k)
    own = torch.arange(75) // 8
    assert layout.to_bool()[..., torch.arange(75), own].all()
    assert torch.equal(layout.counts, (own + 1).clamp_max(4).int().expand(1, 4, -1))


def test_equal_gates_still_give_exactly_top_k_blocks():
    q, k, _ = qkv(75)
    layout = chosen(foveate.create("moba", block=8, top_k=4), torch.zeros_like(q), k)
    assert (layout.counts[:, :, 32:] == 4).all()


@pytest.mark.parametrize("length", [40, 65, 75])
def test_decode_equals_prefill_row(length):
    q, k, v = qkv(75, batch=2)
    mechanism = foveate.create("moba", block=8, top_k=3)
    step = mechanism(q[:, :, length - 1 : length], k[:, :, :length], v[:, :, :length])
    want = mechanism(q, k, v)[:, :, length - 1 : length]
    torch.testing.assert_close(step, want, atol=1e-5, rtol=1e-4)


def test_chunked_prefill_equals_prefill():
    q, k, v = qkv(75)
    mechanism = foveate.create("moba", block=8, top_k=3)
    parts = [mechanism(q[:, :, a:z], k[:, :, :z], v[:, :, :z]) for a, z in ((0, 29), (29, 75))]
    torch.testing.assert_close(torch.cat(parts, 2), mechanism(q, k, v), atol=1e-5, rtol=1e-4)


def test_a_mask_is_applied_inside_the_choice():
    q, k, v = qkv(75, batch=2)
    documents = torch.stack([torch.arange(75) // 30, torch.arange(75) // 50])
    keep = plain_routes(q, k, 8, 3) & (documents[:, None, :, None] == documents[:, None, None])
    out = foveate.create("moba", block=8, top_k=3)(q, k, v, mask=ops.documents(documents))
    torch.testing.assert_close(out, softmax_over(q, k, v, keep), atol=1e-5, rtol=1e-4)


def test_common_claims():
    check_common(foveate.create("moba", block=8, top_k=4), *qkv(90, batch=2))


def test_gradients_are_exact():
    q, k, v = qkv(7, heads=2, kv_heads=1, dim=2, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(foveate.create("moba", block=2, top_k=2), leaves)


def test_no_quadratic_tensor():
    q, k, v = qkv(4096, heads=2, kv_heads=1)
    mechanism = foveate.create("moba", block=256, top_k=3)
    assert largest_output(lambda: mechanism(q, k, v)) < 4096 * 4096 // 8


def test_more_blocks_keep_more_mass():
    q, k, v = qkv(256)
    records = []
    for top_k in (2, 4, 8):
        mechanism = foveate.create("moba", block=16, top_k=top_k)
        mechanism(q, k, v, call=Call(record=records.append))
    mass, density = ([getattr(r, name) for r in records] for name in ("retained_mass", "density"))
    assert mass == sorted(mass) and density == sorted(density)
    assert mass[1] > density[1]


def test_refuses_bad_options_and_attention_to_both_sides():
    with pytest.raises(ValueError, match="top_k"):
        foveate.create("moba", top_k=0)
    with pytest.raises(ValueError, match="causal"):
        foveate.create("moba")(*qkv(30), causal=False)
