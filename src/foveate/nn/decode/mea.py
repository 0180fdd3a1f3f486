"""Multi-head Explicit Attention: keys and values mixed across heads (2026, paper 203)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.nn._attention import AttentionLayer, Projections
from foveate.ops import Mask
from foveate.registry import PATTERNS, Card, register


@register(
    Card(
        name="mea",
        title="Explicit Multi-head Attention for Inter-head Interaction in Large Language Models",
        year=2026,
        paper=203,
        claim="keys and values that are mixtures of component heads train better, or halve the "
        "cache",
        kind="module",
        family="decode",
        patterns=PATTERNS,
        pretrained="fine-tune",
        cost="O(L²·D) time and O(L·D·components·heads) for the mixtures; a cache of components / "
        "heads of that of full heads",
        decoding="keys and values of the component heads; a step reads them without mixing them",
        confidence="medium: no official code; head mixing, norm and start agree in descriptions",
        small={"dim": 32, "heads": 4, "components": 3, "theta": 10_000.0},
    )
)
class MEA(AttentionLayer):
    """Attention whose keys and values are, head by head, sums of `components` heads.

    Key head h is the sum over components c of key c times `mix_k`[c, h], values alike; outputs
    are brought to RMS 1 head by head and scaled by `gain` (`norm` False: left as they are).
    `components` None is one for each of the `heads`, where mixing starts as the identity;
    fewer start as shared by consecutive heads. With `theta` heads rotate by their positions.
    `head_dim` None is dim / heads.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        components: int | None = None,
        *,
        norm: bool = True,
        head_dim: int | None = None,
        theta: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        components = heads if components is None else ops.check_block("components", components)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, heads, components, head_dim=head_dim, theta=theta, **made)
        if components > heads:
            raise ValueError(f"components must be at most {heads} heads, got {components}")
        shared = torch.arange(heads, device=device) * components // heads
        start = nn.functional.one_hot(shared, components).T.to(dtype or torch.get_default_dtype())
        self.mix_k, self.mix_v = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        self.gain = nn.Parameter(torch.ones(heads, 1, self.head_dim, **made)) if norm else None

    @classmethod
    def converted(
        cls,
        weights: Projections,
        heads: int,
        components: int | None = None,
        *,
        norm: bool = False,
        theta: float | None = None,
    ) -> MEA:
        """The nearest layer of `components` heads to a trained one, by singular vectors.

        Exact, without the norm, when there are as many components as trained kv heads (None); more
        raise ValueError.
        """
        width, dim = weights.q.shape[0] // heads, weights.q.shape[1]
        components = weights.k.shape[0] // width if components is None else components
        parts = {name: _factored(getattr(weights, name), width, components) for name in ("k", "v")}
        made: dict[str, Any] = {"device": weights.q.device, "dtype": weights.q.dtype}
        layer = cls(dim, heads, components, norm=norm, head_dim=width, theta=theta, **made)
        layer.load(weights._replace(**{name: heads_ for name, (heads_, _) in parts.items()}))
        with torch.no_grad():
            for mine, (_, mix) in zip((layer.mix_k, layer.mix_v), parts.values(), strict=True):
                mine.copy_(mix.repeat_interleave(heads // mix.shape[1], 1))
        return layer

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Mask | None) -> Tensor:
        """Attention to the mixtures, which a single query does not make."""
        if q.shape[2] == 1:
            out = self._folded(q, k, v, causal, mask)
        else:
            keys, values = (
                torch.einsum("bcld,ch->bhld", x, mix)
                for x, mix in ((k, self.mix_k), (v, self.mix_v))
            )
            out = ops.attend(q, keys, values, causal=causal, mask=mask)
        if self.gain is None:
            return out
        return nn.functional.rms_norm(out, (self.head_dim,)) * self.gain

    def _folded(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Mask | None) -> Tensor:
        """Queries mixed in the place of keys, outputs in that of values: one wide kv head."""
        wide = torch.einsum("bhld,ch->bhlcd", q, self.mix_k).flatten(3)
        keys, values = (x.transpose(1, 2).flatten(2)[:, None] for x in (k, v))
        scale = self.head_dim**-0.5
        out = ops.attend(wide, keys, values, causal=causal, mask=mask, scale=scale)
        return torch.einsum("bhlcd,ch->bhld", out.unflatten(3, (-1, self.head_dim)), self.mix_v)


def _factored(weight: Tensor, width: int, components: int) -> tuple[Tensor, Tensor]:
    """Component heads (components·width, dim) and their shares (components, Hkv) in each head.

    One column for each head, of all its entries: singular vectors on the other axes of the weight
    would not be mixtures of heads.
    """
    heads, dim = weight.shape[0] // width, weight.shape[1]
    if components > heads:
        raise ValueError(f"components must be at most {heads} trained kv heads, got {components}")
    columns = weight.view(heads, width * dim).T.double()
    u, s, vt = torch.linalg.svd(columns, full_matrices=False)
    parts = (u * s)[:, :components].T.reshape(components * width, dim)
    return parts.to(weight.dtype), vt[:components].to(weight.dtype)
