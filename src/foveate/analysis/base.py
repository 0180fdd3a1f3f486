"""What every analysis returns: numbers by layer and head, and what they are numbers of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.files import read_tensors, write_tensors
from foveate.hf.parts import Parts

FORMAT = "foveate.record/1"

Head = tuple[int, int]
"""A layer and one of its query heads."""


@dataclass(frozen=True)
class Record:
    """What an analysis found: tensors by name, the first axes of each named in `axes`.

    `score`, a tensor over layer and head, is what heads are ranked by. `about` says of what model
    and text, with which options and version.
    """

    analysis: str
    values: dict[str, Tensor]
    axes: dict[str, tuple[str, ...]]
    score: str = ""
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.values.items():
            axes = self.axes.get(name)
            if axes is None or len(axes) != value.dim():
                raise ValueError(
                    f"{self.analysis}: {name} has shape {tuple(value.shape)} and axes {axes}"
                )
        if self.score and self.axes.get(self.score) != ("layer", "head"):
            raise ValueError(f"{self.analysis}: {self.score!r} is no score by layer and head")

    def __getitem__(self, name: str) -> Tensor:
        """A tensor by name; KeyError lists what there is."""
        if name not in self.values:
            raise KeyError(f"{self.analysis} has no {name!r}; it has {', '.join(self.values)}")
        return self.values[name]

    def ranked(self, name: str = "", *, ascending: bool = False) -> list[Head]:
        """All heads by a score, the largest first; NaN last."""
        return rank_heads(self._heads(name), ascending=ascending)

    def overlap(self, other: Record, top: int, name: str = "", theirs: str = "") -> float:
        """Jaccard index of the `top` heads of two records."""
        a, b = self.ranked(name)[:top], other.ranked(theirs or name)[:top]
        return len(set(a) & set(b)) / len(set(a) | set(b))

    def correlation(self, other: Record, name: str = "", theirs: str = "") -> float:
        """Spearman's rank correlation of two scores over all heads."""
        return rank_correlation(self._heads(name), other._heads(theirs or name))

    def kv_heads(self, top: int, per_layer: int, name: str = "") -> list[Head]:
        """(layer, kv head) that the `top` heads read, of `per_layer` kv heads in each layer."""
        heads = self._heads(name).shape[1]
        if heads % per_layer:
            raise ValueError(f"{heads} query heads do not divide evenly over {per_layer} kv heads")
        return sorted({(i, h * per_layer // heads) for i, h in self.ranked(name)[:top]})

    def plan(self, top: int, per_layer: int, rest: str, name: str = "") -> list[list[str]]:
        """What `attach` takes as a slot: the kv heads that the `top` heads read are dense.

        All others run `rest`, a mechanism's spec; per_layer is the number of kv heads of a layer.
        """
        dense = set(self.kv_heads(top, per_layer, name))
        layers = len(self._heads(name))
        return [
            ["dense" if (i, h) in dense else rest for h in range(per_layer)] for i in range(layers)
        ]

    def cache_plan(self, top: int, per_layer: int, budget: int, name: str = "") -> list[str | None]:
        """What `attach` takes as the slot cache: the kv heads that the `top` heads read keep all.

        The others keep the first tokens and the last of a budget; per_layer is the number of kv
        heads of a layer.
        """
        full: list[list[int]] = [[] for _ in self._heads(name)]
        for layer, head in self.kv_heads(top, per_layer, name):
            full[layer].append(head)
        return [_cached(heads, per_layer, budget) for heads in full]

    def _heads(self, name: str) -> Tensor:
        value = self[name or self.score]
        if self.axes[name or self.score] != ("layer", "head"):
            raise ValueError(f"{self.analysis}: {name!r} is no score by layer and head")
        return value

    def save(self, folder: str | Path) -> Path:
        """Write NAME.safetensors and NAME.json into a folder; returns the path of the latter."""
        stem = Path(folder) / self.analysis
        stem.parent.mkdir(parents=True, exist_ok=True)
        part = stem.with_suffix(".part")
        try:
            write_tensors(stem.with_suffix(".safetensors"), self.values, {})
            head = {"format": FORMAT, "analysis": self.analysis, "score": self.score}
            text = json.dumps(head | {"axes": self.axes, "about": self.about}, indent=1)
            part.write_text(text + "\n", encoding="utf-8")
            part.replace(stem.with_suffix(".json"))
        finally:
            part.unlink(missing_ok=True)
        return stem.with_suffix(".json")

    def fit(self, model: Any) -> None:
        """Raise ValueError when the record is of a model of another shape."""
        want, have = self.about.get("heads"), shape_of_heads(model)
        if want is not None and list(want) != have:
            raise ValueError(
                f"the record {self.analysis} is of {self.about.get('model')} with {want[0]} layers "
                f"of {want[1]} heads; this model has {have[0]} of {have[1]}"
            )


def _cached(full: list[int], per_layer: int, budget: int) -> str | None:
    """The policy of a layer whose kv heads `full` keep everything; None: all of them."""
    if len(full) == per_layer:
        return None
    if not full:
        return f"window:budget={budget}"
    return f"duo:budget={budget},full={'/'.join(map(str, full))}"


def load_record(path: str | Path) -> Record:
    """Read what `save` wrote, by the path of its JSON file; ValueError for anything else."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else None
            raise ValueError(f"its format is {found!r}, this version reads {FORMAT!r}")
        values, _ = read_tensors(path.with_suffix(".safetensors"))
        axes = {name: tuple(names) for name, names in data["axes"].items()}
        return Record(data["analysis"], values, axes, data["score"], data["about"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"record: {path} cannot be used ({error})") from error


def rank_heads(score: Tensor, *, ascending: bool = False) -> list[Head]:
    """Heads of a score (layers, heads), the largest (or smallest) first; NaN last."""
    if score.dim() != 2:
        raise ValueError(f"score must be (layers, heads), got {tuple(score.shape)}")
    worst = float("inf") if ascending else float("-inf")
    flat = score.double().nan_to_num(worst).flatten()
    order = flat.argsort(descending=not ascending, stable=True).tolist()
    return [divmod(i, score.shape[1]) for i in order]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two tensors of one size, ties at their mean rank."""
    if a.shape != b.shape:
        raise ValueError(f"scores have shapes {tuple(a.shape)} and {tuple(b.shape)}")
    ranks = torch.stack([_mean_ranks(x.double().flatten()) for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def describe(model: Any, inputs: Any = None, **options: Any) -> dict[str, Any]:
    """What a record says it is about."""
    about: dict[str, Any] = {
        "model": Parts(model).name,
        "heads": shape_of_heads(model),
        "foveate": version("foveate"),
    }
    ids = inputs.get("input_ids") if hasattr(inputs, "get") else inputs
    if isinstance(ids, Tensor):
        about |= {"batch": ids.shape[0], "tokens": ids.shape[1]}
    return about | options


def shape_of_heads(model: Any) -> list[int]:
    """Layers of a model and query heads of a layer."""
    parts = Parts(model)
    return [parts.layers, parts.heads]


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """One tensor (layer, …) in float32 of what every layer gave."""
    return torch.stack(list(rows)).float().cpu()


def _mean_ranks(x: Tensor) -> Tensor:
    """Rank of every entry, that of equal ones being their mean."""
    _, group, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[group]
