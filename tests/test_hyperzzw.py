import math

import pytest
import torch
from torch.nn.functional import conv2d

import foveate
from foveate.nn.linear.hyperzzw import GatedUnit, GlobalMix, Interaction, LocalMix, SlowNet


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("hyperzzw", **{"dim": 8, "size": 5, "hidden": 6} | options).double()


def image(rows=5, columns=5, batch=3, seed=1):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 8, rows, columns, generator=made, dtype=torch.float64)


def made(cls, *options, **more):
    torch.manual_seed(0)
    part = cls(*options, **more).double()
    with torch.no_grad():
        for name, p in part.named_parameters():
            if "bias" in name:  # which start at 0
                p += 0.1 * torch.randn_like(p)
    return part


def standardised(x):
    x = x - x.mean((2, 3), keepdim=True)
    return x / (x.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()


def test_a_kernel_is_a_product_of_sines_place_by_place():
    net = made(SlowNet, 4, (3, 5), 6, depth=2)
    with torch.no_grad():
        got = net()
        for i, row in enumerate((-1, 0, 1)):
            for j, column in enumerate((-1, -0.5, 0, 0.5, 1)):
                at = torch.tensor([row, column], dtype=torch.float64)
                h = (net.waves[0] @ at).sin()
                for layer in (0, 1):
                    mixed = net.mix[layer].weight @ h
                    h = (net.waves[layer + 1] @ at).sin() * mixed + net.bias[layer, i, j]
                torch.testing.assert_close(got[0, :, i, j], net.out.weight @ h)


def test_frequencies_follow_the_gamma_distribution_of_their_layer():
    torch.manual_seed(0)
    net = SlowNet(1, (3, 3), 4000, depth=2, omega=0.5)
    for layer in range(3):  # a gamma of shape a, times a normal direction: E w² = a (a + 1)
        a = 6 / (layer + 1)
        got = float((net.waves[layer].detach() / (2 * math.pi * 0.5)).square().mean())
        assert abs(got / (a * (a + 1)) - 1) < 0.15


def test_where_kernel_and_mixing_are_neutral_the_global_branch_is_the_identity(monkeypatch):
    part, x = made(GlobalMix, 8, 5, 6), image()
    with torch.no_grad():
        g = x * part.kernel()
        f = standardised(part.units[0](g) + part.units[1](x))
        want = torch.stack([torch.stack([g[b, c] @ f[b, c] for c in range(8)]) for b in range(3)])
        torch.testing.assert_close(part(x), want)
        monkeypatch.setattr(part.kernel, "forward", lambda: torch.ones(1, 8, 5, 5).double())
        eye = torch.eye(5).double().expand(3, 8, -1, -1)
        monkeypatch.setattr("foveate.nn.linear.hyperzzw.instance_norm", lambda y: eye)
        torch.testing.assert_close(part(x), x)


def test_the_gated_unit_is_its_definition():
    unit, x = made(GatedUnit, 8), image()
    with torch.no_grad():
        k, v, q, y = (part.weight[:, :, 0, 0] for part in (unit.k, unit.v, unit.q, unit.y))

        def cells(weight, z):
            return torch.einsum("oc,bchw->bohw", weight, z)

        inner = standardised(cells(k, x) * cells(q, cells(v, x)))
        inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2 + unit.bias
        torch.testing.assert_close(unit(x), cells(y, inner))


def test_local_kernels_change_with_the_map_and_with_no_other_of_the_batch():
    part, x = made(LocalMix, 8, 3, 6), image()
    with torch.no_grad():
        kernels = part.kernel(x.mean((2, 3)))
        assert (kernels[0] - kernels[1]).abs().max() > 1e-4
        for b in range(3):
            want = conv2d(x[b : b + 1], kernels[b][:, None], padding=1, groups=8) + part.bias
            torch.testing.assert_close(part(x)[b : b + 1], want)


def test_interaction_weighs_channels_and_cells_by_their_squared_means():
    part, x = made(Interaction, 8, 5, 6), image()
    with torch.no_grad():
        of_channels, of_cells, got = part.channels()[0, 0, :, 0], part.cells()[0, 0], part(x)
        for b in range(3):
            for c in range(8):
                channel = torch.sigmoid(of_channels[c] * x[b, c].mean() ** 2)
                cells = torch.sigmoid(of_cells * x[b].mean(0) ** 2)
                torch.testing.assert_close(got[b, c], x[b, c] * channel * cells)


def test_a_cell_sees_the_whole_map_through_its_row_and_its_column():
    part, x = made(GlobalMix, 8, 5, 6), image()
    other = x.clone()
    other[:, :, 4, 3] += 1.0
    with torch.no_grad():
        assert (part(other) - part(x)).abs().amax((0, 1)).min() > 1e-6


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"kernels must be odd widths, got \(4,\)"):
        build(kernels=(4,))
    with pytest.raises(ValueError, match="size must be at least 1"):
        build(size=0)
    with pytest.raises(ValueError, match="x must be of 5 × 5 cells, got 5 × 6"):
        build()(image(5, 6))
