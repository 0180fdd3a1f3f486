"""TokenSelect (2024, paper 250): voted tokens answer what a window of equal size has lost."""

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from foveate.attention.decode.token_select import TokenSelect
from foveate.attention.sparse.sink_window import SinkWindow
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded, text_ids
from foveate.bench.claims._decoding import Prompt
from foveate.bench.needles import needle_prompt, pass_key

CLAIM = (
    "with 512 tokens read of 2,048, voted ones answer for a pass key that a window of equal size "
    "has lost, and a choice serves several steps"
)

_TOKENS, _SINKS, _WINDOW, _READ, _STEPS = 2048, 16, 112, 512, 24


def measure() -> Outcome:
    """Mean loss of the key's tokens at two depths; share of steps that reuse a choice."""
    ways: dict[str, Any] = {
        "dense": None,
        "votes": _made(0.9),
        "window": SinkWindow(sinks=_SINKS, window=_READ - _SINKS),
    }
    losses: dict[str, list[float]] = {name: [] for name in ways}
    _, tokenizer = loaded()
    for depth in (0.2, 0.6):
        key = pass_key(depth, 0)
        asked = needle_prompt(tokenizer, text_ids(_TOKENS), depth, key, _TOKENS)
        told = tokenizer(f" {key}", add_special_tokens=False)["input_ids"]
        fed = torch.cat((asked[:, -1:], torch.tensor([told[:-1]])), 1)
        prompt = Prompt(asked[:, :-1])
        for name, way in ways.items():
            losses[name].append(float(cross_entropy(prompt.decode(fed, way), torch.tensor(told))))
    figures = {f"loss, {name}": sum(x) / len(x) for name, x in losses.items()}
    text = text_ids(_TOKENS + _STEPS)
    prompt = Prompt(text[:, :_TOKENS])
    for threshold in (0.9, 0.7):
        ages: list[float] = []

        def note(cache: Any, ages: list[float] = ages) -> None:
            ages.extend(float(layer.memory[0]["age"] > 1) for layer in cache.layers)

        prompt.decode(text[:, _TOKENS:], _made(threshold), after=note)
        figures[f"steps that reuse a choice at {threshold}"] = sum(ages) / len(ages)
    found = figures["loss, votes"] < 0.5 * figures["loss, window"]
    return Outcome(figures, found and figures["steps that reuse a choice at 0.7"] > 0.5)


def _made(threshold: float) -> TokenSelect:
    budget = _READ - _SINKS - _WINDOW
    return TokenSelect(
        sinks=_SINKS, window=_WINDOW, budget=budget, chunk=_WINDOW, threshold=threshold
    )
