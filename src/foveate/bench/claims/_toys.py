"""Tiny models that claims train from scratch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.attention.base import Attention
from foveate.bench.claims import Outcome
from foveate.hf.text import builtin_text
from foveate.nn._attending import Attending
from foveate.tasks.batch import Batch
from foveate.tasks.byte_text import ByteText
from foveate.tasks.mqar import mqar
from foveate.tasks.train import fit


def toy(*, vocabulary: int, length: int, layers: int = 2, width: int = 64, heads: int = 2) -> Any:
    """A random Llama with rotary positions, the same at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


class Recaller(nn.Module):
    """Embedding, a short causal convolution, layers (B, L, dim) -> (B, L, dim), a head.

    The convolution puts a key beside its value, so that one layer is enough to recall.
    """

    def __init__(self, layers: Sequence[nn.Module], dim: int, vocabulary: int = 128) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(vocabulary, dim), nn.ModuleList(layers)
        self.conv = nn.Conv1d(dim, dim, 3, groups=dim)
        self.head = nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, vocabulary))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, L, vocabulary)."""
        x = self.embed(ids).transpose(1, 2)
        x = (x + self.conv(nn.functional.pad(x, (2, 0)))).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


class Residual(nn.Module):
    """A layer after a norm and beside a skip."""

    def __init__(self, layer: nn.Module, dim: int) -> None:
        super().__init__()
        self.norm, self.layer = nn.RMSNorm(dim), layer

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, dim) -> (B, L, dim)."""
        y: Tensor = x + self.layer(self.norm(x))
        return y


def attending_layer(
    mechanism: Attention, layers: int, dim: int, heads: int
) -> Callable[[int], Attending]:
    """Layer i of so many that attend under a mechanism, their heads rotated by position."""
    return lambda i: Attending(mechanism, dim, heads, index=i, layers=layers, theta=10_000.0)


def attending(mechanism: Attention, *, layers: int = 2, heads: int = 2, dim: int = 64) -> Recaller:
    """Layers that attend under a mechanism, in a model that can recall."""
    own = map(attending_layer(mechanism, layers, dim, heads), range(layers))
    return Recaller([Residual(layer, dim) for layer in own], dim)


def recall(make: Callable[[], nn.Module], *, filler: bool = False, steps: int = 400) -> nn.Module:
    """A model, made from the same random numbers, trained to recall 4 pairs within 64 tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()

        def loss(step: int) -> Tensor:
            batch = _rows(64, step, filler)
            return batch.loss(model(batch.inputs))

        fit(model.parameters(), loss, steps=steps, lr=3e-3)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, *, filler: bool = False) -> float:
    """Share of right answers to questions about fresh pairs."""
    test = _rows(300, 100_000, filler)
    return test.accuracy(model(test.inputs))


def _rows(count: int, seed: int, filler: bool) -> Batch:
    return mqar(count, seed=seed, pairs=4, vocabulary=128, spread=1.0, filler=filler)


def judged(figures: dict[str, float], holds: bool, best: float) -> Outcome:
    """The outcome of a comparison of recall; none where the best of the models did not learn it."""
    if best < 0.5:
        return Outcome(figures, None, "no model learned to recall in so few steps")
    return Outcome(figures, holds)


# Bytes of the built-in text that no language model is trained on.
_HELD_OUT = 1 << 16


def speaker(
    layer: Callable[[int], nn.Module],
    *,
    dim: int = 64,
    layers: int = 4,
    length: int = 64,
    steps: int = 300,
    lr: float = 3e-3,
) -> nn.Module:
    """A language model of bytes, made from the same random numbers, trained on the built-in text.

    layer(i) makes the attention of layer i; each step is of 8 rows of `length` bytes.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Embedding(256, dim),
            *(Residual(x, dim) for i in range(layers) for x in (layer(i), _mlp(dim))),
            nn.RMSNorm(dim),
            nn.Linear(dim, 256),
        )
    return trained_on_bytes(model, length=length, steps=steps, lr=lr)


def trained_on_bytes(
    model: nn.Module, *, length: int, steps: int, lr: float = 3e-3, rows: int = 8
) -> nn.Module:
    """A language model of bytes, (B, L) -> (B, L, 256), trained on the built-in text."""
    text = ByteText.of(builtin_text(), _HELD_OUT)

    def loss(step: int) -> Tensor:
        batch = text.batch(rows, seed=step, length=length)
        return batch.loss(model(batch.inputs))

    fit(model.parameters(), loss, steps=steps, lr=lr)
    return model.eval()


@torch.no_grad()
def held_out_loss(model: nn.Module, length: int) -> float:
    """Nats a byte of a language model on 16,384 bytes that it was not trained on."""
    text = ByteText.of(builtin_text(), _HELD_OUT)
    test = text.test(length=length - 1, limit=(1 << 14) // length)
    parts = (x.split(max(1, 4096 // length)) for x in test)
    total = 0.0
    for inputs, targets, mask in zip(*parts, strict=True):
        total += float(Batch(inputs, targets, mask).loss(model(inputs))) * len(inputs)
    return total / len(test.inputs)


def _mlp(dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
