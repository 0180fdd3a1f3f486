import math

import pytest
import torch
from torch import nn

from foveate.tasks.mqar import mqar
from foveate.tasks.train import fit, schedule


def test_learns_and_asks_for_a_fresh_batch_every_step():
    weight, asked = nn.Parameter(torch.zeros(3)), []

    def loss(step):
        asked.append(step)
        x = torch.randn(32, 3, generator=torch.Generator().manual_seed(step))
        return ((x @ weight - x @ torch.tensor([1.0, -2.0, 0.5])) ** 2).mean()

    heard = []
    losses = fit([weight], loss, steps=200, lr=0.05, seen=lambda *x: heard.append(x))
    assert asked == list(range(200)) and heard == list(enumerate(losses))
    torch.testing.assert_close(weight.detach(), torch.tensor([1.0, -2.0, 0.5]), atol=0.05, rtol=0)


def test_rate_rises_then_falls_to_0():
    rates = [schedule(i / 100, 0.1) for i in range(101)]
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[0] < 0.2 and rates[10] == 1 and math.isclose(rates[-1], 0, abs_tol=1e-12)


def test_gradients_are_clipped_together():
    one, two = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    seen = []
    fit(
        [one, two],
        lambda step: 3e6 * one.sum() + 4e6 * two.sum(),
        steps=1,
        seen=lambda *_: seen.extend((float(one.grad), float(two.grad))),
    )
    assert seen == pytest.approx([0.6, 0.8], abs=1e-4)


def test_a_loss_that_is_no_number_names_the_step():
    weight = nn.Parameter(torch.ones(1))
    with pytest.raises(RuntimeError, match="nan at step 3 of 10"):
        fit([weight], lambda step: weight.sum() * (math.nan if step == 3 else 1), steps=10)
    assert weight.isfinite().all()


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"steps": 1, "lr": 0}, {"steps": 1, "warmup": 1}]
)
def test_refuses_numbers_out_of_range(options):
    with pytest.raises(ValueError, match="fit needs"):
        fit([nn.Parameter(torch.ones(1))], lambda step: torch.ones(()), **options)


def test_refuses_a_frozen_model():
    with pytest.raises(ValueError, match="no parameter"):
        fit(nn.Linear(2, 2).requires_grad_(False).parameters(), lambda s: torch.ones(()), steps=1)


class Recaller(nn.Module):
    """Previous-token shift, then one lookup: the least that can recall."""

    def __init__(self, vocabulary=64, dim=32):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, dim), nn.Linear(dim, vocabulary)
        self.key, self.query = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def forward(self, ids):
        x = self.embed(ids)
        before = nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        q, k = self.query(x)[:, None], self.key(before)[:, None]
        out = nn.functional.scaled_dot_product_attention(q, k, x[:, None], is_causal=True)
        return self.head(out[:, 0])


def test_recall_is_learned_by_a_shift_and_a_lookup():
    torch.manual_seed(0)
    model, sizes = Recaller(), {"length": 32, "pairs": 4, "vocabulary": 64}

    def loss(step):
        batch = mqar(64, seed=step, **sizes)
        return batch.loss(model(batch.inputs))

    fit(model.parameters(), loss, steps=300, lr=1e-2)
    test = mqar(500, seed=10_000, **sizes)
    with torch.no_grad():
        assert test.accuracy(model(test.inputs)) > 0.9
