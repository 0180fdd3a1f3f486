import math

import pytest
import torch

import foveate
from foveate import ops
from foveate.attention.base import Call, Memory
from ops_tools import largest_output
from sparse_checks import qkv, softmax_over, tokens_of


def adaspa(**options):
    small = {"block": 8, "dense_steps": 1, "searches": (1, 3), "sparsity": 0.7}
    return foveate.create("adaspa", **small | options)


def video(length, steps, *, rows=None, **options):
    """Denoising: q, k, v of every step, drifting; half of the heads look at few keys."""
    q, k, v = qkv(length, rows, **options)
    q = q * torch.tensor([0.2, 4.0, 0.2, 4.0]).view(1, 4, 1, 1)
    noise = torch.randn(steps, *k.shape, generator=torch.manual_seed(7))
    return [(q, k + noise[t] / (1 + t), v + noise[t] / 2) for t in range(steps)]


def run(m, tensors, **options):
    """Outputs of all denoising steps."""
    memory = Memory()
    return [
        m(*x, causal=False, call=Call(step=t, memory=memory, **options))
        for t, x in enumerate(tensors)
    ]


def plain_layout(q, k, lse, m):
    """The block map (H, nQ, nK) of one row by the definition: q (H, Lq, D), k (H, Lk, D)."""
    (heads, lq, dim), lk, b = q.shape, k.shape[1], m.block
    start, nk = lk - lq, math.ceil(lk / b)
    tiles = [
        [p - start for p in range(i * b, min((i + 1) * b, lk)) if p >= start]
        for i in range(start // b, nk)
    ]
    share = torch.zeros(heads, len(tiles), nk)
    weights = torch.exp(q @ k.transpose(1, 2) * dim**-0.5 - lse[..., None])
    for i, rows in enumerate(tiles):
        for j in range(nk):
            share[:, i, j] = weights[:, rows, j * b : (j + 1) * b].sum((1, 2))
    share = share / share.sum(-1, keepdim=True)

    def holds_text(number):
        return min((number + 1) * b, lk) > lk - m.text

    def pick(head, sparsity):
        keep = torch.zeros(len(tiles), nk, dtype=torch.bool)
        count = max(1, math.ceil(round((1 - sparsity) * nk, 6)))
        for i in range(len(tiles)):
            keep[i, share[head, i].argsort(descending=True, stable=True)[:count]] = True
            for j in range(nk):
                keep[i, j] |= holds_text(start // b + i) or holds_text(j)
        return keep

    chosen = [pick(h, m.sparsity) for h in range(heads)]
    if m.sparsity >= 1 / 3:
        recall = [float((share[h] * chosen[h]).sum(-1).mean()) for h in range(heads)]
        best = sorted(range(heads), key=lambda h: -recall[h])
        moved = min(sum(r > m.recall for r in recall), heads // 2)
        for h in best[:moved]:
            chosen[h] = pick(h, (1 + m.sparsity) / 2)
        for h in best[heads - moved :]:
            chosen[h] = pick(h, (3 * m.sparsity - 1) / 2)
    return torch.stack(chosen)


def by_definition(m, tensors):
    """Outputs of all steps of one row: dense, first search, cached choice, later searches."""
    outs, lse, layout = [], None, None
    for step, (q, k, v) in enumerate(tensors):
        wide = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        lq, lk, b = q.shape[2], k.shape[2], m.block
        keep = torch.ones(1, q.shape[1], lq, lk, dtype=torch.bool)
        if step >= m.dense_steps:
            if lse is None:
                lse = torch.logsumexp(q @ wide.transpose(-1, -2) * q.shape[3] ** -0.5, -1)
                layout = plain_layout(q[0], wide[0], lse[0], m)
            else:
                if step in m.searches:
                    layout = plain_layout(q[0], wide[0], lse[0], m)
                tile = (torch.arange(lq) + lk - lq) // b - (lk - lq) // b
                keep = layout[:, tile][..., torch.arange(lk) // b][None]
        outs.append(softmax_over(q, k, v, keep))
    return outs


@pytest.mark.parametrize(("length", "rows"), [(160, 160), (157, 157), (157, 45)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"text": 11},
        {"text": 5, "recall": 0.3},
        {"recall": 1.0},
        {"sparsity": 0.2},
        {"dense_steps": 0, "searches": (2, 4)},
    ],
)
def test_equals_the_definition(length, rows, options):
    m, tensors = adaspa(**options), video(length, 6, rows=rows)
    for got, want in zip(run(m, tensors), by_definition(m, tensors), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_heads_trade_blocks_at_the_same_mean():
    (q, k, _), *_ = video(160, 1)
    m = adaspa(sparsity=0.8, recall=0.5)
    lse = ops.attend(q, k, k, return_lse=True)[1]
    layout = m.search(q, k, lse, Call(causal=False))
    # Of 20 blocks; the heads of sharp queries are the ones that give.
    assert layout.counts[0, :, 0].tolist() == [6, 2, 6, 2]
    even = adaspa(sparsity=0.8, recall=1.0).search(q, k, lse, Call(causal=False))
    assert (even.counts == 4).all()
    assert layout.density(causal=False) == even.density(causal=False) == pytest.approx(0.2)


def test_exact_mass_sums_to_the_number_of_queries():
    (q, k, _), *_ = video(157, 1)
    lse = ops.attend(q, k, k, return_lse=True)[1]
    mass = ops.block_mass(q, k, lse, 8, causal=False)
    torch.testing.assert_close(mass.sum((2, 3)), torch.full((1, 4), 157.0))


def test_more_blocks_hold_more_mass():
    tensors, kept = video(160, 1) * 3, []
    for sparsity in (0.9, 0.7, 0.4, 0.2, 0.0):
        records = []
        run(adaspa(sparsity=sparsity), tensors, record=records.append)
        kept.append(records[-1].retained_mass)
    assert kept == sorted(kept) and kept[-1] == pytest.approx(1) and kept[0] < 0.9


def test_unchanged_tokens_give_the_same_choice_with_the_kept_lse():
    m, memory, found = adaspa(), Memory(), []
    for step in (1, 3):
        m(*video(157, 1)[0], causal=False, call=Call(step=step, memory=memory))
        found.append(memory[0][0]["layout"].to_bool())
    assert torch.equal(*found)


def test_no_sparsity_is_dense_at_every_step():
    tensors = video(157, 5)
    for out, x in zip(run(adaspa(sparsity=0.0), tensors), tensors, strict=True):
        torch.testing.assert_close(out, ops.attend(*x), atol=1e-5, rtol=1e-4)


def test_steps_before_the_first_search_are_dense_and_search_nothing():
    m, memory = adaspa(dense_steps=2), Memory()
    x = video(160, 1)[0]
    out = m(*x, causal=False, call=Call(step=1, memory=memory))
    torch.testing.assert_close(out, ops.attend(*x), atol=1e-5, rtol=1e-4)
    assert not memory


def test_a_call_that_finds_no_search_behind_it_searches():
    m, (x, y, *_) = adaspa(), video(160, 2)
    torch.testing.assert_close(
        m(*x, causal=False, call=Call(step=20)), ops.attend(*x), atol=1e-5, rtol=1e-4
    )
    memory = Memory()
    m(*(t[:, :, :80] for t in x), causal=False, call=Call(step=20, memory=memory))
    out = m(*y, causal=False, call=Call(step=21, memory=memory))
    torch.testing.assert_close(out, ops.attend(*y), atol=1e-5, rtol=1e-4)


def test_layers_and_batch_rows_search_for_themselves():
    m, memory, wide = adaspa(), Memory(), video(160, 4, batch=2)
    alone = [run(m, [tuple(x[b : b + 1] for x in step) for step in wide]) for b in (0, 1)]
    flipped = [tuple(x.flip(0) for x in step) for step in wide]
    for t, (here, there) in enumerate(zip(wide, flipped, strict=True)):
        for layer, x in enumerate((here, there)):
            call = Call(step=t, layer=layer, layers=2, memory=memory)
            out = m(*x, causal=False, call=call)
            want = torch.cat([alone[b][t] for b in ((0, 1) if layer == 0 else (1, 0))])
            torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)


def test_a_mask_is_searched_and_read_under():
    m, tensors, memory = adaspa(), video(160, 3), Memory()
    seen = (torch.arange(160) % 3 > 0).repeat(160, 1)
    seen[:16] = False
    for t, x in enumerate(tensors):
        call = Call(step=t, memory=memory)
        out = m(*x, causal=False, mask=ops.dense(seen), call=call)
    keep = tokens_of(memory[0][0]["layout"]) & seen
    torch.testing.assert_close(out, softmax_over(*tensors[2], keep), atol=1e-5, rtol=1e-4)
    assert keep.float().mean() < 0.5


def test_no_quadratic_tensor():
    q, k, v = qkv(4096, heads=2, kv_heads=1)
    m = adaspa(block=64)
    assert largest_output(lambda: run(m, [(q, k, v)] * 3)) < 4096 * 4096 // 8


@pytest.mark.parametrize(
    "option",
    [{"sparsity": 1.0}, {"sparsity": -0.1}, {"recall": 1.5}, {"text": -1}, {"searches": (-1,)}],
)
def test_refuses_bad_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        adaspa(**option)


def test_refuses_causal_attention():
    with pytest.raises(ValueError, match="noncausal attention only"):
        adaspa(dense_steps=0)(*qkv(64))
