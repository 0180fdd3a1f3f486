import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import foveate
from attached import check_padded_row_equals_row_alone, generate, prompt, step_logits
from foveate import ops
from foveate.attention._trained import ModelShape, write_trained
from foveate.attention.base import Call
from foveate.attention.sparse.flux import Router, _summary, temperature
from foveate.bench.train import train
from sparse_checks import causal_keep, qkv, softmax_over

SHAPE = ModelShape(layers=2, q_heads=4, kv_heads=2, dim=16)
SMALL = {"block": 8, "sinks": 2, "window": 12, "pool": 8}


def router_file(path, biases=((5.0, 0.0), (0.0, 5.0))):
    """Routers that always say what their last biases do."""
    made = nn.ModuleList(Router(16) for _ in biases)
    with torch.no_grad():
        for router, bias in zip(made, biases, strict=True):
            router.decide[-1].bias.copy_(torch.tensor(bias))
    shape = SHAPE._replace(layers=len(biases))
    write_trained(path, foveate.create("flux", **SMALL), shape, made.state_dict())
    return foveate.create("flux", **SMALL, router=str(path))


def streaming(q, k, v, sinks=2, window=12):
    far = (
        torch.arange(k.shape[2]) + window
        <= (torch.arange(q.shape[2]) + k.shape[2] - q.shape[2])[:, None]
    )
    keep = ~far | (torch.arange(k.shape[2]) < sinks)
    return softmax_over(q, k, v, keep & causal_keep(q.shape[2], k.shape[2]))


def test_routers_start_with_full_attention_everywhere(tiny_llama, tmp_path):
    ids = prompt(60)
    with torch.no_grad():
        want = tiny_llama(ids).logits
        with foveate.attach(tiny_llama, prefill=foveate.create("flux", **SMALL)):
            torch.testing.assert_close(tiny_llama(ids).logits, want, rtol=1e-5, atol=1e-5)
        learner = foveate.create("flux", **SMALL).learner(SHAPE)
        write_trained(tmp_path / "r", foveate.create("flux", **SMALL), SHAPE, learner.weights())
        made = foveate.create("flux", **SMALL, router=str(tmp_path / "r"))
        with foveate.attach(tiny_llama, prefill=made):
            torch.testing.assert_close(tiny_llama(ids).logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lq", [60, 23])
def test_each_layer_is_what_its_router_says(tmp_path, lq):
    made, (q, k, v) = router_file(tmp_path / "r"), qkv(60, lq)
    sparse = made(q, k, v, call=Call(layer=0, layers=2))
    torch.testing.assert_close(sparse, streaming(q, k, v), atol=1e-5, rtol=1e-4)
    full = made(q, k, v, call=Call(layer=1, layers=2))
    torch.testing.assert_close(full, ops.attend(q, k, v, causal=True), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [10, 16, 40])
def test_the_router_reads_the_ends_of_the_prompt_before_rotation(length):
    q, k, _ = qkv(length, batch=2)

    def tables(positions):
        turns = positions[..., None] * 10.0 ** (-torch.arange(8) / 8)
        return torch.cat((turns, turns), -1).cos(), torch.cat((turns, turns), -1).sin()

    turned = ops.rope(q, *tables(torch.arange(length)[None]))
    ends = [i for i in range(length) if i < 8 or i >= length - 8]
    want = torch.stack([q[:, :, i].mean(1) for i in ends]).mean(0)
    got = _summary(turned, k, Call(rope=tables), 8)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_rows_of_a_batch_are_decided_apart(tmp_path):
    """A router that looks at one direction of the mean query."""
    made = nn.ModuleList([Router(16)])
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
        first, last = made[0].read[0], made[0].read[2]
        first.weight[0, 0], first.bias[0], last.weight[0, 0] = 1.0, 5.0, 1.0
        for i in (0, 2, 4):
            made[0].decide[i].weight[0, 0] = 1.0
        made[0].decide[4].bias.copy_(torch.tensor([0.0, 5.0]))
    write_trained(
        tmp_path / "r", foveate.create("flux", **SMALL), SHAPE._replace(layers=1), made.state_dict()
    )
    attn = foveate.create("flux", **SMALL, router=str(tmp_path / "r"))
    q, k, v = qkv(60, batch=2)
    q[0, ..., 0] += 4
    q[1, ..., 0] -= 4
    out = attn(q, k, v, call=Call())
    torch.testing.assert_close(out[:1], streaming(q, k, v)[:1], atol=1e-5, rtol=1e-4)
    dense = ops.attend(q, k, v, causal=True)
    torch.testing.assert_close(out[1:], dense[1:], atol=1e-5, rtol=1e-4)


def test_decoding_keeps_the_prompts_decision(tiny_llama, tmp_path, monkeypatch):
    made, asked = router_file(tmp_path / "r"), []
    real = Router.forward
    monkeypatch.setattr(Router, "forward", lambda self, x: asked.append(1) or real(self, x))
    slots = {"prefill": made, "decode": made}
    got = step_logits(tiny_llama, prompt(40), 28, **slots)
    assert len(asked) == 2
    plan = ["sink_window:sinks=2,window=12,block=8", "dense"]
    want = step_logits(tiny_llama, prompt(40), 28, prefill=plan, decode=plan)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    check_padded_row_equals_row_alone(tiny_llama, **slots)


def test_a_prompt_read_without_it_counts_as_full(tiny_llama, tmp_path):
    made = router_file(tmp_path / "r", biases=((5.0, 0.0), (5.0, 0.0)))
    want = generate(tiny_llama, prompt(40))
    assert torch.equal(generate(tiny_llama, prompt(40), decode=made), want)


def steady(length, rows=4):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(0))


