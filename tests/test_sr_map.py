import pytest
import torch
from torch import nn

import foveate
from foveate.analysis._relevance import relevance
from foveate.analysis.sr_map import SrMap


def network(bias=False):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=bias),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, stride=2, bias=bias),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(4, 3, bias=bias),
        ).eval()


IMAGES = torch.randn(5, 2, 12, 12, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1, 2, 0, 1])


def logits(model):
    with torch.no_grad():
        return model(IMAGES).gather(1, TARGET[:, None])[:, 0]


def of(model, eps=0.0, alpha=None):
    return relevance(list(model.double()), IMAGES.double(), TARGET, eps=eps, alpha=alpha)


@pytest.mark.parametrize("alpha", [None, 1.0, 2.0])
def test_relevance_is_conserved_without_biases(alpha):
    model = network()
    want = logits(model).double()
    held = of(model, alpha=alpha)
    assert held.shape == IMAGES.shape
    if alpha is None:
        torch.testing.assert_close(held.sum((1, 2, 3)), want, rtol=1e-5, atol=1e-6)
        assert bool((of(model, eps=10.0).sum((1, 2, 3)).abs() < want.abs()).all())
    else:  # a unit without contributions of one sign keeps their part of its relevance
        assert bool(held.isfinite().all())


def test_alpha_one_shares_positive_contributions_by_their_size():
    model = nn.Sequential(nn.Linear(3, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -2.0, 3.0]])
    x = torch.tensor([[1.0, 1.0, 1.0]])
    zero = torch.zeros(1, dtype=torch.long)
    got = relevance(list(model), x, zero, eps=0.0, alpha=1.0)
    torch.testing.assert_close(got, torch.tensor([[0.5, 0.0, 1.5]]))
    got = relevance(list(model), x, zero, eps=0.0, alpha=2.0)
    torch.testing.assert_close(got, torch.tensor([[1.0, -2.0, 3.0]]))
    got = relevance(list(model), x, zero, eps=0.0, alpha=None)
    torch.testing.assert_close(got, torch.tensor([[1.0, -2.0, 3.0]]))


def test_with_alpha_two_negative_inputs_count_by_their_product():
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[-1.0, -1.0]])
    x = torch.tensor([[-3.0, 1.0]])
    got = relevance(list(model), x, torch.zeros(1, dtype=torch.long), eps=0.0, alpha=2.0)
    torch.testing.assert_close(got, torch.tensor([[4.0, -2.0]]))


def test_relevance_by_epsilon_is_gradient_times_input_of_a_relu_network():
    model = network().double()
    x = IMAGES.double().requires_grad_()
    model(x).gather(1, TARGET[:, None]).sum().backward()
    torch.testing.assert_close(of(model), (x * x.grad).detach())


def test_a_constant_map_is_nowhere_salient_and_a_spot_is():
    sharp = SrMap(patch=3, nearest=16, scales=(1.0, 0.5))
    maps = torch.full((2, 10, 12), 3.0)
    assert float(SrMap().saliency(maps).abs().max()) == pytest.approx(0, abs=1e-6)
    maps[1, 4:6, 7:9] = 5.0
    found = sharp.saliency(maps)
    assert float(found[0].abs().max()) == pytest.approx(0, abs=1e-6)
    assert float(found[1, 4:6, 7:9].mean()) > 3 * float(found[1].mean())
    assert float(found.min()) >= 0 and float(found.max()) < 1
    torch.testing.assert_close(sharp.saliency(10 * maps - 7), found, rtol=1e-4, atol=1e-5)


def test_saliency_of_one_scale_is_the_formula():
    maps = torch.rand(1, 4, 5, generator=torch.Generator().manual_seed(0))
    scaled = ((maps - maps.min()) / (maps.max() - maps.min()))[0]
    got = SrMap(patch=1, nearest=3, scales=(1.0,)).saliency(maps)[0]
    places = [(i, j) for i in range(4) for j in range(5)]
    for i, j in ((0, 0), (2, 3)):
        apart = sorted(
            float((scaled[i, j] - scaled[a, b]).abs())
            / (1 + 3 * ((a - i) ** 2 + (b - j) ** 2) ** 0.5 / 5)
            for a, b in places
            if (a, b) != (i, j)
        )
        want = 1 - torch.exp(-torch.tensor(apart[:3]).mean())
        torch.testing.assert_close(got[i, j], want, rtol=1e-3, atol=1e-4)


def test_record_holds_both_maps():
    record = SrMap(rule="alpha-beta")(network(bias=True), IMAGES, TARGET)
    assert record["relevance"].shape == record["saliency"].shape == (5, 12, 12)
    torch.testing.assert_close(record["saliency"], SrMap().saliency(record["relevance"]))


def test_bad_input_is_named():
    for options, words in (
        ({"rule": "gamma"}, "rule must be"),
        ({"alpha": 0.5}, "eps must be at least 0 and alpha 1, got 1e-06, 0.5"),
        ({"patch": 2}, "patch must be odd, got 2"),
        ({"nearest": 0}, "nearest must be at least 1"),
        ({"scales": (2.0,)}, r"scales must be in \(0, 1\], got \(2.0,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            foveate.create("sr_map", **options)
    with pytest.raises(TypeError, match="no rule of relevance for Tanh"):
        SrMap()(nn.Sequential(nn.Flatten(), nn.Tanh()), IMAGES, TARGET)
