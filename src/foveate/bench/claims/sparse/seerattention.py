"""SeerAttention (2024, paper 139): a gate that learned the block-max map."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate import ops
from foveate.attention._trained import InTraining
from foveate.attention.base import Call
from foveate.attention.sparse.seerattention import Distilled, SeerAttention, _gate
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded, text_ids
from foveate.bench.train import train
from foveate.hf.attach import attach
from foveate.hf.parts import body

CLAIM = "a trained gate finds more of the blocks that matter most than mean-pooled q·k"

_BLOCK, _WINDOW, _WINDOWS, _LAYERS = 64, 2048, 8, (4, 14, 24)


def measure() -> Outcome:
    """Recall of the top 10 % of blocks of each row on held-out text, in three layers."""
    model, _ = loaded()
    ids = text_ids(_WINDOW * (_WINDOWS + 1)).view(_WINDOWS + 1, _WINDOW)
    others = tuple(i for i in range(model.config.num_hidden_layers) if i not in _LAYERS)
    mechanism = SeerAttention(block=_BLOCK, dense_layers=others)
    taught = train(model, mechanism, [ids[:-1]], steps=200, lr=1e-3)
    with torch.no_grad():
        test = _Observed(taught.shape, _BLOCK)
        with attach(model, prefill=InTraining(learner=test, dense_layers=others)):
            body(model)(ids[-1:], use_cache=False)
        recall = {"trained": 0.0, "untrained": 0.0, "mean-pooled": 0.0}
        for layer, ((seen, target),) in test.notes.items():
            scores = {
                "trained": _gate(seen, taught.learner.get_parameter("key")[layer]),
                "untrained": _gate(seen, test.key[layer]),
                "mean-pooled": test.means[layer],
            }
            for name, score in scores.items():
                recall[name] += _recall(score, target, seen.visible) / len(_LAYERS)
    figures = {f"recall, {name}": share for name, share in recall.items()}
    figures["loss, first step"], figures["loss, last step"] = taught.losses[0], taught.losses[-1]
    return Outcome(figures, recall["trained"] > max(recall["untrained"], recall["mean-pooled"]))


class _Observed(Distilled):
    """Takes down the products of mean queries and keys, too."""

    means: dict[int, Tensor]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Dense attention."""
        self.means = getattr(self, "means", {})
        queries, keys = (ops.pool_blocks(x, self.block) for x in (q, k))
        self.means[call.layer] = ops.grouped_logits(queries, keys, 1.0)
        return super().attend(q, k, v, call)


def _recall(scores: Tensor, target: Tensor, visible: Tensor) -> float:
    """Share of the blocks with the largest targets among those with the largest scores."""
    top = (visible.sum(-1) * 0.1).ceil().long().expand(scores.shape[:3])
    found, best = (ops.top_k(x, top, visible=visible) for x in (scores, target))
    late = slice(scores.shape[2] // 4, None)
    return float((found & best)[:, :, late].sum() / best[:, :, late].sum())
