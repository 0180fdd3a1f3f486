"""What are you sinking? A geometric approach on attention sink (2025, paper 146)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate import ops
from foveate.analysis._columns import column_means, uniform_means
from foveate.analysis.base import Record, describe, stacked
from foveate.hf.parts import Inputs, run
from foveate.hf.watch import Seen, watch
from foveate.registry import Card, register

KINDS = ("distributed", "centralised", "bidirectional")
"""What a layer's sinks can be; `kind` of a record counts from 0."""

# Rows whose weights are held at once, and a probability that is nothing.
_CHUNK, _NOTHING = 64, 1e-12


@register(
    Card(
        name="sink_geometry",
        title="What are you sinking? A geometric approach on attention sink",
        claim="decoders with rotary positions have one sink, encoders one at each end",
        kind="analysis",
        family="analysis",
        year=2025,
        paper=146,
        patterns=("noncausal self", "causal self"),
        pretrained="exact",
        cost="two further attention passes, and the mean map of a layer for its spectrum",
        confidence="low",
    )
)
@dataclass(frozen=True, kw_only=True)
class SinkGeometry:
    """Where the sinks of every layer are, and how its attention and stream lie around them.

    All by layer and text, of the mean over heads. The share of a key is its mean weight over the
    rows that see it, over the sum of all keys'. `gini` of the shares, the `largest`, those of the
    `first` and `last` token, and `half`, the keys that hold half of them. A key is a sink if its
    share is more than `times` what uniform attention would give it and `seen_by` rows see it (or
    all rows); `kind` says which of `KINDS` the sinks are. `drift`, in nats, is the divergence of
    the shares from those of the layer before (0 in the first). Of the stream that enters, `along`
    is the share of its variance in the direction of the strongest sink's token and `angle`, in
    degrees, that of the other tokens to it. Of the graph with weights (A + Aᵀ) / 2, in texts of at
    most `map_limit` tokens (NaN beyond): `connectivity` and `radius`, second and last eigenvalue
    of its normalised Laplacian.
    """

    times: float = 3.0
    seen_by: int = 8
    map_limit: int = 512

    def __post_init__(self) -> None:
        ops.check_block("seen_by", self.seen_by)
        if self.times <= 1:
            raise ValueError(f"times must be above 1, got {self.times}")
        if self.map_limit < 0:
            raise ValueError(f"map_limit must be at least 0, got {self.map_limit}")

    @torch.no_grad()
    def __call__(self, model: Any, inputs: Inputs) -> Record:
        """Of a model on token ids (B, L), or what its tokenizer or processor made of a batch."""
        found: dict[str, list[Tensor]] = {}
        entering: dict[int, Tensor] = {}
        before: list[Tensor] = []

        def block_in(layer: int, x: Tensor) -> None:
            entering[layer] = x

        def attention(seen: Seen) -> None:
            shares = self.shares(seen)
            by_text = self._of_layer(seen, entering.pop(seen.layer), shares)
            own = [share for share, _ in shares]
            pairs = zip(own, before or own, strict=True)
            by_text["drift"] = torch.stack([divergence(new, old) for new, old in pairs])
            before[:] = own
            for name, value in by_text.items():
                found.setdefault(name, []).append(value)

        with watch(model, attention=attention, block_in=block_in):
            run(model, inputs)
        values = {name: stacked(rows) for name, rows in found.items()}
        axes: dict[str, tuple[str, ...]] = dict.fromkeys(values, ("layer", "text"))
        about = describe(model, inputs, times=self.times, map_limit=self.map_limit)
        return Record("sink_geometry", values, axes, "", about)

    def shares(self, seen: Seen) -> list[tuple[Tensor, Tensor]]:
        """Of every text the shares of its real keys (n,), and which are sinks (n,) bool."""
        weight, uniform = (x.mean(1) for x in (column_means(seen), uniform_means(seen)))
        _, queries = seen.counts()
        found = []
        for i, real in enumerate(seen.real_rows):
            share, even = (x[i, real] / x[i, real].sum() for x in (weight, uniform))
            enough = queries[i, 0, real] >= min(self.seen_by, int(real.sum()))
            found.append((share, (share > self.times * even) & enough))
        return found

    def of_text(
        self, share: Tensor, sink: Tensor, stream: Tensor, map_: Tensor | None
    ) -> dict[str, Tensor]:
        """Of one text's shares (n,), sinks (n,), stream (n, width) and mean map (n, n)."""
        ranked = share.sort(descending=True).values.cumsum(0)
        along, angle = around(stream, int(share.argmax()))
        connectivity, radius = spectrum(map_) if map_ is not None else (float("nan"),) * 2
        return {
            "gini": gini(share),
            "largest": share.max(),
            "first": share[0],
            "last": share[-1],
            "half": 1.0 + (ranked < 0.5).sum(),
            "kind": torch.tensor(float(classify(share, sink))),
            "along": along,
            "angle": angle,
            "connectivity": torch.tensor(connectivity),
            "radius": torch.tensor(radius),
        }

    def _of_layer(
        self, seen: Seen, stream: Tensor, shares: list[tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """Numbers of all texts (B,)."""
        whole = mean_map(seen) if seen.k.shape[2] <= self.map_limit else None
        texts = []
        for i, real in enumerate(seen.real_rows):
            map_ = None if whole is None else whole[i][real][:, real]
            texts.append(self.of_text(*shares[i], stream[i, real], map_))
        return {name: torch.stack([text[name] for text in texts]) for name in texts[0]}


def classify(share: Tensor, sink: Tensor) -> int:
    """Number in `KINDS` of shares (n,) with sinks (n,) bool."""
    mass = share * sink
    if float(mass.sum()) == 0:
        return 0
    mass = mass / mass.sum()
    first, last = float(mass[0]), float(mass[-1])
    if len(mass) > 1 and first + last > 0.5 and min(first, last) > 0.15:
        return 2
    return int(float(mass.max()) > 0.5)


def gini(share: Tensor) -> Tensor:
    """Gini's coefficient of shares (n,): 0 when all are equal, 1 - 1/n when one has it all."""
    n = len(share)
    rank = torch.arange(1, n + 1, device=share.device)
    return (2 * rank - n - 1).to(share) @ share.sort().values / (n * share.sum())


def spectrum(weights: Tensor) -> tuple[float, float]:
    """Second and last eigenvalue of the normalised Laplacian of a map (n, n), made symmetric."""
    w = weights.double()
    w = (w + w.T) / 2
    scale = w.sum(1).clamp_min(_NOTHING).rsqrt()
    values = torch.linalg.eigvalsh(torch.eye(len(w)).to(w) - scale[:, None] * w * scale)
    return (float(values[1]) if len(w) > 1 else float("nan")), float(values[-1])


def around(stream: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """Of tokens (n, width) the share of variance along token `at`, mean angle of the others."""
    x = stream.double()
    direction = torch.nn.functional.normalize(x[at], dim=0)
    centred = x - x.mean(0)
    along = (centred @ direction).square().sum() / centred.square().sum()
    cosine = torch.nn.functional.normalize(x, dim=1) @ direction
    others = torch.arange(len(x), device=x.device) != at
    return along, torch.rad2deg(torch.acos(cosine[others].clamp(-1, 1))).mean()


def divergence(new: Tensor, old: Tensor) -> Tensor:
    """Kullback-Leibler divergence, in nats, of shares (n,) from older ones."""
    return (torch.xlogy(new, new) - new * old.clamp_min(_NOTHING).log()).sum()


def mean_map(seen: Seen) -> Tensor:
    """Map (B, Lq, Lk) of a layer, the mean over its heads."""
    rows = torch.arange(seen.q.shape[2], device=seen.q.device)
    return torch.cat([seen.rows(some).mean(1) for some in rows.split(_CHUNK)], 1)
