import sys

import pytest
import torch

from foveate import ops
from foveate.ops import tree_search


def plain_search(q, k, end, slots, start, width, pos, representative):
    """One search in plain Python: the set of blocks found."""
    n = max(0, -(-(end - start) // width))
    runs = [(n * i // slots, n * (i + 1) // slots) for i in range(slots)]
    runs = [(lo, hi) for lo, hi in runs if hi > lo]

    def score(lo, hi):
        block = {"center": lo + (hi - lo) // 2, "first": lo, "last": hi - 1}[representative]
        keys = range(start + block * width, min(start + (block + 1) * width, end))
        pairs = [(r, j) for r in range(len(q)) for j in keys if pos is None or j <= pos[r]]
        return max((float(q[r] @ k[j]) for r, j in pairs), default=float("-inf"))

    while any(hi - lo > 1 for lo, hi in runs):
        halves = []
        for lo, hi in runs:
            middle = lo + (hi - lo) // 2
            halves += [part for part in ((lo, middle), (middle, hi)) if part[1] > part[0]]
        runs = sorted(halves, key=lambda run: -score(*run))[:slots]
    return {lo for lo, _ in runs}


@pytest.mark.parametrize("representative", ["center", "first", "last"])
@pytest.mark.parametrize(("slots", "start", "width"), [(4, 0, 1), (5, 6, 2), (3, 4, 4)])
def test_equals_a_plain_search(representative, slots, start, width):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(12, 3, 8, generator=g), torch.randn(2, 90, 8, generator=g)
    lane = torch.arange(12) % 2
    end = torch.tensor([90, 89, 70, 45, 20, 13, 12, 8, 7, 5, 0, -3])
    pos = torch.stack([end - 1, end - 9, end // 2], 1)
    options = {"slots": slots, "start": start, "width": width, "representative": representative}
    found, real = tree_search(q, k, lane, end, pos=pos, **options)
    assert found.shape == real.shape == (12, slots)
    for i in range(12):
        mine = found[i][real[i]].tolist()
        at = (int(end[i]), slots, start, width, pos[i].tolist(), representative)
        assert len(mine) == len(set(mine))
        assert set(mine) == plain_search(q[i], k[lane[i]], *at)


def test_many_searches_are_cut_into_steps_without_a_trace(monkeypatch):
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(7, 2, 8, generator=g), torch.randn(1, 64, 8, generator=g)
    args = (q, k, torch.zeros(7, dtype=torch.long), torch.full((7,), 64))
    with ops.backend("torch"):
        whole, real = tree_search(*args, slots=4)
        monkeypatch.setattr(sys.modules[tree_search.__module__], "_CHUNK", 1)
        parts, still_real = tree_search(*args, slots=4)
    assert real.all() and still_real.all()
    assert torch.equal(whole.sort(-1).values, parts.sort(-1).values)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"representative": "mean"}, "representative must be"),
        ({"slots": 0}, "slots must be at least 1"),
        ({"width": 0}, "width must be at least 1"),
        ({"start": -1}, "start must be at least 0"),
        ({"lane": torch.tensor([2])}, r"lane must lie in \[0, 2\), got 2 to 2"),
        ({"lane": torch.tensor([-1])}, r"lane must lie in"),
        ({"lane": torch.tensor([0, 1])}, r"lane must be \(1,\), got \(2,\)"),
        ({"end": torch.tensor([9])}, "end must be at most 8, the number of keys, got 9"),
        ({"pos": torch.zeros(1, 2)}, r"pos must be \(1, 1\), got \(1, 2\)"),
        ({"k": torch.randn(2, 8, 3)}, r"k \(H, Lk, D\), got \(1, 1, 4\), \(2, 8, 3\)"),
    ],
)
def test_refuses_what_does_not_fit(change, said):
    zero = torch.zeros(1, dtype=torch.long)
    call = {"q": torch.randn(1, 1, 4), "k": torch.randn(2, 8, 4), "lane": zero, "end": zero + 8}
    with pytest.raises(ValueError, match=said):
        tree_search(**{**call, "slots": 2, **change})
