import json

import pytest
import torch
from torch import nn

from foveate import ops
from foveate.files import write_tensors
from foveate.nn import Transformer
from foveate.nn._recurrent import state_bytes
from foveate.nn._stack import Stack, pattern_items

HYBRID = "gated_deltanet:expand_k=1,expand_v=1*2, softmax_attention:window=8, dense, linattn"


def build(pattern=HYBRID, seed=0, **options):
    torch.manual_seed(seed)
    return Transformer(50, 32, pattern, **options).eval()


def ids(batch=3, length=20, seed=0):
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("pattern", "items"),
    [
        ("gated_deltanet*3, dense", ["gated_deltanet"] * 3 + ["dense"]),
        ("gla", ["gla"]),
        ("a:x=1,y=2*2,b", ["a:x=1,y=2", "a:x=1,y=2", "b"]),
        ("a : x=1 , y = 2 , mlp ", ["a : x=1,y = 2", "mlp"]),
    ],
)
def test_patterns_are_read(pattern, items):
    assert pattern_items(pattern) == items


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("", "at least one layer"),
        (" , ", "at least one layer"),
        ("linattn*0", "count 1 or more"),
        ("linattn*x", "count 1 or more"),
        ("linatn", "did you mean 'linattn'"),
        ("linattn:width=3", "no option 'width'"),
        ("window", "no layer but a mechanism of kind 'cache'"),
    ],
)
def test_patterns_that_cannot_be_made_are_refused(pattern, said):
    with pytest.raises(ValueError, match=said):
        build(pattern)


def test_a_pattern_is_repeated_to_the_number_of_layers():
    assert Stack(32, "linattn*2, dense", layers=5).items == [
        "linattn", "linattn", "dense", "linattn", "linattn",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="layers must be at least 1"):
        Stack(32, "linattn", layers=0)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"conv": 3}, {"positions": 24, "theta": None}, {"mlp": 0}])
def test_mixed_states_go_on_where_they_ended(options):
    model, x = build(**options), ids()
    want = model(x)
    for cut in (1, 7, 19):
        y, state = model(x[:, :cut], return_state=True)
        z, state = model(x[:, cut:], state=state, return_state=True)
        torch.testing.assert_close(torch.cat((y, z), 1), want, atol=2e-5, rtol=1e-5)
        assert state.pos == 20


@torch.no_grad()
def test_tokens_after_do_not_change_those_before():
    model, x = build(conv=3), ids()
    late = x.clone()
    late[:, 11:] = (late[:, 11:] + 1) % 50
    torch.testing.assert_close(model(late)[:, :11], model(x)[:, :11], atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_give_what_they_give_alone(side):
    model, x = build(conv=3), ids(1, 14)
    valid = torch.arange(20) >= 6 if side == "left" else torch.arange(20) < 14
    padded = torch.zeros(1, 20, dtype=torch.long)
    padded[:, valid] = x
    got = model(padded, mask=ops.padding(valid))[:, valid]
    torch.testing.assert_close(got, model(x), atol=2e-5, rtol=1e-5)


def test_generation_from_a_padded_batch_is_that_of_each_row():
    model, x = build(conv=3), ids()
    valid = torch.ones(3, 20, dtype=torch.bool)
    valid[0, :5], valid[1, :19] = False, False
    got = model.generate(x, 8, valid=valid)
    assert got.shape == (3, 28) and torch.equal(got[:, :20], x)
    for row in range(3):
        own = x[row : row + 1, valid[row]]
        assert torch.equal(got[row, 20:], model.generate(own, 8)[0, own.shape[1] :])


def test_drawn_tokens_follow_the_seed():
    model, x = build(), ids(2, 5)
    one, two = (model.generate(x, 12, temperature=5.0, seed=s) for s in (1, 1))
    other = model.generate(x, 12, temperature=5.0, seed=2)
    assert torch.equal(one, two) and not torch.equal(one, other)
    cold = model.generate(x, 12, temperature=1e-6, seed=1)
    assert torch.equal(cold, model.generate(x, 12))


@torch.no_grad()
@pytest.mark.parametrize("tie", [True, False])
def test_a_saved_model_is_the_same_model(tmp_path, tie):
    model, x = build(tie=tie, conv=2, positions=30), ids()
    model.save(tmp_path / "m.safetensors")
    again = Transformer.load(tmp_path / "m.safetensors").eval()
    assert torch.equal(again(x), model(x)) and again.options == model.options
    assert (again.head.weight is again.embed.weight) == tie
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_files_that_are_no_model_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match="no safetensors file"):
        Transformer.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        Transformer.load(path)
    write_tensors(path, {"x": torch.zeros(1)}, {"format": "other", "options": json.dumps({})})
    with pytest.raises(ValueError, match=r"was not written by Transformer\.save"):
        Transformer.load(path)
    with pytest.raises(OSError, match="cannot write"):
        build("linattn").save(tmp_path / "missing" / "m.safetensors")


def test_an_encoder_sees_both_sides_and_does_not_generate():
    model, x = build("linattn, dense", causal=False), ids()
    late = x.clone()
    late[:, -1] = (late[:, -1] + 1) % 50
    assert (model(late)[:, 0] != model(x)[:, 0]).any()
    with pytest.raises(ValueError, match="an encoder does not generate"):
        model.generate(x, 1)
    with pytest.raises(ValueError, match="gated_deltanet does not do noncausal self-attention"):
        build(causal=False)(x)


def test_layers_learn_and_share_one_embedding():
    model, x = build(conv=3), ids()
    model.train()(x).logsumexp(-1).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert sum(p is model.embed.weight for p in model.parameters()) == 1
    assert not any("head" in name for name, _ in model.named_parameters())


@torch.no_grad()
def test_the_state_is_that_of_its_layers():
    model = build("linattn, softmax_attention:window=8")
    _, state = model(ids(1, 20), return_state=True)
    per_head = 8 * 8 + 8
    assert state_bytes(state) == 4 * (4 * per_head + 2 * 4 * 7 * 8)


def test_bad_input_is_refused():
    model, x = build("linattn", positions=24), ids()
    for wrong, said in (
        (x.float(), "must be \\(batch, length\\) integers"),
        (x[0], "must be \\(batch, length\\) integers"),
        (x + 40, "ids must be in \\[0, 50\\)"),
        (ids(1, 25), "has 24 positions, got 25 tokens"),
    ):
        with pytest.raises(ValueError, match=said):
            model(wrong)
    _, state = model(x, return_state=True)
    with pytest.raises(ValueError, match="has 24 positions, got 40 tokens"):
        model(x, state=state, return_state=True)
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        model.generate(x, 0)
    with pytest.raises(ValueError, match="padded on the left"):
        model.generate(x, 1, valid=torch.arange(20).expand(3, -1) < 15)
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        model.generate(x, 1, temperature=-1.0)
    with pytest.raises(ValueError, match="must be a multiple of heads, got 5 heads"):
        build("linattn", heads=5)
    with pytest.raises(ValueError, match="state of 1 layers for a stack of 2"):
        build("linattn*2", positions=24)(ids(3, 2), state=state, return_state=True)


def test_layers_of_a_class_are_tied_together():
    calls = []

    class Tied(nn.Linear):
        @classmethod
        def tie(cls, layers):
            calls.append(len(layers))

    from foveate.nn._stack import _tie

    _tie([Tied(2, 2), nn.Linear(2, 2), None, Tied(2, 2)])
    assert calls == [2]
