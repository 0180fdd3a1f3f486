import math
import time
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate
from foveate import ops
from ops_tools import assert_same, every_pair, held_to_reference, qkv


def visible(mask, length, heads=1):
    """bool (heads, L, L) of a mask, pair by pair."""
    return every_pair(mask, 1, heads, length, length)[0]


def by_rule(rule, length):
    return torch.tensor([[bool(rule(q, k)) for k in range(length)] for q in range(length)])


def coordinates(shape):
    """Coordinates of every token in row-major order."""
    return list(product(*(range(n) for n in shape)))


def axis_window(i, length, window, stride, dilation, causal):
    """Keys of one query on one axis, as the paper writes it."""
    r, i, length = i % dilation, i // dilation, -(-(length - i % dilation) // dilation)
    if causal:
        leader = min(i // stride * stride + stride - 1, length - 1)
        keys = range(max(leader - window + 1, 0), i + 1)
    else:
        leader = min(i // stride * stride + stride // 2, length - 1)
        left, right = window // 2, window // 2 + window % 2 - 1
        start = max(leader - left, 0)
        if leader + right >= length:
            start += length - right - leader - 1
        keys = range(start, start + window)
    return {r + dilation * key for key in keys}


def radial_rule(frames, size, sink):
    def rule(q, k):
        (i, a), (j, c) = divmod(q, size), divmod(k, size)
        e = math.floor(math.log2(max(abs(i - j), 1)))
        near = 2**e <= size and abs(a - c) + 1 <= size / 2**e
        line = abs(i - j) % math.ceil(2**e / size) == 0 and a == c
        return near or line or (sink and j == 0)

    return by_rule(rule, frames * size)


AXES = [  # (length, window, stride, dilation, causal)
    (10, 3, 1, 1, False),
    (10, 4, 1, 1, False),
    (10, 10, 1, 1, False),
    (12, 4, 4, 1, False),
    (11, 5, 3, 1, False),
    (10, 3, 1, 3, False),
    (11, 3, 2, 3, False),
    (10, 4, 1, 1, True),
    (11, 5, 3, 1, True),
    (11, 3, 2, 3, True),
]
MASKS = {
    "strided": (ops.strided(5, local=3), 60),
    "strided blocks": (ops.strided(3, local=2, block=4, offset=1), 60),
    "strided by head": (ops.strided(4, block=2, offset=torch.tensor([0, 1, 5])), 60),
    "every block": (ops.strided(1), 60),
    "line": (ops.neighborhood(60, 9, stride=4), 60),
    "dilated line": (ops.neighborhood(60, 9, stride=2, dilation=3), 60),
    "causal line": (ops.neighborhood(60, 9, stride=4, causal=True), 60),
    "plane": (ops.neighborhood((6, 10), (3, 5)), 60),
    "late plane": (ops.neighborhood((5, 10), (3, 4), dilation=(1, 2), start=7), 60),
    "full plane": (ops.neighborhood((6, 10), (6, 10)), 60),
    "box": (ops.neighborhood((3, 4, 5), (2, 3, 5), stride=(1, 3, 2), causal=(True, False, False)),
            60),
    "tiled plane": (ops.neighborhood((6, 10), (3, 5), tile=(3, 2)), 60),
    "tiled box": (ops.neighborhood((3, 4, 5), (2, 2, 5), dilation=(1, 2, 1), tile=(3, 2, 1)), 60),
    "tiled circle": (ops.disc((5, 8), 2.5, start=9, tile=(5, 2)), 60),
    "circle": (ops.disc((6, 10), 2.5), 60),
    "late ball": (ops.disc((3, 3, 5), 2, start=10), 60),
    "everything": (ops.disc((6, 10), 99.0), 60),
    "radial": (ops.radial(10, 6), 60),
    "late radial": (ops.radial(7, 8, sink=False, start=2), 60),
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(list(MASKS)),
    st.tuples(st.integers(0, 59), st.integers(0, 59)).map(sorted),
    st.tuples(st.integers(0, 59), st.integers(0, 59)).map(sorted),
)
def test_bounds_never_promise_what_is_not_so(name, rows, cols):
    mask, length = MASKS[name]
    some, every = mask.bounds(
        *mask.axes(torch.device("cpu")), *torch.tensor([*rows, *cols]).view(4, 1, 1, 1, 1)
    )
    seen = visible(mask, length, mask.heads)[:, rows[0] : rows[1] + 1, cols[0] : cols[1] + 1]
    some, every = (x.expand(1, mask.heads, 1, 1).flatten() for x in (some, every))
    assert not (seen.flatten(1).any(-1) & ~some).any()
    assert not (every & ~seen.flatten(1).all(-1)).any()


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([name for name, (mask, _) in MASKS.items() if mask.exact]),
    st.tuples(st.integers(0, 59), st.integers(0, 59)).map(sorted),
    st.tuples(st.integers(0, 59), st.integers(0, 59)).map(sorted),
    st.sampled_from(["alone", "or text", "and causal", "not"]),
)
def test_exact_bounds_are_the_truth(name, rows, cols, form):
    mask, length = MASKS[name]
    mask = {
        "alone": mask,
        "or text": mask | ops.global_tokens(4, 9),
        "and causal": mask & ops.causal(),
        "not": ~mask,
    }[form]
    tile = (*mask.axes(torch.device("cpu")), *torch.tensor([*rows, *cols]).view(4, 1, 1, 1, 1))
    if mask.exact(*tile):
        seen = visible(mask, length)[0, rows[0] : rows[1] + 1, cols[0] : cols[1] + 1]
        some, every = mask.bounds(*tile)
        assert (bool(some), bool(every)) == (bool(seen.any()), bool(seen.all()))


def test_bounds_of_chosen_slots_are_not_exact():
    mask = ops.neighborhood((8, 8), 3)
    assert mask.take(0, torch.arange(0, 64, 2)).exact is None and mask.take(0).exact is not None


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("block", [(8, 8), (5, 16)])
def test_layout_covers_exactly_the_blocks_with_a_visible_pair(name, block):
    mask, length = MASKS[name]
    seen = visible(mask, length, mask.heads).float()
    for rule, want in ((mask, seen), (mask & ops.causal(), seen.tril())):
        got = rule.to_layout(length, length, block).to_bool()[0]
        pooled = torch.nn.functional.max_pool2d(want, block, ceil_mode=True)
        assert torch.equal(got, pooled > 0)
        layout = rule.to_layout(length, length, block)
        hidden = torch.nn.functional.max_pool2d(1 - want, block, ceil_mode=True) > 0
        listed = layout.indices.long().expand(*hidden.shape[:1], -1, -1, -1)[0]
        partial = hidden.gather(-1, listed)
        assert torch.equal(layout.partial[0] & layout.filled[0], partial & layout.filled[0])


@pytest.mark.parametrize("name", MASKS)
def test_sparse_attention_under_the_mask_is_the_definition(name):
    mask, length = MASKS[name]
    q, k, v = qkv(length, length, batch=1, q_heads=3, kv_heads=1)
    for causal in (True, False):
        rule = mask & ops.causal() if causal else mask
        layout = rule.to_layout(length, length, 8)
        got = held_to_reference(
            ops.block_sparse, q, k, v, layout, mask=mask, causal=causal, return_lse=True
        )
        assert_same(got, ops.attend(q, k, v, mask=mask, causal=causal, return_lse=True))


@pytest.mark.parametrize("name", ["strided by head", "plane", "circle", "radial"])
def test_flex_agrees(name):
    mask, length = MASKS[name]
    flex = mask.to_flex(1, mask.heads, length, length)
    h, q, k = torch.meshgrid(
        torch.arange(mask.heads), torch.arange(length), torch.arange(length), indexing="ij"
    )
    got = flex.mask_mod(torch.zeros_like(h), h, q, k)
    assert torch.equal(got, visible(mask, length, mask.heads))


def test_the_factories_are_part_of_the_public_face():
    for name in ("strided", "neighborhood", "disc", "radial"):
        assert getattr(foveate, name) is getattr(ops, name)


# strided


@pytest.mark.parametrize(
    ("stride", "local", "block", "offset"),
    [(4, 1, 1, 0), (5, 3, 2, 1), (3, 2, 4, -2), (7, 1, 3, 9)],
)
def test_strided_is_its_definition(stride, local, block, offset):
    mask = ops.strided(stride, local=local, block=block, offset=offset)

    def rule(q, k):
        i, j = q // block, k // block
        return abs(i - j) < local or (j + offset) % stride == 0

    assert torch.equal(visible(mask, 40)[0], by_rule(rule, 40))


def test_stride_one_is_dense():
    assert visible(ops.strided(1, block=4), 40).all()


def test_heads_with_all_residues_cover_the_context():
    heads = ops.strided(4, block=2, offset=torch.arange(4)) & ops.causal()
    seen = visible(heads, 40, 4)
    assert torch.equal(seen.any(0), torch.ones(40, 40).tril().bool())
    fewer = ops.strided(4, block=2, offset=torch.arange(3)) & ops.causal()
    assert not torch.equal(visible(fewer, 40, 3).any(0), torch.ones(40, 40).tril().bool())


def test_a_block_that_left_a_head_never_returns():
    local, block = 2, 3
    seen = visible(ops.strided(4, local=local, block=block, offset=torch.arange(2)), 60, 2)
    seen = seen & torch.ones(60, 60).tril().bool()
    blocks = seen[:, block - 1 :: block, ::block]  # last row and first column of each block
    outside = torch.ones(20, 20).tril(-local).bool()[1:]
    assert (blocks[:, 1:] <= blocks[:, :-1])[:, outside].all()


@pytest.mark.parametrize("name", ["strided", "window and sinks"])
def test_a_long_layout_is_made_fast(name):
    length = 65536
    mask = {
        "strided": ops.strided(16, local=16, block=64, offset=torch.arange(2)),
        "window and sinks": ops.window(1024) | ops.sinks(16),
    }[name]
    began = time.process_time()
    layout = (mask & ops.causal()).to_layout(length, length, 128)
    assert time.process_time() - began < 1.0
    assert 0.01 < layout.density() < 0.3


# neighborhood


@pytest.mark.parametrize("axis", AXES)
def test_a_line_is_its_definition(axis):
    length, window, stride, dilation, causal = axis
    mask = ops.neighborhood(length, window, stride=stride, dilation=dilation, causal=causal)
    seen = visible(mask, length)[0]
    for i in range(length):
        assert set(seen[i].nonzero().flatten().tolist()) == axis_window(i, *axis)
        assert seen[i, i]
        if not causal:
            assert seen[i].sum() == window


@pytest.mark.parametrize("axes", [AXES[:2], AXES[4:6], AXES[6:8], [AXES[0], (3, 3, 2, 1, False)]])
def test_planes_are_products_of_lines(axes):
    shape, *options = ([a[n] for a in axes] for n in range(5))
    window, stride, dilation, causal = (tuple(x) for x in options)
    mask = ops.neighborhood(tuple(shape), window, stride=stride, dilation=dilation, causal=causal)
    lines = [
        visible(ops.neighborhood(a[0], a[1], stride=a[2], dilation=a[3], causal=a[4]), a[0])[0]
        for a in axes
    ]
    assert torch.equal(visible(mask, math.prod(shape))[0], torch.kron(*lines).bool())


def test_a_box_is_the_product_of_three_lines():
    lines = [visible(ops.neighborhood(n, w), n)[0].int() for n, w in ((3, 2), (4, 3), (5, 3))]
    want = torch.kron(torch.kron(lines[0], lines[1]), lines[2]).bool()
    assert torch.equal(visible(ops.neighborhood((3, 4, 5), (2, 3, 3)), 60)[0], want)


def test_full_window_is_dense_and_window_one_returns_the_values():
    assert visible(ops.neighborhood((6, 10), (6, 10)), 60).all()
    q, k, v = qkv(60, 60, q_heads=2, kv_heads=2)
    assert_same(ops.attend(q, k, v, mask=ops.neighborhood((6, 10), 1)), v)


def test_stride_of_a_window_makes_independent_blocks():
    seen = visible(ops.neighborhood(12, 4, stride=4), 12)[0]
    assert torch.equal(seen, torch.kron(torch.eye(3), torch.ones(4, 4)).bool())


def test_odd_windows_are_symmetric_inside_and_queries_of_a_group_share_one():
    seen = visible(ops.neighborhood(20, 5), 20)[0]
    assert torch.equal(seen[2:-2], visible(ops.window(3), 20)[0][2:-2])
    for window, stride in ((5, 2), (6, 3), (7, 7)):
        rows = visible(ops.neighborhood(21, window, stride=stride), 21)[0]
        for i in range(21):
            assert torch.equal(rows[i], rows[i // stride * stride])


def test_causal_line_of_stride_one_is_a_sliding_window():
    seen = visible(ops.neighborhood(20, 4, causal=True), 20)
    assert torch.equal(seen, visible(ops.window(4) & ops.causal(), 20))


def test_window_one_on_an_axis_is_a_batch_of_lines():
    q, k, v = qkv(40, 40, batch=1, q_heads=2, kv_heads=2)
    plane = ops.attend(q, k, v, mask=ops.neighborhood((5, 8), (1, 3)))
    rows = [x.view(2, 5, 8, 8).transpose(0, 1) for x in (q, k, v)]
    lines = ops.attend(*rows, mask=ops.neighborhood(8, 3))
    assert_same(plane, lines.transpose(0, 1).reshape(1, 2, 40, 8))


# disc


@pytest.mark.parametrize("radius", [0.5, 1, 2, 2.5, 4])
@pytest.mark.parametrize("shape", [(9,), (6, 10), (3, 4, 5)])
def test_disc_is_its_definition(shape, radius):
    at = coordinates(shape)

    def rule(q, k):
        return sum((a - b) ** 2 for a, b in zip(at[q], at[k], strict=True)) < radius**2

    want = by_rule(rule, len(at))
    seen = visible(ops.disc(shape, radius), len(at))[0]
    assert torch.equal(seen, want)
    assert torch.equal(seen, seen.T)


def test_interior_of_a_disc_counts_the_lattice_points():
    seen = visible(ops.disc((17, 17), 5), 17 * 17)[0].view(17, 17, -1)
    points = sum(y * y + x * x < 25 for y in range(-5, 6) for x in range(-5, 6))
    assert seen[8, 8].sum() == points == 69
    assert visible(ops.disc((6, 10), math.hypot(5, 9) + 0.1), 60).all()


@pytest.mark.parametrize(("shape", "tile"), [((6, 10), (3, 5)), ((2, 4, 6), (2, 2, 3)), (12, (4,))])
def test_tile_order_lists_tile_after_tile(shape, tile):
    sizes = (shape,) if isinstance(shape, int) else shape
    order = ops.tile_order(shape, tile)
    assert torch.equal(order.sort().values, torch.arange(math.prod(sizes)))
    at = torch.tensor(coordinates(sizes))[order] // torch.tensor(tile)
    for part in at.split(math.prod(tile)):
        assert (part == part[0]).all()
    assert (order.view(-1, math.prod(tile)).diff() > 0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: ops.neighborhood((6, 10), (3, 5), stride=2, causal=(True, False), **o),
        lambda **o: ops.disc((6, 10), 2.5, **o),
    ],
)
def test_masks_in_tile_order_show_the_same_pairs(make):
    order = ops.tile_order((6, 10), (2, 5))
    seen = visible(make(), 60)[0][order][:, order]
    assert torch.equal(visible(make(tile=(2, 5)), 60)[0], seen)


def test_blocks_that_are_tiles_hold_more_of_a_neighborhood():
    tiled = ops.neighborhood((32, 32), 9, tile=(4, 4)).to_layout(1024, 1024, 16)
    rows = ops.neighborhood((32, 32), 9).to_layout(1024, 1024, 16)
    assert tiled.density(False) < 0.7 * rows.density(False)


def test_a_grid_may_begin_after_text():
    seen = visible(ops.disc((4, 5), 2, start=3), 25)[0]
    assert not seen[:3].any() and not seen[:, :3].any() and not seen[23:].any()
    assert torch.equal(seen[3:23, 3:23], visible(ops.disc((4, 5), 2), 20)[0])
    both = visible(ops.disc((4, 5), 2, start=3) | ops.sinks(3), 25)[0]
    assert both[:, :3].all()


# radial


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize(("frames", "size"), [(1, 7), (5, 6), (12, 3), (20, 2), (9, 1)])
def test_radial_is_its_definition(frames, size, sink):
    seen = visible(ops.radial(frames, size, sink=sink), frames * size)[0]
    assert torch.equal(seen, radial_rule(frames, size, sink))


def test_radial_is_symmetric_but_for_the_sink_and_keeps_near_frames_whole():
    seen = visible(ops.radial(8, 6), 48)[0]
    assert torch.equal(seen[6:, 6:], seen[6:, 6:].T)
    assert seen[:, :6].all() and not seen[:6].all()
    for i in range(7):
        assert seen[i * 6 : i * 6 + 12, i * 6 : i * 6 + 12].all()


def test_radial_work_grows_like_frames_times_log_frames():
    kept = {
        sink: [
            math.floor(
                0.5 + int(visible(ops.radial(f, 16, sink=sink), 16 * f).sum()) / (f * math.log2(f))
            )
            for f in (4, 8, 16, 32, 64)
        ]
        for sink in (True, False)
    }
    assert kept[True] == [476, 519, 561, 579, 581]
    assert kept[False] == [458, 487, 522, 540, 544]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ops.strided(0), ValueError, "stride must be at least 1, got 0"),
        (lambda: ops.strided(2, local=0), ValueError, "local must be at least 1, got 0"),
        (lambda: ops.strided(2, block=1.5), TypeError, "block must be an integer, got 1.5"),
        (lambda: ops.strided(2, offset=torch.ones(2)), ValueError, "offset per head must be"),
        (lambda: ops.strided(2, offset=0.5), TypeError, "offset must be an integer, got 0.5"),
        (lambda: ops.neighborhood((), 1), ValueError, r"shape must have 1 to 3 axes, got \(\)"),
        (lambda: ops.neighborhood((2,) * 4, 1), ValueError, "shape must have 1 to 3 axes"),
        (lambda: ops.neighborhood((4, 0), 1), ValueError, "shape must be at least 1, got 0"),
        (lambda: ops.neighborhood((4, 4), (3,)), ValueError, r"window must have .* 2 axes, .*3,"),
        (lambda: ops.neighborhood((4, 4), 3, stride=(1, 1, 1)), ValueError, "stride must have"),
        (lambda: ops.neighborhood((4, 8), 5), ValueError, "axis of length 4, got window 5"),
        (lambda: ops.neighborhood(8, 3, dilation=3), ValueError, "window 3 and dilation 3"),
        (lambda: ops.neighborhood(8, 3, stride=4), ValueError, "stride .* window 3, got 4"),
        (lambda: ops.neighborhood(8, 0), ValueError, "window must be at least 1, got 0"),
        (lambda: ops.disc((4, 6), 2, tile=(4, 4)), ValueError, r"tile must divide the grid \(4, 6"),
        (lambda: ops.tile_order((4, 6), (2,)), ValueError, "tile must divide the grid"),
        (lambda: ops.global_tokens(4, 2), ValueError, "start <= end, got 4 and 2"),
        (lambda: ops.disc((4, 4), 0), ValueError, "radius must be above 0, got 0"),
        (lambda: ops.disc((4, 4), 2, start=-1), ValueError, "start must be at least 0, got -1"),
        (lambda: ops.radial(0, 4), ValueError, "frames must be at least 1, got 0"),
        (lambda: ops.radial(4, 2.0), TypeError, "tokens_per_frame must be an integer, got 2.0"),
    ],
)
def test_bad_input_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()
