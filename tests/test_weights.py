import pytest
import torch

from attached import prompt
from foveate.hf.parts import Parts
from foveate.hf.watch import watch
from foveate.hf.weights import only_heads, projection
from test_watch import tiny_encoder
from tiny_models import build


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2"])
def test_slices_make_the_values_that_heads_read(family):
    model, ids, held = build(family), prompt(7), {}
    attention = Parts(model).attention(1)
    hook = attention.register_forward_hook(
        lambda m, args, kwargs, out: held.update(x=(args or [kwargs.get("hidden_states")])[0]),
        with_kwargs=True,
    )
    with torch.no_grad(), watch(model, attention=lambda seen: held.update({seen.layer: seen})):
        model(ids)
    hook.remove()
    where = projection(Parts(model), 1, "v")
    bias = where.module.bias
    made = held["x"] @ where.features(where.module.weight).T
    made = made if bias is None else made + bias[where.start : where.stop]
    heads = made.unflatten(-1, (-1, 16)).transpose(1, 2)
    torch.testing.assert_close(heads, held[1].v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_training_changes_the_slices_of_chosen_heads_alone(family):
    model, ids = build(family), prompt(9)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with only_heads(model, [(1, 3), (2, 0)], mlps=[3]) as trained:
        optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(p.requires_grad for p in model.parameters())
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    layers = {part for name in changed for part in name.split(".") if part.isdigit()}
    assert layers == {"1", "2", "3"} and not any("norm" in n or "ln" in n for n in changed)
    parts, (layer, head) = Parts(model), (1, 3)
    for role in "qkvo":
        if role == "o":
            module = parts.output(layer)
            features = module.weight.T if isinstance(module, torch.nn.Linear) else module.weight
        else:
            where = projection(parts, layer, role)
            module, features = where.module, where.features(where.module.weight)
        name = next(n for n, p in model.named_parameters() if p is module.weight)
        old = before[name]
        if role == "o":
            old = old.T if isinstance(module, torch.nn.Linear) else old
        else:
            old = where.features(old)
        moved = (features != old).any(1).view(-1, 16).any(1)
        own = head // 2 if role in "kv" and family != "gpt2" else head
        assert moved.nonzero()[:, 0].tolist() == [own], role


def test_bad_input_is_named():
    model = build("llama")
    with pytest.raises(IndexError, match=r"no head \(1, 9\)"), only_heads(model, [(1, 9)]):
        pass
    with pytest.raises(IndexError, match="no MLP of layer 4"), only_heads(model, [], mlps=[4]):
        pass
    encoder, _ = tiny_encoder("bert")
    assert projection(Parts(encoder), 0, "q").stop == 32
    del model.model.layers[0].self_attn.q_proj
    with pytest.raises(TypeError, match="no matrix that makes q was found in block 0"):
        projection(Parts(model), 0, "q")
