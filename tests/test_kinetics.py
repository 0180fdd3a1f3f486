import itertools

import pytest
import torch

import foveate
from foveate import ops
from foveate.attention.base import Call
from foveate.attention.sparse.kinetics import ModelCost, coverage, generation_cost
from sparse_checks import qkv, softmax_over

MODEL = ModelCost(parameters=1e9, q_heads=512, kv_heads=128, dim=64)


def kinetics(**options):
    return foveate.create("kinetics", **{"budget": 32, "local": 10, "block": 4} | options)


def plain_keep(q, k, m):
    """Tokens read by the definition: mean logits over the group, then over the blocks."""
    (b, h, _, _), (_, kv, n, _) = q.shape, k.shape
    keep = torch.zeros(b, h, 1, n, dtype=torch.bool)
    width = 1 if m.policy == "token" else m.block
    for i, g in itertools.product(range(b), range(kv)):
        heads = range(g * (h // kv), (g + 1) * (h // kv))
        logits = torch.stack([k[i, g] @ q[i, j, 0] for j in heads]).mean(0)
        blocks = [list(range(lo, min(lo + width, n))) for lo in range(0, n, width)]
        must = [x for x in blocks if any(t < m.sinks or t >= n - m.local for t in x)]
        free = sorted((x for x in blocks if x not in must), key=lambda x: -float(logits[x].mean()))
        for block in [*must, *free[: m.budget // width - len(must)]]:
            for j in heads:
                keep[i, j, 0, block] = True
    return keep


@pytest.mark.parametrize("policy", ["token", "block"])
@pytest.mark.parametrize("length", [80, 81, 83])
def test_equals_the_definition(policy, length):
    q, k, v = qkv(length, 1, batch=2)
    m = kinetics(policy=policy)
    keep = plain_keep(q, k, m)
    assert (keep.sum(-1) <= 32).all() and (keep.sum(-1) > 28).all()
    torch.testing.assert_close(m(q, k, v), softmax_over(q, k, v, keep), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("policy", ["token", "block"])
def test_full_budget_equals_dense(policy):
    q, k, v = qkv(80, 1)
    out = kinetics(policy=policy, budget=80)(q, k, v)
    torch.testing.assert_close(out, ops.attend(q, k, v), atol=1e-5, rtol=1e-4)


def test_tokens_keep_more_mass_than_blocks_and_more_budget_keeps_more():
    q, k, v = qkv(400, 1)
    mass = []
    for options in ({"policy": "block"}, {}, {"budget": 128}):
        records = []
        kinetics(**options)(q, k, v, call=Call(phase="decode", record=records.append))
        mass.append(records[0].retained_mass)
    assert mass == sorted(mass) and mass[0] < mass[1]


def test_a_mask_is_applied_inside_the_choice():
    q, k, v = qkv(80, 1)
    shown = torch.arange(80) % 3 > 0
    keep = plain_keep(q, k, kinetics()) & shown
    out = kinetics()(q, k, v, mask=ops.dense(shown.expand(1, 80)))
    torch.testing.assert_close(out, softmax_over(q, k, v, keep), atol=1e-5, rtol=1e-4)


def stepped(prompt, output, trials, budget=None):
    """Compute and bytes, summed step by step; a step reads the mean of its context's ends."""
    compute = moved = 0.0
    for t in range(output):
        fine = [prompt + t + (i + 0.5) / 64 for i in range(64)]
        read = sum(min(c, budget or c) for c in fine) / 64
        own = sum(c - prompt for c in fine) / 64
        compute += trials * (2 * MODEL.parameters + 4 * read * MODEL.q_heads * MODEL.dim)
        moved += (
            4
            * MODEL.kv_heads
            * MODEL.dim
            * (prompt + trials * own if budget is None else trials * read)
        )
    return compute, 562.5 * moved


@pytest.mark.parametrize("trials", [1, 4])
@pytest.mark.parametrize("budget", [None, 20, 50, 90])
def test_costs_are_sums_over_steps(trials, budget):
    cost = generation_cost(MODEL, 40, 30, trials=trials, budget=budget)
    compute, memory = stepped(40, 30, trials, budget)
    assert cost.compute == pytest.approx(compute, rel=1e-9)
    assert cost.memory == pytest.approx(memory, rel=1e-6)


def test_a_budget_of_everything_costs_what_dense_costs():
    for output in (1, 30, 5000):
        dense = generation_cost(MODEL, 40, output)
        assert generation_cost(MODEL, 40, output, budget=40 + output) == pytest.approx(dense)
        assert generation_cost(MODEL, 40, output, budget=10**9) == pytest.approx(dense)


def test_attention_dominates_long_generations_and_wide_heads():
    def share(output, model=MODEL):
        cost = generation_cost(model, 1000, output)
        return cost.memory / cost.total

    assert share(100) < share(1000) < share(10000)
    assert share(1000) < share(1000, MODEL._replace(parameters=1e8))
    assert share(1000) < share(1000, MODEL._replace(q_heads=1024, kv_heads=256))


def test_choosing_by_blocks_costs_a_pass_over_their_means():
    plain = generation_cost(MODEL, 40, 30, budget=20, trials=2)
    blocks = generation_cost(MODEL, 40, 30, budget=20, trials=2, block=16)
    pairs = sum(2 * (40 + t + 0.5) for t in range(30)) / 16
    extra = blocks.compute - plain.compute
    assert extra == pytest.approx(2 * pairs * MODEL.q_heads * MODEL.dim, rel=1e-6)
    assert blocks.memory > plain.memory


def test_coverage_counts_the_draws_that_hold_a_right_answer():
    for total, correct, trials in itertools.product((5, 6), (0, 2, 5), (1, 3, 5)):
        draws = list(itertools.combinations(range(total), trials))
        share = sum(any(x < correct for x in draw) for draw in draws) / len(draws)
        assert coverage(correct, total, trials) == pytest.approx(share)
    with pytest.raises(ValueError, match="trials"):
        coverage(1, 5, 6)


@pytest.mark.parametrize(
    "option",
    [{"budget": 13}, {"local": 0}, {"sinks": -1}, {"policy": "mean"}, {"block": 0}],
)
def test_refuses_bad_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        kinetics(**option)
    with pytest.raises(ValueError, match="2 blocks"):
        kinetics(policy="block", budget=20)
