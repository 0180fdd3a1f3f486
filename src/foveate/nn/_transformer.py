"""A small decoder or encoder of tokens, its layers given by a pattern."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.files import read_tensors, write_tensors
from foveate.nn._stack import Stack, gated_width
from foveate.ops import Mask

FORMAT = "foveate.transformer/1"


class Transformer(nn.Module):
    """Embedding, pre-norm residual layers after a pattern (`Stack`), norm, and a head.

    `"gated_deltanet*3, dense"` with `layers=8` is twice three recurrent layers and one of softmax
    attention. mlp is the inner width of the SwiGLU after each layer (None: 8/3 dim, 0: none), conv
    the width of a causal convolution before each, theta the base of the rotary positions of
    attention (None: no rotation), positions the number of learned ones (0: none), `tie` lets the
    head be the embedding, `causal` False makes an encoder. Raises ValueError for an unknown layer
    and for sizes that do not fit.
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        pattern: str,
        *,
        layers: int | None = None,
        heads: int = 4,
        mlp: int | None = None,
        conv: int = 0,
        theta: float | None = 10_000.0,
        positions: int = 0,
        tie: bool = True,
        causal: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        ops.check_block("vocabulary", vocabulary)
        self.options = {
            "vocabulary": vocabulary, "dim": dim, "pattern": pattern, "layers": layers,
            "heads": heads, "mlp": mlp, "conv": conv, "theta": theta, "positions": positions,
            "tie": tie, "causal": causal,
        }  # fmt: skip
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.causal = causal
        inner = gated_width(dim) if mlp is None else mlp
        self.embed = nn.Embedding(vocabulary, dim, **made)
        self.places = nn.Embedding(positions, dim, **made) if positions else None
        self.stack = Stack(
            dim, pattern, layers=layers, heads=heads, mlp=inner, conv=conv, theta=theta, **made
        )
        self.head = nn.Linear(dim, vocabulary, bias=False, **made)
        for table in (self.embed, self.places, self.head):
            if table is not None:
                nn.init.normal_(table.weight, std=dim**-0.5)  # logits of about 1
        if tie:
            self.head.weight = self.embed.weight

    def forward(
        self,
        ids: Tensor,
        *,
        mask: Mask | None = None,
        state: Any = None,
        return_state: bool = False,
    ) -> Any:
        """Logits (B, L, vocabulary) of ids (B, L), with `return_state` (logits, state).

        `mask` is `ops.padding(valid)` over all tokens so far. Raises ValueError for ids outside of
        the vocabulary and for more tokens than there are learned positions.
        """
        if ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(f"ids must be (batch, length) integers, got {tuple(ids.shape)}")
        size = self.embed.num_embeddings
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise ValueError(f"ids must be in [0, {size}), got {int(ids.min())}…{int(ids.max())}")
        x = self.embed(ids)
        if self.places is not None:
            first = 0 if state is None else state.pos
            if first + ids.shape[1] > self.places.num_embeddings:
                raise ValueError(
                    f"the model has {self.places.num_embeddings} positions, "
                    f"got {first + ids.shape[1]} tokens"
                )
            x = x + self.places.weight[first : first + ids.shape[1]]
        call: dict[str, Any] = {"causal": self.causal, "mask": mask}
        if not return_state:
            return self.head(self.stack(x, **call))
        y, state = self.stack(x, state=state, return_state=True, **call)
        return self.head(y), state

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        tokens: int,
        *,
        valid: Tensor | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Tensor:
        """ids (B, L) and `tokens` more (B, L + tokens): the likeliest, or drawn at a temperature.

        Real tokens of a prompt are those of valid (B, L), None for all; padding goes to the left.
        """
        ops.check_block("tokens", tokens)
        if not self.causal:
            raise ValueError("an encoder does not generate: make the model with causal=True")
        if valid is not None and not bool(valid[:, -1].all()):
            raise ValueError("prompts of a batch must be padded on the left")
        made = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
        out, state, fresh = ids, None, ids
        for _ in range(tokens):
            mask = None if valid is None else ops.padding(valid)
            logits, state = self(fresh, mask=mask, state=state, return_state=True)
            fresh = _drawn(logits[:, -1], temperature, made)
            out = torch.cat((out, fresh), 1)
            if valid is not None:
                valid = torch.cat((valid, torch.ones_like(valid[:, :1])), 1)
        return out

    def save(self, path: Path | str) -> None:
        """Write weights and configuration to one safetensors file; OSError when that fails."""
        about = {"format": FORMAT, "options": json.dumps(self.options)}
        weights = self.state_dict()
        if self.options["tie"]:
            del weights["head.weight"]
        write_tensors(Path(path), weights, about)

    @classmethod
    def load(cls, path: Path | str) -> Transformer:
        """A model that `save` wrote; ValueError for any other file."""
        weights, about = read_tensors(Path(path))
        if about.get("format") != FORMAT:
            raise ValueError(f"{path} was not written by Transformer.save")
        model = cls(**json.loads(about["options"]))
        if model.options["tie"]:
            weights["head.weight"] = weights["embed.weight"]
        model.load_state_dict(weights)
        return model


def _drawn(logits: Tensor, temperature: float, made: torch.Generator | None) -> Tensor:
    """One token (B, 1) of logits (B, vocabulary)."""
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=made)
