"""HyperAttention (2023, paper 43): hashing finds heavy entries that random buckets miss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.sparse.hyperattention import HyperAttention
from foveate.bench.claims import Outcome

CLAIM = "on clustered queries and keys, hashed buckets err less than random ones of equal size"

_LENGTH, _DIM, _CLUSTERS = 8192, 64, 32


@dataclass(frozen=True, kw_only=True)
class _Random(HyperAttention):
    """The same with buckets that know nothing of the vectors."""

    def ranks(self, x: Tensor, planes: Tensor) -> Tensor:
        """Random places."""
        drawn = torch.Generator().manual_seed(self.seed + int(x[0, 0, 0, 0] > 0))
        return torch.randint(2**self.projections, x.shape[:3], generator=drawn)


def measure() -> Outcome:
    """Relative error to dense attention, both directions and causal, mean over seeds."""
    g = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(_CLUSTERS, _DIM, generator=g), dim=-1)

    def vectors() -> Tensor:
        own = centres[torch.randint(_CLUSTERS, (1, 2, _LENGTH), generator=g)]
        noise = torch.randn(own.shape, generator=g) / _DIM**0.5
        return 6 * torch.nn.functional.normalize(own + noise / 2, dim=-1)

    q, k, v = vectors(), vectors(), torch.randn(1, 2, _LENGTH, _DIM, generator=g)
    figures: dict[str, float] = {}
    for causal in (False, True):
        want = ops.attend(q, k, v, causal=causal)
        for name, kind in (("hashed", HyperAttention), ("random", _Random)):
            total = 0.0
            for seed in range(3):
                out = kind(seed=seed, min_seq_len=1024)(q, k, v, causal=causal)
                total += float((out - want).norm() / want.norm())
            figures[f"error, {name}, {'causal' if causal else 'both sides'}"] = total / 3
    holds = all(
        figures[f"error, hashed, {x}"] < figures[f"error, random, {x}"]
        for x in ("causal", "both sides")
    )
    return Outcome(figures, holds)
