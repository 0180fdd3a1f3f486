"""TensorLens: how fast an answer is lost when the tokens it is said to rest on are taken away."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.analysis.rollout_flow import RolloutFlow
from foveate.analysis.tensor_lens import TensorLens
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded, text_ids
from foveate.hf.parts import head_logits, run

CLAIM = "taking away tokens by their part in the frozen operator costs more than by rollout"

_TEXTS, _TOKENS, _STEP, _MOST = 4, 64, 4, 24


def measure() -> Outcome:
    """Log-probability of the predicted token, mean over 0, 4, … 24 tokens taken away, less plain.

    The embedding of a token taken away is that of the end token; the last token always stays.
    """
    lost: dict[str, list[float]] = {"tensor": [], "rollout": [], "random": []}
    errors = []
    model, _ = loaded()
    for text in range(_TEXTS):
        ids = text_ids(_TOKENS, skip=2_000 * text)
        record = TensorLens(probes=0)(model, ids)
        errors.append(float((record["bias"] / record["logit"]).abs()))
        made = torch.Generator().manual_seed(text)
        orders = {
            "tensor": record["contribution"][0].abs(),
            "rollout": RolloutFlow()(model, ids)["rollout"][0, 0],
            "random": torch.rand(_TOKENS, generator=made),
        }
        for name, score in orders.items():
            lost[name].append(_lost(ids, score[:-1].argsort(descending=True)))
    figures = {f"log-probability lost, {name}": sum(x) / _TEXTS for name, x in lost.items()}
    figures["largest completeness error"] = max(errors)
    tensor, rollout, random = list(figures.values())[:3]
    return Outcome(figures, tensor > max(rollout, random))


@torch.no_grad()
def _lost(ids: Tensor, order: Tensor) -> float:
    """What the predicted token loses on average when the first tokens of an order go."""
    model, tokenizer = loaded()
    embedding = model.get_input_embeddings()
    rows = embedding(ids).repeat(1 + _MOST // _STEP, 1, 1)
    for i in range(len(rows)):
        rows[i, order[: i * _STEP]] = embedding.weight[tokenizer.eos_token_id]
    given = {"inputs_embeds": rows, "attention_mask": torch.ones(rows.shape[:2])}
    said = head_logits(model, run(model, given)[:, -1]).log_softmax(-1)
    held = said[:, said[0].argmax()]
    return float(held[0] - held.mean())
