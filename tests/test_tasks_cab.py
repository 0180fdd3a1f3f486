import math

import pytest
import torch

from foveate.registry import PATTERNS
from foveate.tasks.cab import TASKS, compositional_index, cross_retrieval, reversal


def test_every_pattern_has_a_task():
    assert set(TASKS) == set(PATTERNS)


def test_queries_look_up_pairs_of_another_sequence():
    batch = cross_retrieval(60, seed=0, pairs=6, vocabulary=20)
    for asked, pairs, target in zip(*batch, strict=True):
        held = {int(p) // 20: int(p) % 20 for p in pairs}
        assert len(held) == 6 and sorted(held) == sorted(asked.tolist())
        assert [held[int(key)] for key in asked] == target.tolist()
    keys = batch.context // 20
    assert (keys != batch.inputs).any()


def test_a_sequence_is_given_out_from_its_end():
    batch = reversal(30, seed=0, length=7, vocabulary=5)
    assert torch.equal(batch.targets, batch.context.flip(1))
    assert (batch.inputs[:, 0] == 5).all()
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])


@pytest.mark.parametrize("task", [cross_retrieval, reversal])
def test_scores_and_seeds(task):
    one, two, other = (task(4, seed=s) for s in (3, 3, 4))
    assert all(map(torch.equal, one, two)) and not torch.equal(one.context, other.context)
    right = torch.nn.functional.one_hot(one.targets, 64).float() * 50
    assert one.accuracy(right) == 1 and float(one.loss(right)) < 1e-6
    torch.testing.assert_close(one.loss(torch.zeros_like(right)), torch.tensor(64.0).log())


def test_the_index_counts_deviations_and_leaves_out_what_is_missing():
    scores = {"a": {"x": 3.0, "y": 1.0, "z": 2.0}, "b": {"x": 10.0, "y": 30.0}}
    got = compositional_index(scores, frozenset({"b"}))
    step = math.sqrt(1.5)
    assert got == pytest.approx({"x": (step + 1) / 2, "y": (-step - 1) / 2, "z": 0.0})
    scaled = {"a": {k: 7 * v - 2 for k, v in scores["a"].items()}, "b": scores["b"]}
    assert compositional_index(scaled, frozenset({"b"})) == pytest.approx(got)
    alone = {"c": {"w": 1.0}, "d": {"x": 2.0, "y": 2.0}}
    assert compositional_index({**scores, **alone}, frozenset({"b"})) == pytest.approx(got)


def test_sizes_and_scores_are_checked():
    for call, said in (
        (lambda: cross_retrieval(1, seed=0, pairs=9, vocabulary=8), "hold 9 distinct keys"),
        (lambda: cross_retrieval(0, seed=0), "rows must be at least 1"),
        (lambda: reversal(1, seed=0, vocabulary=1), "vocabulary must be at least 2"),
        (lambda: compositional_index({"a": {"x": math.nan, "y": 1.0}}), "scores of a must be"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
