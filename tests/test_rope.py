import pytest
import torch

from foveate import ops
from foveate.ops.reference import rope_reference
from ops_tools import assert_same


def tables(length, width, interleaved=False, factor=1.0, batch=None):
    """cos and sin of RoPE with base 100; `factor` scales both as long-context variants do."""
    angle = torch.arange(length)[:, None] * 100.0 ** (-torch.arange(0, width, 2) / width)
    angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
    cos, sin = angle.cos() * factor, angle.sin() * factor
    return (cos, sin) if batch is None else (cos.expand(batch, -1, -1), sin.expand(batch, -1, -1))


def heads(dtype=torch.float32):
    make = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 7, 8, generator=make, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("batch", [None, 1, 2])
@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rope_is_a_product_of_complex_numbers(dtype, interleaved, width, batch):
    x = heads(dtype)
    got = ops.rope(x, *tables(7, width, interleaved, batch=batch), interleaved=interleaved)
    want = rope_reference(x, *tables(7, width, interleaved), interleaved=interleaved)
    assert got.dtype == dtype
    loose = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    assert_same(got, want, loose)
    assert torch.equal(got[..., width:], x[..., width:])


@pytest.mark.parametrize("factor", [1.0, 1.3])
@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize("interleaved", [False, True])
def test_unrope_undoes_rope(interleaved, width, factor):
    x, (cos, sin) = heads(), tables(7, width, interleaved, factor)
    back = ops.unrope(
        ops.rope(x, cos, sin, interleaved=interleaved), cos, sin, interleaved=interleaved
    )
    assert_same(back, x)


def test_logits_depend_on_distance_alone():
    q, k = heads()[:, :, :1].expand(-1, -1, 7, -1), heads()[:, :, 1:2].expand(-1, -1, 7, -1)
    cos, sin = tables(7, 8)
    logits = ops.rope(q, cos, sin) @ ops.rope(k, cos, sin).mT
    for shift in range(-6, 7):
        line = logits.diagonal(shift, -2, -1)
        assert_same(line, line[..., :1].expand_as(line))


@pytest.mark.parametrize(
    ("cos", "sin", "words"),
    [
        (torch.ones(7, 10), torch.ones(7, 10), r"even width up to 8, got \(7, 10\)"),
        (torch.ones(7, 3), torch.ones(7, 3), "even width up to 8"),
        (torch.ones(7, 4), torch.ones(7, 2), r"cos and sin must agree .* \(7, 2\)"),
        (torch.ones(6, 4), torch.ones(6, 4), "tables hold 6 positions, x has 7"),
    ],
)
def test_bad_tables_are_named(cos, sin, words):
    for turn in (ops.rope, ops.unrope):
        with pytest.raises(ValueError, match=words):
            turn(heads(), cos, sin)
