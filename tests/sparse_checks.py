"""What the tests of sparse mechanisms share: inputs, a plain masked softmax, common claims."""

import torch

from foveate.attention.base import Call


def qkv(lk, lq=None, *, batch=1, heads=4, kv_heads=2, dim=16, seed=0, dtype=torch.float32):
    """Random q, k, v; keys share a direction by stretches, so that blocks differ."""
    g = torch.Generator().manual_seed(seed)
    lq = lk if lq is None else lq
    q = 2 * torch.randn(batch, heads, lq, dim, generator=g)
    k, v = (torch.randn(batch, kv_heads, lk, dim, generator=g) for _ in range(2))
    themes = torch.randn(batch, kv_heads, lk // 10 + 1, dim, generator=g)
    k = k + themes.repeat_interleave(10, 2)[:, :, :lk]
    return q.to(dtype), k.to(dtype), v.to(dtype)


def causal_keep(lq, lk):
    return torch.arange(lk) <= torch.arange(lq)[:, None] + lk - lq


def softmax_over(q, k, v, keep):
    """Plain attention over the pairs of keep (…, Lq, Lk); rows without keys give 0."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    weights = torch.softmax(scores.masked_fill(~keep, float("-inf")), -1).nan_to_num(0)
    return weights @ v


def tokens_of(layout):
    """Bool (B, H, Lq, Lk): the pairs of a layout's blocks."""
    (lq, lk), (bq, bk) = layout.lengths, layout.block
    pos = torch.arange(lq) + max(lk - lq, 0)
    return layout.to_bool()[:, :, pos // bq - pos[0] // bq][..., torch.arange(lk) // bk]


def chosen(mechanism, q, k, causal=True):
    return mechanism.select(q, k, Call(causal=causal))


def check_common(mechanism, q, k, v):
    """Claims that hold for every causal mechanism; q, k, v of at least two batch rows."""
    out = mechanism(q, k, v)
    alone = mechanism(q[1:], k[1:], v[1:])
    torch.testing.assert_close(out[1:], alone, atol=1e-5, rtol=1e-4)

    later = v.clone()
    later[:, :, -20:] += 100
    past = q.shape[2] - 20
    torch.testing.assert_close(mechanism(q, k, later)[:, :, :past], out[:, :, :past])

    short = (x.bfloat16() for x in (q, k, v))
    short = tuple(short)
    exact = mechanism(*(x.float() for x in short))
    assert mechanism(*short).dtype == torch.bfloat16
    torch.testing.assert_close(mechanism(*short).float(), exact, atol=0.03, rtol=0.03)

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    grown = mechanism(*leaves)
    torch.testing.assert_close(grown, out, atol=1e-5, rtol=1e-4)
    grown.square().sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in leaves)

    valid = torch.ones(q.shape[0], k.shape[2], dtype=torch.bool)
    valid[1, :30] = False
    padded = mechanism(q, k, v, call=Call(valid=valid))
    rows = q.shape[2] - max(0, 30 - (k.shape[2] - q.shape[2]))
    alone = mechanism(q[1:, :, -rows:], k[1:, :, 30:], v[1:, :, 30:])
    torch.testing.assert_close(padded[1:, :, -rows:], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(padded[:1], out[:1], atol=1e-5, rtol=1e-4)
