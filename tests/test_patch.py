import pytest
import torch

from attached import left_padded, prompt
from foveate.hf.ablate import head_outputs
from foveate.hf.parts import head_logits, run
from foveate.hf.patch import direct_effects, patch, path_patch
from foveate.hf.watch import watch
from tiny_models import build

ALL = [(layer, head) for layer in range(4) for head in range(4)]


def logit(logits):
    """The logit of token 7."""
    return logits[..., 7]


def test_patching_everything_gives_the_attention_of_the_other_run_and_itself_nothing():
    model, clean, corrupt = build("llama"), prompt(10, 1), prompt(10, 2)
    own, other = head_outputs(model, clean), head_outputs(model, corrupt)
    with torch.no_grad():
        plain = run(model, clean)
        with patch(model, own, ALL):
            torch.testing.assert_close(run(model, clean), plain, rtol=1e-5, atol=1e-5)
        with patch(model, other, ALL), patch(model, other, []):
            got = head_outputs(model, clean)
        assert all(torch.equal(got[i], other[i]) for i in range(4))
        with patch(model, other, [(2, 1)], positions=torch.tensor([6])):
            moved = run(model, clean)
    assert torch.allclose(moved[:, :6], plain[:, :6], atol=1e-5)
    assert not torch.allclose(moved[:, 6], plain[:, 6], atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_direct_effects_are_those_of_whole_patched_runs(family):
    model, (clean, corrupt) = build(family), (prompt(10, 1), prompt(10, 2))
    effects = direct_effects(model, clean, corrupt, logit)
    assert effects.shape == (4, 4, 1)
    own, other = head_outputs(model, clean), head_outputs(model, corrupt)
    for layer, head in ((0, 1), (2, 3), (3, 0)):
        changed = {i: x.clone() for i, x in own.items()}
        changed[layer][:, head, -1] = other[layer][:, head, -1]
        with torch.no_grad(), patch(model, changed, ALL):
            whole = logit(head_logits(model, run(model, clean)[:, -1]))
        with torch.no_grad():
            plain = logit(head_logits(model, run(model, clean)[:, -1]))
        torch.testing.assert_close(effects[layer, head], whole - plain, rtol=1e-3, atol=1e-4)
    same = direct_effects(model, clean, clean, logit)
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-4)


def test_direct_effects_of_a_padded_batch_are_those_of_its_rows():
    model = build("llama")
    rows, others = (prompt(10, 1), prompt(7, 2)), (prompt(10, 3), prompt(7, 4))
    batches = [
        dict(zip(("input_ids", "attention_mask"), left_padded(*x), strict=True))
        for x in (rows, others)
    ]
    together = direct_effects(model, *batches, logit)
    for i in range(2):
        alone = direct_effects(model, rows[i], others[i], logit)
        torch.testing.assert_close(together[..., i : i + 1], alone, rtol=1e-3, atol=1e-4)


def test_path_patching_reaches_the_receivers_alone():
    model, clean, corrupt = build("llama"), prompt(10, 1), prompt(10, 2)
    with torch.no_grad():
        plain = run(model, clean)
    for via in "qkv":
        same = path_patch(model, clean, clean, [(0, 1)], [(2, 2)], via=via)
        torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-5)
        nothing = path_patch(model, clean, corrupt, [(3, 1)], [(2, 2)], via=via)
        torch.testing.assert_close(nothing, plain, rtol=1e-4, atol=1e-5)
        moved = path_patch(model, clean, corrupt, [(0, 1)], [(2, 2)], via=via)
        assert float((moved - plain).abs().max()) > 1e-4


def test_receivers_queries_come_from_a_run_with_the_senders_alone():
    """By hand: freeze all heads but the sender, note the query, put it into a clean run."""
    model, clean, corrupt = build("llama"), prompt(10, 1), prompt(10, 2)
    own, other, held = head_outputs(model, clean), head_outputs(model, corrupt), {}
    mixed = {i: x.clone() for i, x in own.items()}
    mixed[0][:, 1] = other[0][:, 1]

    def note(seen):
        held[seen.layer] = seen.q

    def put(seen):
        if seen.layer == 2:
            q = seen.q.clone()
            q[:, 2] = held[2][:, 2]
            return seen.attend(q, seen.k, seen.v)[0]
        return None

    with torch.no_grad():
        with patch(model, mixed, ALL), watch(model, attention=note):
            run(model, clean)
        with watch(model, attention=put):
            want = run(model, clean)
    got = path_patch(model, clean, corrupt, [(0, 1)], [(2, 2)], via="q")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_bad_input_is_named():
    model = build("llama")
    with pytest.raises(ValueError, match='via must be "q", "k" or "v"'):
        path_patch(model, prompt(4), prompt(4), [(0, 0)], [(1, 0)], via="o")
    source = head_outputs(model, prompt(9))
    with pytest.raises(ValueError, match="same length"), patch(model, source, [(0, 0)]):
        run(model, prompt(4))
    with pytest.raises(TypeError, match="do not simply add"):
        direct_effects(build("gemma2"), prompt(6, 1), prompt(6, 2), logit)
