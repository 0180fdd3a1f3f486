"""Shapes, positions and tile grids shared by every primitive."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """Sizes of one attention call."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    k_len: int
    dim: int
    v_dim: int

    @property
    def group(self) -> int:
        """Query heads that share one kv head."""
        return self.q_heads // self.kv_heads


def check_qkv(q: Tensor, k: Tensor, v: Tensor | None = None) -> Shape:
    """Validate q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv) and return their sizes.

    Raises TypeError for what is no floating tensor, ValueError for sizes, dtypes or devices that
    do not fit together.
    """
    v = k if v is None else v
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = f"{x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
        if x.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, length, dim), got {tuple(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}: they must match"
            )
    (b, hq, lq, d), (_, hkv, lk, _) = q.shape, k.shape
    if k.shape[0] != b or v.shape[0] != b:
        raise ValueError(f"batch sizes differ: q {b}, k {k.shape[0]}, v {v.shape[0]}")
    if k.shape[3] != d:
        raise ValueError(f"head dim of k is {k.shape[3]}, that of q is {d}: they must match")
    if v.shape[1:3] != k.shape[1:3]:
        raise ValueError(
            f"v has (heads, length) {tuple(v.shape[1:3])}, k {tuple(k.shape[1:3])}: they must match"
        )
    if hkv == 0 or hq % hkv:
        raise ValueError(f"{hq} query heads do not divide evenly over {hkv} kv heads")
    return Shape(b, hq, hkv, lq, lk, d, v.shape[3])


def check_causal(q_len: int, k_len: int, causal: bool) -> None:
    """Refuse causal attention whose queries have no place among the keys."""
    if causal and q_len > k_len:
        raise ValueError(
            f"causal attention puts the queries at the last positions of the keys, "
            f"but there are {q_len} queries and only {k_len} keys"
        )


def check_block(name: str, value: int) -> int:
    """A block size or budget: an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def query_offset(q_len: int, k_len: int) -> int:
    """Position of the first query: the queries are the last `q_len` of `k_len` positions."""
    return max(k_len - q_len, 0)


def positions(
    q_len: int, k_len: int, q_pos: Tensor | None, k_pos: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Absolute positions of queries (B|1, Lq) and keys (B|1, Lk); default: the last Lq of Lk."""
    if q_pos is None:
        q_pos = torch.arange(q_len, device=device) + query_offset(q_len, k_len)
    if k_pos is None:
        k_pos = torch.arange(k_len, device=device)
    out = []
    for name, pos, length in (("q_pos", q_pos, q_len), ("k_pos", k_pos, k_len)):
        if pos.shape[-1] != length or pos.dim() not in (1, 2):
            raise ValueError(
                f"{name} must be ({length},) or (batch, {length}), got {tuple(pos.shape)}"
            )
        out.append(pos if pos.dim() == 2 else pos[None])
    return out[0], out[1]


class TileGrid(NamedTuple):
    """Query tiles cut on absolute positions: tile t covers positions [(first+t)*block, …)."""

    first: int
    tiles: int
    lead: int
    """Rows of the first tile that lie before the first query."""

    @classmethod
    def of(cls, q_len: int, k_len: int, block: int) -> TileGrid:
        """The grid of `q_len` queries at the end of `k_len` positions."""
        start = query_offset(q_len, k_len)
        first = start // block
        return cls(first, -(-(start + q_len) // block) - first, start % block)


def tile_positions(pos: Tensor, lead: int, block: int, count: int) -> Tensor:
    """Positions by tile: (B|1, L) -> (B|1, count, block); ragged ends repeat their neighbour."""
    tail = count * block - lead - pos.shape[1]
    edges = (pos[:, :1].expand(-1, lead), pos, pos[:, -1:].expand(-1, tail))
    return torch.cat(edges, dim=-1).view(pos.shape[0], count, block)
