import pytest
import torch

from foveate.analysis.attn_vat import AttnVAT


def pooling(classes=3, rows=64, length=6):
    """Class logits of attention logits (rows, L) over random values, and a parameter of it."""
    made = torch.Generator().manual_seed(0)
    values = torch.randn(rows, length, 5, generator=made)
    weight = torch.randn(5, classes, generator=made).requires_grad_()
    logits = torch.randn(rows, length, generator=made)
    logits[1, -2:] = float("-inf")

    def predict(a):
        return torch.einsum("bl,bld->bd", a.softmax(-1), values) @ weight

    return predict, logits, weight


def moved(predict, logits, r):
    """Divergence (B,) under a perturbation, written out."""
    with torch.no_grad():
        p, q = predict(logits).softmax(-1), predict(logits + r).softmax(-1)
    return (p * (p / q).log()).sum(-1)


def test_term_is_the_mean_divergence_under_the_perturbation():
    predict, logits, weight = pooling()
    vat = AttnVAT(epsilon=2.0, weight=0.5)
    r = vat.perturbation(predict, logits, seed=3)
    term = vat(predict, logits, seed=3)
    assert weight.grad is None
    torch.testing.assert_close(term.detach(), 0.5 * moved(predict, logits, r).mean())
    assert float(term.detach()) > 1e-3
    term.backward()
    assert float(weight.grad.abs().max()) > 0
    assert float(AttnVAT(epsilon=0.0)(predict, logits).detach()) == pytest.approx(0, abs=1e-7)


def test_perturbation_has_its_size_and_spares_masked_keys():
    predict, logits, _ = pooling()
    r = AttnVAT(epsilon=0.7).perturbation(predict, logits)
    torch.testing.assert_close(r.norm(dim=1), torch.full((64,), 0.7))
    assert bool((r[1, -2:] == 0).all())
    signs = AttnVAT(epsilon=0.7, norm="position").perturbation(predict, logits)
    assert bool((signs[0].abs() == 0.7).all()) and bool((signs[1, -2:] == 0).all())
    torch.testing.assert_close(AttnVAT(epsilon=0.7).perturbation(predict, logits), r)


def test_found_perturbation_moves_more_than_a_random_one():
    predict, logits, _ = pooling()
    r = AttnVAT().perturbation(predict, logits)
    other = torch.randn(r.shape, generator=torch.Generator().manual_seed(5)) * logits.isfinite()
    other = other / other.norm(dim=1, keepdim=True)
    found, random = moved(predict, logits, r), moved(predict, logits, other)
    assert float(found.mean()) > 1.5 * float(random.mean())


def test_divergence_has_no_gradient_at_no_perturbation():
    predict, logits, _ = pooling()
    leaf = torch.zeros_like(logits).requires_grad_()
    plain = predict(logits).detach().softmax(-1)
    kl = (plain * (plain.log() - predict(logits + leaf).log_softmax(-1))).sum()
    (g,) = torch.autograd.grad(kl, leaf)
    assert float(g.abs().max()) < 1e-6
    r = AttnVAT(probe=1e-3).perturbation(predict, logits)
    assert float(r.norm(dim=1).min()) == pytest.approx(1)


def test_one_logit_is_that_of_yes():
    predict, logits, _ = pooling(classes=1)
    two = AttnVAT()(lambda a: torch.cat((predict(a), 0 * predict(a)), -1), logits)
    torch.testing.assert_close(AttnVAT()(predict, logits), two)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"probe must be at least 0.001, got 1e-06"):
        AttnVAT(probe=1e-6)
    with pytest.raises(ValueError, match="weight must be at least 0, got -1"):
        AttnVAT(weight=-1.0)
