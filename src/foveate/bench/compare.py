"""The main job: which attention should this model use, on this text, on this machine?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.bench import needles
from foveate.bench.machine import machine
from foveate.bench.maps import block_map
from foveate.bench.runs import (
    Recording,
    Run,
    answer,
    body,
    divergence,
    head_logits,
    perplexity,
    run,
)
from foveate.bench.store import SCHEMA, Json, Results, now
from foveate.bench.summary import summarise
from foveate.hf.plan import attention_plan, cache_plan, python_line, slots_of
from foveate.hf.planfile import load_plan
from foveate.hf.text import encode, text_sha256
from foveate.ops import full_layout
from foveate.registry import create, spec_of

DEFAULT_SPECS = ("flexprefill", "prism", "sink_window", "cache=snapkv:budget=512")

Step = Callable[[], None]


@dataclass(frozen=True)
class Settings:
    """What decides a comparison; two runs with equal settings can share measurements.

    tokens: length of the prompt; decode_tokens: tokens of the text decoded after it; scored: last
    positions of the prompt on which KL and top-1 are judged; needle_tokens: length of a needle
    prompt; max_loss (percent of perplexity) and max_kl (nats) bound the winner's loss.
    """

    model: str
    text: str
    text_sha256: str
    tokens: int = 4096
    decode_tokens: int = 64
    repeats: int = 3
    scored: int = 256
    needle_depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    needle_tokens: int = 2048
    max_loss: float = 1.0
    max_kl: float = 0.05
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("tokens", "decode_tokens", "repeats", "scored", "needle_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if any(not 0 <= d <= 1 for d in self.needle_depths):
            raise ValueError(f"needle depths must lie in [0, 1], got {self.needle_depths}")

    def longest(self) -> int:
        """Tokens of the longest sequence the model will see."""
        return max(self.tokens + self.decode_tokens + 1, self.needle_tokens + needles.ANSWER_TOKENS)


class Comparison:
    """A comparison of mechanisms on a loaded model; every finished measurement is on disk."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        text: str,
        settings: Settings,
        specs: Sequence[str],
        folder: Path,
        *,
        command: str = "",
        fresh: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.specs = list(dict.fromkeys(["dense", *specs]))
        layers = body(model).config.num_hidden_layers
        self.slots = {spec: _slots(spec, layers) for spec in self.specs}
        for path in {slots["plan"] for slots in self.slots.values() if "plan" in slots}:
            load_plan(path).fit(model, path)
        self.ids = encode(tokenizer, text, settings.tokens + settings.decode_tokens + 1)
        self.hay = encode(tokenizer, text, settings.needle_tokens)
        self.results = Results.open(folder, self._frame(command), fresh)
        self.path, self.resumed = self.results.path, len(self.results.data["measurements"])
        self._dense: Run | None = None
        summarise(self.results)
        self.results.save()

    def _frame(self, command: str) -> Json:
        settings = asdict(self.settings) | {"specs": self.specs}
        settings["needle_depths"] = list(self.settings.needle_depths)
        return {
            "schema": SCHEMA,
            "created": now(),
            "updated": now(),
            "complete": False,
            "command": command,
            "settings": settings,
            "machine": machine(),
            "model": _describe(self.model, self.settings.model),
            "mechanisms": [_entry(spec, self.slots[spec]) for spec in self.specs],
        }

    def todo(self) -> list[tuple[str, Step]]:
        """What is not measured yet, in order: (what it is, how to do it)."""
        return list(self._steps())

    def _steps(self) -> Iterator[tuple[str, Step]]:
        s, find = self.settings, self.results.find
        for spec in self.specs:
            if not find(kind="quality", spec=spec):
                yield f"quality of {spec}", _bind(self._measure_quality, spec)
        for repeat in range(s.repeats):
            missing = [x for x in self.specs if not find(kind="timing", spec=x, repeat=repeat)]
            if missing:
                label = f"timing, round {repeat + 1} of {s.repeats}"
                yield label, _bind(self._measure_round, repeat, missing)
        for spec in self.specs:
            for depth in s.needle_depths:
                if not find(kind="needle", spec=spec, depth=depth):
                    label = f"needle at {depth:.0%} with {spec}"
                    yield label, _bind(self._measure_needle, spec, depth)

    def finish(self) -> None:
        """Bring the summary up to date with the measurements."""
        summarise(self.results)
        self.results.save()

    def _prompt(self) -> tuple[Tensor, Tensor]:
        t, d = self.settings.tokens, self.settings.decode_tokens
        return self.ids[:, :t], self.ids[:, t : t + d]

    def _run(self, spec: str, record: Recording | None = None) -> Run:
        return run(self.model, self.slots[spec], *self._prompt(), record)

    def _dense_run(self) -> Run:
        """The run that quality is judged against, made once."""
        if self._dense is None:
            self._dense = self._run("dense")
        return self._dense

    @torch.inference_mode()
    def _measure_quality(self, spec: str) -> None:
        s, base = self.settings, self._dense_run()
        config = body(self.model).config
        record = Recording(config.num_hidden_layers // 2, 0)
        own = base if spec == "dense" else self._run(spec, record)
        scored = min(s.scored, s.tokens)
        last = (head_logits(self.model, r.hidden[-scored:]) for r in (base, own))
        kl, top1 = divergence(*last)
        decode_kl, decode_top1 = divergence(base.logits, own.logits)
        after = self.ids[0, s.tokens + 1 :]
        loss = torch.nn.functional.cross_entropy(own.logits, after)
        self.results.data["measurements"] += self._picture(spec, record)
        self.results.add(
            {
                "kind": "quality",
                "spec": spec,
                "prefill": {
                    "perplexity": perplexity(self.model, own.hidden, self.ids[0, 1 : s.tokens + 1]),
                    "kl": kl,
                    "top1": top1,
                    "positions": s.tokens,
                },
                "decode": {
                    "perplexity": float(loss.exp()),
                    "kl": decode_kl,
                    "top1": decode_top1,
                    "positions": s.decode_tokens,
                },
                "kv_bytes": own.kv_bytes,
                "dense_kv_bytes": base.kv_bytes,
                "density": {p: record.mean("density", p) for p in ("prefill", "decode")},
                "retained_mass": {
                    p: record.mean("retained_mass", p) for p in ("prefill", "decode")
                },
            }
        )

    def _picture(self, spec: str, record: Recording) -> list[Json]:
        if not record.picture:  # dense over a full cache: everything is read
            tokens = self.settings.tokens
            full = full_layout(tokens, tokens, -(-tokens // 32), is_causal=True)
            record.picture, record.phase = block_map(full, record.head), "prefill"
        shape = f"{len(record.picture)}×{len(record.picture[0])}"
        picture = {"layers_shape": shape, "map": record.picture, "phase": record.phase}
        return [{"kind": "map", "spec": spec, "layer": record.layer, "head": record.head} | picture]

    def _measure_round(self, repeat: int, specs: list[str]) -> None:
        """One round of timings: dense first, then every mechanism, each set against that dense."""
        base = self._run("dense")
        for spec in specs:
            own = base if spec == "dense" else self._run(spec)
            self.results.add(
                {
                    "kind": "timing",
                    "spec": spec,
                    "repeat": repeat,
                    "prefill_seconds": own.prefill_seconds,
                    "dense_prefill_seconds": base.prefill_seconds,
                    "decode_seconds": own.decode_seconds,
                    "dense_decode_seconds": base.decode_seconds,
                    "decode_tokens": self.settings.decode_tokens,
                }
            )

    def _measure_needle(self, spec: str, depth: float) -> None:
        s = self.settings
        key = needles.pass_key(depth, s.seed)
        prompt = needles.needle_prompt(self.tokenizer, self.hay, depth, key, s.needle_tokens)
        said = answer(self.model, self.slots[spec], prompt, needles.ANSWER_TOKENS)
        found = needles.answered(self.tokenizer.decode(said, skip_special_tokens=True))
        record = {"kind": "needle", "spec": spec, "depth": depth, "expected": key}
        self.results.add(record | {"answer": found, "hit": found == key})


def _bind(function: Callable[..., None], *args: Any) -> Step:
    return lambda: function(*args)


def check_specs(specs: Sequence[str]) -> None:
    """Refuse unknown mechanisms, options and slots before a model is loaded."""
    for spec in specs:
        _slots(spec, 1)


def _slots(spec: str, layers: int) -> dict[str, str]:
    """The slots of a spec, checked against the model before anything runs."""
    slots = {} if spec == "dense" else slots_of(spec)
    for slot, value in slots.items():
        if slot == "plan":
            load_plan(value)
            continue
        (cache_plan(value, layers) if slot == "cache" else attention_plan(slot, value, layers))
    return slots


def _entry(spec: str, slots: dict[str, str]) -> Json:
    made = {slot: create(value) for slot, value in slots.items() if slot != "plan"}
    shown = {slot: spec_of(m) for slot, m in made.items()}
    parts = list(made.values()) or ([] if "plan" in slots else [create("dense")])
    titles, digest = list(dict.fromkeys(m.card.title for m in parts)), None
    if "plan" in slots:
        shown = {"prefill": f"plan={slots['plan']}"} | shown
        titles = ["A plan for every layer and head", *titles]
        plan = load_plan(slots["plan"])
        parts += plan.mechanisms()
        digest = text_sha256(plan.text())
    only = parts[0].card if len(titles) == 1 and "plan" not in slots else None
    return {
        "spec": spec,
        "slots": shown,
        "plan_sha256": digest,
        "title": " with ".join(titles),
        "year": only and only.year,
        "paper": only and only.paper,
        "selection_causal": all(m.card.selection_causal for m in parts),
        "python": python_line(slots),
    }


def _describe(model: Any, name: str) -> Json:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return {
        "name": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": config.num_hidden_layers,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "context": getattr(config, "max_position_embeddings", None) or 0,
    }
