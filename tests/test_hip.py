import pytest
import torch

import foveate
from foveate import ops
from foveate.attention.base import Call
from foveate.registry import lookup
from ops_tools import largest_output
from sparse_checks import causal_keep, check_common, chosen, qkv, softmax_over
from test_tree_search import plain_search


def hip(**options):
    small = {"block": 8, "budget": 16, "window": 12, "sinks": 4, "dense_layers": ()}
    return foveate.create("hip", **small | options)


def plain_pairs(q, k, m, causal):
    """Pairs read, by the definition: (B, Hq, Lq, Lk)."""
    (b, h, lq, _), (_, kv, lk, _) = q.shape, k.shape
    start = max(lk - lq, 0)
    keep = torch.zeros(b, h, lq, lk, dtype=torch.bool)
    keep[..., : m.sinks] = True
    for tile in range(start // m.block, -(-(start + lq) // m.block)):
        rows = range(max(tile * m.block, start), min((tile + 1) * m.block, start + lq))
        asked = list(reversed(rows))[:: m.stride]
        end = rows[-1] + 1 - m.window if causal else lk
        for i in range(b):
            for head in range(h):
                found = plain_search(
                    q[i, head, [t - start for t in asked]],
                    k[i, head // (h // kv)],
                    end,
                    m.budget // m.key_block,
                    m.sinks,
                    m.key_block,
                    asked if causal else None,
                    m.representative,
                )
                for t in rows:
                    for block in found:
                        lo = m.sinks + block * m.key_block
                        keep[i, head, t - start, lo : min(lo + m.key_block, end)] = True
                    if causal:
                        keep[i, head, t - start, max(t - m.window + 1, 0) : t + 1] = True
    return keep & causal_keep(lq, lk) if causal else keep


@pytest.mark.parametrize(("lq", "lk"), [(96, 96), (93, 93), (45, 93), (3, 93)])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 1, "key_block": 4}, {"representative": "first"}, {"window": 3, "stride": 3}],
)
def test_equals_the_definition(lq, lk, options):
    q, k, v = qkv(lk, lq, heads=2, kv_heads=1, batch=2)
    m = hip(**options)
    keep = plain_pairs(q, k, m, True)
    assert keep.float().mean() < 0.9 * causal_keep(lq, lk).float().mean()
    torch.testing.assert_close(m(q, k, v), softmax_over(q, k, v, keep), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("lq", "lk"), [(93, 93), (45, 93), (120, 70)])
