"""Numerical primitives: pure functions on tensors that every mechanism stands on.

Shapes: q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv), out (B, Hq, Lq, Dv), lse
(B, Hq, Lq) float32. Query head h reads kv head h // (Hq // Hkv). With Lq < Lk the queries are the
last Lq positions. A row that sees no key gives 0 and lse -inf.
"""

from foveate.ops.api import attend, block_sparse, gather
from foveate.ops.attend_quantized import attend_quantized
from foveate.ops.backend import backend
from foveate.ops.convolution import fft_conv, short_conv
from foveate.ops.elementwise_scan import elementwise_scan
from foveate.ops.features import FeatureMap, feature_map
from foveate.ops.grids import disc, global_tokens, neighborhood, radial, strided, tile_order
from foveate.ops.hadamard import hadamard
from foveate.ops.layout import (
    BlockLayout,
    causal_map,
    from_map,
    from_mask,
    full_layout,
    visible_pairs,
)
from foveate.ops.linear_attention import linear_attention_causal, linear_attention_global
from foveate.ops.mask import (
    Mask,
    causal,
    dense,
    documents,
    groups,
    padding,
    real_tokens,
    sinks,
    window,
)
from foveate.ops.measure import RowStats, attend_T, attention_rows, row_stats, visible_counts
from foveate.ops.memory_scan import MemoryState, memory_read, memory_scan, memory_start
from foveate.ops.merge import merge
from foveate.ops.mix import mix
from foveate.ops.normalizers import Normalizer, Relu, Sigmoid, Softmax
from foveate.ops.orthogonal import cayley, moments, principal_axes
from foveate.ops.prefix_softmax import prefix_softmax_gate
from foveate.ops.quantize import Quantized, dequantize, quantize, quantized_bytes
from foveate.ops.rope import rope, unrope
from foveate.ops.scan import scan
from foveate.ops.scores import block_mass, pool_blocks, token_scores
from foveate.ops.select import force, threshold, top_k, top_p
from foveate.ops.shapes import TileGrid, check_block, check_qkv
from foveate.ops.tile import grouped_logits
from foveate.ops.tree_search import tree_search

__all__ = [
    "BlockLayout",
    "FeatureMap",
    "Mask",
    "MemoryState",
    "Normalizer",
    "Quantized",
    "Relu",
    "RowStats",
    "Sigmoid",
    "Softmax",
    "TileGrid",
    "attend",
    "attend_T",
    "attend_quantized",
    "attention_rows",
    "backend",
    "block_mass",
    "block_sparse",
    "causal",
    "causal_map",
    "cayley",
    "check_block",
    "check_qkv",
    "dense",
    "dequantize",
    "disc",
    "documents",
    "elementwise_scan",
    "feature_map",
    "fft_conv",
    "force",
    "from_map",
    "from_mask",
    "full_layout",
    "gather",
    "global_tokens",
    "grouped_logits",
    "groups",
    "hadamard",
    "linear_attention_causal",
    "linear_attention_global",
    "memory_read",
    "memory_scan",
    "memory_start",
    "merge",
    "mix",
    "moments",
    "neighborhood",
    "padding",
    "pool_blocks",
    "prefix_softmax_gate",
    "principal_axes",
    "quantize",
    "quantized_bytes",
    "radial",
    "real_tokens",
    "rope",
    "row_stats",
    "scan",
    "short_conv",
    "sinks",
    "strided",
    "threshold",
    "tile_order",
    "token_scores",
    "top_k",
    "top_p",
    "tree_search",
    "unrope",
    "visible_counts",
    "visible_pairs",
    "window",
]
