import pytest
import torch

import foveate
from attached import check_equals_plain, check_padded_row_equals_row_alone, prompt, step_logits
from foveate import ops
from foveate.attention.base import Call, Memory
from ops_tools import largest_output
from sparse_checks import check_common, qkv

FREQUENCY = 0.9 ** torch.arange(8.0)


def longheads(**options):
    return foveate.create("longheads", **{"chunk": 8, "attention": 40} | options)


def tables(at):
    angles = at[..., None] * torch.cat((FREQUENCY, FREQUENCY))
    return angles.cos(), angles.sin()


def turned(x, at):
    """Rows x (n, D) rotated by positions (n,)."""
    return ops.rope(x[None, None], *tables(torch.as_tensor(at)[None]))[0, 0]


def rotated(length, lq=None, **options):
    """Unrotated q, k, v, and q and k rotated at their positions."""
    q, k, v = qkv(length, lq, **options)
    cos, sin = tables(torch.arange(length)[None])
    last = slice(length - q.shape[2], None)
    return (q, k, v), (ops.rope(q, cos[:, last], sin[:, last]), ops.rope(k, cos, sin), v)


def plain_chunk(q, k, v):
    """The representation of one chunk: q, k (w, D) unrotated, v (w, D)."""
    at = torch.arange(len(k))
    q, k = turned(q, at), turned(k, at)
    mean = (torch.softmax(q @ k.T / 4, -1) @ v).mean(0)
    return torch.softmax(mean @ k.T / 4, -1) @ k


def plain_row(q, k, v, t, chunk, count):
    """The output of query t of one head by the definition; q, k (L, D) unrotated."""
    own = t // chunk
    pieces = [slice(g * chunk, (g + 1) * chunk) for g in range(own)]
    scores = [float(q[t] @ plain_chunk(q[p], k[p], v[p])) for p in pieces]
    others = sorted(range(1, own - 1), key=lambda g: -scores[g])[: count - 3]
    chunks = sorted([0, own - 1, own, *others])
    tokens = [g * chunk + i for g in chunks for i in range(chunk) if g * chunk + i <= t]
    keys = turned(k[tokens], list(range(len(tokens))))
    query = turned(q[t : t + 1], [(count - 1) * chunk + t % chunk])[0]
    assert len(tokens) == (count - 1) * chunk + t % chunk + 1
    return torch.softmax(keys @ query / 4, -1) @ v[tokens]


