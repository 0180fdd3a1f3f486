import pytest
import torch
from transformers import DynamicCache

import foveate
from attached import check_bytes, prompt
from foveate import ops
from foveate.cache.base import Slots
from foveate.hf.eviction import EvictionLayer

HEADS, GROUP, DIM = 2, 2, 8


def case(n=40, seed=0):
    torch.manual_seed(seed)
    q = torch.randn(1, HEADS * GROUP, n, DIM)
    return q, torch.randn(1, HEADS, n, DIM), torch.randn(1, HEADS, n, DIM)


def compressed(policy, q, k, v, tables=None):
    """What a prefill of one row leaves."""
    layer = EvictionLayer(policy, tables)
    call(layer, q, k, v)
    return layer.slots


def call(layer, q, k, v):
    """One call of a layer, without its attention."""
    layer.await_call()
    layer.update(k, v)
    layer.admit(None, 1, k.shape[2])
    layer.finish(q, scale=None, record=None, at=0)


def scores_of(q, k, window, combine):
    """Plain reference: (Hkv, n - window)."""
    n = k.shape[2]
    every, late = torch.zeros(HEADS, n), torch.zeros(HEADS, n)
    for head in range(HEADS * GROUP):
        for i in range(n):
            p = torch.softmax(k[0, head // GROUP, : i + 1] @ q[0, head, i] * DIM**-0.5, 0)
            every[head // GROUP, : i + 1] += p / GROUP
            late[head // GROUP, : i + 1] += p / GROUP * (i >= n - window)
    parts = [x[:, : n - window] for x in (every, late)]
    parts = [x / x.mean(1, keepdim=True) for x in parts]
    return torch.maximum(*parts) if combine == "max" else parts[0] + parts[1]


def merged_by_hand(q, k, v, *, budget, window, reach, tau, combine):
    """Plain reference, head by head: lists of (position, key, value, members, score)."""
    scores, n, rows = scores_of(q, k, window, combine), k.shape[2], []
    for h in range(HEADS):
        ranked = scores[h].argsort(descending=True).tolist()
        count = budget - window
        clusters = {c: [c] for c in ranked[:count]}
        for t in ranked[count : reach * count]:
            cosine = {
                c: float(torch.cosine_similarity(k[0, h, t], k[0, h, c], dim=0)) for c in clusters
            }
            best = max(cosine, key=cosine.get)
            if cosine[best] >= tau:
                clusters[best].append(t)
        slots = []
        for c in sorted(clusters):
            w = scores[h, clusters[c]]
            mean = [(x[0, h, clusters[c]] * w[:, None]).sum(0) / w.sum() for x in (k, v)]
            slots.append((c, *mean, len(clusters[c])))
        slots += [(t, k[0, h, t], v[0, h, t], 1) for t in range(n - window, n)]
        rows.append(slots)
    return rows


@pytest.mark.parametrize("combine", ["max", "sum"])
@pytest.mark.parametrize("tau", [-1.0, 0.4])
def test_equals_the_definition_head_by_head(combine, tau):
    q, k, v = case()
    options = {"budget": 14, "window": 5, "reach": 3, "tau": tau, "combine": combine}
    slots = compressed(foveate.create("ems", **options, space="post"), q, k, v)
    rows = merged_by_hand(q, k, v, **options)
    assert slots.lengths == [14, 14]
    for name, at in (("k", 1), ("v", 2)):
        expected = torch.stack([torch.stack([slot[at] for slot in row]) for row in rows])
        torch.testing.assert_close(slots.padded(name), expected)
    assert slots.padded("count").tolist() == [[slot[3] for slot in row] for row in rows]
    assert any(slot[3] > 1 for row in rows for slot in row)


def test_a_threshold_above_one_and_no_reach_are_pure_eviction():
    q, k, v = case()
    zero, none = (
        compressed(foveate.create("ems", budget=14, window=5, **x), q, k, v)
        for x in ({"tau": 1.1}, {"reach": 1})
    )
    for name in ("k", "v", "total"):
        assert torch.equal(zero.held[name], none.held[name])
    policy, scores = foveate.create("ems", budget=14, window=5), scores_of(q, k, 5, "max")
    scores = torch.nn.functional.pad(scores, (0, 5), value=torch.inf)
    kept = k[0][policy.keep(scores)].view(HEADS, 14, DIM)
    torch.testing.assert_close(none.padded("k"), kept)


def test_a_threshold_of_minus_one_loses_no_token_of_the_pool():
    q, k, v = case()
    policy = foveate.create("ems", budget=15, window=5, reach=2, tau=-1.0)
    assert compressed(policy, q, k, v).padded("count").sum(1).tolist() == [25, 25]


def test_duplicates_merge_to_an_unchanged_key_and_with_mass_to_dense_attention():
    q, k, v = (x.repeat(1, 1, 10, 1) for x in case(2))
    # nine centres among eight copies of each of two tokens: both have one
    policy = foveate.create("ems", budget=13, window=4, reach=4, tau=0.999, space="post")
    layer = EvictionLayer(policy)
    call(layer, q, k, v)
    held = layer.slots.padded("k")
    gaps = (held[:, :, None] - k[0][:, None]).abs().amax(-1).amin(-1)
    assert float(gaps.max()) < 1e-6
    assert layer.slots.padded("count").sum(1).tolist() == [20, 20]
    new = [torch.randn(1, h, 1, DIM) for h in (HEADS * GROUP, HEADS, HEADS)]
    layer.await_call()
    layer.update(*new[1:])
    layer.admit(None, 1, 1)
    whole = [torch.cat([x, y], 2) for x, y in zip((k, v), new[1:], strict=True)]
    dense = ops.attend(new[0], *whole)
    torch.testing.assert_close(layer.attend(new[0], scale=None, softcap=None), dense)


def tables(positions):
    """Rotary tables of positions (B, L)."""
    angle = positions[..., None] * torch.tensor([1.0, 0.3, 0.1, 0.01]).repeat(2)
    return angle.cos(), angle.sin()


def test_without_rotary_embedding_equal_keys_meet_at_the_centres_position():
    q, k, v = case(24)
    k = torch.ones(1, HEADS, 24, DIM)  # the same key everywhere, before it is turned
    cos, sin = tables(torch.arange(24)[None])
    turned = ops.rope(k, cos, sin)
    options = {"budget": 12, "window": 4, "reach": 4, "tau": 0.99}
    slots = compressed(foveate.create("ems", **options), q, turned, v, tables)
    cos, sin = tables(slots.padded("position"))
    torch.testing.assert_close(slots.padded("k"), ops.rope(k[0][:, None, :12], cos, sin)[:, 0])
    post = compressed(foveate.create("ems", **options, space="post"), q, turned, v)
    assert torch.equal(post.padded("k")[:, -4:], turned[0, :, -4:])
    assert not torch.allclose(post.padded("v"), slots.padded("v"))


def test_slots_count_as_tokens_when_the_cache_is_compressed_again():
    q, k, v = case(60)
    layer = EvictionLayer(foveate.create("ems", budget=12, window=4, buffer=3, tau=0.0))
    call(layer, *(x[:, :, :30] for x in (q, k, v)))
    widths = []
    for i in range(30, 60):
        call(layer, *(x[:, :, i : i + 1] for x in (q, k, v)))
        widths.append(layer.slots.width)
    assert widths[:5] == [13, 14, 15, 12, 13] and max(widths) == 15
    count = layer.slots.padded("count")
    assert torch.equal(count[:, -4:], torch.ones(HEADS, 4))
    assert bool((count.sum(1) > 30).all()) and bool((count.sum(1) <= 60).all())


def test_a_row_of_the_mixing_matrix_sums_to_one():
    torch.manual_seed(0)
    slot, weight = torch.randint(0, 5, (2, 30)), torch.rand(2, 30)
    matrix = torch.zeros(2, 5, 30).scatter_(1, slot[:, None], weight[:, None])
    matrix = matrix / matrix.sum(2, keepdim=True)
    x = torch.randn(2, 30, 4)
    torch.testing.assert_close(ops.mix(x, slot, weight, 5), matrix @ x)
    torch.testing.assert_close(ops.mix(torch.ones(2, 30, 1), slot, weight, 5), torch.ones(2, 5, 1))
    assert not ops.mix(x, slot, weight, 6)[:, 5].any()
    with pytest.raises(ValueError, match=r"slot and weight must be \(2, 30\)"):
        ops.mix(x, slot[:1], weight, 5)


@torch.no_grad()
def test_a_compressed_cache_is_refused_outside_the_block(tiny_llama):
    cache = DynamicCache()
    with foveate.attach(tiny_llama, cache="ems:budget=12,window=4"):
        tiny_llama(prompt(30), past_key_values=cache)
    with pytest.raises(ValueError, match="needs the model to be attached"):
        tiny_llama(prompt(1), past_key_values=cache)


@pytest.mark.parametrize("options", [{}, {"mass": False, "space": "post"}])
def test_bytes_held_are_those_claimed_at_every_step(tiny_llama, options):
    policy = foveate.create("ems", budget=12, window=4, buffer=3, tau=0.3, **options)
    check_bytes(tiny_llama, policy, 30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 128}, "window must be below the budget 128, got 128"),
        ({"smooth": 4}, "smooth must be odd, got 4"),
        ({"reach": 0}, "reach must be at least 1"),
        ({"combine": "mean"}, "combine must be max or sum, got 'mean'"),
        ({"space": "rope"}, "space must be post or pre, got 'rope'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        foveate.create("ems", **options)


def test_segments_of_different_lengths_are_kept_joined_and_picked():
    x = Slots({"k": torch.arange(6.0)[:, None]}, [1, 3, 2])
    assert x.padded("k")[..., 0].tolist() == [[0, 0, 0], [1, 2, 3], [0, 4, 5]]
    assert x.filled().tolist() == [[False, False, True], [True] * 3, [False, True, True]]
    kept = x.keep(torch.tensor([[True] * 3, [False, True, True], [True, False, True]]))
    assert kept.held["k"][:, 0].tolist() == [0, 2, 3, 5] and kept.lengths == [1, 2, 1]
    grown = kept.append({"k": torch.tensor([7.0, 8, 9]).view(3, 1, 1)})
    assert grown.held["k"][:, 0].tolist() == [0, 7, 2, 3, 8, 5, 9]
    rows = grown.rows(3)
    assert Slots.joined([rows[2], rows[0]]).held["k"][..., 0].tolist() == [[5, 9], [0, 7]]
    assert Slots.joined(rows).held["k"][:, 0].tolist() == [0, 7, 2, 3, 8, 5, 9]


@torch.no_grad()
def test_a_selected_row_holds_its_own_bytes_only(tiny_llama):
    cache, ids = DynamicCache(), prompt(60).view(3, 20)
    with foveate.attach(tiny_llama, cache="h2o:budget=8"):
        tiny_llama(ids, past_key_values=cache)
    before = cache.layers[0].nbytes()
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.layers[0].nbytes() * 3 == before
