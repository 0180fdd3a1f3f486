import math

import pytest
import torch

import foveate
from foveate import ops
from foveate.analysis.deceptive_attn import DeceptiveAttn, log_allowed_mass, unmixed
from foveate.hf.parts import run
from foveate.hf.watch import watch
from test_watch import tiny_encoder


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FORBIDDEN = torch.tensor([[True, False, False, True], [False, False, True, False]])


def test_penalty_is_minus_the_logarithm_of_the_allowed_mass():
    logits = rows(2, 4)
    mass = (logits.softmax(-1) * FORBIDDEN).sum(-1)
    want = -(1 - mass).log().mean()
    torch.testing.assert_close(DeceptiveAttn()(logits, FORBIDDEN), want)
    torch.testing.assert_close(DeceptiveAttn(weight=0.1)(logits, FORBIDDEN), 0.1 * want)
    assert float(DeceptiveAttn(weight=0.0)(logits, FORBIDDEN)) == 0


def test_penalty_is_zero_only_without_forbidden_mass():
    logits = rows(2, 4)
    assert float(DeceptiveAttn()(logits, torch.zeros_like(FORBIDDEN))) == 0
    hidden = logits.masked_fill(FORBIDDEN, float("-inf"))
    assert float(DeceptiveAttn()(hidden, FORBIDDEN)) == 0
    assert float(DeceptiveAttn()(logits, FORBIDDEN)) > 0.1


def test_heads_are_averaged_or_the_worst_is_taken():
    logits = rows(2, 3, 4)
    mass = (logits.softmax(-1) * FORBIDDEN[:, None]).sum(-1)
    each = -(1 - mass).log()
    torch.testing.assert_close(DeceptiveAttn(heads="mean")(logits, FORBIDDEN), each.mean())
    torch.testing.assert_close(DeceptiveAttn(heads="max")(logits, FORBIDDEN), each.amax(1).mean())


def test_gradient_pushes_forbidden_logits_down_even_where_all_mass_is_theirs():
    logits = torch.tensor([[60.0, 0.0, 0.0, 60.0], [0.0, 0.0, 90.0, 0.0]]).requires_grad_()
    assert bool(((logits.softmax(-1) * FORBIDDEN).sum(-1) == 1).all())
    DeceptiveAttn()(logits, FORBIDDEN).backward()
    assert bool((logits.grad[FORBIDDEN] >= 0.2).all())
    assert float(logits.grad.sum()) == pytest.approx(0, abs=1e-6)


def test_rows_without_an_allowed_key_are_left_out():
    logits = rows(3, 4)
    logits[2, 1:] = float("-inf")
    forbidden = torch.cat((FORBIDDEN, torch.tensor([[True, False, False, False]])))
    logits.requires_grad_()
    penalty = DeceptiveAttn()(logits, forbidden)
    torch.testing.assert_close(penalty, DeceptiveAttn()(logits[:2], FORBIDDEN))
    penalty.backward()
    assert bool(logits.grad.isfinite().all()) and float(logits.grad[2].abs().max()) == 0
    everything = torch.ones(3, 4, dtype=torch.bool)
    assert float(DeceptiveAttn()(logits.detach(), everything)) == 0


def test_allowed_mass_of_known_logits():
    logits = torch.tensor([0.0, math.log(3.0)])
    mass = log_allowed_mass(logits, torch.tensor([False, True])).exp()
    assert float(mass) == pytest.approx(0.25)


def test_unmixed_tokens_hear_of_forbidden_ones_through_the_class_row_alone():
    q, k, v = (rows(1, 1, 4, 8, seed=i) for i in range(3))
    mask = unmixed(torch.tensor([[False, True, False, True]]))
    before = ops.attend(q, k, v, mask=mask)
    changed = v.clone()
    changed[:, :, 1] += 1
    moved = (ops.attend(q, k, changed, mask=mask) - before).abs().amax((0, 1, 3))
    assert bool((moved[[0, 1, 3]] > 1e-3).all()) and float(moved[2]) == 0


def test_gradients_reach_a_model_through_its_class_row():
    model, inputs = tiny_encoder("bert")
    forbidden = torch.zeros(2, 9, dtype=torch.bool)
    forbidden[:, 3] = True
    found = []

    def attention(seen):
        logits = ops.grouped_logits(seen.q[:, :, :1], seen.k, seen.scale)[:, :, 0]
        found.append(DeceptiveAttn(heads="max")(logits, forbidden))

    with watch(model, attention=attention):
        run(model, inputs)
    found[-1].backward()
    grad = model.encoder.layer[1].attention.self.query.weight.grad
    assert float(grad.abs().max()) > 0


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"forbidden \(B, L\), got \(2, 4\) and \(2, 3\)"):
        DeceptiveAttn()(rows(2, 4), FORBIDDEN[:, :3])
    with pytest.raises(ValueError, match="weight must be at least 0, got -1"):
        DeceptiveAttn(weight=-1.0)
    with pytest.raises(ValueError, match='heads must be "mean" or "max", got \'least\''):
        DeceptiveAttn(heads="least")
    assert foveate.create("deceptive_attn:heads=max") == DeceptiveAttn(heads="max")
