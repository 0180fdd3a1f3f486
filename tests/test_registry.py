import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

import foveate
from foveate import registry


def card(name, **changes):
    words = {"title": "T", "claim": "c", "kind": "attention", "family": "toy"}
    return registry.Card(name=name, **words | changes)


@pytest.fixture
def toy():
    """A registered mechanism with an option of every type."""

    @foveate.register(card("toy"))
    @dataclass(frozen=True, kw_only=True)
    class Toy:
        count: int = 3
        share: float = 0.5
        fast: bool = False
        mode: str = "mean"
        choice: Literal["near", "far"] = "near"
        limit: int | None = None
        layers: tuple[int, ...] = ()
        shares: tuple[float, ...] = (1.0,)

    yield Toy
    del registry._classes["toy"]


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("toy", {}),
        ("toy:", {}),
        ("toy:count=7", {"count": 7}),
        ("toy:share=0.25,count=7", {"share": 0.25, "count": 7}),
        ("toy: share = 1e-3 , fast = True", {"share": 1e-3, "fast": True}),
        ("toy:share=2", {"share": 2.0}),
        ("toy:fast=false", {"fast": False}),
        ("toy:mode=12", {"mode": "12"}),
        ("toy:choice=far", {"choice": "far"}),
        ("toy:limit=5", {"limit": 5}),
        ("toy:limit=none", {"limit": None}),
        ("toy:layers=0/1/-1", {"layers": (0, 1, -1)}),
        ("toy:layers=4", {"layers": (4,)}),
        ("toy:shares=", {"shares": ()}),
        ("toy:shares=0.5/2", {"shares": (0.5, 2.0)}),
    ],
)
def test_text_and_options_create_the_same(toy, spec, options):
    made = foveate.create(spec)
    assert made == toy(**options) == foveate.create("toy", **options)
    for key, value in options.items():
        assert type(getattr(made, key)) is type(value)
    assert foveate.create(registry.spec_of(made)) == made
    stored = json.loads(json.dumps(dataclasses.asdict(made)))
    assert foveate.create("toy", **stored) == made
    assert hash(made) == hash(toy(**options))


@pytest.mark.parametrize(
    ("spec", "options", "error", "words"),
    [
        ("tay", {}, ValueError, "unknown mechanism 'tay'; did you mean 'toy'?"),
        ("zzzzzz", {}, ValueError, "unknown mechanism 'zzzzzz'; known: "),
        ("", {}, ValueError, "unknown mechanism ''"),
        ("toy:cuont=3", {}, ValueError, "toy has no option 'cuont'; did you mean 'count'?"),
        ("toy", {"xyz": 1}, ValueError, "toy has no option 'xyz'; known: choice, count, "),
        ("toy:count", {}, ValueError, "option 'count' in 'toy:count' must read key=value"),
        ("toy:count=1,count=2", {}, ValueError, "option 'count' is given twice"),
        ("toy:count=1", {"count": 2}, ValueError, "option 'count' is given twice"),
        ("toy:count=2.5", {}, TypeError, "toy: option 'count' must be int, got '2.5'"),
        ("toy", {"count": 2.5}, TypeError, "option 'count' must be int, got 2.5"),
        ("toy", {"count": True}, TypeError, "option 'count' must be int, got True"),
        ("toy", {"count": None}, TypeError, "option 'count' must be int, got None"),
        ("toy:share=much", {}, TypeError, "option 'share' must be float, got 'much'"),
        ("toy", {"share": True}, TypeError, "option 'share' must be float, got True"),
        ("toy:fast=yes", {}, TypeError, "option 'fast' must be bool, got 'yes'"),
        ("toy", {"fast": 1}, TypeError, "option 'fast' must be bool, got 1"),
        ("toy", {"mode": 3}, TypeError, "option 'mode' must be str, got 3"),
        ("toy:choice=off", {}, TypeError, "option 'choice' must be Literal.*got 'off'"),
        ("toy:limit=x", {}, TypeError, "option 'limit' must be int | None, got 'x'"),
        ("toy:layers=0/a", {}, TypeError, "option 'layers' must be .*got '0/a'"),
        ("toy", {"layers": (0, "a")}, TypeError, "option 'layers' must be int, got 'a'"),
        ("toy", {"layers": 3}, TypeError, "option 'layers' must be .*got 3"),
    ],
)
def test_bad_input_is_named(toy, spec, options, error, words):
    with pytest.raises(error, match=words.replace("?", r"\?").replace("|", r"\|")):
        foveate.create(spec, **options)


