import math

import pytest
import torch

from foveate import ops
from foveate.analysis.lora_limits import LoraLimits, power_features


def qkv(length=32, heads=2, kv_heads=1, dim=4):
    made = torch.Generator().manual_seed(0)
    shapes = ((heads, length, dim), (kv_heads, length, dim), (kv_heads, length, 8))
    return [torch.randn(1, *shape, generator=made, dtype=torch.float64) for shape in shapes]


def test_products_of_features_are_the_polynomial():
    x, y = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    s = x @ y.T
    for degree in (1, 2, 3):
        want = sum(s**j / math.factorial(j) for j in range(degree + 1))
        torch.testing.assert_close(power_features(x, degree) @ power_features(y, degree).T, want)


def test_outputs_are_attention_with_the_polynomial_in_place_of_exp():
    q, k, v = qkv()
    s = ops.grouped_logits(q, k, 0.5)
    weights = 1 + s + s**2 / 2
    want = (weights / weights.sum(-1, keepdim=True)) @ v
    torch.testing.assert_close(LoraLimits().attend(q, k, v), want)


def test_errors_grow_with_the_logits_and_fall_with_the_degree():
    low, high = (LoraLimits(degree=degree)(*qkv()) for degree in (2, 4))
    for name in ("output", "gradient"):
        assert bool((low[name].diff(dim=0) > 0).all()) and low[name].shape == (5, 2)
        assert bool((high[name] < low[name])[:3].all())
    assert bool((low["output"][0] < 0.02).all()) and bool((low["output"][-1] > 0.2).all())
    assert bool((low["rank"].diff(dim=0) >= 0).all()) and bool((low["rank"][-1] > 8).all())


def test_errors_are_those_of_the_scaled_queries():
    q, k, v = qkv(heads=1)
    largest = (0.5 * q @ k.mT).abs().max()
    record = LoraLimits(bounds=(3.0,))(q, k, v)
    scaled = q * 3 / largest
    exact, near = ops.attend(scaled, k, v), LoraLimits().attend(scaled, k, v)
    want = float((exact - near).norm() / exact.norm())
    assert float(record["output"]) == pytest.approx(want, rel=1e-4)
    p = torch.softmax(0.5 * scaled @ k.mT, -1)[0, 0]
    u, singular, vh = torch.linalg.svd(p)
    rank = int(record["rank"])
    for r, enough in ((rank, True), (rank - 1, False)):
        rest = p - u[:, :r] * singular[:r] @ vh[:r]
        assert bool(rest.norm() <= 0.01 * p.norm()) is enough


def test_bad_input_is_named():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="degree must be even, got 3"):
        LoraLimits(degree=3)
    with pytest.raises(ValueError, match="bounds must be above 0"):
        LoraLimits(bounds=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"eps must be in \(0, 1\), got 1"):
        LoraLimits(eps=1.0)
    with pytest.raises(ValueError, match="takes one row, got a batch of 2"):
        LoraLimits()(*(x.repeat(2, 1, 1, 1) for x in (q, k, v)))
    with pytest.raises(ValueError, match="not all 0"):
        LoraLimits()(0 * q, k, v)
    with pytest.raises(ValueError, match="dimension 64 has 17043521 features of degree 4"):
        power_features(torch.ones(2, 64), 4)
