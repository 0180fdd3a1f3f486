import pytest
import torch
import transformers as hf

from attached import left_padded, prompt
from foveate.analysis.secondary_sinks import SecondarySinks, first_run, risen
from foveate.hf.watch import watch
from tiny_models import SIZES

LAYERS, AT = 9, 7


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = hf.LlamaConfig(**SIZES | {"num_hidden_layers": LAYERS})
        return hf.LlamaForCausalLM(config).eval()


def planted(first, last):
    """In layers first to last the stream at AT is the first token's, elsewhere away from it."""
    other = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def block_in(layer, x):
        x = x.clone()
        x[:, AT] = 2 * x[:, 0] if first <= layer <= last else other
        return x

    return block_in


def test_first_run_of_layers():
    candidate = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 1], [1, 0, 1, 1], [0, 0, 0, 1], [1, 0, 1, 1]])
    onset, lifetime = first_run(candidate.bool())
    assert onset.tolist() == [1, -1, 2, 0]
    assert lifetime.tolist() == [2, 0, 1, 5]


def test_layers_between_the_rise_and_the_fall_of_a_norm():
    norm = torch.tensor([[1.0, 1.0], [2.0, 1.5], [90.0, 2.0], [91.0, 50.0], [5.0, 51.0]])
    assert risen(norm).int().T.tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_a_planted_sink_is_found_with_its_onset_and_lifetime(model):
    with watch(model, block_in=planted(2, 6)):
        record = SecondarySinks()(model, prompt(20))
        later = SecondarySinks(noise=5)(model, prompt(20))
        shorter = SecondarySinks(longest=5)(model, prompt(20))
    assert record["onset"][0, AT] == 2 and record["lifetime"][0, AT] == 5
    assert record["secondary"].nonzero().tolist() == [[0, AT]]
    assert not bool(later["secondary"].any()) and not bool(shorter["secondary"].any())
    want = record["importance"][2:7, 0, AT].mean()
    torch.testing.assert_close(record["strength"][0, AT], want)
    torch.testing.assert_close(record["cosine_rest"][2:7, 0, AT], torch.ones(5))
    assert bool(record["formed"][0, 1:AT].isnan().all())


def test_a_token_that_stays_a_sink_is_no_secondary_one(model):
    with watch(model, block_in=planted(1, LAYERS)):
        record = SecondarySinks()(model, prompt(20))
    assert record["lifetime"][0, AT] == LAYERS - 1 == record["lifetime"][0, 0]
    assert not bool(record["secondary"].any())


def test_formation_is_what_the_feed_forward_part_gave(model):
    held = {}

    def mlp_out(layer, x):
        if layer != 1:
            return None
        held["mlp"] = x.clone()
        held["mlp"][:, AT] = 1000 * x[:, 0]
        held["mlp"][:, 0] = 1000 * x[:, 0]
        return held["mlp"]

    with watch(model, mlp_out=mlp_out):
        record = SecondarySinks()(model, prompt(20))
    assert record["onset"][0, AT] == 2
    assert float(record["formed"][0, AT]) == pytest.approx(1, abs=1e-3)
    assert float(record["formed_norm"][0, AT]) == pytest.approx(float(held["mlp"][0, AT].norm()))


def test_the_first_token_is_alike_to_itself_and_its_repeats_do_not_count_as_embeddings(model):
    ids = prompt(30)
    ids[0, 20] = ids[0, 0]
    record = SecondarySinks()(model, ids)
    assert float(record["cosine"][:, 0, 0].min()) == pytest.approx(1, abs=1e-5)
    assert float(record["cosine"][0, 0, 20]) == pytest.approx(1, abs=1e-5)
    assert record["onset"][0, 0] == 1 and record["onset"][0, 20] != 0


def test_a_random_model_has_next_to_none(model):
    record = SecondarySinks()(model, torch.cat([prompt(60, i) for i in range(4)]))
    assert float(record["secondary"].float().mean()) < 0.01


def test_outside_the_rise_of_the_norm_nothing_counts(model):
    def rising(layer, x):
        x = planted(2, 6)(layer, x)
        x[:, 0] *= {5: 100.0, 8: 0.001}.get(layer, 1.0)
        return x

    with watch(model, block_in=rising):
        record = SecondarySinks(within_norm=True)(model, prompt(20))
    assert record["onset"][0, AT] == 5 and record["lifetime"][0, AT] == 2


def test_padded_texts_are_measured_as_they_are_alone(model):
    rows = prompt(24, 1), prompt(15, 2)
    ids, mask = left_padded(*rows)
    both = SecondarySinks(cosine=0.3)(model, {"input_ids": ids, "attention_mask": mask})
    for i, row in enumerate(rows):
        alone, n = SecondarySinks(cosine=0.3)(model, row), row.shape[1]
        for name in ("cosine", "cosine_rest", "importance", "strength", "formed", "formed_norm"):
            torch.testing.assert_close(
                both[name][..., i, :n],
                alone[name][..., 0, :],
                rtol=1e-4,
                atol=1e-5,
                equal_nan=True,
                msg=name,
            )
        assert torch.equal(both["lifetime"][i, :n], alone["lifetime"][0])
    assert not bool(both["secondary"][1, 15:].any()) and bool((both["onset"][1, 15:] == -1).all())


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"cosine must be in \(0, 1\), got 1"):
        SecondarySinks(cosine=1.0)
    with pytest.raises(ValueError, match="noise must be at least 0, got -1"):
        SecondarySinks(noise=-1)
    with pytest.raises(ValueError, match="longest must be at least 1, got 0"):
        SecondarySinks(longest=0)
