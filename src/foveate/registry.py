"""What a mechanism is (`Card`), and how it is registered, created and found by name."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

KINDS = ("attention", "module", "cache", "intervention", "analysis")
PATTERNS = ("noncausal self", "causal self", "noncausal cross", "causal cross")
PRETRAINED = ("exact", "approximate", "fine-tune", "scratch")
# Packages that some mechanisms need, and the extra that brings each.
_EXTRAS = {"transformers": "hf"}
_FOLDERS = ("attention", "nn", "cache", "steer", "analysis")
_classes: dict[str, type] = {}

T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class Card:
    """A mechanism in words: where it comes from, what it is for and what it costs.

    paper is its number in the table of papers (None: a common baseline); pretrained says how it
    fits a pretrained model; phases are those in which it acts (attention only), elsewhere it is
    dense; selection_causal is False when its choice for a query looks at later tokens. For the
    audit: `small` are options at which it acts on a few dozen tokens, `full` options at which it
    equals dense attention, and exempt maps a property to the reason why it does not apply.
    """

    name: str
    title: str
    claim: str
    kind: str
    family: str
    year: int | None = None
    paper: int | None = None
    patterns: tuple[str, ...] = ("causal self",)
    pretrained: str = "approximate"
    phases: tuple[str, ...] = ("prefill", "decode")
    selection_causal: bool = True
    cost: str = ""
    decoding: str = ""
    confidence: str = ""
    small: dict[str, Any] = field(default_factory=dict, hash=False)
    full: dict[str, Any] = field(default_factory=dict, hash=False)
    exempt: dict[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", (self.kind,), KINDS),
            ("patterns", self.patterns, PATTERNS),
            ("pretrained", (self.pretrained,), PRETRAINED),
            ("phases", self.phases, ("prefill", "decode")),
        ):
            for item in value:
                if item not in known:
                    raise ValueError(f"Card {self.name}: {name} {item!r} is not one of {known}")


def register(card: Card) -> Callable[[T], T]:
    """Class decorator that enters a mechanism under its card's name.

    Raises ValueError when the name is taken, or differs from its file inside this package.
    """

    def enter(cls: T) -> T:
        module = cls.__module__
        if module.startswith("foveate.") and module.rsplit(".", 1)[-1] != card.name:
            raise ValueError(f"mechanism {card.name!r} must live in a file of that name: {module}")
        held = _classes.get(card.name)
        if held is not None and (held.__module__, held.__qualname__) != (module, cls.__qualname__):
            raise ValueError(f"the name {card.name!r} is already taken by {held.__module__}")
        cast(Any, cls).card = card
        _classes[card.name] = cls
        return cls

    return enter


@cache
def _modules() -> dict[str, str]:
    """Mechanism files of this package: name -> module, read off the folders without importing."""
    root = Path(__file__).parent
    found = {}
    for folder in _FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            if path.stem != "base" and not path.stem.startswith("_"):
                dotted = path.relative_to(root.parent).with_suffix("").parts
                found[path.stem] = ".".join(dotted)
    return found


def names() -> list[str]:
    """Names of all mechanisms, without importing them."""
    return sorted({*_modules(), *_classes})


def lookup(name: str) -> Any:
    """The registered class of a mechanism; ValueError suggests the nearest name.

    ImportError, naming the extra, when it works on transformers models and these are not here.
    """
    if name not in _classes and name in _modules():
        try:
            importlib.import_module(_modules()[name])
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] not in _EXTRAS:
                raise
            extra = _EXTRAS[error.name.split(".")[0]]
            raise ImportError(
                f"{name} needs {error.name}, not installed here: pip install 'foveate[{extra}]'",
                name=error.name,
            ) from error
    if name not in _classes:
        raise ValueError(f"unknown mechanism {name!r}{nearest(name, names())}")
    return _classes[name]


def load_plugin(path: Path) -> None:
    """Run a Python file that registers mechanisms of your own; ValueError when it cannot be run."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"plugin {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean …?` or the list of what is known."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known) or 'none'}"


def find(
    *, kind: str | None = None, family: str | None = None, pretrained: str | None = None
) -> list[Card]:
    """Cards of all mechanisms that match, by family and name; imports every mechanism.

    Those that need a package which is not installed are left out.
    """
    cards = []
    for name in names():
        with contextlib.suppress(ImportError):
            cards.append(lookup(name).card)
    wanted = {"kind": kind, "family": family, "pretrained": pretrained}
    for key, value in wanted.items():
        if value is not None:
            cards = [c for c in cards if getattr(c, key) == value]
    return sorted(cards, key=lambda c: (c.family, c.name))


def create(spec: str, **options: Any) -> Any:
    """A mechanism from its name and options, or from a string `name:key=value,…`.

    `create("flexprefill", gamma=0.95)` and `create("flexprefill:gamma=0.95")` are equal. Tuples
    are written with slashes: `dense_layers=0/1`. Raises ValueError for an unknown mechanism or
    option, TypeError for an option of the wrong type and for one that must be given but is not.
    """
    cls, options = parse(spec, **options)
    taken = inspect.signature(cls).parameters.values()
    missing = [p.name for p in taken if p.default is p.empty and p.name not in options]
    if missing:
        name = cls.card.name
        raise TypeError(f"{name} needs {', '.join(missing)}, got {', '.join(options) or 'none'}")
    return cls(**options)


def parse(spec: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The class and the options that a string names, with further options; raises as `create`."""
    name, _, tail = spec.partition(":")
    cls = lookup(name.strip())
    for pair in filter(None, (p.strip() for p in tail.split(","))):
        key, sign, text = (part.strip() for part in pair.partition("="))
        if not sign:
            raise ValueError(f"option {pair!r} in {spec!r} must read key=value")
        if key in options:
            raise ValueError(f"option {key!r} is given twice in {spec!r}")
        options[key] = _parse(cls, name, key, text)
    for key, value in options.items():
        # JSON knows no tuples: they come back from it as lists.
        options[key] = tuple(value) if isinstance(value, list) else value
        _check(options[key], _hint(cls, name, key), name, key)
    return cls, options


def spec_of(mechanism: Any) -> str:
    """The string that creates an equal mechanism; options at their default are left out."""
    parts = []
    for f in dataclasses.fields(mechanism):
        value = getattr(mechanism, f.name)
        if value != f.default:
            shown = "/".join(map(str, value)) if isinstance(value, tuple) else value
            parts.append(f"{f.name}={shown}")
    name = mechanism.card.name
    return f"{name}:{','.join(parts)}" if parts else name


def _hint(cls: Any, name: str, key: str) -> Any:
    taken = inspect.signature(cls).parameters
    if key not in taken:
        raise ValueError(f"{name} has no option {key!r}{nearest(key, sorted(taken))}")
    # A dataclass declares its options as fields, any other class where it is made.
    return typing.get_type_hints(cls if dataclasses.is_dataclass(cls) else cls.__init__)[key]


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type hint: int | None -> (int, NoneType)."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _parse(cls: Any, name: str, key: str, text: str) -> Any:
    """The value of an option written as text, after the field's type."""
    kinds = _kinds(_hint(cls, name, key))
    if type(None) in kinds and text.lower() == "none":
        return None
    for kind in kinds:
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind is str:
            return text
        if typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)[0]
            try:
                return tuple(inner(x) for x in text.split("/") if x)
            except ValueError:
                continue
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _check(value: Any, hint: Any, name: str, key: str) -> None:
    """Refuse a value whose type the field does not take."""
    for kind in _kinds(hint):
        plain = typing.get_origin(kind) or kind
        if plain is typing.Literal and value in typing.get_args(kind):
            return
        if not isinstance(plain, type):
            continue
        if plain is tuple and isinstance(value, tuple):
            for item in value:
                _check(item, typing.get_args(kind)[0], name, key)
            return
        number = plain is float and isinstance(value, int) and not isinstance(value, bool)
        exact = isinstance(value, plain) and not (plain is int and isinstance(value, bool))
        if number or exact:
            return
    shown = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise TypeError(f"{name}: option {key!r} must be {shown}, got {value!r}")
