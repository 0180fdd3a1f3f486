"""Understanding the differences in Foundation Models: dynamical systems (2024, paper 24)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.nn._attention import heads_of, joined_heads
from foveate.nn._linear import LinearAttention, head_width
from foveate.nn._recurrent import Recurrent
from foveate.nn.linear.lightning2 import Lightning2
from foveate.registry import Card, register

# Beyond it the exponential of a normaliser is taken for that of the limit.
_LIMIT = 30.0


@register(
    Card(
        name="dsf",
        title="Understanding the differences in Foundation Models: Attention, State Space Models, "
        "and Recurrent Neural Networks",
        year=2024,
        paper=24,
        claim="attention, state spaces and recurrences are one system h = Λh + Bu, y = Ch; a "
        "normaliser learned from the input brings linear attention nearer to softmax",
        kind="module",
        family="linear",
        pretrained="scratch",
        cost="O(L·D²) time",
        decoding="a state of heads · D² numbers",
        confidence="high for the layer, medium for the table of matrices",
        small={"dim": 32, "heads": 4},
    )
)
class NormAttention(Recurrent):
    """o_t = Σ_{j≤t} (q_t·k_j) v_j / exp(w_h·x_t + b_h): linear attention, normalised by its input.

    The exponent of head h is kept within ±30. Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.width = head_width(dim, heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **made)
        self.normalizer = nn.Linear(dim, heads, **made)
        self.out = nn.Linear(dim, dim, bias=False, **made)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (B, H, L, width) of x (B, L, dim)."""
        q, k, v = (heads_of(y, self.width) for y in self.qkv(x).chunk(3, -1))
        return q, k, v

    def log_norm(self, x: Tensor) -> Tensor:
        """Logarithm of the normaliser (B, H, L) of x (B, L, dim)."""
        return self.normalizer(x).float().clamp(-_LIMIT, _LIMIT).mT

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """The recurrence; what is read is divided by the normaliser of the token that reads."""
        q, k, v = self.split(x)
        out, s = ops.scan(q, k, v, scale=1.0, state=state.s, valid=valid)
        out = (out * (-self.log_norm(x)).exp()[..., None]).to(x.dtype)
        return self.out(joined_heads(out)), replace(state, s=s)


class System(NamedTuple):
    """h_t = keep_t h_{t-1} + write_t v_tᵀ, y_t = h_tᵀ read_t of every head.

    keep (B, H, L), the Λ_t; write and read (B, H, L, K), the B_t and C_t.
    """

    keep: Tensor
    write: Tensor
    read: Tensor

    def matrix(self) -> Tensor:
        """Weights (B, H, L, L) with which y_t sums the values: read_t·write_j Π_{j<i≤t} keep_i."""
        logs = self.keep.log().cumsum(-1)
        kept = (logs[..., :, None] - logs[..., None, :]).tril().exp()
        return ((self.read @ self.write.mT) * kept).tril()


def dsf_matrices(layer: nn.Module, x: Tensor) -> System:
    """What a layer is as a dynamical system on x (B, L, dim): its Λ, B and C at every token.

    For `LinearAttention` and its kin, `dsf` and `Lightning2` and its kin, the values as the input
    and without their norms and projections. A normaliser η is in the state: keep_t = η_{t-1} / η_t
    and write_t = φ(k_t) / η_t. Raises TypeError for another layer.
    """
    if isinstance(layer, Lightning2):
        at = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        q, k, _ = layer.split(x, at)
        keep = (-torch.tensor(layer.slopes, device=x.device)).exp()
        return System(keep[:, None].expand(k.shape[:3]), k, q)
    if isinstance(layer, NormAttention):
        q, k, _ = layer.split(x)
        return _normalized(q, k, layer.log_norm(x))
    if isinstance(layer, LinearAttention):
        q, k = layer.features(*(heads_of(y, layer.qk_width) for y in (layer.q(x), layer.k(x))))
        mass = (
            (q * k.cumsum(2)).sum(-1) + layer.eps if layer.normalize else torch.ones_like(q[..., 0])
        )
        return _normalized(q, k, mass.log())
    raise TypeError(f"no dynamical system is known of a layer {type(layer).__name__}")


def _normalized(q: Tensor, k: Tensor, log_norm: Tensor) -> System:
    """Of a state that holds the sum divided by the normaliser of the last token."""
    before = torch.cat((log_norm[..., :1], log_norm[..., :-1]), -1)
    return System((before - log_norm).exp(), k * (-log_norm).exp()[..., None], q)
