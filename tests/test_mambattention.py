import copy

import pytest
import torch

import foveate
from foveate.nn.linear.mambattention import along_rows


def build(seed=0, **options):
    torch.manual_seed(seed)
    given = {"dim": 32, "heads": 4, "depth": 1, "states": 4, "expand": 1.0} | options
    return foveate.create("mambattention", **given)


def maps(rows=5, columns=7):
    return torch.randn(2, 32, rows, columns, generator=torch.Generator().manual_seed(1))


def attention(part, x):
    """x + attention(norm(x)) of one sequence (L, dim), head by head."""
    q, k, v = (part.norm(x) @ part.qkv.weight.T + part.qkv.bias).split(32, -1)
    outs = []
    for h in range(4):
        at = slice(8 * h, 8 * h + 8)
        outs.append((q[:, at] @ k[:, at].T / 8**0.5).softmax(-1) @ v[:, at])
    return x + torch.cat(outs, -1) @ part.out.weight.T + part.out.bias


def scans(part, x):
    """x + the projection of both directions of one sequence (L, dim)."""
    along = x + part.scans[0](part.norms[0](x)[None])[0]
    back = x.flip(0)
    against = (back + part.scans[1](part.norms[1](back)[None])[0]).flip(0)
    return x + torch.cat((along, against), -1) @ part.out.weight.T + part.out.bias


def test_is_its_definition_sequence_by_sequence():
    layer, x = build(), maps()
    block = layer.blocks[0]
    with torch.no_grad():
        want = x.clone()
        for b in range(2):
            for f in range(7):
                row = want[b, :, :, f].T
                want[b, :, :, f] = scans(block.rows, attention(block.attend, row)).T
        for b in range(2):
            for t in range(5):
                row = want[b, :, t].T
                want[b, :, t] = scans(block.columns, attention(block.attend, row)).T
        torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-4)


def test_every_element_comes_back_to_its_place():
    x = torch.arange(2.0 * 3 * 4 * 5).view(2, 3, 4, 5)
    seen = []
    assert torch.equal(along_rows(lambda y: (seen.append(y), y)[1], x), x)
    assert seen[0].shape == (10, 4, 3) and torch.equal(seen[0][7, 2], x[1, :, 2, 2])


def test_time_and_frequency_share_their_attention():
    layer = build()
    count = sum(p.numel() for p in layer.parameters())
    block = layer.blocks[0]
    parts = (block.attend, block.rows, block.columns)
    assert count == sum(p.numel() for part in parts for p in part.parameters())
    x = maps()
    layer(x).sum().backward()
    both = block.attend.out.bias.grad.clone()
    grads = []
    for axis in ("rows", "columns"):
        other = copy.deepcopy(layer)
        other.zero_grad()
        twin = copy.deepcopy(other.blocks[0].attend).requires_grad_(False)
        part, shared = other.blocks[0], other.blocks[0].attend
        first, second = (shared, twin) if axis == "rows" else (twin, shared)
        y = along_rows(lambda z, part=part, a=first: part.rows(a(z)), x)
        along_rows(lambda z, part=part, a=second: part.columns(a(z)), y.mT).sum().backward()
        grads.append(shared.out.bias.grad)
    assert all(g.abs().max() > 1e-3 for g in grads)
    torch.testing.assert_close(both, grads[0] + grads[1], atol=1e-3, rtol=1e-4)


def test_turned_maps_and_swapped_halves_are_the_same():
    layer, x = build(), maps()
    block = layer.blocks[0]
    with torch.no_grad():
        y = along_rows(lambda z: block.columns(block.attend(z)), x.mT).mT
        want = along_rows(lambda z: block.rows(block.attend(z)), y)
        block.rows, block.columns = block.columns, block.rows
        torch.testing.assert_close(layer(x.mT).mT, want, atol=1e-5, rtol=1e-4)


def test_both_ends_of_both_axes_are_seen():
    layer, x = build(), maps().requires_grad_()
    (grad,) = torch.autograd.grad(layer(x)[0, :, 2, 3].sum(), x)
    assert (grad[0].abs().amax(0) > 0).all() and (grad[1] == 0).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 5}, "multiple of heads, got 5"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"states": 0}, "states must be at least 1"),
    ],
)
def test_refuses_sizes_that_do_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)


def test_refuses_what_is_no_map():
    with pytest.raises(ValueError, match=r"x must be \(batch, 32, rows, columns\), got \(2, 32\)"):
        build()(torch.zeros(2, 32))
