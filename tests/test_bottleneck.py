"""Work and traffic of a decoding step: formulas against counts."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate import ops
from foveate.analysis.bottleneck import Bottleneck, Cost, expert, latent

SHAPE = {"heads": 8, "dim": 16, "tokens": 96, "itemsize": 4}


def counted(call, *cache):
    """Multiplications and additions of a call, and the bytes of what it reads."""
    with FlopCounterMode(display=False) as meter:
        call()
    return Cost(meter.get_total_flops(), sum(x.nbytes for x in cache))


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("queries", [1, 3])
def test_dense_formula_equals_the_count_of_plain_attention(kv_heads, queries):
    q, k, v = torch.randn(1, 8, queries, 16), *torch.randn(2, 1, kv_heads, 96, 16)
    with ops.backend("reference"):
        count = counted(lambda: ops.attend(q, k, v), k, v)
    assert Bottleneck(**SHAPE, kv_heads=kv_heads, queries=queries)() == count


def test_latent_formula_equals_the_count_of_absorbed_attention():
    heads, dim, rank, rope, tokens = 6, 16, 24, 8, 40
    made = torch.Generator().manual_seed(0)
    c, turned = (torch.randn(tokens, n, generator=made) for n in (rank, rope))
    up_k, up_v = torch.randn(2, heads, rank, dim, generator=made)
    q, q_rope = (torch.randn(heads, 1, n, generator=made) for n in (dim, rope))
    wide, cache = torch.cat((q @ up_k.transpose(1, 2), q_rope), -1), torch.cat((c, turned), 1)

    def absorbed():
        weights = torch.softmax(wide.squeeze(1) @ cache.T, -1)
        return weights @ cache[:, :rank]

    # Absorbed or not, attention is the same.
    logits = q @ (c @ up_k).transpose(1, 2) + q_rope @ turned.T
    plain = torch.softmax(logits, -1) @ (c @ up_v)
    torch.testing.assert_close(absorbed()[:, None] @ up_v, plain, atol=1e-4, rtol=1e-4)
    assert latent(heads, rank, rope, tokens, itemsize=4) == counted(absorbed, cache)


def test_an_expert_is_counted_as_its_three_products():
    x, up, gate, down = torch.randn(5, 12), *torch.randn(2, 12, 20), torch.randn(20, 12)
    weights = (up, gate, down)
    count = counted(lambda: ((x @ up) * torch.sigmoid(x @ gate)) @ down, *weights)
    assert expert(12, 20, 5, itemsize=4) == count


def test_intensities_are_those_of_the_literature():
    """With numbers of 2 bytes: 1 for full heads, the group, all heads, and that of latents."""
    shape = {"heads": 128, "dim": 128, "tokens": 1000}
    full, grouped, single = (Bottleneck(**shape, kv_heads=n)().intensity for n in (128, 16, 1))
    assert (full, grouped, single) == (1, 8, 128)
    absorbed = latent(128, 512, 64, 1000).intensity
    assert absorbed == pytest.approx(241.8, abs=0.05) and absorbed > 100 * full
    assert latent(128, 512, 64, 1000, queries=2).intensity == 2 * absorbed
    assert expert(4096, 1024, 37).intensity == 37


def test_mechanisms_are_counted_by_what_they_read():
    shape = Bottleneck(**SHAPE, kv_heads=2)
    full = shape()
    for exact in ("dense", "lean", "relay", "sink_window:window=500"):
        assert shape(foveate.create(exact)) == full
    near = shape(foveate.create("sink_window:window=20,sinks=4"))
    assert near.flops / full.flops == pytest.approx(24 / 100, rel=0.05)
    assert near.intensity == pytest.approx(full.intensity)


def test_keys_that_heads_of_a_group_share_are_read_once():
    """Random blocks of 4 heads are some of the same: more bytes than pairs, fewer than the sum."""
    shape = Bottleneck(**SHAPE, kv_heads=2)
    cost, full = shape(foveate.create("pr_flash:rate=0.5,block=4")), shape()
    pairs, rows = cost.flops / full.flops, cost.bytes / full.bytes
    assert pairs < rows < 4 * pairs
    # The same lists for the heads of a group: nothing is lost.
    shared = shape(foveate.create("tidal:budget=16,scope=kv,select_layer=1"))
    assert shared.intensity == pytest.approx(full.intensity)


def test_policies_are_taken_at_their_claims():
    shape = Bottleneck(**SHAPE, kv_heads=2)
    full, kept = shape(), shape(foveate.create("snapkv:budget=24,window=8"))
    assert kept == Cost(full.flops / 4, full.bytes / 4)
    coded = shape(foveate.create("saq:bits=16/4,recent=0,first=0,block=32,group=16"))
    assert coded.flops == full.flops
    assert full.bytes / coded.bytes == pytest.approx(4 / (4 / 8 + 4 / 16))


def test_refuses_what_has_no_cost_and_bad_shapes():
    with pytest.raises(TypeError, match="attention mechanism or a cache policy, got 'tidal'"):
        Bottleneck()("tidal")
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads, got 8 and 3"):
        Bottleneck(heads=8, kv_heads=3)
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        Bottleneck(tokens=0)


def test_the_command_prints_a_line_for_each(foveate_command):
    sizes = ("--tokens=64", "--heads=4", "--kv-heads=2", "--dim=16")
    code, said, _ = foveate_command("cost", "tidal", "snapkv:budget=40", *sizes)
    assert code == 0
    found = {line.split()[0]: line.split() for line in said.splitlines() if line.strip()}
    assert found["multi-query"][-1] == "4" and found["multi-head"][-1] == "1"
    assert math.isclose(float(found["snapkv:budget=40"][-2]), 40 * 2 * 16 * 2 * 2 / 1e6)
    code, _, said = foveate_command("cost", "mqa:dim=32,heads=4", *sizes)
    assert code == 2 and "attention mechanism or a cache policy" in said
