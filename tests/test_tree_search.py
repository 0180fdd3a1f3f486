import pytest
import torch

from foveate.ops.tree_search import tree_search


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
    whole = tree_search(*args, slots=4)
    monkeypatch.setattr("foveate.ops.tree_search._CHUNK", 1)
    assert all(torch.equal(a, b) for a, b in zip(whole, tree_search(*args, slots=4), strict=True))


def test_refuses_what_it_does_not_know():
    q, k, zero = torch.randn(1, 1, 4), torch.randn(1, 8, 4), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="representative"):
        tree_search(q, k, zero, zero + 8, slots=2, representative="mean")
    with pytest.raises(ValueError, match="slots"):
        tree_search(q, k, zero, zero + 8, slots=0)