def test_training_moves_routers_only_and_reaches_the_target(tiny_llama, tmp_path):
    before = {n: p.clone() for n, p in tiny_llama.named_parameters()}
    made = foveate.create("flux", **SMALL, targets=(1.0,))
    result = train(tiny_llama, made, [steady(40)], steps=60, lr=1e-2)
    for name, p in tiny_llama.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None
    assert bool((result.learner.prices > 0.25).all())
    result.write(tmp_path / "r")
    routed, records = foveate.create("flux", **SMALL, router=str(tmp_path / "r")), []
    with torch.no_grad(), foveate.attach(tiny_llama, prefill=routed) as attached:
        attached.record = records.append
        tiny_llama(steady(40))
    assert len(records) == 8 and all(r.retained_mass < 0.999 for r in records)


def test_prices_never_fall_and_rise_only_for_the_task_that_misses(tiny_llama):
    made, seen = foveate.create("flux", **SMALL, targets=(1.0, 0.0)), []
    learner = made.learner(SHAPE)
    optimizer = torch.optim.AdamW([learner.prices], lr=1e-2, weight_decay=0.0)
    for _ in range(5):
        learner.said = [torch.ones(1), torch.ones(1)]
        optimizer.zero_grad()
        learner.loss(0.0, torch.zeros(()), 0).backward()
        optimizer.step()
        seen.append(learner.prices.detach().clone())
    rows = torch.stack(seen)
    assert (rows[:, 0].diff(dim=0) > 0).all() and (rows[:, 1] == 0.25).all()


def test_the_loss_is_the_models_and_the_price_of_the_gap():
    learner = foveate.create("flux", targets=(0.75, 0.5)).learner(SHAPE)
    learner.said = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])]
    gaps = torch.tensor([0.0 - 0.5, 0.5 - 0.5])
    want = 2.0 + 0.25 * (gaps.abs() + gaps.square()).mean()
    torch.testing.assert_close(learner.loss(0.0, torch.tensor(2.0), 1), want)
    assert not learner.said


def test_the_noisy_choice_is_one_of_both_and_has_a_gradient():
    learner = foveate.create("flux", **SMALL).learner(SHAPE)
    q, k, v = qkv(60, batch=16)
    with torch.no_grad():
        learner.routers[0].decide[-1].bias.zero_()
    out = learner.attend(q, k, v, Call(layers=2))
    dense, sparse = ops.attend(q, k, v, causal=True), streaming(q, k, v)
    said = learner.said[0].detach()
    assert set(said.round(decimals=5).tolist()) == {0.0, 1.0}
    want = torch.where(said.view(-1, 1, 1, 1) > 0.5, dense, sparse)
    torch.testing.assert_close(out.detach(), want, atol=1e-5, rtol=1e-4)
    out.square().sum().backward()
    assert float(learner.routers[0].decide[-1].bias.grad.abs().sum()) > 0


def test_temperature_falls_from_a_half_more_to_1():
    assert [round(temperature(x), 3) for x in (0, 0.3, 0.6, 1)] == [1.5, 1.25, 1.0, 1.0]


def test_refuses_files_and_options_that_do_not_fit(tmp_path):
    made = router_file(tmp_path / "r")
    with pytest.raises(ValueError, match=r"pool=8.*pool=100"):
        foveate.create("flux", router=str(tmp_path / "r"))
    q, k, v = qkv(30)
    with pytest.raises(ValueError, match=r"2 layers.*3 layers"):
        made(q, k, v, call=Call(layers=3))
    about = {"format": "foveate.trained/1", "mechanism": "flux", "options": '{"pool": 8}'}
    about["shape"] = '{"layers": 2, "q_heads": 4, "kv_heads": 2, "dim": 16}'
    save_file({"key": torch.ones(1)}, tmp_path / "odd", about)
    with pytest.raises(ValueError, match="holds no routers"):
        foveate.create("flux", **SMALL, router=str(tmp_path / "odd"))
    for options in ({"targets": (1.5,)}, {"targets": ()}, {"sinks": -1}, {"pool": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            foveate.create("flux", **options)


def test_refuses_a_text_without_a_target(tiny_llama):
    with pytest.raises(ValueError, match="no target for text 1"):
        train(tiny_llama, foveate.create("flux", **SMALL), [steady(20), steady(20)], steps=2)
