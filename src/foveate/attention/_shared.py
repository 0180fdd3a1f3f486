"""Attention to what all rows of a batch follow, read once for all of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from foveate import ops
from foveate.attention._call import Call, Result
from foveate.attention.base import Attention, dense_result
from foveate.ops import Mask
from foveate.ops.tile import default_scale


@dataclass(frozen=True, kw_only=True)
class SharedPrefix(Attention):
    """Exact attention to a shared prefix, to documents after it, and of each row to its own keys.

    Documents may be read at a `temper`ature and with a share of their own. Queries of all rows
    meet what is shared in one matrix product; parts merge by their log-sum-exp. Without anything
    shared it is dense attention.
    """

    reads_shared: ClassVar[bool] = True

    def temper(self) -> tuple[float, float]:
        """What logits to documents are divided by, and the power of the documents' weight."""
        return 1.0, 1.0

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = True,
        mask: Mask | None = None,
        scale: float | None = None,
        call: Call | None = None,
    ) -> Tensor:
        """Attend: q (B, Hq, Lq, D); k and v are what follows the shared keys of the call."""
        shared = None if call is None else call.shared
        if call is None or shared is None:
            return super().__call__(q, k, v, causal=causal, mask=mask, scale=scale, call=call)
        shape = ops.check_qkv(q, k, v)
        call = dataclasses.replace(call, causal=causal, mask=mask, scale=scale)
        parts = [_own(q, k, v, call), _to_shared(q, (shared.k, shared.v), call)]
        powers = [1.0, 1.0]
        if shared.documents is not None:
            heat, power = self.temper() if self.acts(shape.k_len, call) else (1.0, 1.0)
            parts.append(_to_shared(q, shared.documents, call, heat))
            powers.append(power)
        out = ops.merge(parts, powers)[0]
        if call.valid is None:
            return out
        return out.masked_fill(~call.valid[:, None, -shape.q_len :, None], 0.0)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Dense attention, where nothing is shared."""
        return dense_result(q, k, v, call)


def _own(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) of every row over its own keys, all rows at once; padding is not seen."""
    options = call.options()
    if call.valid is not None:
        real = ops.padding(call.valid)
        options["mask"] = real if call.mask is None else call.mask & real
    return ops.attend(q, k, v, return_lse=True, **options)


def _to_shared(
    q: Tensor, over: tuple[Tensor, Tensor], call: Call, heat: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the queries of all rows, as those of one, over keys (1, Hkv, n, D)."""
    batch, _, length, dim = q.shape
    rows = q.transpose(0, 1).flatten(1, 2)[None]
    options: dict[str, Any] = {"scale": default_scale(call.scale, dim) / heat}
    options["softcap"] = None if call.softcap is None else call.softcap / heat
    out, lse = ops.attend(rows, *over, return_lse=True, **options)
    # (1, H, B * L, …) -> (B, H, L, …)
    out, lse = (x[0].unflatten(1, (batch, length)).transpose(0, 1) for x in (out, lse))
    return out, lse
