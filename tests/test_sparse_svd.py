import pytest
import torch

from attached import left_padded, prompt
from foveate.analysis._bilinear import (
    Scores,
    contributions,
    fewest,
    note_positions,
    singular_directions,
)
from foveate.analysis.sparse_svd import SparseSvd, trace
from foveate.hf.parts import Parts, run
from foveate.hf.watch import watch
from tiny_models import build


def made_of(model, ids, layer=1):
    """What a layer's queries and keys are made of."""
    parts, tables, streams, held = Parts(model), {}, [], []
    hook = note_positions(parts, layer, tables)

    def attention(seen):
        if seen.layer == layer:
            held.append(Scores(parts, seen, streams[-1], tables[layer]))

    with (
        torch.no_grad(),
        watch(model, attention=attention, block_in=lambda _, x: streams.append(x)),
    ):
        run(model, ids)
    hook.remove()
    return held[0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2"])
def test_parts_sum_to_the_relative_logit(family):
    model, ids = build(family), prompt(12)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    made = made_of(model, ids)
    seen, head = made.seen, 3
    for text, row, key, rest in made.pairs(head, 5, True):
        x, w_q, w_k, against, turn = made.pair(head, text, row, key, rest)
        form = singular_directions(w_q, w_k, turn)
        logits = seen.scale * (seen.k[0, head // made.group] @ seen.q[0, head, row])
        want = float(logits[key] - logits[rest].mean())
        got = float(contributions(x, w_q, against, form.u).sum())
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5)
        whole = (x @ form.u * form.sizes) @ (form.v.T @ made.x[0, key])
        assert float(made.scale * whole) == pytest.approx(float(logits[key]), rel=1e-4, abs=1e-5)
        for basis in (form.u, form.v):
            torch.testing.assert_close(basis.T @ basis, torch.eye(16).double())
        without = x - form.u @ (form.u.T @ x)
        assert float((w_q @ without).abs().max()) < 1e-9


def test_the_form_is_that_of_the_whole_matrix():
    torch.manual_seed(0)
    w_q, w_k, turn = torch.randn(4, 9), torch.randn(4, 9), torch.randn(4, 4)
    form = singular_directions(w_q, w_k, turn)
    torch.testing.assert_close(form.u * form.sizes @ form.v.T, w_q.T @ turn @ w_k)
    plain = singular_directions(w_q, w_k)
    torch.testing.assert_close(plain.u * plain.sizes @ plain.v.T, w_q.T @ w_k)


def test_fewest_parts():
    assert fewest(torch.tensor([1.0, 6.0, 3.0]), 0.6).tolist() == [1]
    assert fewest(torch.tensor([1.0, 6.0, 3.0]), 0.7).tolist() == [1, 2]
    assert fewest(torch.tensor([8.0, -3.0, 1.0]), 0.7).tolist() == [0]
    assert len(fewest(torch.ones(4), 1.0)) == 4


def test_a_head_of_one_direction_needs_one():
    """Queries and keys along one direction of the stream: one part carries all."""
    model, ids = build("llama"), prompt(16)
    with torch.no_grad():
        attention = model.model.layers[2].self_attn
        for weight in (attention.q_proj.weight, attention.k_proj.weight):
            heads = weight.view(-1, 16, 64)
            u, sizes, v = torch.linalg.svd(heads, full_matrices=False)
            sizes[:, 1:] *= 1e-3
            heads.copy_(u * sizes[:, None] @ v)
    record = SparseSvd()(model, ids, heads=[(2, 0), (2, 1)])
    counted = record["pairs"] > 0
    assert counted[2, :2].all() and int(counted.sum()) == 2
    assert float(record["directions"][2, :2].max()) == 1


def test_another_basis_spreads_what_one_direction_carries():
    torch.manual_seed(0)
    w_q, w_k = torch.randn(16, 40), torch.randn(16, 40)
    u = singular_directions(w_q, w_k).u
    against = torch.linalg.lstsq(w_q.T, u[:, :1]).solution[:, 0]
    mix = torch.linalg.qr(torch.randn(16, 16))[0]
    assert fewest(contributions(u[:, 0], w_q, against, u), 0.7).tolist() == [0]
    spread = contributions(u[:, 0], w_q, against, u @ mix)
    torch.testing.assert_close(spread, mix[0].square(), rtol=1e-3, atol=1e-5)
    assert len(fewest(spread, 0.7)) > 2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_traced_sums_to_the_score(family):
    """At each end heads, feed-forward parts and embedding add up to what the directions carry."""
    model, ids = build(family), prompt(12)
    made = made_of(model, ids, layer=2)
    row, key = next((r, k) for _, r, k, _ in made.pairs(3, 3, True) if k < r)
    rest = torch.tensor([i for i in range(row + 1) if i != key])
    x, w_q, w_k, against, turn = made.pair(3, 0, row, key, rest)
    form = singular_directions(w_q, w_k, turn)
    parts_of = contributions(x, w_q, against, form.u)
    kept = fewest(parts_of, 0.7)
    of_key = made.scale * (form.u.T @ x) * form.sizes * (form.v.T @ made.x[0, key])
    want = torch.stack((parts_of[kept].sum(), of_key[kept].sum())).float()
    found = trace(model, ids, (2, 3), row, key)
    held = {}
    parts = Parts(model)

    def keep(name):
        return lambda layer, x: held.__setitem__((name, layer), x[0, [row, key]])

    with torch.no_grad(), watch(model, block_in=keep("in"), mlp_out=keep("mlp")):
        run(model, ids)
    rest = held["in", 0] + held["mlp", 0] + held["mlp", 1]
    for layer in (0, 1):
        bias = parts.projection(layer)[1]
        rest = rest if bias is None else rest + bias
    added = torch.stack((found.query, found.key)).sum((1, 2)) + (rest * found.signal).sum(1)
    torch.testing.assert_close(added, want, rtol=1e-3, atol=1e-4)
    assert float(found.query[2:].abs().max()) == 0 and float(found.key[:2].abs().max()) > 0


def test_padded_texts_are_measured_as_alone():
    model, row = build("llama"), prompt(9, 2)
    ids, mask = left_padded(prompt(14, 1)[:, :9], row)
    wide = torch.nn.functional.pad(ids, (5, 0)), torch.nn.functional.pad(mask, (5, 0))
    measure = SparseSvd(pairs=100)
    both = measure(model, dict(zip(("input_ids", "attention_mask"), wide, strict=True)))
    alone = measure(model, ids)
    for name in ("directions", "score", "pairs"):
        torch.testing.assert_close(both[name], alone[name], rtol=1e-3, atol=1e-4, equal_nan=True)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        SparseSvd(share=0.0)
    with pytest.raises(ValueError, match="pairs must be at least 1"):
        SparseSvd(pairs=0)
    with pytest.raises(ValueError, match="not above the others'"):
        for key in range(8):
            trace(build("llama"), prompt(8), (1, 0), 7, key)
    with pytest.raises(TypeError, match="no turned projection"):
        SparseSvd()(build("qwen3"), prompt(8), heads=[(1, 0)])
