"""Masks as predicates on positions, with the algebra `&`, `|`, `~`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveate.ops.runs import FAR, Runs, joined_runs, one_run, outside, runs_of
from foveate.ops.shapes import check_block, positions

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from foveate.ops.layout import BlockLayout

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Bounds = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Exact = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _unknown(b: Tensor, h: Tensor, *tile: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of a mask that knows nothing of whole tiles: every tile must be looked into."""
    shape = torch.broadcast_shapes(b.shape, h.shape, *(x.shape for x in tile))
    some = torch.ones(shape, dtype=torch.bool, device=b.device)
    return some, torch.zeros_like(some)


def always(b: Tensor, h: Tensor, *tile: Tensor) -> Tensor:
    """Of a mask whose bounds are the truth about every tile."""
    return torch.ones((), dtype=torch.bool, device=b.device)


@dataclass(frozen=True)
class Mask:
    """Which query may see which key: a predicate `(b, h, q_pos, k_pos) -> bool`.

    Positions are absolute; the arguments are integer tensors that broadcast, the contract of
    FlexAttention's `mask_mod`. `bounds(b, h, q_lo, q_hi, k_lo, k_hi)` says what is certain of
    whole tiles without looking inside: a pair `(some, every)`, `some` false where the tile is
    surely empty, `every` true where it is surely full; `exact`, where a mask has it, is true of
    tiles for which both are not only bounds but the truth. `batch` and `heads` are above 1 when
    the mask differs over them. `runs(b, h, q_pos)`, where a mask has it, is another form of the
    predicate: a query sees the positions [first, end) of its runs (…, runs, 2). `valid` (B, L)
    is the whole of a mask that hides tokens as such, from every query.
    """

    predicate: Predicate
    bounds: Bounds = _unknown
    batch: int = 1
    heads: int = 1
    name: str = "mask"
    runs: Runs | None = None
    exact: Exact | None = None
    valid: Tensor | None = None

    def __call__(self, b: Tensor, h: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """Evaluate the predicate on broadcasting integer tensors."""
        return self.predicate(b, h, q_pos, k_pos)

    def __repr__(self) -> str:
        return self.name

    def _join(self, other: Mask, op: Callable[[Tensor, Tensor], Tensor], sign: str) -> Mask:
        def predicate(*at: Tensor) -> Tensor:
            return op(self.predicate(*at), other.predicate(*at))

        def bounds(*tile: Tensor) -> tuple[Tensor, Tensor]:
            (some, every), (some2, every2) = self.bounds(*tile), other.bounds(*tile)
            return op(some, some2), op(every, every2)

        both = op is torch.logical_and
        return Mask(
            predicate,
            bounds,
            max(self.batch, other.batch),
            max(self.heads, other.heads),
            f"({self.name} {sign} {other.name})",
            joined_runs(self.runs, other.runs, both),
            _joined_exact(self, other, both),
        )

    def __and__(self, other: Mask) -> Mask:
        return self._join(other, torch.logical_and, "&")

    def __or__(self, other: Mask) -> Mask:
        return self._join(other, torch.logical_or, "|")

    def __invert__(self) -> Mask:
        def bounds(*tile: Tensor) -> tuple[Tensor, Tensor]:
            some, every = self.bounds(*tile)
            return ~every, ~some

        return Mask(
            lambda *at: ~self.predicate(*at),
            bounds,
            self.batch,
            self.heads,
            f"~{self.name}",
            None if self.runs is None else partial(outside, self.runs),
            self.exact,
        )

    def take(self, row: int, slots: Tensor | None = None) -> Mask:
        """The mask of batch row `row` alone; position p then stands for slots[p], ascending."""

        def moved(b: Tensor, h: Tensor, *pos: Tensor) -> tuple[Tensor, ...]:
            if slots is not None:
                pos = tuple(slots[p.clamp(0, slots.numel() - 1)] for p in pos)
            return (b + row, h, *pos)

        def runs(own: Runs, b: Tensor, h: Tensor, q_pos: Tensor) -> Tensor:
            seen = own(*moved(b, h, q_pos)).contiguous()
            return seen if slots is None else torch.searchsorted(slots, seen)

        def exact(own: Exact, *tile: Tensor) -> Tensor:
            return own(*moved(*tile))

        return Mask(
            lambda *at: self.predicate(*moved(*at)),
            lambda *tile: self.bounds(*moved(*tile)),
            1,
            self.heads,
            self.name,
            None if self.runs is None else partial(runs, self.runs),
            # A tile of slots is not the tile between the positions of its ends.
            None if self.exact is None or slots is not None else partial(exact, self.exact),
        )

    def shifted(self, by: int) -> Mask:
        """The mask as seen from positions that start at `by`: position p stands for p + by."""

        def moved(pos: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(p + by for p in pos)

        return Mask(
            lambda b, h, *at: self.predicate(b, h, *moved(at)),
            lambda b, h, *tile: self.bounds(b, h, *moved(tile)),
            self.batch,
            self.heads,
            f"{self.name} from {by}",
        )

    def to_dense(
        self,
        q_len: int,
        k_len: int,
        *,
        q_pos: Tensor | None = None,
        k_pos: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Bool tensor (batch|1, heads|1, Lq, Lk), True = visible."""
        dev = torch.device(device)
        qp, kp = positions(q_len, k_len, q_pos, k_pos, dev)
        b, h = self.axes(dev)
        seen = self.predicate(b, h, qp[:, None, :, None], kp[:, None, None, :])
        return torch.broadcast_to(seen, torch.broadcast_shapes(seen.shape, (1, 1, q_len, k_len)))

    def axes(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Batch and head indices, shaped (batch, 1, 1, 1) and (1, heads, 1, 1)."""
        b = torch.arange(self.batch, device=device).view(-1, 1, 1, 1)
        return b, torch.arange(self.heads, device=device).view(1, -1, 1, 1)

    def to_layout(self, q_len: int, k_len: int, block: int | tuple[int, int] = 128) -> BlockLayout:
        """Blocks that hold a visible pair, classified full or partial without an Lq×Lk tensor."""
        from foveate.ops.layout import from_mask

        return from_mask(self, q_len, k_len, block)

    def to_flex(self, batch: int, heads: int, q_len: int, k_len: int) -> BlockMask:
        """FlexAttention's `BlockMask` of this mask (queries at the last positions)."""
        from torch.nn.attention.flex_attention import create_block_mask

        offset = max(k_len - q_len, 0)
        b = batch if self.batch > 1 else None
        h = heads if self.heads > 1 else None
        return create_block_mask(
            lambda b_, h_, q, k: self.predicate(b_, h_, q + offset, k), b, h, q_len, k_len, "cpu"
        )


def _joined_exact(left: Mask, right: Mask, both: bool) -> Exact | None:
    """Where the bounds of a joined mask are the truth: where one mask alone decides, exactly."""
    if left.exact is None and right.exact is None:
        return None

    def decides(one: Mask, other: Mask, tile: tuple[Tensor, ...]) -> Tensor | None:
        if one.exact is None:
            return None
        some, every = other.bounds(*tile)
        return one.exact(*tile) & (every if both else ~some)

    def exact(*tile: Tensor) -> Tensor:
        parts = [decides(left, right, tile), decides(right, left, tile)]
        return reduce(torch.logical_or, [part for part in parts if part is not None])

    return exact


def causal() -> Mask:
    """A query sees the keys at its own position and before."""
    return Mask(
        lambda b, h, q, k: k <= q,
        lambda b, h, q_lo, q_hi, k_lo, k_hi: (k_lo <= q_hi, k_hi <= q_lo),
        name="causal()",
        runs=lambda b, h, q: one_run(FAR[0], q + 1, q),
        exact=always,
    )


def with_causal(mask: Mask | None, is_causal: bool) -> Mask | None:
    """A mask and, where asked for, causality."""
    if not is_causal:
        return mask
    return causal() if mask is None else mask & causal()


def _per_head(n: int | Tensor, name: str) -> tuple[Callable[[Tensor], int | Tensor], int]:
    """A size that may differ by head, as a function of the head index, and the number of heads."""
    if isinstance(n, Tensor):
        if n.dim() != 1 or n.is_floating_point() or bool((n < 1).any()):
            raise ValueError(f"{name} per head must be a 1-D integer tensor of sizes >= 1, got {n}")
        return (lambda h: n.to(h.device)[h]), n.numel()
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {n!r}")
    return (lambda h: n), 1


def window(n: int | Tensor, *, block: int = 1) -> Mask:
    """A query sees keys at distance below `n`, before and behind; (heads,) gives each its own.

    Distances are those of blocks of `block` positions, cut on absolute positions.
    """
    size, heads = _per_head(n, "window")
    check_block("block", block)

    def bounds(b: Tensor, h: Tensor, *tile: Tensor) -> tuple[Tensor, Tensor]:
        q_lo, q_hi, k_lo, k_hi = (x // block for x in tile)
        w = size(h)
        return (k_lo - q_hi < w) & (q_lo - k_hi < w), (k_hi - q_lo < w) & (q_hi - k_lo < w)

    def runs(b: Tensor, h: Tensor, q: Tensor) -> Tensor:
        return one_run((q // block - size(h) + 1) * block, (q // block + size(h)) * block, q)

    return Mask(
        lambda b, h, q, k: (q // block - k // block).abs() < size(h),
        bounds,
        heads=heads,
        name=f"window({n})" if block == 1 else f"window({n}, block={block})",
        runs=runs,
        exact=always,
    )


def sinks(n: int | Tensor) -> Mask:
    """Every query sees the first `n` positions; (heads,) gives each head its own number."""
    size, heads = _per_head(n, "sinks")
    return Mask(
        lambda b, h, q, k: (k < size(h)) & (q >= 0),
        lambda b, h, q_lo, q_hi, k_lo, k_hi: (
            (k_lo < size(h)) & (q_hi >= 0),
            (k_hi < size(h)) & (q_lo >= 0),
        ),
        heads=heads,
        name=f"sinks({n})",
        runs=lambda b, h, q: one_run(0, size(h), q),
        exact=always,
    )


def _rows(x: Tensor, name: str) -> Tensor:
    if x.dim() not in (1, 2):
        raise ValueError(f"{name} must be (length,) or (batch, length), got {tuple(x.shape)}")
    return x if x.dim() == 2 else x[None]


def _lookup(table: Tensor, b: Tensor, pos: Tensor) -> Tensor:
    """table (B, L) at batch row b and position pos; off the table its nearest end."""
    return table.to(pos.device)[b % table.shape[0], pos.clamp(0, table.shape[1] - 1)]


def groups(ids: Tensor, links: Tensor | None = None) -> Mask:
    """Tokens see tokens of linked groups: ids (L,) or (B, L), links (G, G) bool, default the same.

    links[g, m] says that queries of group g see keys of group m.
    """
    table = _rows(ids, "ids")
    if table.is_floating_point() or table.dtype == torch.bool:
        raise TypeError(f"ids must be an integer tensor, got {table.dtype}")
    if links is not None and (
        links.dtype != torch.bool
        or links.shape != (len(links), len(links))
        or not 0 <= int(table.min()) <= int(table.max()) < len(links)
    ):
        raise ValueError(
            f"links must be a bool tensor (G, G) with every id in [0, G), got {links.dtype} "
            f"{tuple(links.shape)} for ids in [{int(table.min())}, {int(table.max())}]"
        )

    def predicate(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        gq, gk = _lookup(table, b, q), _lookup(table, b, k)
        return gq == gk if links is None else links.to(q.device)[gq, gk]

    def bounds(b: Tensor, h: Tensor, *tile: Tensor) -> tuple[Tensor, Tensor]:
        """Ids that never fall: those of a tile lie between the ids of its ends."""
        q_lo, q_hi, k_lo, k_hi = (_lookup(table, b, x) for x in tile)
        return (k_lo <= q_hi) & (q_lo <= k_hi), (k_lo == q_hi) & (q_lo == k_hi)

    ordered = links is None and bool((table.diff(dim=-1) >= 0).all())
    return Mask(predicate, bounds if ordered else _unknown, table.shape[0], name="groups(…)")


def documents(ids: Tensor) -> Mask:
    """Packed documents: a token sees the tokens of its own document; ids (L,) or (B, L)."""
    return groups(ids)


def padding(valid: Tensor) -> Mask:
    """Keys that are real tokens: valid (L,) or (B, L) bool, True = real."""
    table = _rows(valid, "valid")
    if table.dtype != torch.bool:
        raise TypeError(f"valid must be a bool tensor (True = real token), got {table.dtype}")
    before = torch.nn.functional.pad(table.long().cumsum(-1), (1, 0))

    def bounds(b: Tensor, h: Tensor, *tile: Tensor) -> tuple[Tensor, Tensor]:
        _, _, k_lo, k_hi = tile
        real = _lookup(before, b, k_hi + 1) - _lookup(before, b, k_lo)
        off_table = (k_lo < 0) | (k_hi >= table.shape[1])
        return (real > 0) | off_table, real == k_hi - k_lo + 1

    return Mask(
        lambda b, h, q, k: _lookup(table, b, k) & (q >= 0),
        bounds,
        batch=table.shape[0],
        name="padding(…)",
        runs=runs_of(table),
        valid=table,
    )


def real_tokens(mask: Mask | None, batch: int, length: int) -> Tensor | None:
    """Which of the last `length` tokens of each row are real, (batch, length), or None for all.

    Raises ValueError for a mask that is no padding, and for one of another size.
    """
    if mask is None:
        return None
    if mask.valid is None:
        raise ValueError(f"a recurrence can only be masked by ops.padding(valid), got {mask}")
    rows, seen = mask.valid.shape
    if rows not in (1, batch) or seen < length:
        raise ValueError(
            f"the padding mask is of {rows} rows of {seen} tokens, x is of {batch} of {length}"
        )
    valid = mask.valid[:, seen - length :].expand(batch, -1)
    return None if bool(valid.all()) else valid


def dense(visible: Tensor, *, q_start: int | None = None) -> Mask:
    """An explicit bool tensor (Lq, Lk), (B, Lq, Lk) or (B, H, Lq, Lk).

    Its rows are the last Lq of Lk positions, or start at position `q_start`.
    """
    if visible.dtype != torch.bool or visible.dim() not in (2, 3, 4):
        raise ValueError(
            "visible must be a bool tensor (Lq, Lk), (B, Lq, Lk) or (B, H, Lq, Lk), "
            f"got {visible.dtype} {tuple(visible.shape)}"
        )
    table = visible.view(*(1,) * (4 - visible.dim()), *visible.shape)
    if visible.dim() == 3:
        table = visible[:, None]
    n_b, n_h, n_q, n_k = table.shape
    start = max(n_k - n_q, 0) if q_start is None else q_start

    def predicate(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row, col = (q - start).clamp(0, n_q - 1), k.clamp(0, n_k - 1)
        return table.to(q.device)[b % n_b, h % n_h, row, col]

    return Mask(predicate, batch=n_b, heads=n_h, name="dense(…)")
