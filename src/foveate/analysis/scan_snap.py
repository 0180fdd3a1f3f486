"""Scan and Snap: what attention of one layer learns to look at (2023, paper 257)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.analysis.base import Record, rank_correlation
from foveate.registry import Card, register


@register(
    Card(
        name="scan_snap",
        title="Scan and Snap: Understanding Training Dynamics and Token Composition in 1-layer "
        "Transformer",
        year=2023,
        paper=257,
        claim="attention of one layer leaves common tokens for distinct ones, by co-occurrence, "
        "and stops before one of them takes all",
        kind="analysis",
        family="analysis",
        pretrained="scratch",
        cost="a softmax of every row for each step that is measured",
        confidence="medium",
    )
)
@dataclass(frozen=True, kw_only=True)
class ScanSnap:
    """Where attention from the last token stood at steps of its training.

    A context token is distinct when one next token alone occurs with it, else common. By step, as
    means over rows: `common` (mass on common tokens), `largest` (weight of a row) and `even` (that
    weight if the distinct tokens of the row shared all mass alike); as means over pairs of a last
    and a next token: `order` (rank correlation of the logits of distinct tokens and how often
    they occur, NaN while all are alike) and `gap` (mean logit of distinct less common tokens).
    """

    @torch.no_grad()
    def __call__(self, logits: Tensor, table: Tensor, inputs: Tensor) -> Record:
        """Of logits (steps, last tokens, vocabulary) of context tokens.

        table (last tokens, next tokens, vocabulary) is P(context | last, next); inputs (n, L) are
        rows whose last token is one of the last ids of the vocabulary. Raises ValueError for
        shapes that do not fit, or a table without distinct or without common tokens.
        """
        lasts, _, vocabulary = table.shape
        if logits.dim() != 3 or logits.shape[1:] != (lasts, vocabulary):
            raise ValueError(
                f"logits must be (steps, {lasts}, {vocabulary}), got {tuple(logits.shape)}"
            )
        nexts = (table > 0).sum(1)
        distinct, common = nexts == 1, nexts > 1
        if not bool(distinct.any(1).all() and common.any(1).all()):
            raise ValueError("every last token of the table needs distinct and common tokens")
        own, context = inputs[:, -1] - (vocabulary - lasts), inputs[:, :-1]
        weights = logits[:, own[:, None], context].softmax(-1)
        is_distinct = distinct[own[:, None], context]
        values = {
            "common": (weights * ~is_distinct).sum(-1).mean(1),
            "largest": weights.amax(-1).mean(1),
            "even": (1 / is_distinct.sum(1).clamp_min(1)).mean().expand(len(logits)),
            "order": torch.stack([_order(z, table, distinct) for z in logits]),
            "gap": (_mean(logits, distinct) - _mean(logits, common)).mean(1),
        }
        return Record("scan_snap", values, dict.fromkeys(values, ("step",)))


def _order(logits: Tensor, table: Tensor, distinct: Tensor) -> Tensor:
    """Mean rank correlation, over pairs, of logits (lasts, vocabulary) and occurrence."""
    found = []
    for last, following in torch.cartesian_prod(*map(torch.arange, table.shape[:2])).tolist():
        own = distinct[last] & (table[last, following] > 0)
        found.append(rank_correlation(logits[last, own], table[last, following, own]))
    return torch.tensor(found).mean()


def _mean(logits: Tensor, of: Tensor) -> Tensor:
    """Mean (steps, lasts) of logits (steps, lasts, vocabulary) over some tokens."""
    return (logits * of).sum(-1) / of.sum(-1)
