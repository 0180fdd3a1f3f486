"""Tiny language models that claims train from scratch."""

from __future__ import annotations

from typing import Any

import torch


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
