import pytest
import torch

import foveate
from foveate.nn._attending import Attending
from foveate.nn._recurrent import state_bytes
from foveate.nn.linear.hybrid_study import hybrid_pattern
from layer_checks import tokens

MIXERS = ("linattn", "gated_deltanet", "s6", "mamba2:states=8")


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("hybrid_study", **{"dim": 32, "heads": 4} | options)


@pytest.mark.parametrize(
    ("layers", "ratio", "places"),
    [
        (8, 3, [3, 7]),
        (7, 3, [3]),
        (4, 1, [1, 3]),
        (24, 24, [23]),
        (25, 24, [24]),
        (3, 0, [0, 1, 2]),
        (24, 6, [6, 13, 20]),
        (5, None, []),
    ],
)
def test_attention_ends_every_period(layers, ratio, places):
    items = hybrid_pattern(layers, ratio, "a", "b").split(", ")
    assert [i for i, item in enumerate(items) if item == "b"] == places
    assert items.count("a") == layers - len(places)


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_the_cache_at_length_is_the_share_of_attention(ratio):
    layers = 2 * (ratio + 1)
    sizes = {}
    for name, each in (("hybrid", ratio), ("full", 0)):
        model = build(mixer="linattn", ratio=each, layers=layers)
        with torch.no_grad():
            held = [
                state_bytes(list(model(tokens(n), return_state=True)[1].layers)) for n in (20, 60)
            ]
        sizes[name] = held[1] - held[0]
    assert sizes["hybrid"] * (ratio + 1) == sizes["full"] > 0


@pytest.mark.parametrize("mixer", MIXERS)
def test_any_mixer_decodes_as_it_reads(mixer):
    model, x = build(mixer=mixer, ratio=1, layers=2), tokens(9)
    assert [isinstance(block.layer, Attending) for block in model.blocks] == [False, True]
    with torch.no_grad():
        want, state, got = model(x), None, []
        for t in range(9):
            y, state = model.step(x[:, t], state)
            got.append(y)
    torch.testing.assert_close(torch.stack(got, 1), want, atol=1e-5, rtol=1e-4)


def test_attention_rotates_and_mixers_are_told_their_heads():
    model = build(mixer="linattn", ratio=1, layers=2)
    assert model.blocks[1].layer.theta == 10_000.0 and model.blocks[1].layer.heads == 4
    assert model.blocks[0].layer.v_width == 8


def test_refuses_what_cannot_be_laid_out():
    with pytest.raises(ValueError, match="ratio must be at least 0, got -1"):
        hybrid_pattern(4, -1)
    with pytest.raises(ValueError, match="layers must be at least 1"):
        hybrid_pattern(0, 3)
    with pytest.raises(ValueError, match="unknown mechanism 'linatn'; did you mean 'linattn'"):
        build(mixer="linatn")
