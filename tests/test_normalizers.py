import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from foveate import ops
from foveate.ops.normalizers import NORMALIZERS
from ops_tools import assert_same, held_to_reference, qkv
from test_attend import masks


@dataclass(frozen=True)
class Standardized(ops.Normalizer):
    """(s - mean) / sqrt(1 + variance) over the visible keys of a row: it needs two passes."""

    passes: ClassVar[int] = 2

    def init(self, like):
        return {name: torch.zeros_like(like) for name in ("count", "sum", "squares")}

    def update(self, stats, scores, visible):
        seen = scores.masked_fill(~visible, 0.0)
        new = {"count": visible.to(scores.dtype), "sum": seen, "squares": seen**2}
        return {n: stats[n] + x.sum(-1, keepdim=True) for n, x in new.items()}, None

    def weight(self, scores, stats):
        count = stats["count"].clamp_min(1)
        mean = stats["sum"] / count
        variance = (stats["squares"] / count - mean**2).clamp_min(0)
        return (scores.masked_fill(torch.isinf(scores), 0.0) - mean) / (1 + variance).sqrt()


EVERY = {
    "softmax": ops.Softmax(),
    "sigmoid": ops.Sigmoid(),
    "sigmoid with bias": ops.Sigmoid(bias=-3.0),
    "relu": ops.Relu(),
    "squared relu": ops.Relu(power=2, mean=True),
    "user's two passes": Standardized(),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("lengths", [(20, 20), (7, 20), (1, 20)])
def test_normalizer_is_its_definition(name, lengths):
    for v_dim in (8, 5):
        q, k, v = qkv(*lengths, v_dim=v_dim)
        for causal in (True, False):
            for mask in (None, ops.window(6), masks(lengths[1])["mixture"]):
                held_to_reference(
                    ops.attend, q, k, v, mask=mask, causal=causal, normalizer=EVERY[name]
                )


@pytest.mark.parametrize("name", EVERY)
def test_streaming_over_many_keys_is_the_definition(name):
    q, k, v = qkv(9, 4200, dtype=torch.float64, v_dim=5)
    for mask in (None, ops.window(3000), ops.padding(torch.arange(4200) >= 2500)):
        held_to_reference(ops.attend, q, k, v, mask=mask, causal=True, normalizer=EVERY[name])


def test_sigmoid_and_relu_by_hand():
    q, k, v = qkv(6, 6, q_heads=2, kv_heads=2)
    s = (q @ k.mT) / math.sqrt(8)
    seen = torch.ones(6, 6).tril().bool()
    got = ops.attend(q, k, v, causal=True, normalizer=ops.Sigmoid(bias=-2.0))
    assert_same(got, torch.sigmoid(s - 2).masked_fill(~seen, 0) @ v)
    got = ops.attend(q, k, v, causal=True, normalizer=ops.Relu(power=2, mean=True))
    weights = s.relu().square().masked_fill(~seen, 0) / torch.arange(1, 7)[:, None]
    assert_same(got, weights @ v)


@pytest.mark.parametrize("name", [n for n in EVERY if EVERY[n].passes == 1])
def test_halves_merge_to_the_whole(name):
    rule = EVERY[name]
    make = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 5, 12, generator=make, dtype=torch.float64) * 20
    values = torch.randn(2, 12, 3, generator=make, dtype=torch.float64)
    seen = torch.rand(2, 5, 12, generator=make) < 0.5
    seen[:, 0], seen[:, 1, :7], seen[:, 2, 7:] = False, False, False

    def run(keys):
        part = scores[..., keys].masked_fill(~seen[..., keys], -math.inf)
        stats, _ = rule.update(
            rule.init(torch.zeros(2, 5, 1, dtype=torch.float64)), part, seen[..., keys]
        )
        weights = rule.weight(part, stats).masked_fill(~seen[..., keys], 0.0)
        return weights @ values[:, keys], stats

    acc, stats = run(slice(0, 12))
    joined, both = rule.merge(run(slice(0, 7)), run(slice(7, 12)))
    assert_same(rule.finish(joined, both), rule.finish(acc, stats), torch.float64)
    if name == "softmax":
        assert_same(rule.lse(both), rule.lse(stats), torch.float64)


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_exact(name):
    q, k, v = qkv(3, 4, batch=1, q_heads=2, kv_heads=1, dim=3, v_dim=2, dtype=torch.float64)
    mask = ops.window(3)

    def attend(q, k, v):
        return ops.attend(q, k, v, mask=mask, causal=True, normalizer=EVERY[name])

    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in (q, k, v)])


@pytest.mark.parametrize("name", EVERY)
def test_strong_scores_and_empty_rows_stay_finite(name):
    q, k, v = qkv(20, 20, grad=True)
    mask = ops.padding(torch.arange(20) >= 15)
    out = ops.attend(q, k, v, mask=mask, causal=True, scale=1e4, normalizer=EVERY[name])
    assert (out[:, :, :15] == 0).all() and out.isfinite().all()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("name", NORMALIZERS)
def test_names_stand_for_instances(name):
    q, k, v = qkv(7, 20)
    got = ops.attend(q, k, v, normalizer=name)
    assert torch.equal(got, ops.attend(q, k, v, normalizer=NORMALIZERS[name]))


@pytest.mark.parametrize("name", [n for n in EVERY if n != "softmax"])
def test_only_softmax_has_a_log_sum_exp(name):
    q, k, v = qkv(3, 4)
    for backend in ("torch", "reference"):
        with ops.backend(backend), pytest.raises(ValueError, match="no log-sum-exp: return_lse"):
            ops.attend(q, k, v, normalizer=EVERY[name], return_lse=True)
