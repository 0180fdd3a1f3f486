import pytest
import torch

from attached import left_padded, prompt
from foveate.analysis.attention_lens import AttentionLens, Lens
from foveate.hf.parts import Parts
from foveate.hf.watch import watch
from tiny_models import build


def lens(family="llama", layer=2):
    return Lens(build(family), layer, 3, torch.Generator().manual_seed(0))


def trained(**options):
    torch.manual_seed(0)
    return AttentionLens(layer=2, rank=4, lr=1e-2, steps=60, batch=16, **options)(
        build("llama"), torch.cat([prompt(64, i) for i in range(4)])
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_untrained_it_is_the_unembedding_of_what_attention_adds(family):
    own, ids = lens(family), prompt(12)
    added = []

    def attention_out(layer, x):
        if layer == 2:
            added.append(x[0])

    with torch.no_grad(), watch(own.parts.model, attention_out=attention_out):
        own.parts.model(ids)
    _, bias = own.parts.projection(2)
    want = (added[0] - (0 if bias is None else bias)) @ own.unembedding.T
    got = own(own.contributions(own.collect(ids)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_heads_sum_to_the_whole_and_nothing_gives_a_heads_bias():
    own = lens()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    made = own.contributions(own.collect(prompt(7)))
    torch.testing.assert_close(own.by_head(made).sum(0), own(made), rtol=1e-4, atol=1e-3)
    made[1] = 0
    torch.testing.assert_close(own.by_head(made)[1], own.bias[1].expand(7, -1))


def test_divergence_is_that_of_the_two_distributions():
    own, ids = lens(), prompt(9)
    positions = own.collect(ids)
    with torch.no_grad():
        p = own.parts.model(ids).logits[0].softmax(-1)
        q = own(own.contributions(positions)).softmax(-1)
        want = (p * (p / q).log()).sum(-1).mean()
        torch.testing.assert_close(own.divergence(positions), want, rtol=1e-4, atol=1e-4)


def test_padding_is_not_collected():
    own, rows = lens(), (prompt(10, 1), prompt(6, 2))
    ids, mask = left_padded(*rows)
    both = own.collect({"input_ids": ids, "attention_mask": mask})
    alone = [own.collect(row) for row in rows]
    for name in ("outputs", "hidden"):
        want = torch.cat([getattr(x, name) for x in alone])
        torch.testing.assert_close(getattr(both, name), want, rtol=1e-4, atol=1e-4)


def test_training_lowers_the_loss_of_what_was_held_out_and_keeps_the_best():
    own = trained()
    assert min(own.losses) < 0.9 * own.losses[0]
    positions = own.collect(torch.cat([prompt(64, i) for i in range(4)]))
    held = positions.at(torch.arange(224, 256))
    assert float(own.divergence(held).detach()) == pytest.approx(min(own.losses), rel=1e-5)
    assert all(p.grad is None for p in own.parts.model.parameters())
    assert not any("parts" in name for name, _ in own.named_parameters())


def test_the_same_seed_trains_the_same_lens():
    assert trained().losses == trained().losses != trained(seed=1).losses


def test_negative_layers_count_from_the_last():
    model = build("llama")
    options = {"rank": 1, "steps": 1, "batch": 4}
    assert AttentionLens(**options)(model, prompt(16)).layer == Parts(model).layers - 1


def test_bad_input_is_named():
    with pytest.raises(IndexError, match=r"layer must be in \[-4, 4\), got 4"):
        AttentionLens(layer=4)(build("llama"), prompt(64))
    with pytest.raises(ValueError, match="got 20 positions for batches of 32"):
        AttentionLens()(build("llama"), prompt(20))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        AttentionLens(rank=0)
    with pytest.raises(ValueError, match="lr must be above 0, got 0"):
        AttentionLens(lr=0.0)
