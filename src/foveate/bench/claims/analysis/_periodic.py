"""Small encoders trained to fill periodic rows, both ways or with causal attention."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.hf.quiet import quiet
from foveate.tasks.masked_periodic import masked_periodic
from foveate.tasks.train import fit

VOCABULARY, LENGTH, _ROWS = 16, 32, 32
_START, _END = VOCABULARY + 1, VOCABULARY + 2  # beside the mask token


@cache
def filler(*, causal: bool, steps: int = 600) -> Any:
    """A BERT of two layers of four heads that gives the tokens behind the mask."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY + 3,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LENGTH + 2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        is_decoder=causal,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with quiet():  # it warns of the causal twin
            model = BertForMaskedLM(config)

        def loss(step: int) -> Tensor:
            batch = masked_periodic(_ROWS, seed=step, length=LENGTH)
            return batch.loss(filled(model, batch.inputs))

        fit(model.parameters(), loss, steps=steps, lr=2e-3)
    return model.eval()


def framed(rows: Tensor) -> Tensor:
    """Rows (n, L) between a start and an end token, (n, L + 2), as encoders read them."""
    return pad(pad(rows, (1, 0), value=_START), (0, 1), value=_END)


def filled(model: Any, rows: Tensor) -> Tensor:
    """Logits (n, L, vocabulary) of the tokens of rows (n, L)."""
    logits: Tensor = model(framed(rows)).logits
    return logits[:, 1:-1, :VOCABULARY]
