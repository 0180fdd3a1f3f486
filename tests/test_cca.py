import pytest
import torch

import foveate
from attached import (
    check_differs_from_plain,
    check_padded_row_equals_row_alone,
    generate,
    prompt,
    step_logits,
)
from foveate import ops
from foveate.attention._trained import ModelShape, write_trained
from foveate.attention.base import Call, Memory
from foveate.bench.train import train
from ops_tools import largest_output
from sparse_checks import check_common, qkv


def tables(positions):
    turns = positions[..., None] * 100.0 ** (-torch.arange(8) / 8)
    return torch.cat((turns, turns), -1).cos(), torch.cat((turns, turns), -1).sin()


def turned(x, pos, back=False):
    """One vector (16,) rotated to a position, or back from it."""
    move = ops.unrope if back else ops.rope
    return move(x.view(1, 1, 1, 16), *tables(torch.tensor([[pos]]))).view(16)


def plain_cca(q, k, v, group, window, core_rope="last", rotated=True, count_bias=False):
    """The definition, query by query: cores of whole groups before the window, then tokens."""
    (b, h, length, d), per = q.shape, q.shape[1] // k.shape[1]
    out = torch.zeros(b, h, length, v.shape[3])
    for i in range(b):
        for kv in range(k.shape[1]):
            cores = []
            for m in range(length // group):
                at, last = slice(m * group, (m + 1) * group), (m + 1) * group - 1
                heads = q[i, kv * per : (kv + 1) * per, last]
                a = torch.stack([(x @ k[i, kv, at].T / d**0.5).softmax(0) for x in heads]).mean(0)
                keys = k[i, kv, at]
                if rotated and core_rope == "last":
                    plain = [turned(x, m * group + j, back=True) for j, x in enumerate(keys)]
                    core = turned(a @ torch.stack(plain), last)
                else:
                    core = a @ keys
                cores.append((core, a @ v[i, kv, at]))
            for t in range(length):
                far = max(0, (t - window) // group)
                keys = [c for c, _ in cores[:far]] + list(k[i, kv, far * group : t + 1])
                values = [c for _, c in cores[:far]] + list(v[i, kv, far * group : t + 1])
                bias = torch.zeros(len(keys))
                bias[:far] = torch.tensor(float(group)).log() if count_bias else 0.0
                for head in range(kv * per, (kv + 1) * per):
                    logits = torch.stack(keys) @ q[i, head, t] / d**0.5 + bias
                    out[i, head, t] = logits.softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("core_rope", ["last", "post"])
@pytest.mark.parametrize(("group", "window"), [(4, 10), (8, 0), (5, 16)])
@pytest.mark.parametrize("count_bias", [False, True])
def test_equals_the_definition_query_by_query(core_rope, group, window, count_bias):
    q, k, v = qkv(53, batch=2)
    options = {"group": group, "window": window, "core_rope": core_rope, "count_bias": count_bias}
    got = foveate.create("cca", block=8, **options)(q, k, v, call=Call(rope=tables))
    torch.testing.assert_close(got, plain_cca(q, k, v, **options), atol=1e-5, rtol=1e-4)


def test_without_rotary_keys_are_pooled_as_they_are():
    q, k, v = qkv(53)
    got = foveate.create("cca", group=4, window=10, block=8)(q, k, v)
    want = plain_cca(q, k, v, 4, 10, rotated=False)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("core_rope", ["last", "post"])
@pytest.mark.parametrize("options", [{"group": 1, "window": 3}, {"group": 8, "window": 53}])
def test_groups_of_one_and_a_window_of_all_equal_dense(core_rope, options):
    q, k, v = qkv(53)
    made = foveate.create("cca", block=8, core_rope=core_rope, **options)
    got = made(q, k, v, call=Call(rope=tables))
    torch.testing.assert_close(got, ops.attend(q, k, v, causal=True), atol=1e-5, rtol=1e-4)


def test_every_earlier_token_is_represented_exactly_once():
    """With equal logits and one-hot values the output lists the weight of every token."""
    length, group = 45, 4
    q, k = torch.zeros(2, 1, 2, length, 16)
    v = torch.eye(length).expand(1, 2, -1, -1)
    got = foveate.create("cca", group=group, window=6, block=8, count_bias=True)(q, k, v)
    want = torch.ones(length, length).tril() / torch.arange(1, length + 1)[:, None]
    torch.testing.assert_close(got, want.expand(1, 2, -1, -1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cuts", [(30, *range(31, 54)), (1, 2, 3, 29, 30, 53), (7, 20, 53)])
def test_decoding_and_chunks_equal_prefill(cuts):
    q, k, v = qkv(53, batch=2)
    made, memory, start = foveate.create("cca", group=4, window=10, block=8), Memory(), 0
    parts = []
    for end in cuts:
        call = Call(memory=memory, rope=tables, phase="prefill" if end - start > 1 else "decode")
        parts.append(made(q[:, :, start:end], k[:, :, :end], v[:, :, :end], call=call))
        start = end
    whole = made(q, k, v, call=Call(rope=tables))
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-5, rtol=1e-4)


def test_groups_without_their_last_query_are_read_exactly():
    q, k, v = qkv(53)
    made = foveate.create("cca", group=4, window=4, block=8)
    early = made(q[:, :, 40:42], k[:, :, :42], v[:, :, :42])
    dense = ops.attend(q[:, :, 40:42], k[:, :, :42], v[:, :, :42], causal=True)
    torch.testing.assert_close(early, dense, atol=1e-5, rtol=1e-4)
    late = made(q[:, :, 40:], k, v)
    assert float((late - ops.attend(q[:, :, 40:], k, v, causal=True)).abs().max()) > 1e-3


def test_choice_and_cores_never_see_later_tokens():
    q, k, v = qkv(60)
    made = foveate.create("cca", group=4, window=5, block=8)
    want = made(q, k, v)
    for cut in (37, 40):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, cut:] = 50 * torch.randn_like(x[:, :, cut:])
        torch.testing.assert_close(made(*changed)[:, :, :cut], want[:, :, :cut])


def test_common_claims():
    check_common(foveate.create("cca", group=4, window=12, block=8), *qkv(90, batch=2))


def test_inside_a_model_decoding_equals_prefill_and_rows_stand_alone(tiny_llama):
    made = foveate.create("cca", group=4, window=8, block=8)
    slots = {"prefill": made, "decode": made}
    ids = prompt(40)
    with torch.no_grad(), foveate.attach(tiny_llama, prefill=made):
        whole = tiny_llama(ids).logits
    torch.testing.assert_close(
        step_logits(tiny_llama, ids, 21, **slots), whole[:, 20:], rtol=1e-4, atol=1e-4
    )
    check_differs_from_plain(tiny_llama, **slots)
    check_padded_row_equals_row_alone(tiny_llama, **slots)
    check_padded_row_equals_row_alone(tiny_llama, beams=2, **slots)


def test_a_prompt_read_densely_can_be_decoded_under_it(tiny_llama):
    made = foveate.create("cca", group=64, window=8, block=8)
    assert torch.equal(
        generate(tiny_llama, prompt(40), decode=made), generate(tiny_llama, prompt(40))
    )


SHAPE = ModelShape(layers=2, q_heads=4, kv_heads=2, dim=16)


def tuned(path, turn, **options):
    """The mechanism with matrices (layers, heads, 16, 16) from a file."""
    options = {"group": 4, "window": 10, **options}
    write_trained(path, foveate.create("cca", **options), SHAPE, {"turn": turn})
    return foveate.create("cca", **options, queries=str(path))


def test_tuned_queries_are_turned_before_rotation(tmp_path):
    q, k, v = qkv(60)
    turn = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3)) / 4
    made = tuned(tmp_path / "t", turn)
    plain = torch.stack([torch.stack([turned(x, p, True) for p, x in enumerate(h)]) for h in q[0]])
    other = plain @ turn[1]
    want = torch.stack([torch.stack([turned(x, p) for p, x in enumerate(h)]) for h in other])[None]
    call = Call(layer=1, layers=2, rope=tables)
    untuned = foveate.create("cca", group=4, window=10)
    got = made(q, k, v, call=call)
    torch.testing.assert_close(got, untuned(want, k, v, call=call), atol=1e-5, rtol=1e-4)
    same = tuned(tmp_path / "s", torch.eye(16).expand(2, 4, -1, -1))
    start = untuned(q, k, v, call=call)
    torch.testing.assert_close(same(q, k, v, call=call), start, atol=1e-5, rtol=1e-4)


