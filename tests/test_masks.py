import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import ops
from ops_tools import every_pair

BATCH, HEADS, LENGTH = 2, 4, 24
SIZES = torch.tensor([1, 3, 9, 30])
IDS = torch.tensor([[0] * 5 + [1] * 19, [0] * 11 + [3] * 2 + [4] * 11])
MIXED = torch.tensor([0, 1, 0, 2, 2, 1] * 4)
LINKS = torch.tensor([[True, False, True], [False, True, False], [False, False, True]])
REAL = torch.arange(LENGTH) >= torch.tensor([[0], [7]])
ENDS = (torch.arange(LENGTH) - 10).abs() < torch.tensor([[7], [0]])
HOLES = torch.arange(LENGTH) % 5 > 1
DENSE = torch.rand(BATCH, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.3

# Each mask with its meaning, spelled out on plain integers.
RULES = {
    "causal": (ops.causal(), lambda b, h, q, k: k <= q),
    "window": (ops.window(5), lambda b, h, q, k: abs(q - k) < 5),
    "window per head": (ops.window(SIZES), lambda b, h, q, k: abs(q - k) < SIZES[h]),
    "window of blocks": (ops.window(2, block=5), lambda b, h, q, k: abs(q // 5 - k // 5) < 2),
    "window of blocks per head": (
        ops.window(SIZES, block=3),
        lambda b, h, q, k: abs(q // 3 - k // 3) < SIZES[h],
    ),
    "sinks": (ops.sinks(3), lambda b, h, q, k: k < 3),
    "sinks per head": (ops.sinks(SIZES), lambda b, h, q, k: k < SIZES[h]),
    "global tokens": (
        ops.global_tokens(4, 9),
        lambda b, h, q, k: 4 <= q < 9 or 4 <= k < 9,
    ),
    "no global tokens": (ops.global_tokens(4, 4), lambda b, h, q, k: False),
    "documents": (ops.documents(IDS), lambda b, h, q, k: IDS[b, q] == IDS[b, k]),
    "unordered groups": (ops.groups(MIXED), lambda b, h, q, k: MIXED[q] == MIXED[k]),
    "linked groups": (ops.groups(MIXED, LINKS), lambda b, h, q, k: LINKS[MIXED[q], MIXED[k]]),
    "padding": (ops.padding(REAL), lambda b, h, q, k: REAL[b, k]),
    "padding at both ends": (ops.padding(ENDS), lambda b, h, q, k: ENDS[b, k]),
    "padding with holes": (ops.padding(HOLES), lambda b, h, q, k: HOLES[k]),
    "dense": (ops.dense(DENSE), lambda b, h, q, k: DENSE[b, h, q, k]),
    "dense per row": (ops.dense(DENSE[:, 0]), lambda b, h, q, k: DENSE[b, 0, q, k]),
    "dense for all": (ops.dense(DENSE[0, 0]), lambda b, h, q, k: DENSE[0, 0, q, k]),
}


def combinations(depth=3):
    leaf = st.sampled_from([mask for mask, _ in RULES.values()])
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.tuples(inner, inner).map(lambda ab: ab[0] & ab[1]),
            st.tuples(inner, inner).map(lambda ab: ab[0] | ab[1]),
            inner.map(lambda a: ~a),
        ),
        max_leaves=depth,
    )


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("q_len", [LENGTH, 7, 1])
def test_mask_means_what_its_rule_says(name, q_len):
    mask, rule = RULES[name]
    seen = mask.to_dense(q_len, LENGTH)
    assert seen.shape == (mask.batch, mask.heads, q_len, LENGTH)
    start = LENGTH - q_len
    for b in range(mask.batch):
        for h in range(mask.heads):
            want = [[bool(rule(b, h, start + q, k)) for k in range(LENGTH)] for q in range(q_len)]
            assert seen[b, h].tolist() == want


@settings(max_examples=100, deadline=None)
@given(combinations())
@pytest.mark.parametrize("slots", [None, torch.arange(1, LENGTH, 2)], ids=["whole", "slots"])
def test_runs_are_another_form_of_the_mask(slots, mask):
    length = LENGTH if slots is None else len(slots)
    mask = mask.take(1, slots)
    if mask.runs is None:
        return
    q, k = torch.arange(length), torch.arange(length)
    b, h = mask.axes(torch.device("cpu"))
    runs = mask.runs(b[..., 0], h[..., 0], q[None, None])
    inside = (runs[..., :1] <= k) & (k < runs[..., 1:])
    want = mask.to_dense(length, length)
    assert torch.equal(inside.any(-2).expand_as(want), want)


def test_padding_has_runs_where_its_rows_have_no_holes():
    assert ops.padding(REAL).runs is not None and ops.padding(ENDS).runs is not None
    assert ops.padding(HOLES).runs is None


@settings(max_examples=60, deadline=None)
@given(combinations(), combinations())
def test_algebra_is_that_of_sets(a, b):
    shape = (BATCH, HEADS, 9, LENGTH)
    seen_a, seen_b = every_pair(a, *shape), every_pair(b, *shape)
    assert torch.equal(every_pair(a & b, *shape), seen_a & seen_b)
    assert torch.equal(every_pair(a | b, *shape), seen_a | seen_b)
    assert torch.equal(every_pair(~a, *shape), ~seen_a)
    assert torch.equal(every_pair(~(a & b), *shape), every_pair(~a | ~b, *shape))


@settings(max_examples=100, deadline=None)
@given(
    combinations(),
    st.sampled_from([(LENGTH, LENGTH), (10, LENGTH), (1, LENGTH)]),
    st.sampled_from([(4, 4), (8, 3), (5, 16), (1, 4)]),
)
def test_layout_covers_exactly_the_blocks_with_a_visible_pair(mask, lengths, block):
    layout = mask.to_layout(*lengths, block)
    seen = every_pair(mask, mask.batch, mask.heads, *lengths)
    (q_len, k_len), (bq, bk) = lengths, block
    grid = ops.TileGrid.of(q_len, k_len, bq)
    chosen = layout.to_bool()
    # The layout of the partial blocks alone: filler goes to a column past the last.
    at = layout.indices.long().masked_fill(~layout.filled, chosen.shape[-1])
    partial = torch.nn.functional.pad(torch.zeros_like(chosen), (0, 1))
    partial = partial.scatter(-1, at, layout.partial)[..., :-1]
    for i in range(grid.tiles):
        rows = slice(max(i * bq - grid.lead, 0), (i + 1) * bq - grid.lead)
        for j in range(-(-k_len // bk)):
            tile = seen[:, :, rows, j * bk : (j + 1) * bk].flatten(2)
            assert torch.equal(chosen[:, :, i, j], tile.any(-1))
            assert torch.equal(partial[:, :, i, j], tile.any(-1) & ~tile.all(-1))


@settings(max_examples=100, deadline=None)
@given(
    combinations(),
    st.tuples(st.integers(0, 23), st.integers(0, 23)).map(sorted),
    st.tuples(st.integers(0, 23), st.integers(0, 23)).map(sorted),
)
def test_bounds_never_promise_what_is_not_so(mask, rows, cols):
    at = torch.tensor([*rows, *cols]).view(4, 1, 1, 1, 1)
    some, every = mask.bounds(*mask.axes(torch.device("cpu")), *at)
    seen = every_pair(mask, mask.batch, mask.heads, LENGTH, LENGTH)
    seen = seen[:, :, rows[0] : rows[1] + 1, cols[0] : cols[1] + 1].flatten(2)
    shape = seen.shape[:2]
    some, every = (x.expand(*shape, 1, 1).reshape(shape) for x in (some, every))
    assert not (seen.any(-1) & ~some).any()
    assert not (every & ~seen.all(-1)).any()


def test_window_and_sinks_layouts_need_no_look_inside_full_tiles():
    looked = []
    band = ops.window(64) | ops.sinks(4)
    spy = ops.Mask(lambda *at: looked.append(at[2].shape) or band(*at), band.bounds)
    spy.to_layout(1024, 1024, 32)
    assert sum(shape[0] for shape in looked if shape[1] == 32) < 100  # of 1,024 tiles


@pytest.mark.parametrize("slots", [None, torch.tensor([3, 5, 6, 10, 23])])
def test_take_is_the_row_alone_at_moved_positions(slots):
    mask = (ops.documents(IDS) & ops.padding(REAL)) | ops.window(SIZES)
    whole = mask.to_dense(LENGTH, LENGTH)
    at = torch.arange(LENGTH) if slots is None else slots
    for row in range(BATCH):
        alone = mask.take(row, slots)
        assert (alone.batch, alone.heads) == (1, HEADS)
        want = whole[row : row + 1][:, :, at][..., at]
        assert torch.equal(alone.to_dense(len(at), len(at)), want)
        reached = alone.to_layout(len(at), len(at), 2).to_bool()
        tiles = torch.nn.functional.max_pool2d(want.float(), 2, ceil_mode=True) > 0
        assert torch.equal(reached, tiles)


def test_positions_replace_indices():
    q_pos, k_pos = torch.tensor([20, 3]), torch.tensor([[3, 20, 4], [19, 0, 2]])
    seen = (ops.window(2) & ops.causal()).to_dense(2, 3, q_pos=q_pos, k_pos=k_pos)
    assert seen.shape == (2, 1, 2, 3)
    assert seen.int().flatten().tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1]


def test_off_the_table_the_nearest_end_holds_inside_and_in_bounds():
    mask = ops.padding(torch.tensor([False, True, True]))
    assert mask.to_dense(1, 6).flatten().tolist() == [False, True, True, True, True, True]
    assert mask.to_layout(1, 8, 2).to_bool().all()
    assert ops.documents(torch.tensor([0, 1])).to_dense(1, 4).flatten().tolist() == [
        False,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize("name", RULES)
def test_flex_agrees_with_dense(name):
    mask = RULES[name][0]
    flex = mask.to_flex(BATCH, HEADS, 8, LENGTH)
    b, h = mask.axes(torch.device("cpu"))
    q, k = torch.arange(8).view(-1, 1), torch.arange(LENGTH)
    assert torch.equal(
        flex.mask_mod(b, h, q, k).expand(mask.to_dense(8, LENGTH).shape), mask.to_dense(8, LENGTH)
    )
    assert flex.shape[-2:] == (8, LENGTH)


def test_flex_blocks_are_those_of_the_layout():
    mask = (ops.window(100) | ops.sinks(2)) & ops.causal()
    flex = mask.to_flex(1, 1, 512, 512)
    assert torch.equal(flex.to_dense().bool(), mask.to_layout(512, 512, 128).to_bool())


def test_names_read_like_the_algebra():
    assert repr(ops.window(4) | ~ops.sinks(2) & ops.causal()) == (
        "(window(4) | (~sinks(2) & causal()))"
    )


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ops.window(0), ValueError, "window .* at least 1, got 0"),
        (lambda: ops.window(2.5), ValueError, "window .* integer .* got 2.5"),
        (lambda: ops.window(torch.tensor([1, 0])), ValueError, "window per head"),
        (lambda: ops.sinks(torch.ones(2)), ValueError, "sinks per head"),
        (lambda: ops.padding(torch.ones(3)), TypeError, "valid must be a bool .*float32"),
        (lambda: ops.padding(torch.ones(1, 1, 3).bool()), ValueError, r"valid .* \(1, 1, 3\)"),
        (lambda: ops.documents(torch.ones(3)), TypeError, "ids must be an integer .*float32"),
        (lambda: ops.documents(torch.ones(1, 1, 3).long()), ValueError, r"ids .* \(1, 1, 3\)"),
        (lambda: ops.groups(MIXED, LINKS[:2]), ValueError, r"links .* \(2, 3\)"),
        (lambda: ops.groups(MIXED + 1, LINKS), ValueError, r"links .* ids in \[1, 3\]"),
        (lambda: ops.dense(torch.ones(3, 3)), ValueError, "visible must be a bool .*float32"),
        (lambda: ops.dense(torch.ones(3).bool()), ValueError, r"visible .* \(3,\)"),
        (
            lambda: ops.causal().to_dense(2, 3, q_pos=torch.arange(3)),
            ValueError,
            r"q_pos must be \(2,\)",
        ),
        (lambda: ops.causal().to_layout(4, 4, 0), ValueError, "block rows .* at least 1, got 0"),
        (lambda: ops.causal().to_layout(4, 4, (2, 1.5)), TypeError, "block keys .* got 1.5"),
    ],
)
def test_bad_input_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()
