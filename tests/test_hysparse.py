import pickle

import pytest
import torch

import foveate
from foveate import ops
from sparse_checks import causal_keep, softmax_over, tokens_of

SMALL = {"kv_heads": 2, "block": 4, "blocks": 3, "window": 6, "sparse_layers": 2}


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("hysparse", dim=32, heads=4, **{**SMALL, **options})


def tokens(length, batch=2, seed=1):
    return 3 * torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(seed))


def plain(layer, x):
    """The definition with L×L maps."""
    length = x.shape[1]
    tables = layer._tables(torch.arange(length))
    seen = causal_keep(length, length)
    q, k, v = layer.full.project(x, tables)
    probs = ops.grouped_logits(q, k, 8**-0.5).masked_fill(~seen, float("-inf")).softmax(-1)
    blocks = probs.split(layer.block, -1)
    score = torch.stack([b.amax(-1) for b in blocks], -1).view(2, 2, 2, length, -1).amax(2)
    keep = torch.zeros(2, 4, length, length, dtype=torch.bool)
    for b in range(2):
        for kv in range(2):
            for t in range(length):
                ranked = score[b, kv, t, : t // layer.block + 1].argsort(descending=True)
                for j in ranked[: layer.blocks].tolist():
                    keep[b, 2 * kv : 2 * kv + 2, t, j * layer.block : (j + 1) * layer.block] = True
    x = layer.full.finish(x, [softmax_over(q, k, v, seen)])
    far = torch.arange(length)[:, None] - torch.arange(length) >= layer.window
    for part in layer.sparse:
        q, own_k, own_v = part.project(x, tables)
        branches = [softmax_over(q, k, v, keep & seen), softmax_over(q, own_k, own_v, seen & ~far)]
        gates = torch.sigmoid(part.gate(part.norm(x))).view(2, length, 2, 4)
        total = sum(
            gates[:, :, i].transpose(1, 2)[..., None] * out for i, out in enumerate(branches)
        )
        x = x + part.out(total.transpose(1, 2).flatten(2))
        x = x + part.mlp(x)
    return x


def test_equals_the_definition():
    layer, x = build(), tokens(37)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(layer, x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prompt", [0, 1, 5, 23])
def test_steps_equal_the_parallel_form(prompt):
    layer, x, state, outs = build(), tokens(37), None, []
    with torch.no_grad():
        want = layer(x)
        if prompt:
            y, state = layer(x[:, :prompt], return_state=True)
            outs = [y]
        for t in range(prompt, 37):
            y, state = layer.step(x[:, t], state)
            outs.append(y[:, None])
    assert state.pos == 37
    torch.testing.assert_close(torch.cat(outs, 1), want, atol=1e-5, rtol=1e-4)


def test_chunks_equal_the_parallel_form():
    layer, x, state, outs = build(), tokens(37), None, []
    with torch.no_grad():
        for part in x.split((9, 17, 11), 1):
            y, state = layer(part, state=state, return_state=True)
            outs.append(y)
        torch.testing.assert_close(torch.cat(outs, 1), layer(x), atol=1e-5, rtol=1e-4)


def test_sparse_layers_store_no_more_than_their_window():
    layer, x = build(), tokens(100)
    with torch.no_grad():
        _, state = layer(x, return_state=True)
        _, state = layer.step(x[:, 0], state)
    held = [state.keys, state.values, *(y for pair in state.near for y in pair)]
    bytes_of = sum(y.untyped_storage().nbytes() for y in held)
    per_token = 2 * 2 * 8 * 4  # keys and values, two kv heads of 8, float32
    assert bytes_of == 2 * per_token * (101 + 2 * 6)


def test_full_budget_reads_all_shared_keys():
    layer, x = build(blocks=100), tokens(37)
    with torch.no_grad():
        q, k, v = layer.full.project(x, layer._tables(torch.arange(37)))
        _, lse = ops.attend(q, k, v, causal=True, return_lse=True)
        layout = layer.select(q, k, lse)
        other = torch.randn_like(q)
        got = ops.block_sparse(other, k, v, layout)
    want = ops.attend(other, k, v, causal=True)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_heads_of_a_kv_head_share_their_blocks_and_early_queries_have_fewer():
    layer, x = build(), tokens(37)
    with torch.no_grad():
        q, k, v = layer.full.project(x, layer._tables(torch.arange(37)))
        _, lse = ops.attend(q, k, v, causal=True, return_lse=True)
        layout = layer.select(q, k, lse)
    assert layout.indices.shape[1] == 2
    assert torch.equal(layout.counts[0, 0], (torch.arange(37) // 4 + 1).clamp_max(3).int())
    assert tokens_of(layout).shape == (2, 2, 37, 37)


def test_never_looks_ahead_and_rows_stand_alone():
    layer, x = build(), tokens(37)
    with torch.no_grad():
        want, changed = layer(x), x.clone()
        changed[:, 22:] = -7 * changed[:, 22:].flip(1)
        torch.testing.assert_close(layer(changed)[:, :22], want[:, :22], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer(x[1:]), want[1:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cut", [None, 20])
def test_a_mask_keeps_documents_apart(cut):
    layer, x = build(blocks=100, window=64), tokens(32)
    mask = ops.documents(torch.arange(32) // 16)
    with torch.no_grad():
        if cut is None:
            got = layer(x, mask=mask)
        else:
            first, state = layer(x[:, :cut], mask=mask, return_state=True)
            got = torch.cat((first, layer(x[:, cut:], mask=mask, state=state)), 1)
        torch.testing.assert_close(got[:, :16], layer(x[:, :16]), atol=1e-5, rtol=1e-4)
        # Rotation knows distances only: the second document gives what it gives alone.
        torch.testing.assert_close(got[:, 16:], layer(x[:, 16:]), atol=1e-5, rtol=1e-4)


def test_gradients_reach_every_weight():
    layer = build()
    layer(tokens(37)).square().mean().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in layer.parameters())


def test_bfloat16_meta_device_and_pickling():
    layer, x = build(), tokens(37)
    again = pickle.loads(pickle.dumps(layer))
    with torch.no_grad():
        assert torch.equal(again(x), layer(x))
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    empty = build(device="meta")
    assert all(p.is_meta for p in empty.parameters())


def test_attention_alone_and_the_full_layer_alone():
    with torch.no_grad():
        assert build(mlp=0)(tokens(9)).shape == (2, 9, 32)
        lone, x = build(sparse_layers=0, mlp=0), tokens(9)
        q, k, v = lone.full.project(x, lone._tables(torch.arange(9)))
        want = x + lone.full.out(ops.attend(q, k, v, causal=True).transpose(1, 2).flatten(2))
        torch.testing.assert_close(lone(x), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_heads": 3}, "kv_heads 3"),
        ({"blocks": 0}, "blocks"),
        ({"window": 0}, "window"),
        ({"sparse_layers": -1}, "sparse_layers"),
    ],
)
def test_refuses_sizes_that_do_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)


def test_refuses_contexts_and_both_sides():
    for given in ({"context": tokens(5)}, {"causal": False}):
        with pytest.raises(ValueError, match="causal self-attention"):
            build()(tokens(5), **given)


def test_the_command_line_shows_it(foveate_command):
    for args, word in ((["list", "--kind=module"], "hysparse"), (["show", "hysparse"], "dim")):
        code, out, _ = foveate_command(*args)
        assert code == 0 and word in out
    assert "sparse_layers" in out and "128" in out
