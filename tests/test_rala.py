import pytest
import torch
from torch.nn.functional import elu

import foveate
from foveate.nn.linear.rala import key_weights


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("rala", **{"dim": 32, "heads": 4} | options).double()


def image(rows=5, columns=7, batch=2, seed=1):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 32, rows, columns, generator=made, dtype=torch.float64)


def parts(layer, x):
    """Features, values (B, 4, N, 8) and the gate (B, N, 32)."""
    tokens = x.flatten(2).mT
    q, k, v, o = (tokens @ layer.qkvo.weight.T).split(32, -1)
    heads = [y.unflatten(-1, (4, 8)).transpose(1, 2) for y in (q, k, v)]
    return elu(heads[0]) + 1, elu(heads[1]) + 1, heads[2], o


def turned(x, columns, theta):
    """Pairs (2i, 2i + 1) turned cell by cell: the first half by row, the second by column."""
    out = x.clone()
    for t in range(x.shape[2]):
        for i in range(4):
            place = t // columns if i < 2 else t % columns
            angle = torch.tensor(place * theta ** -float(i % 2), dtype=torch.float64)
            a, b = x[:, :, t, 2 * i], x[:, :, t, 2 * i + 1]
            out[:, :, t, 2 * i] = a * angle.cos() - b * angle.sin()
            out[:, :, t, 2 * i + 1] = a * angle.sin() + b * angle.cos()
    return out


def explicit(layer, x, theta):
    fq, fk, v, o = parts(layer, x)
    scores = (fq.mean(2)[:, :, None] * fk).sum(-1) / 8**0.5
    fk = fk * scores.softmax(-1)[..., None] * fk.shape[2]
    mass = (fq @ fk.mT).sum(-1, keepdim=True)
    if theta is not None:
        fq, fk = turned(fq, x.shape[3], theta), turned(fk, x.shape[3], theta)
    y = ((fq @ fk.mT) @ v / mass).transpose(1, 2).flatten(2)
    maps = v.transpose(1, 2).flatten(2).mT.unflatten(2, x.shape[2:])
    near = layer.local(maps) if layer.local is not None else torch.zeros_like(maps)
    return layer.out((y + near.flatten(2).mT) * o).mT.unflatten(2, x.shape[2:])


@pytest.mark.parametrize("theta", [None, 100.0])
@pytest.mark.parametrize("conv", [0, 3])
def test_equals_the_definition_with_explicit_weights(theta, conv):
    layer, x = build(theta=theta, conv=conv), image()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), explicit(layer, x, theta), atol=1e-5, rtol=1e-5)


def test_keys_count_1_in_the_mean_and_alike_where_the_queries_are_indifferent():
    layer, x = build(), image()
    fq, fk, *_ = parts(layer, x)
    alpha = key_weights(fq, fk)
    torch.testing.assert_close(alpha.mean(-1), torch.ones(2, 4, dtype=torch.float64))
    assert alpha.std() > 0.1
    same = key_weights(fq, fk[:, :, :1].expand_as(fk))
    torch.testing.assert_close(same, torch.ones_like(same))


def test_outputs_of_a_state_of_low_rank_get_a_higher_one_from_the_gate():
    layer, x = build(theta=None, conv=0), image(8, 8, 1)
    fq, fk, v, o = parts(layer, x)
    with torch.no_grad():
        layer.qkvo.weight[64:96] = layer.qkvo.weight[64:65].expand(32, -1)  # equal values
        fq, fk, v, o = parts(layer, x)
        plain = ((fq @ fk.mT) @ v / (fq @ fk.mT).sum(-1, keepdim=True)).transpose(1, 2).flatten(2)
        ranks = [int(torch.linalg.matrix_rank(y[0])) for y in (plain, plain * o)]
    assert ranks[0] <= 4 and ranks[1] >= 30


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 16}, "need a multiple of 4 channels, got 2"),
        ({"conv": 4}, "conv must be odd, or 0 for none, got 4"),
        ({"heads": 5}, "multiple of heads, got 5"),
    ],
)
def test_refuses_what_does_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)


def test_refuses_what_is_no_map():
    with pytest.raises(ValueError, match=r"x must be \(batch, 32, rows, columns\), got"):
        build()(torch.zeros(2, 9, 32).double())