def test_attention_to_both_sides_equals_the_definition(lq, lk):
    q, k, v = qkv(lk, lq, heads=2, kv_heads=1, batch=2)
    keep = plain_pairs(q, k, hip(), False)
    out = hip()(q, k, v, causal=False)
    torch.testing.assert_close(out, softmax_over(q, k, v, keep), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("budget", [94, 200])
def test_full_budget_equals_dense(budget):
    q, k, v = qkv(93)
    want = ops.attend(q, k, v, causal=True)
    torch.testing.assert_close(hip(budget=budget)(q, k, v), want, atol=1e-5, rtol=1e-4)


def test_a_budget_that_holds_the_searched_region_equals_dense():
    q, k, v = qkv(93)
    m = hip(budget=78)  # 4 sinks, 77 keys to search, 12 in the window
    want = ops.attend(q, k, v, causal=True)
    torch.testing.assert_close(m(q, k, v), want, atol=1e-5, rtol=1e-4)


def test_first_layers_are_dense():
    q, k, v = qkv(93)
    m = hip(dense_layers=foveate.create("hip").dense_layers)
    want = ops.attend(q, k, v, causal=True)
    for layer in range(5):
        out = m(q, k, v, call=Call(layer=layer, layers=5))
        assert torch.allclose(out, want, atol=1e-5) == (layer < 3)


def test_keys_constant_by_slot_give_the_exact_top():
    m = hip(budget=16, key_block=2)
    g = torch.Generator().manual_seed(0)
    region, slots = 8 * 16, 8
    k = torch.randn(1, 1, 4 + region + 12, 16, generator=g)
    k[:, :, 4 : 4 + region] = k[:, :, 4 : 4 + region : 16].repeat_interleave(16, 2)
    q = torch.randn(1, 1, 1, 16, generator=g).expand(-1, -1, 8, -1)
    layout = chosen(m, q, k)
    scores = (k @ q[:, :, :1].transpose(-1, -2)).view(-1, 2).amax(-1)
    searched = scores[2 : 2 + region // 2]
    mine = scores[layout.indices[0, 0, -1].long()].sort(descending=True).values
    torch.testing.assert_close(mine, searched.topk(slots).values)


def test_chosen_blocks_are_unique_and_lie_between_sinks_and_window():
    q, k, _ = qkv(93, batch=2)
    layout = chosen(hip(), q, k)
    blocks = layout.to_bool()
    assert torch.equal(blocks.sum(-1), layout.counts)
    ends = (torch.arange(12) + 1) * 8
    reach = (torch.arange(47) * 2 < (ends.clamp_max(93) - 12)[:, None]) & (torch.arange(47) >= 2)
    assert not (blocks & ~reach).any()


def test_choice_depends_on_its_own_query_block_only():
    q, k, _ = qkv(96)
    m = hip()
    want = chosen(m, q, k).to_bool()
    q2, k2 = q.clone(), k.clone()
    q2[:, :, :40], q2[:, :, 48:] = 9, -9
    k2[:, :, 48:] = 9
    assert torch.equal(chosen(m, q2, k2).to_bool()[:, :, 5], want[:, :, 5])
    q2[:, :, 47] = -q2[:, :, 47]
    assert not torch.equal(chosen(m, q2, k2).to_bool()[:, :, 5], want[:, :, 5])


@pytest.mark.parametrize("length", [50, 77, 93])
def test_decode_equals_prefill_row_for_single_row_blocks(length):
    q, k, v = qkv(93, batch=2)
    m = hip(block=1)
    step = m(q[:, :, length - 1 : length], k[:, :, :length], v[:, :, :length])
    want = m(q, k, v)[:, :, length - 1 : length]
    torch.testing.assert_close(step, want, atol=1e-5, rtol=1e-4)


def smooth_keys(seed, length=512, dim=16):
    """Keys that drift slowly, and a query block that likes some of them."""
    g = torch.Generator().manual_seed(seed)
    kernel = torch.hann_window(48).view(1, 1, -1).expand(dim, 1, -1)
    noise = torch.randn(1, dim, length + 47, generator=g)
    k = torch.nn.functional.conv1d(noise, kernel, groups=dim).transpose(1, 2)[None]
    q = torch.randn(1, 1, 1, dim, generator=g).expand(-1, -1, 8, -1)
    return q, 2 * k / k.std(), g


def test_search_keeps_more_mass_than_chance_on_smooth_scores():
    m = hip(budget=64)
    gain = []
    for seed in range(12):
        q, k, g = smooth_keys(seed)
        layout = chosen(m, q, k)
        mass = torch.softmax((k @ q[0, 0, -1]).flatten() / 4, 0).view(-1, 2).sum(-1)
        mine = mass[layout.indices[0, 0, -1].long()].sum()
        region = 2 + torch.randperm(248, generator=g)[:32]
        gain.append(float(mine - mass[region].sum()))
    assert sum(gain) / len(gain) > 0.2


def test_center_finds_a_peak_no_less_often_than_first():
    hits = {"center": 0, "first": 0}
    for seed in range(40):
        q, k, g = smooth_keys(seed)
        at = int(torch.randint(100, 400, (1,), generator=g))
        bump = torch.exp(-(((torch.arange(512) - at) / 12.0) ** 2))
        k = k / 4 + 6 * bump[:, None] * q[:, :, :1] / q[0, 0, 0].norm()
        for name in hits:
            blocks = chosen(hip(representative=name), q, k).to_bool()[0, 0, -1]
            hits[name] += int(blocks[at // 2])
    assert hits["center"] >= hits["first"] and hits["center"] >= 36


def test_a_mask_is_applied_inside_the_choice():
    q, k, v = qkv(93, heads=2, kv_heads=1)
    documents = torch.arange(93) // 40
    keep = plain_pairs(q, k, hip(), True) & (documents[:, None] == documents)
    out = hip()(q, k, v, mask=ops.documents(documents))
    torch.testing.assert_close(out, softmax_over(q, k, v, keep), atol=1e-5, rtol=1e-4)


def test_common_claims():
    check_common(hip(), *qkv(125, batch=2))


def test_records_everything_it_reads():
    q, k, v = qkv(93, heads=2, kv_heads=1)
    records = []
    out = hip()(q, k, v, call=Call(record=records.append))
    torch.testing.assert_close(out, hip()(q, k, v))
    keep = plain_pairs(q, k, hip(), True)
    share = keep.sum() / causal_keep(93, 93).expand_as(keep).sum()
    assert float(share) <= records[0].density < float(share) + 0.2
    assert records[0].retained_mass < 1


def test_no_quadratic_tensor():
    q, k, v = qkv(4096, heads=2, kv_heads=1)
    m = foveate.create("hip", dense_layers=(), budget=256)
    assert largest_output(lambda: m(q, k, v)) <= 4096 * 4096 // 4


@pytest.mark.parametrize(
    "option",
    [
        {"budget": 0},
        {"budget": 15},
        {"sinks": 3},
        {"window": 0},
        {"stride": 0},
    ],
)
def test_refuses_bad_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        hip(**option)


def test_refuses_an_unknown_representative():
    with pytest.raises(ValueError, match="representative"):
        lookup("hip")(representative="mean")
