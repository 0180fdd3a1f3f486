"""APE (2025, paper 96): documents read apart, once their attention is aligned, answer better."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from foveate.attention.decode.ape import APE
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded
from foveate.hf.attach import attach
from foveate.hf.prefix import prefix
from foveate.hf.tails import Prefix

CLAIM = (
    "with 8 facts read apart a temperature brings the perplexity of answers nearer to that of "
    "facts read in order"
)

_SYSTEM = "Some facts about people:\n"
_PEOPLE = {
    "Alice": ("a violin", "Lisbon", "seven"),
    "Bruno": ("a canoe", "Oslo", "twelve"),
    "Clara": ("a telescope", "Nairobi", "three"),
    "David": ("a harp", "Quito", "nine"),
    "Elena": ("a printing press", "Dublin", "four"),
    "Felix": ("a hot air balloon", "Osaka", "eleven"),
    "Grace": ("a lighthouse", "Tunis", "two"),
    "Henry": ("a beehive", "Zagreb", "six"),
}
_GRID = ((0.9, 0.9), (0.8, 0.9), (0.8, 1.0), (0.7, 1.0))


@torch.inference_mode()
def measure() -> Outcome:
    """Perplexity of the answers to 24 questions: no facts, in order, apart, and aligned."""
    model, tokenizer = loaded()
    facts = [
        f"{name} owns {thing}, lives in {city} and has {count} cousins.\n"
        for name, (thing, city, count) in _PEOPLE.items()
    ]
    apart = prefix(model, _SYSTEM, documents=facts, tokenizer=tokenizer)
    ordered = prefix(model, _SYSTEM + "".join(facts), tokenizer=tokenizer)
    none = prefix(model, _SYSTEM, tokenizer=tokenizer)
    figures = {
        "perplexity, no facts": _perplexity(none, None),
        "in order": _perplexity(ordered, None),
        "apart": _perplexity(apart, None),
    }
    aligned = {
        f"T {heat}, S {scale}": _perplexity(apart, APE(temperature=heat, scale=scale))
        for heat, scale in _GRID
    }
    gap = figures["apart"] - figures["in order"]
    best = min(aligned.values())
    closed = (figures["apart"] - best) / gap
    figures |= {**aligned, "share of the gap closed by the best": closed}
    return Outcome(figures, gap > 0 and closed > 0.1)


def _perplexity(held: Prefix, way: APE | None) -> float:
    """Of the tokens of all answers, asked in one left-padded batch."""
    model, tokenizer = loaded()
    asked: list[tuple[str, str]] = []
    for name, (thing, city, count) in _PEOPLE.items():
        asked.append((f"Question: What does {name} own? Answer: {name} owns", f" {thing}"))
        asked.append((f"Question: Where does {name} live? Answer: {name} lives in", f" {city}"))
        asked.append((f"Question: How many cousins has {name}? Answer: {name} has", f" {count}"))
    rows, answers = [], []
    for question, answer in asked:
        first, last = (_ids(tokenizer, text) for text in (question, answer))
        rows.append(torch.cat((first, last)))
        answers.append(last)
    width = max(len(row) for row in rows)
    ids = torch.stack([pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    at = (mask.cumsum(1) - 1).clamp_min(0)
    with attach(model, prefix=held, prefill=way, decode=way):
        logits = model(ids, attention_mask=mask, position_ids=at).logits
    losses = [
        cross_entropy(logits[b, -len(x) - 1 : -1].float(), x, reduction="sum")
        for b, x in enumerate(answers)
    ]
    return float(torch.stack(losses).sum().div(sum(len(x) for x in answers)).exp())


def _ids(tokenizer: object, text: str) -> Tensor:
    found = tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    return torch.tensor(found)
