import pytest
import torch

from attached import prompt
from foveate.analysis.attn_at import AttnAT
from foveate.hf.noise import AttentionNoise
from foveate.hf.parts import run
from tiny_models import build


def pooling(seed=0, length=6):
    """A loss of attention logits (3, L) over random values, one key masked, and its parameter."""
    made = torch.Generator().manual_seed(seed)
    values = torch.randn(3, length, 5, generator=made, dtype=torch.float64)
    weight = torch.randn(5, generator=made, dtype=torch.float64).requires_grad_()
    logits = torch.randn(3, length, generator=made, dtype=torch.float64)
    logits[1, -2:] = float("-inf")

    def loss(a):
        return torch.nn.functional.softplus(
            torch.einsum("bl,bld,d->b", a.softmax(-1), values, weight)
        )

    return loss, logits, weight


def gradient(loss, logits):
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf).sum(), leaf)[0]


def test_perturbation_is_of_size_epsilon_along_the_gradient():
    loss, logits, _ = pooling()
    r, g = AttnAT(epsilon=0.7).perturbation(loss, logits), gradient(loss, logits)
    torch.testing.assert_close(r.norm(dim=1), torch.full((3,), 0.7, dtype=torch.float64))
    torch.testing.assert_close(r, 0.7 * g / g.norm(dim=1, keepdim=True))
    assert bool((r[1, -2:] == 0).all())
    signs = AttnAT(epsilon=0.7, norm="position").perturbation(loss, logits)
    torch.testing.assert_close(signs, 0.7 * g.sign())
    assert float(g.sum(1).abs().max()) < 1e-15


@pytest.mark.parametrize("norm", ["example", "position"])
def test_small_perturbations_raise_every_loss(norm):
    loss, logits, _ = pooling()
    r = AttnAT(epsilon=1e-2, norm=norm).perturbation(loss, logits)
    assert bool((loss(logits + r) > loss(logits)).all())
    other = torch.randn(r.shape, generator=torch.Generator().manual_seed(1)).double()
    other = (other * (r != 0)) / (other * (r != 0)).norm(dim=1, keepdim=True)
    if norm == "example":
        assert bool((loss(logits + r) > loss(logits + 1e-2 * other)).all())


@pytest.mark.parametrize("norm", ["example", "position"])
def test_weighted_differences_of_logits_come_to_the_same(norm):
    loss, logits, _ = pooling()
    logits = logits[:1]
    apart = logits[0][:, None] - logits[0]
    unit = apart / apart.norm(dim=1, keepdim=True)
    c = torch.zeros_like(unit).requires_grad_()
    moved = logits + (c * unit).sum(1)
    (g,) = torch.autograd.grad(loss(moved).sum(), c)
    length = g.norm() if norm == "example" else g.norm(dim=1, keepdim=True)
    want = (0.5 * g / length * unit).sum(1)
    r = AttnAT(epsilon=0.5, norm=norm).perturbation(loss, logits)
    torch.testing.assert_close(r[0], want)


def test_objective_adds_the_loss_under_the_perturbation():
    loss, logits, weight = pooling()
    at = AttnAT(epsilon=0.3, weight=0.5)
    total = at(loss, logits)
    assert weight.grad is None
    moved = logits + at.perturbation(loss, logits)
    torch.testing.assert_close(total, loss(logits).mean() + 0.5 * loss(moved).mean())
    total.backward()
    fresh, _, other = pooling()
    (fresh(logits).mean() + 0.5 * fresh(moved).mean()).backward()
    torch.testing.assert_close(weight.grad, other.grad)
    still = AttnAT(epsilon=0.0, weight=0.5)(loss, logits)
    torch.testing.assert_close(still, 1.5 * loss(logits).mean())


def test_without_a_gradient_nothing_moves():
    _, logits, _ = pooling()
    for norm in ("example", "position"):
        r = AttnAT(norm=norm).perturbation(lambda a: 0.0 * a.softmax(-1)[:, 0], logits)
        assert float(r.abs().max()) == 0


def test_layers_of_a_model_are_perturbed_by_noise_on_their_logits():
    model, ids = build("llama"), prompt(8)

    def loss(delta):
        with AttentionNoise(model, {1: delta}).added():
            return run(model, ids)[:, -1, 0]

    zero = torch.zeros(1, 4, 8, 8)
    r = AttnAT(epsilon=0.1).perturbation(loss, zero)
    assert float(r.norm()) == pytest.approx(0.1, rel=1e-4)
    assert float(r.triu(1).abs().max()) == 0
    with torch.no_grad():
        assert float(loss(r)) > float(loss(zero)) > float(loss(-r))
    assert all(p.grad is None for p in model.parameters())


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="epsilon must be at least 0, got -1"):
        AttnAT(epsilon=-1.0)
    with pytest.raises(ValueError, match="norm must be one of example, position, got 'batch'"):
        AttnAT(norm="batch")
