import pytest
import torch

from foveate.nn._held import Held, attend_held, token_positions, turned
from sparse_checks import softmax_over


def ragged(length, seed=0, heads=2):
    """Keys and values of two rows, the second with padding at the end of two parts."""
    made = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 2 * heads, length, 8, generator=made)
    k, v = torch.randn(2, 2, heads, length, 8, generator=made)
    half = length // 2
    valid = torch.ones(2, half, dtype=torch.bool)
    valid[1, half // 3 :] = False
    at, real = token_positions(torch.zeros(2, dtype=torch.long), half, valid)
    later, also = token_positions(at[:, -1] + 1, length - half, valid[:, : length - half])
    parts = [
        Held(k[:, :, :half], v[:, :, :half], at, real),
        Held(k[:, :, half:], v[:, :, half:], later, also),
    ]
    return q, parts[0].joined(parts[1])


@pytest.mark.parametrize("length", [10, 700])
@pytest.mark.parametrize(("window", "always"), [(5, 0), (5, 3), (1000, 0), (130, 40)])
def test_a_token_sees_its_window_and_the_first_positions(length, window, always):
    q, held = ragged(length)
    at = held.at
    got = attend_held(q, at, at + 1 - window, held, always)
    far = at[:, :, None] - at[:, None]
    seen = (far >= 0) & ((far < window) | (at[:, None] < always)) & held.real[:, None]
    for row in range(2):
        want = softmax_over(*(x[row : row + 1] for x in (q, held.keys, held.values)), seen[row])
        real = held.real[row]
        torch.testing.assert_close(got[row][:, real], want[0][:, real], atol=1e-5, rtol=1e-4)


def test_positions_count_real_tokens_from_those_seen():
    valid = torch.tensor([[True, True, True, True], [True, True, False, False]])
    at, real = token_positions(torch.tensor([5, 0]), 4, valid, before=2)
    assert at.tolist() == [[7, 8, 9, 10], [2, 3, 3, 3]] and torch.equal(real, valid)
    at, real = token_positions(torch.tensor([5, 0]), 2, None)
    assert at.tolist() == [[5, 6], [0, 1]] and real.all()


def test_keeps_what_some_row_can_see_and_nothing_of_the_rest():
    _, held = ragged(12)
    kept = held.since(held.at[:, -1] - 1, always=1)
    assert (kept.at[kept.real] >= 0).all() and kept.keys.shape[2] < 12
    for row in range(2):
        last = held.at[row, -1]
        seen = held.real[row] & ((held.at[row] >= last - 1) | (held.at[row] < 1))
        wanted = held.keys[row][:, seen]
        mine = kept.keys[row][:, kept.real[row]]
        assert all((mine == w[:, None]).all(-1).any(1).all() for w in wanted.unbind(1))
    storage = kept.keys.untyped_storage().nbytes()
    assert storage == kept.keys.nbytes


def test_rotations_follow_the_positions_of_each_row():
    x = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([[0, 1, 2], [4, 5, 5]])
    got = turned(x, at, 100.0)
    for row in range(2):
        for i in range(3):
            angle = float(at[row, i]) * torch.tensor([1.0, 0.1])
            a, b = x[row, 0, i].chunk(2)
            want = torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))
            torch.testing.assert_close(got[row, 0, i], want)
    assert turned(x, at, None) is x
