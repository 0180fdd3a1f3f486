import pytest
import torch
import transformers as hf

from analysis_tools import banded
from attached import left_padded, prompt
from foveate.analysis.base import rank_correlation
from foveate.analysis.vit_importance import (
    VitImportance,
    answers,
    effects,
    hop_distance,
    hop_mass,
    jensen_shannon,
)
from tiny_models import build

COLUMNS = ("loss", "probability", "accuracy", "divergence", "embedding")


def classifier():
    """A random classifier of 4 × 4 patches, images and labels."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "initializer_range": 0.2}
    torch.manual_seed(0)
    config = hf.ViTConfig(**sizes, image_size=16, patch_size=4, num_channels=1, num_labels=5)
    model = hf.ViTForImageClassification(config).eval()
    return model, {"pixel_values": torch.randn(6, 1, 16, 16)}, torch.arange(6) % 5


def test_divergence_is_a_bounded_distance():
    p = torch.randn(5, 8).softmax(-1)
    assert float(jensen_shannon(p, p).abs().max()) == 0
    apart = jensen_shannon(torch.eye(2)[:1], torch.eye(2)[1:])
    assert float(apart) == pytest.approx(0.6931, abs=1e-4)
    assert bool((jensen_shannon(p, p.flip(0)) >= 0).all())


def test_hops_on_a_grid_and_in_a_line():
    distance = hop_distance(1 + 6, (2, 3))
    assert distance[1, 1:].tolist() == [0, 1, 2, 1, 1, 2]
    assert distance[0].tolist() == [7] * 7 and distance[:, 0].tolist() == [7] * 7
    assert hop_distance(4)[1].tolist() == [1, 0, 1, 2]
    p = torch.rand(2, 3, 7, 7).softmax(-1)
    mass = hop_mass(p, distance, 2)
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 3, 7))
    torch.testing.assert_close(mass[..., 1:, 0], p.diagonal(0, 2, 3)[..., 1:])
    torch.testing.assert_close(mass[..., 0, 2], torch.ones(2, 3))
    back = hop_mass(banded(8, 3)[0, 0], hop_distance(8), 5)
    assert back[3:, 3].tolist() == [1.0] * 5


def test_exact_effects_are_those_of_answers_without_the_head():
    model, inputs, labels = classifier()
    record = VitImportance(grid=(4, 4), hops=3)(model, inputs, labels)
    assert all(record[name].shape == (2, 4) for name in COLUMNS)
    with torch.no_grad():
        plain = answers(model, inputs, labels)
        torch.testing.assert_close(plain.logits, model(**inputs).logits)
        dense = model.vit.layers[1].attention.o_proj
        dense.weight[:, 8:16] = 0.0
        want = effects(plain, answers(model, inputs, labels))
    for name in COLUMNS:
        torch.testing.assert_close(record[name][1, 1], want[name], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(record["hops"].sum(-1), torch.ones(2, 4))


def test_a_head_that_gives_nothing_has_no_effect():
    model, ids = build("llama"), prompt(12)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[16:] = 0.0
    record = VitImportance()(model, ids, heads=[(1, 2), (1, 1)])
    for name in COLUMNS:
        assert float(record[name][1, 2].abs()) < 1e-5
    assert float(record["proxy"][1, 2]) == 0 and float(record["proxy"][1, 1]) > 0
    assert float(record["divergence"][1, 1]) > 1e-4
    assert int(record["loss"].isfinite().sum()) == 2


def test_the_slope_ranks_heads_much_as_ablation_does():
    model, ids = build("llama"), prompt(24)
    with torch.no_grad():  # heads of small part, where a slope tells the effect
        for block in model.model.layers:
            block.self_attn.o_proj.weight *= 0.05
    record = VitImportance()(model, ids)
    assert rank_correlation(record["proxy"], record["loss"].abs()) > 0.5


def test_padded_texts_count_by_their_tokens():
    model, rows = build("llama"), (prompt(12, 1), prompt(7, 2))
    ids, mask = left_padded(*rows)
    both = VitImportance()(model, {"input_ids": ids, "attention_mask": mask}, heads=[(2, 3)])
    alone = [VitImportance()(model, row, heads=[(2, 3)]) for row in rows]
    for name, counts in (("loss", (11, 6)), ("divergence", (11, 6)), ("hops", (12, 7))):
        pairs = zip(alone, counts, strict=True)
        want = sum(a[name][2, 3] * n for a, n in pairs) / sum(counts)
        torch.testing.assert_close(both[name][2, 3], want, rtol=1e-3, atol=1e-5)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="hops must be at least 1"):
        VitImportance(hops=0)
    with pytest.raises(ValueError, match=r"height and a width of at least 1, got \(4,\)"):
        VitImportance(grid=(4,))
    with pytest.raises(ValueError, match="5 × 5 has more patches than 17 tokens"):
        hop_distance(17, (5, 5))
    with pytest.raises(IndexError, match=r"no head \(9, 0\)"):
        VitImportance()(build("llama"), prompt(4), heads=[(9, 0)])