def test_tuned_queries_decode_as_they_prefill(tmp_path, tiny_llama):
    turn = torch.eye(16) + torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3)) / 9
    made = tuned(tmp_path / "t", turn)
    check_padded_row_equals_row_alone(tiny_llama, prefill=made, decode=made)


def test_tuning_lowers_the_loss_and_leaves_the_model_as_it_is(tiny_llama, tmp_path):
    before = {n: p.clone() for n, p in tiny_llama.named_parameters()}
    text = torch.randint(3, 9, (2, 60), generator=torch.Generator().manual_seed(0))
    made = foveate.create("cca", group=4, window=10)
    result = train(tiny_llama, made, [text], steps=40, lr=1e-2)
    assert min(result.losses[-2:]) < result.losses[0] - 0.1
    for name, p in tiny_llama.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None
    result.write(tmp_path / "t")
    served = foveate.create("cca", group=4, window=10, queries=str(tmp_path / "t"))
    with torch.no_grad():
        for mechanism, lower in ((made, False), (served, True)):
            with foveate.attach(tiny_llama, prefill=mechanism):
                loss = float(tiny_llama(text[:1], labels=text[:1]).loss)
            assert (loss < result.losses[0] - 0.1) == lower


def test_refuses_files_and_options_that_do_not_fit(tmp_path):
    tuned(tmp_path / "t", torch.eye(16).expand(2, 4, -1, -1))
    with pytest.raises(ValueError, match="trained with group=4, but cca has group=8"):
        foveate.create("cca", group=8, window=10, queries=str(tmp_path / "t"))
    with pytest.raises(ValueError, match=r"wanted {.turn.: \(2, 4, 16, 16\)}"):
        tuned(tmp_path / "t", torch.eye(16).expand(2, 3, -1, -1))
    made = tuned(tmp_path / "t", torch.eye(16).expand(2, 4, -1, -1))
    with pytest.raises(ValueError, match="but this one has 3 layers"):
        made(*qkv(60), call=Call(layer=0, layers=3))


def test_no_quadratic_tensor():
    q, k, v = qkv(4096, heads=2, kv_heads=1)
    made = foveate.create("cca", group=32, window=256)
    assert largest_output(lambda: made(q, k, v)) < 4096 * 4096 // 8


@pytest.mark.parametrize(
    "options", [{"group": 0}, {"window": -1}, {"core_rope": "none"}, {"block": 0}]
)
def test_refuses_bad_options(options):
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        foveate.create("cca", **options)
