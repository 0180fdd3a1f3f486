"""The main job: which attention should this model use, on this text, on this machine?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.bench import needles
from foveate.bench.machine import machine
from foveate.bench.maps import block_map
from foveate.bench.runs import Recording, Run, answer, divergence, perplexity, run
from foveate.bench.store import SCHEMA, Json, Results, now
from foveate.bench.summary import summarise
from foveate.hf.parts import body, head_logits
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

    lengths: of the prompt, ascending: all is measured at each, the longest decides; decode_tokens:
    tokens of the text decoded after it; scored: last positions of the prompt on which KL and top-1
    are judged; needle_tokens: a needle prompt is as long as the prompt, at most this; max_loss
    (percent of perplexity) and max_kl (nats) bound the winner's loss.
    """

    model: str
    text: str
    text_sha256: str
    lengths: tuple[int, ...] = (4096,)
    decode_tokens: int = 128
    repeats: int = 3
    scored: int = 1024
    needle_depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    needle_tokens: int = 2048
    max_loss: float = 1.0
    max_kl: float = 0.05
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"tokens must be ascending lengths, at least one, got {self.lengths}")
        if self.lengths[0] < 1:
            raise ValueError(f"tokens must be at least 1, got {self.lengths[0]}")
        for name in ("decode_tokens", "repeats", "scored", "needle_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if any(not 0 <= d <= 1 for d in self.needle_depths):
            raise ValueError(f"needle depths must lie in [0, 1], got {self.needle_depths}")

    def longest(self) -> int:
        """Tokens of the longest sequence the model will see."""
        return self.lengths[-1] + max(self.decode_tokens, needles.ANSWER_TOKENS)


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
        self.ids = encode(tokenizer, text, settings.lengths[-1] + settings.decode_tokens + 1)
        for depth in settings.needle_depths:
            self._needle(settings.lengths[0], depth)  # refuses a prompt too short for it
        self.results = Results.open(folder, self._frame(command), fresh)
        self.path, self.resumed = self.results.path, len(self.results.data["measurements"])
        self._dense: tuple[int, Run] | None = None
        summarise(self.results)
        self.results.save()

    def _frame(self, command: str) -> Json:
        settings = json.loads(json.dumps(asdict(self.settings))) | {"specs": self.specs}
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
        for tokens in self.settings.lengths:
            for label, step in self._steps_at(tokens):
                yield f"{tokens:,} tokens: {label}", step

    def _steps_at(self, tokens: int) -> Iterator[tuple[str, Step]]:
        s, find = self.settings, partial(self.results.find, tokens=tokens)
        for spec in self.specs:
            if not find(kind="quality", spec=spec):
                yield f"quality of {spec}", partial(self._measure_quality, tokens, spec)
        for repeat in range(s.repeats):
            missing = [x for x in self.specs if not find(kind="timing", spec=x, repeat=repeat)]
            if missing:
                label = f"timing, round {repeat + 1} of {s.repeats}"
                yield label, partial(self._measure_round, tokens, repeat, missing)
        for spec in self.specs:
            for depth in s.needle_depths:
                if not find(kind="needle", spec=spec, depth=depth):
                    label = f"needle at {depth:.0%} with {spec}"
                    yield label, partial(self._measure_needle, tokens, spec, depth)

    def finish(self) -> None:
        """Bring the summary up to date with the measurements."""
        summarise(self.results)
        self.results.save()

    def _run(self, tokens: int, spec: str, record: Recording | None = None) -> Run:
        prompt, then = (
            self.ids[:, :tokens],
            self.ids[:, tokens : tokens + self.settings.decode_tokens],
        )
        return run(self.model, self.slots[spec], prompt, then, record)

    def _recording(self, tokens: int) -> Recording:
        """What is noted of a run; a head is pictured at the longest length only."""
        middle = body(self.model).config.num_hidden_layers // 2
        return Recording(middle if tokens == self.settings.lengths[-1] else -1, 0)

    def _dense_run(self, tokens: int) -> Run:
        """The run that quality is judged against, made once for a length."""
        if self._dense is None or self._dense[0] != tokens:
            self._dense = tokens, self._run(tokens, "dense", self._recording(tokens))
        return self._dense[1]

    @torch.inference_mode()
    def _measure_quality(self, tokens: int, spec: str) -> None:
        s, base, record = self.settings, self._dense_run(tokens), self._recording(tokens)
        own = base if spec == "dense" else self._run(tokens, spec, record)
        scored = min(s.scored, tokens)
        last = (head_logits(self.model, r.hidden[-scored:]) for r in (base, own))
        kl, top1 = divergence(*last)
        decode_kl, decode_top1 = divergence(base.logits, own.logits)
        given = self.ids[0, 1 : tokens + s.decode_tokens + 1]
        loss = torch.nn.functional.cross_entropy(own.logits, given[tokens:])
        if tokens == s.lengths[-1]:
            self.results.data["measurements"] += self._picture(tokens, spec, record)
        phases = ("prefill", "decode")
        self.results.add(
            {
                "kind": "quality",
                "spec": spec,
                "tokens": tokens,
                "prefill": {
                    "perplexity": perplexity(self.model, own.hidden, given[:tokens]),
                    "kl": kl,
                    "top1": top1,
                    "positions": tokens,
                },
                "decode": {
                    "perplexity": float(loss.exp()),
                    "kl": decode_kl,
                    "top1": decode_top1,
                    "positions": s.decode_tokens,
                },
                "kv_bytes": own.kv_bytes,
                "dense_kv_bytes": base.kv_bytes,
                "peak_kv_bytes": own.peak_kv_bytes,
                "density": {phase: record.mean("density", phase) for phase in phases},
                "retained_mass": {phase: record.mean("retained_mass", phase) for phase in phases},
            }
        )

    def _picture(self, tokens: int, spec: str, record: Recording) -> list[Json]:
        if not record.picture:  # dense over a full cache: everything is read
            full = full_layout(tokens, tokens, -(-tokens // 32), is_causal=True)
            record.picture, record.phase = block_map(full, record.head), "prefill"
        shape = f"{len(record.picture)}×{len(record.picture[0])}"
        picture = {"layers_shape": shape, "map": record.picture, "phase": record.phase}
        place = {"tokens": tokens, "layer": record.layer, "head": record.head}
        return [{"kind": "map", "spec": spec} | place | picture]

    def _measure_round(self, tokens: int, repeat: int, specs: list[str]) -> None:
        """One round of timings: dense first, then every mechanism, each set against that dense."""
        base = self._run(tokens, "dense")
        for spec in specs:
            own = base if spec == "dense" else self._run(tokens, spec)
            self.results.add(
                {
                    "kind": "timing",
                    "spec": spec,
                    "tokens": tokens,
                    "repeat": repeat,
                    "prefill_seconds": own.prefill_seconds,
                    "dense_prefill_seconds": base.prefill_seconds,
                    "decode_seconds": own.decode_seconds,
                    "dense_decode_seconds": base.decode_seconds,
                    "decode_tokens": self.settings.decode_tokens,
                }
            )

    def _needle(self, tokens: int, depth: float) -> tuple[Tensor, str]:
        """The prompt that hides a key, and the key."""
        key, length = (
            needles.pass_key(depth, self.settings.seed),
            min(tokens, self.settings.needle_tokens),
        )
        return needles.needle_prompt(self.tokenizer, self.ids, depth, key, length), key

    def _measure_needle(self, tokens: int, spec: str, depth: float) -> None:
        """Ask for a key. What is asked comes after a cache policy has compressed the text."""
        prompt, key = self._needle(tokens, depth)
        slots, count = self.slots[spec], needles.ANSWER_TOKENS
        late = needles.question_tokens(self.tokenizer) if "cache" in slots else 0
        said = answer(self.model, slots, prompt, count, held_back=late)
        found = needles.answered(self.tokenizer.decode(said, skip_special_tokens=True))
        record = {"kind": "needle", "spec": spec, "tokens": tokens, "depth": depth}
        self.results.add(record | {"expected": key, "answer": found, "hit": found == key})


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
