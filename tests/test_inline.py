import pytest
import torch
from torch.nn.functional import conv2d, gelu

import foveate
from foveate.nn.linear.inline import inline_attention


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("inline", **{"dim": 32, "heads": 4} | options).double()


def image(rows=5, columns=7, batch=2, seed=1):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 32, rows, columns, generator=made, dtype=torch.float64)


def heads(n, width=4, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(3, 1, 2, n, width, generator=made, dtype=torch.float64)


def weights(q, k):
    dots = q @ k.mT
    n = k.shape[2]
    return (dots - dots.mean(-1, keepdim=True)) * q.shape[3] ** -0.5 / n + 1 / n


def test_equals_the_weights_of_the_definition_which_sum_to_1():
    q, k, v = heads(20)
    w = weights(q, k)
    torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]))
    assert w.min() < 0
    torch.testing.assert_close(inline_attention(q, k, v), w @ v)


def test_it_is_softmax_to_first_order():
    q, k, v = heads(20)
    far = []
    for size in (1e-2, 1e-3):
        soft = ((size * q) @ k.mT * q.shape[3] ** -0.5).softmax(-1)
        far.append(float((inline_attention(size * q, k, v) - soft @ v).abs().max()))
    assert far[1] < far[0] / 50 and far[0] < 1e-3


def test_distinct_queries_have_distinct_rows_where_the_centred_keys_span_all_channels():
    q, k, _ = heads(20)
    centred = k - k.mean(2, keepdim=True)
    assert int(torch.linalg.matrix_rank(centred[0, 0])) == 4
    assert (weights(q, k) - weights(2 * q, k)).abs().amax(-1).min() > 1e-3
    few = k[:, :, :4]  # four keys span the channels, but centred they do not
    assert int(torch.linalg.matrix_rank((few - few.mean(2, keepdim=True))[0, 0])) == 3
    blind = torch.linalg.svd(few - few.mean(2, keepdim=True)).Vh[..., -1:, :]
    torch.testing.assert_close(weights(q + blind, few), weights(q, few))


def test_normalised_by_division_a_query_and_its_double_are_one():
    q, k, _ = heads(20)
    fq, fk = q.relu() + 1e-3, k.relu()
    for size in (1, 2):
        row = size * fq @ fk.mT
        row = row / row.sum(-1, keepdim=True)
        if size == 1:
            once = row
    torch.testing.assert_close(row, once)


def explicit(layer, x):
    tokens = x.flatten(2).mT
    q, k, v = layer.qkv(tokens).split(32, -1)
    per_head = [y.unflatten(-1, (4, 8)).transpose(1, 2) for y in (q, k, v)]
    fq, fk = layer.map(per_head[0]), layer.map(per_head[1])
    y = (weights(fq, fk) @ per_head[2]).transpose(1, 2).flatten(2)
    first, _, second = layer.kernel
    near = torch.zeros_like(x)
    for b in range(len(x)):
        mean = tokens[b].mean(0).view(4, 8)
        inner = torch.cat([first.weight[8 * h : 8 * h + 8, :, 0] @ mean[h] for h in range(4)])
        inner = gelu(inner + first.bias).view(4, 8)
        flat = [second.weight[72 * h : 72 * h + 72, :, 0] @ inner[h] for h in range(4)]
        kernels = (torch.cat(flat) + second.bias).view(32, 1, 3, 3)
        values = v[b].T.view(1, 32, *x.shape[2:])
        near[b] = conv2d(values, kernels, padding=1, groups=32)[0]
    return layer.out(y + near.flatten(2).mT).mT.unflatten(2, x.shape[2:])


@pytest.mark.parametrize("features", ["identity", "relu", "exp"])
def test_the_layer_is_its_definition_image_by_image(features):
    layer, x = build(features=features), image()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), explicit(layer, x), atol=1e-9, rtol=1e-7)


def test_every_window_is_a_map_of_its_own():
    layer, x = build(window=3), image(6, 9)
    whole = build()
    whole.load_state_dict(layer.state_dict())
    with torch.no_grad():
        got = layer(x)
        for row in (0, 3):
            for column in (0, 3, 6):
                at = (..., slice(row, row + 3), slice(column, column + 3))
                torch.testing.assert_close(got[at], whole(x[at]))


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="unknown feature map 'cosine'"):
        build(features="cosine")
    with pytest.raises(ValueError, match="multiple of heads, got 5"):
        build(heads=5)
    with pytest.raises(ValueError, match=r"multiples of window 4, got \(6, 8\)"):
        build(window=4)(image(6, 8))