@pytest.fixture
def layer():
    """A registered mechanism that is no dataclass."""

    @foveate.register(card("layer", kind="module"))
    class Layer:
        def __init__(self, dim: int, heads: int, *, theta: float = 1e4, mode: str | None = None):
            self.options = (dim, heads, theta, mode)

    yield Layer
    del registry._classes["layer"]


def test_classes_that_are_no_dataclass_take_text_too(layer):
    text = foveate.create("layer:dim=32,heads=4,theta=500,mode=none")
    same = foveate.create("layer", dim=32, heads=4, theta=500.0, mode=None)
    assert text.options == same.options == (32, 4, 500.0, None)
    assert foveate.create("layer:dim=8", heads=2).options == (8, 2, 1e4, None)


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("layer", TypeError, "layer needs dim, heads, got none"),
        ("layer:dim=3", TypeError, "layer needs heads, got dim"),
        ("layer:dim=3,heads=x", TypeError, "layer: option 'heads' must be int, got 'x'"),
        ("layer:dim=3,head=2", ValueError, "layer has no option 'head'; did you mean 'heads'?"),
    ],
)
def test_bad_options_of_other_classes_are_named(layer, spec, error, words):
    with pytest.raises(error, match=words.replace("?", r"\?")):
        foveate.create(spec)


def test_a_name_is_taken_once(toy):
    with pytest.raises(ValueError, match="the name 'toy' is already taken by test_registry"):

        @foveate.register(card("toy"))
        class Other:
            pass


def test_registering_the_same_class_again_is_a_reload(toy):
    assert foveate.register(card("toy"))(toy) is toy


def test_a_mechanism_of_the_package_lives_in_a_file_of_its_name(toy):
    stray = type("Stray", (), {"__module__": "foveate.attention.sparse.elsewhere"})
    with pytest.raises(ValueError, match="'stray' must live in a file of that name"):
        foveate.register(card("stray"))(stray)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "layer"}, "Card x: kind 'layer' is not one of"),
        ({"patterns": ("self",)}, "Card x: patterns 'self' is not one of"),
        ({"pretrained": "yes"}, "Card x: pretrained 'yes' is not one of"),
        ({"phases": ("training",)}, "Card x: phases 'training' is not one of"),
    ],
)
def test_cards_refuse_words_they_do_not_know(change, words):
    with pytest.raises(ValueError, match=words):
        card("x", **change)


def test_find_filters_and_sorts(toy):
    assert foveate.find(family="toy") == [toy.card]
    assert foveate.find(family="toy", kind="module") == []
    cards = foveate.find()
    assert {"dense", "sink_window", "toy"} <= {c.name for c in cards}
    assert cards == sorted(cards, key=lambda c: (c.family, c.name))
    exact = foveate.find(kind="attention", pretrained="exact")
    assert "dense" in {c.name for c in exact} and "toy" not in {c.name for c in exact}


def test_every_name_is_found_under_its_file_and_survives_json():
    for name in registry.names():
        cls = registry.lookup(name)
        assert cls.card.name == name
        assert cls.__module__ == registry._modules()[name] and cls.__module__ in sys.modules
        if dataclasses.is_dataclass(cls):
            made = foveate.create(name)
            assert registry.spec_of(made) == name
            stored = json.loads(json.dumps(dataclasses.asdict(made)))
            assert foveate.create(name, **stored) == made


def test_without_transformers_analyses_are_left_out_and_say_what_they_need(monkeypatch):
    held = registry._classes.pop("sink_metric", None)
    real = registry.importlib.import_module

    def missing(name, package=None):
        if name.startswith("foveate.analysis.sink_metric"):
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        return real(name, package)

    monkeypatch.setattr(registry.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"sink_metric needs transformers.*'foveate\[hf\]'"):
        registry.lookup("sink_metric")
    names = {card.name for card in registry.find()}
    assert "core_stats" in names and "sink_metric" not in names
    if held is not None:
        registry._classes["sink_metric"] = held
