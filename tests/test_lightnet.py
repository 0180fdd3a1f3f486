import pytest
import torch
from torch.nn.functional import silu

import foveate
from layer_checks import tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("lightnet", **{"dim": 32, "heads": 4, "rank": 8} | options)


def cells(length, sides):
    """Coordinates of every token, one list a token."""
    found = []
    for t in range(length):
        at = []
        for side in reversed(sides):
            at.append(t % side)
            t //= side
        found.append([t, *reversed(at)])
    return found


def angles(length, sides, heads, width, theta):
    share = width // (len(sides) + 1)
    table = torch.zeros(heads, length, width, dtype=torch.float64)
    for t, at in enumerate(cells(length, sides)):
        for h in range(heads):
            for axis, place in enumerate(at):
                for i in range(share):
                    rate = theta ** -((h * share + i) / (heads * share))
                    table[h, t, axis * share + i] = place * rate
    return table


def explicit(layer, x, causal, theta=None, sides=()):
    q, k, v = (
        y.unflatten(-1, (4, -1)).transpose(1, 2) for y in (silu(layer.q(x)), layer.k(x), layer.v(x))
    )
    length = x.shape[1]
    seen = torch.ones(length, length).tril().bool() if causal else torch.ones(length, length).bool()
    logits = k[:, :, None].expand(-1, -1, length, -1, -1).masked_fill(~seen[..., None], -torch.inf)
    keys = logits.softmax(3)
    near = torch.ones(length, length, 1, dtype=x.dtype)
    if theta is not None:
        turn = angles(length, sides, 4, q.shape[3], theta)
        near = (turn[:, :, None] - turn[:, None]).cos()
    weights = (q[:, :, :, None] * keys * near).sum(-1) * q.shape[3] ** -0.5
    y = (weights @ v).transpose(1, 2).flatten(2)
    y = y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return layer.out(y * silu(x @ layer.gate[0].weight.T @ layer.gate[1].weight.T)), weights


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("theta", "sides"), [(None, ()), (100.0, ()), (100.0, (5,)), (100.0, (2, 3, 2))]
)
def test_equals_the_definition_with_explicit_weights(causal, theta, sides):
    layer = build(theta=theta, sides=sides).double()
    x = tokens(23).double()
    with torch.no_grad():
        want, _ = explicit(layer, x, causal, theta, sides)
        torch.testing.assert_close(layer(x, causal=causal), want, atol=1e-7, rtol=1e-4)


def test_keys_of_a_channel_sum_to_1_over_the_prefix():
    layer, x = build(expand=0.5).double(), tokens(23).double()
    with torch.no_grad():
        _, weights = explicit(layer, x, True)
        q = silu(layer.q(x)).unflatten(-1, (4, -1)).transpose(1, 2)
        torch.testing.assert_close(weights.sum(-1), q.sum(-1) / 2)


def test_in_any_order_and_at_the_last_token_it_is_the_same():
    layer, x = build().double(), tokens(30).double()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = layer(x, causal=False)
        torch.testing.assert_close(layer(x[:, order], causal=False), whole[:, order])
        torch.testing.assert_close(layer(x)[:, -1], whole[:, -1])


def test_rotated_by_both_coordinates_a_map_may_be_read_by_columns():
    by_row, by_column = build(theta=50.0, sides=(5,)), build(theta=50.0, sides=(4,))
    by_column.load_state_dict(by_row.state_dict())
    swap = torch.arange(20).view(4, 5).T.flatten()
    share = by_row.k_width // 2
    with torch.no_grad():  # the axes change places, and so do their channels
        for part in (by_column.q, by_column.k):
            rows = part.weight.view(4, 2, share, 32).flip(1)
            part.weight.copy_(rows.reshape(32, 32))
        x = tokens(20)
        torch.testing.assert_close(
            by_column(x[:, swap], causal=False), by_row(x, causal=False)[:, swap],
            atol=1e-5, rtol=1e-4,
        )  # fmt: skip


def test_the_first_key_is_no_phantom():
    layer, x = build().double(), tokens(6).double()
    with torch.no_grad():
        layer.k.weight *= 50
        want, _ = explicit(layer, x, True)
        got, state = layer(x[:, :1], return_state=True)
    torch.testing.assert_close(got, want[:, :1], atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(state.z, layer.k(x[:, 0]).unflatten(-1, (4, -1)).detach())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 5}, "multiple of heads, got 5"),
        ({"sides": (3, 3)}, r"must divide the 8 key channels of a head; got \(3, 3\)"),
        ({"sides": (0,)}, r"sides must be at least 1.*got \(0,\)"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"expand": 0.3}, "times 0.3 must be a multiple of heads"),
    ],
)
def test_refuses_what_does_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)
