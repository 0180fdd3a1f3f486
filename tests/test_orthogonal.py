"""Principal axes and the Cayley map."""

import pytest
import torch

from foveate import ops


def points(n=200, dim=6, seed=0):
    made = torch.Generator().manual_seed(seed)
    spread = torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1])[:dim]
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=made)).Q
    return (torch.randn(n, dim, generator=made) * spread) @ turn + 7


def test_axes_are_those_of_the_singular_values():
    x = points()
    mean, axes = ops.principal_axes(ops.moments(x))
    torch.testing.assert_close(mean.float(), x.mean(0))
    away = (x - x.mean(0)).double()
    want = torch.linalg.svd(away, full_matrices=False).Vh.mT
    torch.testing.assert_close((want.mT @ axes).abs(), torch.eye(6).double(), atol=1e-5, rtol=0)


def test_moments_of_parts_add_up():
    x = torch.stack((points(), points(seed=1)))
    whole = ops.moments(x)
    parts = ops.moments(x[:, :50]) + ops.moments(x[:, 50:])
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(whole[1], ops.moments(x[1]))


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_a_cayley_image_is_a_rotation(n):
    x = 3 * torch.randn(2, n, n, generator=torch.Generator().manual_seed(n))
    turned = ops.cayley(x)
    torch.testing.assert_close(turned.mT @ turned, torch.eye(n).expand(2, n, n), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(turned), torch.ones(2), atol=1e-4, rtol=0)
    half = (x - x.mT) / 2
    one = torch.eye(n)
    want = torch.linalg.inv(one - half) @ (one + half)
    torch.testing.assert_close(turned, want, atol=1e-4, rtol=1e-4)


def test_it_is_the_identity_at_zero_and_where_nothing_turns():
    assert torch.equal(ops.cayley(torch.zeros(3, 3)), torch.eye(3))
    torch.testing.assert_close(ops.cayley(torch.ones(3, 3)), torch.eye(3))


def test_gradients_go_through():
    x = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.cayley, x)


def test_refuses_what_is_not_square():
    with pytest.raises(ValueError, match=r"square matrices .* got \(3, 4\)"):
        ops.cayley(torch.zeros(3, 4))
