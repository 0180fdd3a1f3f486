"""The cache layer that drops tokens: it grows in place, and its copies are not disturbed."""

import copy

import pytest
import torch

import foveate
from foveate.hf.eviction import EvictionLayer


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, 2, count, 8, generator=generator) for _ in range(2))


def feed(layer, count, seed):
    """One call of `count` tokens; what its attention is given."""
    k, v = tokens(count, seed)
    with torch.no_grad():
        layer.await_call()
        given = layer.update(k, v)
        layer.admit(None, 1, count)
        layer.finish(k.repeat(1, 2, 1, 1), scale=None, record=None, at=0)
    return given


def filled(spec, count=300):
    layer = EvictionLayer(foveate.create(spec))
    feed(layer, count, 0)
    feed(layer, 1, 1)
    return layer


@pytest.mark.parametrize("spec", ["snapkv:budget=200", "h2o:budget=200,buffer=40"])
def test_steps_append_in_place_and_seldom_copy(spec):
    layer, places = filled(spec), set()
    before = layer.slots.held["k"]
    for step in range(30):
        k, v = feed(layer, 1, 10 + step)
        added = [tokens(1, 10 + i)[0][0] for i in range(step + 1)]
        assert torch.equal(k[0], torch.cat([before, *added], 1)) and v.shape == k.shape
        places.add(layer.slots.held["k"].data_ptr())
    assert len(places) <= 11  # three slots of room for every 200


def test_what_an_eviction_drops_is_not_held_on_to():
    layer = filled("window:budget=100,buffer=8")
    exact = 100 * 2 * 2 * 8 * 4
    for step in range(20):
        feed(layer, 1, 10 + step)
        assert layer.nbytes() <= exact * 1.08 * (1 + 1 / 64)
        storages = [x.storage for x in layer._growing.values()]
        assert not storages or layer.slots.held["k"].data_ptr() == storages[0].data_ptr()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize(
    "spec", ["window:budget=100,buffer=3", "ems:budget=100,window=20,buffer=3"]
)
def test_copies_of_a_layer_go_on_apart(spec, copied):
    def alone(seed):
        layer = filled(spec)
        return [feed(layer, 1, seed + step) for step in range(9)]

    layer = filled(spec)
    twin = copied(layer)
    for step, expected in enumerate(zip(alone(50), alone(90), strict=True)):
        given = feed(layer, 1, 50 + step), feed(twin, 1, 90 + step)
        for found, wanted in zip(given, expected, strict=True):
            assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    for name in layer.slots.held:
        assert layer.slots.held[name].data_ptr() != twin.slots.held[name].data_ptr()