@pytest.mark.parametrize("rope", [tables, None])
def test_equals_the_definition_row_by_row(rope):
    plain, turned_inputs = rotated(93)
    inputs = turned_inputs if rope else plain
    out = longheads()(*inputs, call=Call(rope=rope))
    dense = ops.attend(*inputs, causal=True)
    torch.testing.assert_close(out[:, :, :40], dense[:, :, :40], atol=1e-5, rtol=1e-4)
    if rope:
        q, k, v = plain
        for h in range(4):
            for t in (40, 41, 47, 48, 70, 88, 92):
                want = plain_row(q[0, h], k[0, h // 2], v[0, h // 2], t, 8, 5)
                torch.testing.assert_close(out[0, h, t], want, atol=2e-5, rtol=1e-4)
    assert (out[:, :, 40:] - dense[:, :, 40:]).abs().max() > 1e-2


@pytest.mark.parametrize("length", [93, 96])
def test_up_to_its_attention_length_it_is_dense(length):
    _, (q, k, v) = rotated(length)
    out = longheads(attention=96)(q, k, v, call=Call(rope=tables))
    torch.testing.assert_close(out, ops.attend(q, k, v, causal=True), atol=1e-5, rtol=1e-4)


def test_no_rotary_position_reaches_the_attention_length():
    asked = []

    def spy(at):
        asked.append(int(at.max()))
        return tables(at)

    _, (q, k, v) = rotated(93)
    longheads()(q, k, v, call=Call(rope=spy))
    assert asked[0] == 92  # undoing the model's own rotation
    assert max(asked[1:]) == 39


@pytest.mark.parametrize("cut", [30, 40, 57, 64, 92])
def test_decoding_after_a_prefill_equals_prefill(cut):
    _, (q, k, v) = rotated(93, batch=2)
    m, memory, outs = longheads(), Memory(), []
    edges = [(0, cut), *((t, t + 1) for t in range(cut, 93))]
    for lo, hi in edges:
        phase = "decode" if hi == lo + 1 and lo else "prefill"
        call = Call(rope=tables, memory=memory, phase=phase)
        outs.append(m(q[:, :, lo:hi], k[:, :, :hi], v[:, :, :hi], call=call))
    want = m(q, k, v, call=Call(rope=tables))
    torch.testing.assert_close(torch.cat(outs, 2), want, atol=1e-5, rtol=1e-4)


def test_representation_of_a_chunk_does_not_depend_on_where_it_lies():
    m = longheads()
    (q, k, v), _ = rotated(16)
    for x in (q, k, v):
        x[:, :, 8:] = x[:, :, :8]
    cos, sin = tables(torch.arange(16)[None])
    call = Call(rope=tables, state={0: {}})
    m.compute(ops.rope(q, cos, sin), ops.rope(k, cos, sin), v, call)
    kept = call.state[0]["kept"]
    torch.testing.assert_close(kept[:, :, 0], kept[:, :, 1], atol=1e-5, rtol=1e-4)
    want = plain_chunk(q[0, 3, :8], k[0, 1, :8], v[0, 1, :8])
    torch.testing.assert_close(kept[0, 3, 0], want, atol=1e-5, rtol=1e-4)


def test_first_own_and_last_full_chunk_are_always_read():
    q, _, _ = qkv(93)
    kept = torch.randn(1, 4, 11, 16, generator=torch.manual_seed(0))
    pos = torch.arange(40, 93)
    chosen = longheads()._chosen(q[:, :, 40:], kept, pos)
    for fixed in (torch.zeros_like(pos), pos // 8, pos // 8 - 1):
        assert (chosen == fixed[:, None]).any(-1).all()
    assert (chosen.diff(dim=-1) > 0).all()


def test_inside_a_model_short_texts_are_untouched_and_batches_are_padding_proof(tiny_llama):
    both = {"prefill": longheads(attention=48), "decode": longheads(attention=48)}
    check_equals_plain(tiny_llama, **both)
    acting = {"prefill": longheads(attention=24), "decode": longheads(attention=24)}
    check_padded_row_equals_row_alone(tiny_llama, **acting)


def test_inside_a_model_steps_equal_a_prefill(tiny_llama):
    both = {"prefill": longheads(attention=24), "decode": longheads(attention=24)}
    ids = prompt(40)
    steps = step_logits(tiny_llama, ids, 20, **both)
    with foveate.attach(tiny_llama, **both), torch.no_grad():
        whole = tiny_llama(ids).logits[:, 19:]
    torch.testing.assert_close(steps, whole, atol=1e-4, rtol=1e-4)


def test_decoding_without_the_queries_of_the_prompt_is_refused():
    q, k, v = qkv(93, 1)
    with pytest.raises(RuntimeError, match="both prefill and decode"):
        longheads()(q, k, v)


def test_common_claims():
    check_common(longheads(), *qkv(93, batch=2))


def test_no_quadratic_tensor():
    q, k, v = qkv(4096, heads=2, kv_heads=1)
    m = longheads(chunk=64, attention=256)
    assert largest_output(lambda: m(q, k, v)) < 4096 * 4096 // 8


@pytest.mark.parametrize("option", [{"attention": 44}, {"attention": 16}, {"chunk": 0}])
def test_refuses_bad_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        longheads(**option)


def test_refuses_values_of_another_width():
    q, k, v = qkv(93)
    with pytest.raises(ValueError, match="width 16, got 8"):
        longheads()(q, k, v[..., :8])
