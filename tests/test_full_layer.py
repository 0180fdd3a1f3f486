"""The plain cache layer: it grows in place, and nothing that shares its storage is disturbed."""

import copy

import pytest
import torch

from foveate.hf.layers import FullLayer


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, count, 8, generator=generator) for _ in range(2))


def filled(count=200):
    """A layer that holds a prompt and one decoded token, and what it must hold."""
    layer = FullLayer()
    prompt, token = tokens(count, 0), tokens(1, 1)
    with torch.no_grad():
        layer.update(*prompt)
        layer.update(*token)
    return layer, joined(prompt, token)


def joined(*parts):
    return tuple(torch.cat(x, 2) for x in zip(*parts, strict=True))


def holds(layer, expected):
    assert layer.get_seq_length() == expected[0].shape[2]
    return torch.equal(layer.keys, expected[0]) and torch.equal(layer.values, expected[1])


def test_steps_append_in_place_and_seldom_copy():
    layer, expected = filled()
    places = set()
    with torch.no_grad():
        for step in range(30):
            token = tokens(1, 10 + step)
            given, expected = layer.update(*token), joined(expected, token)
            assert torch.equal(given[0], expected[0]) and holds(layer, expected)
            places.add(layer.keys.data_ptr())
    assert len(places) <= 11  # three tokens of room for every 200


@pytest.mark.parametrize("count", [1, 40, 63, 1000])
def test_the_room_is_a_sixty_fourth_of_what_is_held(count):
    layer, expected = filled(count)
    exact = sum(x.nbytes for x in expected)
    assert exact <= layer.nbytes() <= exact * (1 + 1 / 64)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_of_a_layer_go_on_apart(copied):
    layer, expected = filled()
    twin = copied(layer)
    one, other = tokens(1, 2), tokens(1, 3)
    with torch.no_grad():
        layer.update(*one)
        twin.update(*other)
        layer.update(*one)
    assert holds(layer, joined(expected, one, one)) and holds(twin, joined(expected, other))


def test_a_layer_that_was_cropped_or_reordered_goes_on_from_there():
    layer, expected = filled()
    before, token = layer.keys, tokens(1, 2)
    with torch.no_grad():
        layer.crop(-3)
        layer.update(*token)
        short = tuple(x[:, :, :198] for x in expected)
        assert holds(layer, joined(short, token)) and torch.equal(before, expected[0])
        layer.reorder_cache(torch.tensor([1, 0]))
        layer.update(*token)
        flipped = tuple(x[[1, 0]] for x in joined(short, token))
        assert holds(layer, joined(flipped, token))


def test_inference_mode_may_begin_and_end_between_steps():
    layer, expected = filled()
    token = tokens(1, 2)
    with torch.inference_mode():
        layer.update(*token)
    with torch.no_grad():
        layer.update(*token)
    assert holds(layer, joined(expected, token, token))


def test_gradients_pass_through_what_is_held():
    layer = FullLayer()
    prompt = tuple(x.requires_grad_() for x in tokens(100, 0))
    layer.update(*prompt)
    keys, _ = layer.update(*tokens(1, 1))
    layer.update(*tokens(1, 2))
    keys.sum().backward()
    assert torch.equal(prompt[0].grad, torch.ones_like(prompt[0]))
