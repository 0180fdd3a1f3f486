"""Scan and Snap: one layer of attention and a decoder, trained by plain gradient descent."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from foveate.analysis.scan_snap import ScanSnap
from foveate.bench.claims import Outcome
from foveate.tasks.batch import Batch
from foveate.tasks.scan_snap import context_table, scan_snap

CLAIM = "attention leaves common tokens for distinct ones, in their order, and takes no winner"

_STEPS, _EVERY, _ROWS = 6000, 500, 64
# The decoder learns faster than attention: its rate is ten times as high.
_RATE, _DECODER_RATE = 0.1, 1.0


def measure() -> Outcome:
    """Mass on common tokens, order of the distinct ones and largest weight, while it learns."""
    table = context_table()
    logits = _train(table)
    record = ScanSnap()(logits, table, scan_snap(table, 1000, seed=-1).inputs)
    common, gap = record["common"], record["gap"]
    growth = gap.diff() / (_EVERY / 1000)
    figures = {
        "mass on common tokens, at first": float(common[0]),
        "mass on common tokens, halfway": float(common[len(common) // 2]),
        "mass on common tokens, at last": float(common[-1]),
        "rank correlation with occurrence": float(record["order"][-1]),
        "largest weight of a row": float(record["largest"][-1]),
        "largest weight if distinct tokens shared all": float(record["even"][-1]),
        "growth of the gap in 1,000 steps, at first": float(growth[0]),
        "growth of the gap in 1,000 steps, at last": float(growth[-3:].mean()),
    }
    falls = bool((common.diff() < 0).all())
    ordered = figures["rank correlation with occurrence"] > 0.9
    shared = figures["largest weight of a row"] < 0.5
    slows = figures["growth of the gap in 1,000 steps, at last"] < growth.max()
    return Outcome(figures, falls and ordered and shared and bool(slows))


def _train(table: Tensor) -> Tensor:
    """The logits (steps, last tokens, vocabulary) of context tokens, every so many steps."""
    lasts, nexts, vocabulary = table.shape
    attention = torch.zeros(lasts, vocabulary, requires_grad=True)
    decoder = torch.zeros(vocabulary, nexts, requires_grad=True)
    kept = [attention.detach().clone()]
    for step in range(_STEPS):
        batch = scan_snap(table, _ROWS, seed=step)
        grads = torch.autograd.grad(_loss(batch, attention, decoder), (attention, decoder))
        with torch.no_grad():
            attention -= _RATE * grads[0]
            decoder -= _DECODER_RATE * grads[1]
        if (step + 1) % _EVERY == 0:
            kept.append(attention.detach().clone())
    return torch.stack(kept)


def _loss(batch: Batch, attention: Tensor, decoder: Tensor) -> Tensor:
    """Cross-entropy of the next token, decoded from the attended tokens at unit length."""
    lasts, vocabulary = attention.shape
    own, context = batch.inputs[:, -1] - (vocabulary - lasts), batch.inputs[:, :-1]
    weights = attention[own[:, None], context].softmax(-1)
    bag = weights.new_zeros(len(own), vocabulary).scatter_add(1, context, weights)
    return cross_entropy(normalize(bag, dim=1) @ decoder, batch.targets[:, -1])
