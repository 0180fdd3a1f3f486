import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import ops
from ops_tools import largest_output

SIZES = [((24, 24), (4, 4)), ((7, 24), (4, 4)), ((1, 24), (8, 8)), ((10, 23), (4, 6)), ((9, 5), 4)]


def pairs_of_blocks(lengths, block, causal):
    """Visible pairs per block by visiting every pair."""
    (lq, lk), (bq, bk) = lengths, (block, block) if isinstance(block, int) else block
    start = max(lk - lq, 0)
    first = start // bq
    out = torch.zeros(-(-(start + lq) // bq) - first, -(-lk // bk), dtype=torch.int64)
    for q in range(start, start + lq):
        for k in range(q + 1 if causal else lk):
            if k < lk:
                out[q // bq - first, k // bk] += 1
    return out


def block_maps():
    grid = st.sampled_from([s for s in SIZES if isinstance(s[1], tuple)])
    seeds = st.integers(0, 10**6)
    heads = st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 4)])
    return st.tuples(grid, heads, seeds, st.sampled_from([0.0, 0.1, 0.5, 1.0]))


def drawn(case):
    (lengths, block), heads, seed, share = case
    shape = (*heads, *pairs_of_blocks(lengths, block, False).shape)
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    return chosen, lengths, block


@settings(max_examples=60, deadline=None)
@given(block_maps())
def test_map_to_layout_and_back(case):
    chosen, lengths, block = drawn(case)
    layout = ops.from_map(chosen, block, lengths)
    assert torch.equal(layout.to_bool(), chosen)
    assert torch.equal(layout.counts, chosen.sum(-1).int())
    assert layout.indices.dtype == layout.counts.dtype == torch.int32
    rising = layout.indices.diff(dim=-1) > 0
    assert (rising | ~layout.filled[..., 1:]).all()


@settings(max_examples=60, deadline=None)
@given(block_maps(), st.booleans())
def test_density_is_the_share_of_visible_pairs_read(case, causal):
    chosen, lengths, block = drawn(case)
    pairs = pairs_of_blocks(lengths, block, causal)
    want = (chosen * pairs).sum() / (pairs.sum() * chosen.shape[0] * chosen.shape[1])
    got = ops.from_map(chosen, block, lengths).density(causal)
    assert got == pytest.approx(want.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("lengths", "block", "causal"),
    [
        (*size, causal)
        for size in SIZES
        for causal in (True, False)
        if not causal or size != SIZES[4]
    ],
)
def test_visible_pairs_are_counted_right(lengths, block, causal):
    block = (block, block) if isinstance(block, int) else block
    want = pairs_of_blocks(lengths, block, causal)
    assert torch.equal(ops.visible_pairs(lengths, block, causal), want)
    if causal:
        assert torch.equal(ops.causal_map(lengths, block), want > 0)


@pytest.mark.parametrize(("lengths", "block"), SIZES)
def test_full_layout_reads_everything_visible(lengths, block):
    assert ops.full_layout(*lengths, block, is_causal=False).to_bool().all()
    if lengths[0] <= lengths[1]:
        layout = ops.full_layout(*lengths, block)
        assert torch.equal(layout.to_bool()[0, 0], ops.causal_map(lengths, layout.block))
        assert layout.density() == 1.0


def test_density_of_token_lists_needs_no_square_tensor():
    lists = torch.arange(8, dtype=torch.int32).expand(1, 1, 4096, 8)
    counts = torch.full((1, 1, 4096), 8, dtype=torch.int32)
    layout = ops.BlockLayout(lists, counts, (1, 1), (4096, 4096))
    assert largest_output(lambda: layout.density()) < 4096 * 16
    assert layout.density() == pytest.approx((4096 * 8 - 28) / (4096 * 4097 / 2))


def test_decode_step_sees_the_blocks_of_the_prefill_row():
    mask = (ops.window(13) | ops.sinks(3)) & ops.causal()
    prefill = mask.to_layout(41, 41, 8).to_bool()
    for length in (9, 16, 17, 41):
        step = mask.to_layout(1, length, (1, 8)).to_bool()[0, 0, 0]
        rows = mask.to_dense(41, 41)[0, 0, length - 1]
        want = torch.nn.functional.pad(rows, (0, 7)).view(6, 8).any(-1)[: step.numel()]
        assert torch.equal(step, want)
        assert (step <= prefill[0, 0, (length - 1) // 8, : step.numel()]).all()


def test_a_fine_mask_is_classified_without_a_square_tensor():
    mask = ops.groups(torch.arange(4096) % 3) & ops.causal()
    assert largest_output(lambda: mask.to_layout(4096, 4096, 64)) < 4096 * 4096 // 4


def test_flex_form_reads_the_same_blocks():
    chosen = torch.rand(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    flex = ops.from_map(chosen, 8, (24, 24)).to_flex()
    assert torch.equal(flex.to_dense().bool(), chosen)


def test_flex_form_refuses_what_flex_cannot_say():
    with pytest.raises(ValueError, match="square blocks and aligned queries"):
        ops.full_layout(24, 24, (4, 8)).to_flex()
    with pytest.raises(ValueError, match="first block with 1 missing rows"):
        ops.full_layout(23, 24, 8).to_flex()


def layout(**changes):
    parts = {
        "indices": torch.zeros(1, 1, 3, 2, dtype=torch.int32),
        "counts": torch.ones(1, 1, 3, dtype=torch.int32),
        "block": (8, 8),
        "lengths": (24, 24),
    }
    return ops.BlockLayout(**parts | changes)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: layout(lengths=(32, 32)), r"indices must be \(batch, heads, 4 query blocks, m\)"),
        (lambda: layout(counts=torch.ones(3)), r"counts must be \(1, 1, 3\), got \(3,\)"),
        (
            lambda: layout(counts=torch.full((1, 1, 3), 3)),
            r"counts must lie in \[0, 3\), got \[3, 3\]",
        ),
        (lambda: layout(indices=torch.full((1, 1, 3, 2), 3)), r"indices must lie in \[0, 3\)"),
        (lambda: layout(partial=torch.ones(3).bool()), r"partial must be \(1, 1, 3, 2\)"),
        (
            lambda: ops.from_map(torch.ones(1, 1, 2, 3).bool(), 8, (24, 24)),
            r"chosen must be a bool block map \(batch, heads, 3, 3\), got .*\(1, 1, 2, 3\)",
        ),
        (lambda: ops.from_map(torch.ones(3, 3).bool(), 8, (24, 24)), r"chosen .* got .*\(3, 3\)"),
        (lambda: ops.from_map(torch.ones(1, 1, 3, 3), 8, (24, 24)), "chosen .* torch.float32"),
        (
            lambda: ops.from_map(
                torch.ones(1, 2, 3, 3).bool(), 8, (24, 24), torch.ones(3, 3).bool()
            ),
            r"partial must be \(1, 2, 3, 3\) like chosen, got \(3, 3\)",
        ),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
