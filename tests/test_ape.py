import math
from itertools import pairwise

import pytest
import torch

import foveate
from attached import generate, left_padded, prompt
from foveate import ops
from foveate.attention.base import Call, Shared

SYSTEM, DOCUMENTS = prompt(6, 9), [prompt(9, 11), prompt(12, 12), prompt(4, 13)]
ROWS = [prompt(7, 1), prompt(4, 2)]


def tensors(q_len=3, k_len=5, texts=(7, 4)):
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 4, q_len, 8), torch.randn(2, 2, 2, k_len, 8)
    documents = tuple(torch.randn(2, 1, 2, sum(texts), 8))
    return q, k, v, Shared(*torch.randn(2, 1, 2, 10, 8), documents)


def brute(q, k, v, shared, temperature, scale):
    """Plain reference: two softmaxes and the softmax of their log-sums, head by head."""
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(4):
            kv = h // 2
            far_k, far_v = (x[0, kv] for x in shared.documents)
            near_k = torch.cat((shared.k[0, kv], k[b, kv]))
            near_v = torch.cat((shared.v[0, kv], v[b, kv]))
            far = q[b, h] @ far_k.T * 8**-0.5 / temperature
            near = q[b, h] @ near_k.T * 8**-0.5
            rows, cols = near.shape
            late = torch.arange(cols)[None] > torch.arange(cols - rows, cols)[:, None]
            near = near.masked_fill(late, -math.inf)
            logs = torch.stack(
                (scale * temperature * far.logsumexp(-1), near.logsumexp(-1)), -1
            ).softmax(-1)
            parts = torch.softmax(far, -1) @ far_v, torch.softmax(near, -1) @ near_v
            out[b, h] = logs[:, :1] * parts[0] + logs[:, 1:] * parts[1]
    return out


@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.9, 0.9), (0.5, 1.0), (1.0, 0.7)])
@pytest.mark.parametrize("q_len", [1, 3])
def test_it_merges_two_attentions_as_defined(temperature, scale, q_len):
    q, k, v, shared = tensors(q_len)
    ape = foveate.create("ape", temperature=temperature, scale=scale)
    out = ape(q, k, v, call=Call(shared=shared))
    want = brute(q, k, v, shared, temperature, scale)
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-5)


def test_at_one_and_one_it_is_relay_and_dense_layers_are_at_one_and_one():
    q, k, v, shared = tensors()
    want = foveate.create("relay")(q, k, v, call=Call(shared=shared))
    plain = foveate.create("ape", temperature=1.0, scale=1.0)
    torch.testing.assert_close(plain(q, k, v, call=Call(shared=shared)), want)
    elsewhere = foveate.create("ape", dense_layers=(2,))
    torch.testing.assert_close(elsewhere(q, k, v, call=Call(2, 4, shared=shared)), want)
    assert (elsewhere(q, k, v, call=Call(1, 4, shared=shared)) - want).abs().max() > 1e-3


@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.8, 0.9)])
def test_every_document_twice_adds_log_two_to_their_log_sum(temperature, scale):
    q, k, v, shared = tensors()
    twice = shared._replace(documents=tuple(torch.cat((x, x), 2) for x in shared.documents))
    ape = foveate.create("ape", temperature=temperature, scale=scale)
    out = ape(q, k, v, call=Call(shared=twice))
    own = [torch.cat((x.expand(2, -1, -1, -1), y), 2) for x, y in ((shared.k, k), (shared.v, v))]
    near = ops.attend(q, *own, causal=True, return_lse=True)
    far = ops.attend(
        q,
        *(x.expand(2, -1, -1, -1) for x in shared.documents),
        scale=8**-0.5 / temperature,
        return_lse=True,
    )
    want, _ = ops.merge([near, (far[0], far[1] + math.log(2))], [1.0, temperature * scale])
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def logits(model, rows, **slots):
    with foveate.attach(model, **slots):
        return model(rows).logits


def test_one_document_at_one_and_one_is_sequential_attention(tiny_llama):
    held = foveate.prefix(tiny_llama, SYSTEM, documents=DOCUMENTS[:1])
    text = torch.cat((SYSTEM, DOCUMENTS[0], ROWS[0]), 1)
    with torch.no_grad():
        want = tiny_llama(text).logits[:, -7:]
    one = "ape:temperature=1.0,scale=1.0"
    got = logits(tiny_llama, ROWS[0], prefix=held, prefill=one, decode=one)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    tokens = generate(tiny_llama, ROWS[0], prefix=held, prefill=one, decode=one)
    assert torch.equal(tokens, generate(tiny_llama, text))


def test_documents_do_not_see_each_other_and_the_request_goes_on_from_the_longest(tiny_llama):
    held = foveate.prefix(tiny_llama, SYSTEM, documents=DOCUMENTS)
    assert (held.tokens, held.documents, held.end) == (6, (9, 12, 4), 18)
    text = torch.cat((SYSTEM, *DOCUMENTS, ROWS[0]), 1)
    n, starts = text.shape[1], [6, 15, 27, 31]
    at = torch.cat(
        [torch.arange(6), *(6 + torch.arange(x.shape[1]) for x in DOCUMENTS), 18 + torch.arange(7)]
    )
    visible = torch.ones(n, n, dtype=torch.bool).tril()
    for lo, hi in pairwise(starts):
        visible[lo:hi, 6:lo] = False
    with torch.no_grad():
        want = tiny_llama(text, attention_mask=visible[None, None], position_ids=at[None])
    got = logits(tiny_llama, ROWS[0], prefix=held)
    torch.testing.assert_close(got, want.logits[:, -7:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", ["ape", "ape:temperature=0.7,scale=1.0"])
def test_the_order_of_documents_does_not_matter(tiny_llama, spec):
    slots = {"prefill": spec, "decode": spec}
    orders = (DOCUMENTS, DOCUMENTS[::-1])
    first, second = (
        logits(tiny_llama, ROWS[0], prefix=foveate.prefix(tiny_llama, SYSTEM, documents=x), **slots)
        for x in orders
    )
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_padded_rows_generate_what_they_do_alone(tiny_llama, beams):
    held = foveate.prefix(tiny_llama, SYSTEM, documents=DOCUMENTS)
    slots = {"prefill": "ape", "decode": "ape", "prefix": held, "beams": beams}
    got = generate(tiny_llama, *left_padded(*ROWS), **slots)
    alone = torch.cat([generate(tiny_llama, row, **slots) for row in ROWS])
    assert torch.equal(got, alone)


@torch.no_grad()
def test_steps_equal_the_request_at_once(tiny_llama):
    held = foveate.prefix(tiny_llama, SYSTEM, documents=DOCUMENTS)
    slots = {"prefill": "ape", "decode": "ape", "prefix": held}
    whole, cache, outs = logits(tiny_llama, ROWS[0], **slots), None, []
    with foveate.attach(tiny_llama, **slots):
        for token in ROWS[0].split(1, 1):
            out = tiny_llama(token, past_key_values=cache)
            outs.append(out.logits)
            cache = out.past_key_values
    torch.testing.assert_close(torch.cat(outs, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["temperature", "scale"])
@pytest.mark.parametrize("value", [0.0, 1.1])
def test_bad_options_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be above 0 and at most 1, got {value}"):
        foveate.create("ape", **{name: value})
