import pytest
import torch

import foveate

SMALL = "window:budget=12,sinks=3"


def kept(n, **options):
    k, policy = torch.zeros(1, 2, n, 4), foveate.create("window", **options)
    return [row.nonzero()[:, 0].tolist() for row in policy.keep(policy.score(k, k, {}, scale=None))]


def test_keeps_the_first_tokens_and_the_last():
    assert kept(10, budget=5, sinks=2) == [[0, 1, 7, 8, 9]] * 2


def test_without_sinks_it_is_a_window():
    assert kept(10, budget=3, sinks=0) == [[7, 8, 9]] * 2


def test_a_short_sequence_is_kept_whole():
    assert kept(4, budget=5, sinks=2) == [[0, 1, 2, 3]] * 2


def test_step_by_step_keeps_what_one_prefill_keeps():
    slots = torch.arange(6)
    for token in range(6, 20):
        slots = torch.cat([slots, torch.tensor([token])])
        slots = slots[torch.tensor(kept(slots.numel(), budget=6, sinks=2)[0])]
    assert slots.tolist() == kept(20, budget=6, sinks=2)[0]


@pytest.mark.parametrize("sinks", [-1, 8])
def test_sinks_must_fit_the_budget(sinks):
    with pytest.raises(ValueError, match="sinks must be at least 0 and below the budget 8"):
        foveate.create("window", budget=8, sinks=sinks)
