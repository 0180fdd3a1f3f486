"""A mechanism inside a model can undo the rotation of queries and keys exactly."""

from dataclasses import dataclass

import pytest
import torch

import foveate
from attached import generate, left_padded, prompt
from foveate import Card, ops
from foveate.attention.base import Attention, dense_result

SEEN = []


@dataclass(frozen=True, kw_only=True)
class Unrotating(Attention):
    """Dense attention that notes the keys as they were before rotation."""

    card = Card(name="unrotating", title="-", claim="-", kind="attention", family="-")

    def compute(self, q, k, v, call):
        if call.layer == 0:
            SEEN.append((call.phase, ops.unrope(k, *call.tables(k.shape[2]))))
        return dense_result(q, k, v, call)


@pytest.fixture
def projected(tiny_llama):
    """What the first layer's key projection gave, call by call: (B, Hkv, L, D)."""
    held = []
    hook = tiny_llama.model.layers[0].self_attn.k_proj.register_forward_hook(
        lambda module, args, out: held.append(out.view(*out.shape[:2], -1, 16).transpose(1, 2))
    )
    SEEN.clear()
    yield held
    hook.remove()


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_keys_without_rotation_are_what_the_projection_gave(tiny_llama, projected, side):
    ids, mask = left_padded(prompt(20), prompt(13, 1))
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    if side == "none":
        mask = torch.ones_like(ids)
    position = (mask.cumsum(1) - 1).clamp_min(0) + 5
    with torch.no_grad(), foveate.attach(tiny_llama, prefill=Unrotating()):
        tiny_llama(ids, attention_mask=mask, position_ids=position)
    rows = SEEN[0][1] if side == "none" else [keys[0] for _, keys in SEEN]
    for row, seen, real in zip(projected[0], rows, mask.bool(), strict=True):
        torch.testing.assert_close(seen, row[:, real], atol=1e-5, rtol=1e-4)


def test_positions_go_on_while_decoding(tiny_llama, projected):
    generate(tiny_llama, prompt(9), new=4, prefill=Unrotating(), decode=Unrotating())
    phase, keys = SEEN[-1]
    assert phase == "decode" and keys.shape[2] == 12
    torch.testing.assert_close(keys, torch.cat(projected, 2), atol=1e-5, rtol=1e-4)


def test_without_a_model_nothing_was_rotated():
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    tables = []

    @dataclass(frozen=True, kw_only=True)
    class Plain(Attention):
        card = Unrotating.card

        def compute(self, q, k, v, call):
            tables.append(call.tables(k.shape[2]))
            return dense_result(q, k, v, call)

    Plain()(q, k, v)
    assert tables == [None]
