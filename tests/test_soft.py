import pytest
import torch
from torch.nn.functional import gelu, layer_norm

import foveate
from foveate.nn.linear.soft import NewtonInverse, gaussian, nystrom


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("soft", **{"dim": 32, "heads": 4} | options).double()


def image(rows=6, columns=8, batch=2, seed=1):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 32, rows, columns, generator=made, dtype=torch.float64)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel(a, b):
    rows = [[torch.exp(-(x - y).square().sum() / 2) for y in b] for x in a]
    return torch.stack([torch.stack(row) for row in rows])


def test_with_all_tokens_as_landmarks_it_is_the_full_kernel():
    x, v = draw(12, 5), draw(12, 3, seed=1)
    full = kernel(x, x)
    torch.testing.assert_close(gaussian(x, x), full)
    got = nystrom(x, x, v, normalize="none", ridge=0.0)
    torch.testing.assert_close(got, full @ v, atol=1e-9, rtol=1e-7)
    r = full.sum(-1, keepdim=True).rsqrt()
    got = nystrom(x, x, v, normalize="rows", ridge=0.0)
    torch.testing.assert_close(got, r * (full @ (r * v)), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("normalize", ["rows", "landmarks", "none"])
def test_equals_the_product_of_its_parts(normalize):
    x, marks, v = draw(20, 5), draw(6, 5, seed=2), draw(20, 3, seed=1)
    c, b = kernel(x, marks), kernel(marks, marks) + 1e-4 * torch.eye(6)
    inner = torch.linalg.inv(b)
    if normalize == "landmarks":
        d = torch.diag(b.sum(-1) ** -0.5)
        inner = d @ inner @ d
    a = c @ inner @ c.T
    if normalize == "rows":
        r = torch.diag(a.sum(-1).clamp_min(1e-6) ** -0.5)
        a = r @ a @ r
    torch.testing.assert_close(nystrom(x, marks, v, normalize=normalize), a @ v)


def test_landmarks_have_a_positive_definite_kernel():
    b = gaussian(draw(9, 4), draw(9, 4))
    torch.testing.assert_close(b, b.T)
    assert torch.linalg.eigvalsh(b).min() > 0


def test_the_iteration_finds_the_inverse_where_landmarks_are_near_and_where_they_are_far():
    near = gaussian(2 * draw(10, 8), 2 * draw(10, 8))
    spread = gaussian(0.7 * draw(10, 4), 0.7 * draw(10, 4))
    assert 20 < float(torch.linalg.cond(spread)) < 250
    for b in (torch.eye(10, dtype=torch.float64), near, spread):
        v = NewtonInverse.apply(b, 20)
        torch.testing.assert_close(v @ b, torch.eye(10, dtype=torch.float64), atol=1e-5, rtol=0)


def test_its_gradient_is_that_of_the_inverse():
    found = []
    for invert in (torch.linalg.inv, lambda b: NewtonInverse.apply(b, 30)):
        x = (0.8 * draw(8, 4)).requires_grad_()
        weight = draw(8, 8, seed=3)
        (invert(gaussian(x, x)) * weight).sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_the_layer_is_its_definition_head_by_head(ratio):
    layer, x = build(ratio=ratio), image()
    with torch.no_grad():
        tokens = x.flatten(2).mT
        q = tokens @ layer.q.weight.T / 8**0.25
        v = tokens @ layer.v.weight.T
        y = torch.zeros(2, 48, 32, dtype=torch.float64)
        for b in range(2):
            for h in range(4):
                at = slice(8 * h, 8 * h + 8)
                maps = q[b, :, at].T.view(8, 6, 8)
                tiles = maps.unfold(1, ratio, ratio).unfold(2, ratio, ratio)
                marks = torch.einsum("cijxy,dcxy->ijd", tiles, layer.pool.weight).flatten(0, 1)
                marks = gelu(layer_norm(marks, (8,), layer.norm.weight, layer.norm.bias))
                if ratio == 1:
                    far = kernel(marks, marks) @ v[b, :, at]
                else:
                    far = nystrom(q[b, :, at], marks, v[b, :, at])
                values = torch.nn.functional.pad(v[b, :, at].T.view(8, 6, 8), (1, 1, 1, 1))
                near = torch.zeros(8, 6, 8, dtype=torch.float64)
                for i in range(3):
                    for j in range(3):
                        weight = layer.local.weight[h, 0, i, j]
                        near += weight * values[:, i : i + 6, j : j + 8]
                y[b, :, at] = far + near.flatten(1).T
        want = layer.out(y).mT.unflatten(2, (6, 8))
        torch.testing.assert_close(layer(x), want, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"normalize": "columns"}, "normalize must be one of rows, landmarks, none, got 'columns'"),
        ({"inverse": "pinv"}, "inverse must be one of exact, newton, got 'pinv'"),
        ({"ratio": 0}, "ratio must be at least 1"),
        ({"heads": 5}, "multiple of heads, got 5"),
    ],
)
def test_refuses_what_does_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)


def test_refuses_maps_smaller_than_a_landmark():
    with pytest.raises(ValueError, match="must be of 4 cells aside, got 6 × 3"):
        build(ratio=4)(image(6, 3))
