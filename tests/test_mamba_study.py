import pytest
import torch

import foveate
from foveate.nn.linear.mamba_study import allocate_hybrid, parse_hybrid
from layer_checks import tokens

REFERENCE = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("mamba_study", **{"dim": 32, "heads": 4, "states": 8} | options)


def test_the_published_order_of_56_layers():
    assert allocate_hybrid(56) == REFERENCE
    assert [REFERENCE.count(symbol) for symbol in "M*-"] == [24, 4, 28]
    assert [i for i, symbol in enumerate(REFERENCE) if symbol == "*"] == [10, 22, 33, 45]


@pytest.mark.parametrize("layers", [4, 10, 25, 48, 57, 118])
@pytest.mark.parametrize(("attention", "mlp"), [(0.08, 0.5), (0.25, 0.25), (0.1, 0.0), (0.0, 0.5)])
def test_counts_are_the_shares_and_attention_is_within(layers, attention, mlp):
    row = allocate_hybrid(layers, attention, mlp)
    assert len(row) == layers
    assert row.count("*") == round(layers * attention) and row.count("-") == round(layers * mlp)
    assert row[0] != "*" != row[-1]


def test_attention_is_spread_evenly():
    parts = [len(part) for part in allocate_hybrid(100, 0.09, 0.0).split("*")]
    assert max(parts) - min(parts) <= 1 and len(parts) == 10


def test_a_string_says_the_order_instead():
    assert parse_hybrid("M-*M", "s6", "dense") == "s6, mlp, dense, s6"
    model = build(symbols="M*-")
    kinds = [type(block.layer).__name__ for block in model.blocks]
    assert kinds == ["Mamba2", "Attending", "NoneType"]
    assert [block.mlp is None for block in model.blocks] == [True, True, False]
    assert model.blocks[1].layer.theta is None


@pytest.mark.parametrize("symbols", ["M*-M", "MM", "*M"])
def test_mixed_caches_decode_as_they_read(symbols):
    model, x = build(symbols=symbols), tokens(9)
    with torch.no_grad():
        want, state, got = model(x), None, []
        for t in range(9):
            y, state = model.step(x[:, t], state)
            got.append(y)
    torch.testing.assert_close(torch.stack(got, 1), want, atol=1e-5, rtol=1e-4)


def test_only_mamba_tells_the_order_of_tokens():
    x = tokens(9)
    with torch.no_grad():
        for symbols, differs in (("*-", False), ("M*-", True)):
            model = build(symbols=symbols)
            other = x.clone()
            other[:, [2, 5]] = x[:, [5, 2]]
            off = (model(other)[:, -1] - model(x)[:, -1]).abs().max()
            assert (off > 1e-4) == differs


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"symbols": "M-A"}, "string of M, \\* and -, got 'M-A'"),
        ({"symbols": ""}, "string of M, \\* and -, got ''"),
        ({"attention": 0.6, "mlp": 0.5}, "at most 1 together, got 0.6 and 0.5"),
        ({"attention": -0.1}, "at least 0"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"layers": 3, "attention": 0.5, "mlp": 0.5}, "2 attention layers and 2 MLPs"),
    ],
)
def test_refuses_what_cannot_be_laid_out(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)
