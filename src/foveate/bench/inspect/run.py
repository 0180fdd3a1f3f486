"""What `foveate inspect` measures, step by step, and the record that its page is made from."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from foveate import registry
from foveate.analysis.base import Head, Record, rank_heads
from foveate.analysis.retrieval_head import answer_accuracy
from foveate.analysis.vit_importance import slopes
from foveate.bench.inspect.views import (
    CELLS,
    TOP_TOKENS,
    distances,
    looks,
    redundancy,
    views,
)
from foveate.bench.machine import machine
from foveate.bench.store import now, write_json
from foveate.hf.ablate import ablate
from foveate.hf.frozen import frozen_forward
from foveate.hf.parts import Parts, head_logits, run
from foveate.registry import nearest
from foveate.tasks.needle_kv import needles
from foveate.tasks.prompt import Prompt

SCHEMA = "foveate.inspect/1"
PARTS = ("retrieval", "importance", "attribution", "ablation")
# Needle prompts; tokens of a text whose loss is watched, and of one that is attributed; heads put
# out of action at once; weights of the page's chosen heads; heads named of a measure.
_NEEDLES, _NEEDLE_TOKENS, _LOSS, _ATTRIBUTED = 8, 273, 512, 2048
_OUT, _LOOKS, _BEST = 10, 400_000, 3

# Measures of heads, of layers and of tokens: title and meaning.
_CORE = (
    ("entropy", "Spread", "Entropy of its rows over that of uniform attention: 1 reads all alike."),
    ("sink", "First token", "Mean weight on the first token, the usual sink."),
    ("locality", "Distance", "Mean distance, in tokens, of what it reads."),
    ("previous", "Token before", "Mean weight on the token before."),
    ("largest", "Sharpness", "Mean of the largest weight of a row."),
)
_REDUNDANCY = (
    "Redundancy",
    "Largest cosine of its map with that of another head: 1 has a twin somewhere in the model.",
)
_RETRIEVAL = (
    "Retrieval",
    "Share of a needle's answer that it looks at most while the model writes it; 0.1 and more is a "
    "retrieval head.",
)
_IMPORTANCE = (
    "Importance",
    "How fast the loss on the text changes when the head's output is turned down (gradient).",
)
_LAYERS = (
    ("collapse", "Spread of tokens", "‖X - mean‖ / ‖X‖ of what enters the layer; 0: all one"),
    ("cosine", "Likeness of tokens", "mean cosine of two tokens that enter the layer"),
    ("rank", "Effective rank", "of the tokens that enter the layer"),
    ("diversity", "Diversity of heads", "√ of the Jensen-Shannon divergence among them"),
)
_COLUMNS = ("How much it is read", "Mean weight of every token over all heads and later tokens.")
_ROLLOUT = (
    "Rollout to the last token",
    "How much of every token reaches the last one when attention and skips are multiplied up.",
)
_LENS = (
    "Contribution to the prediction",
    "What every token adds to the logit of “{}”, {:.1f}, in the model with its gates frozen.",
)
_ABLATION = (
    f"Loss on the first {_LOSS} tokens of the text, and answers to {_NEEDLES} questions about "
    "sentences hidden in others, with some heads set to zero."
)
_NOTES = (
    "Maps were never held: statistics come from attention with other values, from its transposed "
    "form, and from sampled rows.",
    f"A block map has at most {CELLS} × {CELLS} cells, each an equal part of the text.",
    "Rows that see one token alone are left out of means.",
)


def check_parts(only: Sequence[str] | None) -> tuple[str, ...]:
    """Parts by name, all by default; ValueError for one that is unknown."""
    for name in only or ():
        if name not in PARTS:
            raise ValueError(f"unknown part {name!r}{nearest(name, PARTS)}")
    return tuple(name for name in PARTS if name in (only or PARTS))


class Inspection:
    """A model on one text (1, L): `todo` names the steps, `data` is the record so far."""

    resumed = 0

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        ids: Tensor,
        text: str,
        folder: Path,
        *,
        parts: Sequence[str] = PARTS,
        command: str = "",
    ) -> None:
        self.model, self.tokenizer, self.ids, self.folder = model, tokenizer, ids, folder
        self.path = folder / "inspect.json"
        self._parts, self._records = tuple(parts), dict[str, Record]()
        self._heads: dict[str, Tensor] = {}
        shape = Parts(model)
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "created": now(),
            "command": command,
            "machine": machine(),
            "model": {"name": Path(shape.name).name, "layers": shape.layers, "heads": shape.heads},
            "text": {"name": text},
            "tokens": [tokenizer.decode([i]) for i in ids[0].tolist()],
            "metrics": [],
            "overlays": [],
            "layers": [],
            "ablation": None,
            "notes": list(_NOTES),
        }

    @property
    def core_done(self) -> bool:
        """Whether there is enough for a page."""
        return "looks" in self.data

    def todo(self) -> list[tuple[str, Callable[[], None]]]:
        """The steps, in order: what the page cannot do without comes first."""
        steps: list[tuple[str, Callable[[], None]]] = [
            ("statistics of all heads", self._core),
            ("maps and profiles", self._see),
            ("where chosen heads look", self._look),
        ]
        more = {
            "retrieval": ("retrieval heads", self._retrieval),
            "importance": ("importance of heads", self._importance),
            "attribution": ("what the prediction rests on", self._attribution),
            "ablation": ("without some heads", self._ablation),
        }
        steps[2:2] = [more[name] for name in self._parts if name in ("retrieval", "importance")]
        return steps + [more[name] for name in self._parts if name in ("attribution", "ablation")]

    def finish(self) -> None:
        """Write the record and those of the analyses."""
        if self.core_done:
            write_json(self.path, self.data)
        for record in self._records.values():
            record.save(self.folder / "records")

    def _core(self) -> None:
        """What `core_stats` says."""
        record = self._keep(registry.create("core_stats")(self.model, self.ids))
        for name, title, what in _CORE:
            self._metric(name, title, what, record[name])
        for name, title, what in _LAYERS:
            self._layer(title, what, record[name])
        self._layer("First token", "mean weight over the heads", record["sink"].mean(1))

    def _see(self) -> None:
        """Maps, profiles, tokens that are looked at, and the norms of the stream."""
        seen = views(self.model, self.ids)
        self._metric("redundancy", *_REDUNDANCY, redundancy(seen.maps))
        top = seen.maps.amax((-1, -2), keepdim=True).clamp_min(1e-9)
        weights, keys = seen.columns.topk(min(TOP_TOKENS, self.ids.shape[1]), -1)
        begins = distances(self.ids.shape[1])
        ends = [*begins[1:], 2 * begins[-1]]
        self.data |= {
            "cells": seen.maps.shape[-1],
            "maps": _packed((255 * seen.maps / top).round().to(torch.uint8)),
            "distances": [_range(a, b) for a, b in zip(begins, ends, strict=True)],
            "profiles": _rounded(seen.profiles),
            "top_tokens": [
                [list(map(list, zip(i, w, strict=True))) for i, w in zip(*layer, strict=True)]
                for layer in zip(keys.tolist(), _rounded(weights), strict=True)
            ],
        }
        first, others = seen.streams[:, 0], seen.streams[:, 1:].median(1).values
        self._layer("Norm of the first token", "over the median of the others", first / others)
        self._overlay("columns", *_COLUMNS, seen.columns.mean((0, 1)))

    def _look(self) -> None:
        """The largest weights of every row, in the heads that stand out."""
        room = max(1, _LOOKS // (4 * self.ids.shape[1]))
        chosen: dict[Head, str] = {}
        best = {m["title"]: rank_heads(self._heads[m["name"]]) for m in self.data["metrics"]}
        for place in range(len(next(iter(best.values())))):
            for title, heads in best.items():
                if len(chosen) < min(room, 24):
                    chosen.setdefault(heads[place], f"{title.lower()}, no. {place + 1}")
        found = looks(self.model, self.ids, sorted(chosen))
        self.data["looks"] = {
            "heads": found.heads,
            "why": [chosen[head] for head in found.heads],
            "kept": found.keys.shape[-1],
            "keys": base64.b64encode(found.keys.numpy().astype("<u2").tobytes()).decode(),
            "weights": _packed((255 * found.weights).round().to(torch.uint8)),
        }
        first = "retrieval" if "retrieval" in self._heads else "sink"
        self.data["start"] = {"metric": first, "head": rank_heads(self._heads[first])[0]}

    def _prompts(self) -> list[Prompt]:
        """Needles at several depths."""
        return [
            prompt
            for i in range(_NEEDLES)
            for prompt in needles(
                self.tokenizer, rows=1, seed=i, length=_NEEDLE_TOKENS, depth=(i + 0.5) / _NEEDLES
            )
        ]

    def _retrieval(self) -> None:
        """How often a head copies the needle."""
        record = self._keep(registry.create("retrieval_head")(self.model, self._prompts()))
        if record["retrieval"].isnan().all():
            self.data["notes"].append("The model answered no question: retrieval says nothing.")
            return
        self._metric("retrieval", *_RETRIEVAL, record["retrieval"])

    def _importance(self) -> None:
        """How much the loss feels every head."""
        text = self.ids[:, :_LOSS]
        first = rank_heads(slopes(self.model, text))[:_OUT]
        record = registry.create("vit_importance")(self.model, text, heads=first)
        self._metric("importance", *_IMPORTANCE, self._keep(record)["proxy"])

    def _attribution(self) -> None:
        """What the prediction after the text rests on, through all layers."""
        record = self._keep(registry.create("rollout_flow")(self.model, self.ids))
        self._overlay("rollout", *_ROLLOUT, record["rollout"][0, 0])
        if self.ids.shape[1] > _ATTRIBUTED:
            self.data["notes"].append(
                f"Contributions are for texts of at most {_ATTRIBUTED} tokens."
            )
            return
        frozen = frozen_forward(self.model, self.ids)
        logits = frozen.logits().detach()[0]
        token = logits.argmax()
        title, what = _LENS
        what = what.format(self.tokenizer.decode([int(token)]), float(logits[token]))
        self._overlay("lens", title, what, frozen.contributions(token[None])[0])

    def _ablation(self) -> None:
        """The loss and the needles without some heads."""
        prompts, sets = self._prompts(), {"none": list[Head]()}
        named = {"retrieval": "retrieval", "importance": "importance", "sink": "the first token"}
        for name, title in named.items():
            if name in self._heads:
                sets[f"the {_OUT} first in {title}"] = rank_heads(self._heads[name])[:_OUT]
        every = rank_heads(self._heads["sink"])
        taken = {head for heads in sets.values() for head in heads}
        others = [head for head in every if head not in taken]
        sets[f"{_OUT} others at random"] = random.Random(0).sample(others, min(_OUT, len(others)))
        rows = []
        for name, heads in sets.items():
            with torch.inference_mode(), ablate(self.model, heads):
                loss = _loss(self.model, self.ids[:, :_LOSS])
                rows.append(
                    {"name": name, "loss": loss, "accuracy": answer_accuracy(self.model, prompts)}
                )
        self.data["ablation"] = {"what": _ABLATION, "rows": rows}

    def _keep(self, record: Record) -> Record:
        self._records[record.analysis] = record
        return record

    def _metric(self, name: str, title: str, what: str, values: Tensor) -> None:
        """A figure of every head."""
        self._heads[name] = values
        rounded = _rounded(values)
        best = [(i, h, rounded[i][h]) for i, h in rank_heads(values)[:_BEST]]
        metric = {"name": name, "title": title, "what": what, "values": rounded, "best": best}
        self.data["metrics"].append(metric)

    def _layer(self, title: str, what: str, values: Tensor) -> None:
        """A figure of every layer."""
        self.data["layers"].append({"title": title, "what": what, "values": _rounded(values)})

    def _overlay(self, name: str, title: str, what: str, values: Tensor) -> None:
        """A figure of every token."""
        overlay = {"name": name, "title": title, "what": what, "values": _rounded(values)}
        self.data["overlays"].append(overlay)


def _loss(model: Any, ids: Tensor) -> float:
    """Nats a token of a text (1, L)."""
    logits = head_logits(model, run(model, ids)[0, :-1])
    return float(cross_entropy(logits, ids[0, 1:]))


def _range(start: int, stop: int) -> str:
    """The whole numbers of [start, stop)."""
    return str(start) if stop == start + 1 else f"{start}–{stop - 1}"


def _packed(x: Tensor) -> str:
    """Bytes as text."""
    return base64.b64encode(x.contiguous().numpy().tobytes()).decode()


def _rounded(x: Tensor) -> Any:
    """Numbers of four figures, None for NaN."""
    if x.dim():
        return [_rounded(part) for part in x]
    value = float(x)
    return None if value != value else float(f"{value:.4g}")
