import pytest
import torch

from analysis_tools import attending, banded
from attached import left_padded, prompt
from foveate.analysis.vit_heads import VitHeads, of_rows, similarities, without
from test_watch import eager_maps, tiny_encoder
from tiny_models import build

SIDE = 6
TOKENS = SIDE * SIDE


def shifted(down, right, wrap=False):
    """Every query looks at a fixed offset, at the border as far as there is."""
    at = torch.arange(TOKENS)
    row, column = at // SIDE + down, at % SIDE + right
    if wrap:
        row, column = row % SIDE, column % SIDE
    key = row.clamp(0, SIDE - 1) * SIDE + column.clamp(0, SIDE - 1)
    p = torch.zeros(1, 1, TOKENS, TOKENS)
    p[0, 0, at, key] = 1
    return p


def of(p, special=0, causal=False, **options):
    return VitHeads(special=special, **options).of_layer(attending(p, causal))


def test_looking_at_oneself_has_no_distance_and_no_offset():
    stats = of(shifted(0, 0))
    assert float(stats["distance"]) < 1e-6 and float(stats["offset"]) < 1e-6
    assert float(stats["peak"]) == pytest.approx(1)
    assert not bool(stats["offset_local"])


@pytest.mark.parametrize(("down", "right"), [(0, 1), (-1, 0), (1, -1)])
def test_a_shift_peaks_at_its_offset(down, right):
    stats = of(shifted(down, right))
    assert (int(stats["peak_row"]), int(stats["peak_column"])) == (down, right)
    assert bool(stats["offset_local"])
    inside = 5 / 6  # queries at the border look at themselves
    want = inside if 0 in (down, right) else inside**2
    assert float(stats["peak"]) == pytest.approx(want, abs=1e-5)
    if right == 1:
        assert float(stats["offset"]) * (SIDE - 1) == pytest.approx(0.83, abs=0.01)
        assert float(of(shifted(0, 1, wrap=True))["offset"]) == pytest.approx(0, abs=1e-5)


def test_uniform_attention():
    stats = of(torch.full((1, 1, TOKENS, TOKENS), 1 / TOKENS))
    at = torch.cartesian_prod(*[torch.linspace(0, 1, SIDE)] * 2)
    want = float((at[:, None] - at[None]).norm(dim=-1).mean())
    assert float(stats["distance"]) == pytest.approx(want, rel=1e-4)
    assert float(stats["peak"]) == pytest.approx(1 / TOKENS, rel=1e-4)
    assert float(stats["deviation"]) == pytest.approx(0, abs=1e-5)
    assert float(stats["offset"]) == pytest.approx(0, abs=1e-5)
    assert not bool(stats["offset_local"])


def test_deviations_over_queries_and_over_heads():
    apart = torch.cat([shifted(0, 0), shifted(0, 1)], 1)
    stats = of(apart)
    want = apart.std(2, correction=0).mean((0, 2))
    torch.testing.assert_close(stats["deviation"], want, rtol=1e-4, atol=1e-5)
    want = apart.std(1, correction=0).mean()
    torch.testing.assert_close(stats["head_deviation"], want, rtol=1e-4, atol=1e-5)


def test_special_tokens_are_left_out_and_rows_renormalised():
    p = torch.zeros(1, 1, TOKENS + 1, TOKENS + 1)
    p[..., 0] = 0.6
    p[:, :, 1:, 1:] = 0.4 * shifted(0, 1)
    p[:, :, 0, 5] = 0.4
    stats, plain = of(p, special=1), of(shifted(0, 1))
    for name in ("distance", "peak", "offset", "deviation"):
        torch.testing.assert_close(stats[name], plain[name], rtol=1e-4, atol=1e-5)
    assert float(stats["from_special"][0, 5]) == pytest.approx(0.4, abs=1e-5)
    assert float(stats["from_grid"][0, 0]) == pytest.approx(0.6, abs=1e-5)
    nowhere = without(torch.eye(4)[:1], 1)
    assert nowhere.tolist() == [[0, 0, 0]]


def test_on_a_line_a_previous_token_head_peaks_one_back():
    stats = of(banded(30, 1), causal=True, grid=(1, 30))
    assert (int(stats["peak_row"]), int(stats["peak_column"])) == (0, -1)
    assert float(stats["peak"]) == pytest.approx(29 / 30, abs=1e-4)
    assert bool(stats["offset_local"])


def test_sums_of_parts_are_those_of_the_whole():
    p = torch.rand(2, 3, 12, 12).softmax(-1)
    at = torch.arange(12)
    whole = of_rows(p, at, (3, 4))
    for name in ("distance", "window", "key", "square", "heads"):
        parts = (of_rows(p[:, :, i], i, (3, 4))[name] for i in at.split(5))
        torch.testing.assert_close(sum(parts), whole[name])
    assert float(whole["window"].sum()) == pytest.approx(2 * 3 * 12, rel=1e-5)


def test_statistics_are_those_of_the_models_own_map():
    model, ids = build("llama"), torch.cat([prompt(20), prompt(20, 1)])
    record = VitHeads(grid=(4, 5), special=0)(model, ids)
    at = torch.arange(20)
    place = torch.stack([at // 5 / 3, at % 5 / 4], -1).float()
    distance = (place[:, None] - place[None]).norm(dim=-1)
    for layer, p in enumerate(eager_maps(model, ids)):
        want = {
            "distance": (p * distance).sum(-1).mean((0, 2)),
            "deviation": p.std(2, correction=0).mean((0, 2)),
            "head_deviation": p.std(1, correction=0).mean(),
            "from_grid": p.mean((0, 2)),
        }
        for name, value in want.items():
            torch.testing.assert_close(record[name][layer], value, rtol=1e-3, atol=1e-5, msg=name)


def test_a_random_image_model_has_no_offset_local_heads():
    model, inputs = tiny_encoder("vit")
    record = VitHeads()(model, inputs)
    assert record["from_special"].shape == (2, 4, 17)
    assert not bool(record["offset_local"].any())
    torch.testing.assert_close(record["similarity"].diagonal(), torch.ones(2))
    torch.testing.assert_close(record["similarity"], record["similarity"].T)


def test_alignment_ignores_rotation_and_scale():
    made = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 200, 6, generator=made)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=made))[0]
    found = similarities([x, 3 * x @ turn + 1, y])
    torch.testing.assert_close(found.diagonal(), torch.ones(3))
    assert float(found[0, 1]) == pytest.approx(1, abs=1e-5) and float(found[0, 2]) < 0.2
    torch.testing.assert_close(found, found.T)


def test_bad_input_is_named():
    model = build("llama")
    with pytest.raises(ValueError, match="a square, got 19 tokens beside"):
        VitHeads()(model, prompt(20))
    with pytest.raises(ValueError, match="4 x 4, got 20 tokens"):
        VitHeads(grid=(4, 4), special=0)(model, prompt(20))
    ids, mask = left_padded(prompt(16), prompt(9))
    with pytest.raises(ValueError, match="without padding"):
        VitHeads(special=0)(model, {"input_ids": ids, "attention_mask": mask})
    with pytest.raises(ValueError, match=r"grid must be \(rows, columns\), got \(3,\)"):
        VitHeads(grid=(3,))
    with pytest.raises(ValueError, match=r"sharp must be in \(0, 1\), got 2"):
        VitHeads(sharp=2.0)
    with pytest.raises(ValueError, match="special must be at least 0, got -1"):
        VitHeads(special=-1)
