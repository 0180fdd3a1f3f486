"""Small models trained on bigrams that copy back, and their maps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.hf.parts import run
from foveate.hf.watch import Seen, watch
from foveate.ops import Normalizer
from foveate.tasks.batch import Batch
from foveate.tasks.bigram_backcopy import Chain, bigram_backcopy, dirichlet_chain
from foveate.tasks.train import fit

_VOCABULARY, _LENGTH, _WIDTH, _ROWS = 32, 48, 64, 64


class Trained(NamedTuple):
    """A model after training, fresh rows, and what it makes of them.

    weights (B, 1, L, L), values (B, 1, L, width) and outputs (B, 1, L, width) are those of a
    layer, trigger (B, L) says which rows copy back.
    """

    weights: Tensor
    values: Tensor
    outputs: Tensor
    trigger: Tensor
    losses: tuple[float, float]
    """On the triggers; in excess of the chain's entropy elsewhere."""


class Copier:
    """A GPT-2 of one head with random embeddings N(0, std²), trained on the task."""

    def __init__(
        self, rule: Normalizer | None = None, *, steps: int = 1000, layers: int = 1, std: float = 1
    ) -> None:
        self.rule, self.chain = rule, dirichlet_chain(_VOCABULARY, seed=0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = _gpt2(layers, std)
            fit(self.model.parameters(), self._loss, steps=steps, lr=2e-3)
        self.model.eval()

    @torch.no_grad()
    def judged(self, layer: int = 0) -> Trained:
        """One of its layers, on rows that it has not seen."""
        held: list[tuple[Tensor, Tensor, Tensor]] = []

        def attention(seen: Seen) -> Tensor:
            unit = torch.eye(seen.k.shape[2]).expand(*seen.k.shape[:2], -1, -1)
            held.append((self._attend(seen, unit), seen.v, self._attend(seen, seen.v)))
            return held[-1][2]

        batch = _rows(self.chain, 1_000_000)
        with watch(self.model, attention=attention):
            logits = self.model.get_output_embeddings()(run(self.model, batch.inputs))
        losses = self.chain.excess(batch, logits)
        return Trained(*held[layer], self.chain.is_trigger(batch), losses)

    def _loss(self, step: int) -> Tensor:
        batch = _rows(self.chain, step)
        if self.rule is None:
            hidden = run(self.model, batch.inputs)
        else:
            with watch(self.model, attention=lambda seen: self._attend(seen, seen.v)):
                hidden = run(self.model, batch.inputs)
        return batch.loss(self.model.get_output_embeddings()(hidden))

    def _attend(self, seen: Seen, v: Tensor) -> Tensor:
        rule = self.rule or "softmax"
        return ops.attend(seen.q, seen.k, v, normalizer=rule, **seen.options())


def _rows(chain: Chain, seed: int) -> Batch:
    return bigram_backcopy(chain, _ROWS, seed=seed, length=_LENGTH)


def _gpt2(layers: int, std: float) -> Any:
    """Learned positions, norms before the parts, a GELU of four times the width."""
    from transformers import GPT2Config, GPT2LMHeadModel

    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(
        vocab_size=_VOCABULARY + 1,
        n_positions=_LENGTH,
        n_embd=_WIDTH,
        n_layer=layers,
        n_head=1,
        activation_function="gelu",
        initializer_range=(3 * _WIDTH) ** -0.5,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        **off,
    )
    model = GPT2LMHeadModel(config)
    for table in (model.transformer.wte, model.transformer.wpe):
        nn.init.normal_(table.weight, std=std)
    return model
