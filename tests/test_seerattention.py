import json

import pytest
import torch
from safetensors.torch import save_file

import foveate
from foveate import ops
from foveate.attention._trained import ModelShape, write_trained
from foveate.attention.base import Call
from foveate.attention.sparse.seerattention import _gate, _means_only, _pooled
from foveate.bench.train import train
from sparse_checks import causal_keep, check_common, qkv, softmax_over, tokens_of

SHAPE = ModelShape(layers=2, q_heads=4, kv_heads=2, dim=16)


def tables(positions):
    """Rotary tables of a head of 16."""
    turns = positions[..., None] * 100.0 ** (-torch.arange(8) / 8)
    return torch.cat((turns, turns), -1).cos(), torch.cat((turns, turns), -1).sin()


def rotated(length, lq=None, **options):
    """Rotated q, k, v, a call that knows their tables, and q, k before rotation."""
    q, k, v = qkv(length, lq, **options)
    cos, sin = tables(torch.arange(length)[None])
    rows = slice(length - q.shape[2], None)
    turned = ops.rope(q, cos[:, rows], sin[:, rows]), ops.rope(k, cos, sin), v
    return turned, Call(rope=tables), (q, k)


def weights(seed=0):
    return 0.3 * torch.randn(4, 48, 16, generator=torch.Generator().manual_seed(seed))


def plain_gate(q, k, w, block):
    """The gate by its definition, block by block: q, k before rotation, (B, Hq, nQ, nK)."""
    (b, h, lq, d), lk = q.shape, k.shape[2]
    start = lk - lq
    first, n_k = start // block, -(-lk // block)
    out = torch.zeros(b, h, n_k - first, n_k)

    def turn(x, j):
        cos, sin = tables(torch.tensor([[j * block]]))
        return ops.rope(x.view(1, 1, 1, d), cos, sin).view(d)

    for i in range(b):
        for head in range(h):
            for big in range(first, n_k):
                rows = q[i, head, max(big * block - start, 0) : (big + 1) * block - start]
                query, scores = turn(rows.mean(0), big), []
                for j in range(big + 1):
                    keys = k[i, head // 2, j * block : (j + 1) * block]
                    pooled = torch.cat((keys.amax(0), keys.amin(0), keys.mean(0)))
                    scores.append(query @ turn(pooled @ w[head], j) / d**0.5)
                out[i, head, big - first, : big + 1] = torch.stack(scores).softmax(0)
    return out


def gate_file(path, w=None, shape=SHAPE, **options):
    """A gate as `foveate train` writes it, the same in every layer."""
    w = weights() if w is None else w
    made = foveate.create("seerattention", block=8, **options)
    write_trained(path, made, shape, {"key": w.expand(shape.layers, -1, -1, -1)})
    return str(path)


@pytest.mark.parametrize(("length", "lq"), [(80, 80), (75, 75), (75, 33)])
def test_gate_equals_its_definition(length, lq):
    (q, k, _), call, before = rotated(length, lq, batch=2)
    got = _gate(_pooled(q, k, call, 8), weights())
    torch.testing.assert_close(got, plain_gate(*before, weights(), 8), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]))


def test_an_untrained_gate_compares_means():
    (q, k, _), call, _ = rotated(64)
    got = _gate(_pooled(q, k, call, 8), _means_only(4, 16))
    q0, k0 = (ops.unrope(x, *call.tables(64)) for x in (q, k))
    means = [x.unflatten(2, (-1, 8)).mean(3) for x in (q0, k0)]
    at = tables(8 * torch.arange(8)[None])
    logits = ops.grouped_logits(*(ops.rope(x, *at) for x in means), 0.25)
    want = logits.masked_fill(~causal_keep(8, 8), float("-inf")).softmax(-1)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lq", [75, 33])
def test_reads_what_the_gate_of_its_layer_lets_through(tmp_path, lq):
    (q, k, v), call, before = rotated(75, lq, batch=2)
    w = torch.stack([weights(1), weights(2)])
    write_trained(tmp_path / "g", foveate.create("seerattention", block=8), SHAPE, {"key": w})
    made = foveate.create(
        "seerattention", block=8, threshold=0.1, last_rows=1, gate=str(tmp_path / "g")
    )
    call.layer, call.layers = 1, 2
    layout = made.select(q, k, call)
    gate = plain_gate(*before, w[1], 8)
    keep = gate >= 0.1
    first, rows = (75 - lq) // 8, gate.shape[2]
    keep[:, :, torch.arange(rows), torch.arange(rows) + first] = True
    keep[:, :, -1] = True
    assert torch.equal(layout.to_bool(), keep)
    want = softmax_over(q, k, v, tokens_of(layout) & causal_keep(lq, 75))
    torch.testing.assert_close(made(q, k, v, call=call), want, atol=1e-5, rtol=1e-4)


def test_a_threshold_below_0_and_a_ratio_of_1_equal_dense():
    (q, k, v), call, _ = rotated(75)
    dense = ops.attend(q, k, v, causal=True)
    for options in ({"threshold": -1.0}, {"ratio": 1.0}):
        got = foveate.create("seerattention", block=8, **options)(q, k, v, call=call)
        torch.testing.assert_close(got, dense, atol=1e-5, rtol=1e-4)


def test_ratio_keeps_about_that_share_of_the_causal_blocks():
    (q, k, _), call, _ = rotated(640)
    for ratio in (0.2, 0.5):
        made = foveate.create("seerattention", block=8, ratio=ratio, last_rows=0)
        counts = made.select(q, k, call).counts
        kept = int((1 - (1 - ratio) ** 0.5) * 80)
        assert (counts <= kept + 1).all() and (counts[:, :, kept:] >= kept).all()
        assert float(counts.float().mean()) / 40.5 == pytest.approx(ratio, abs=0.03)


def test_common_claims():
    check_common(foveate.create("seerattention", block=8, threshold=0.15), *qkv(90, batch=2))


def plain_target(q, k, block, softcap=None):
    logits = ops.grouped_logits(q, k, 0.25)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    n = q.shape[2] // block
    probs = logits.masked_fill(~causal_keep(n * block, n * block), float("-inf")).softmax(-1)
    most = probs.view(*q.shape[:2], n, block, n, block).amax((3, 5))
    return most / most.sum(-1, keepdim=True)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_what_is_taught_is_the_largest_probability_of_each_block(softcap):
    (q, k, v), call, _ = rotated(64)
    call.softcap = softcap
    learner = foveate.create("seerattention", block=8).learner(SHAPE)
    out = learner.attend(q, k, v, call)
    want = ops.attend(q, k, v, causal=True, softcap=softcap)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)
    ((_, target),) = learner.notes[0]
    torch.testing.assert_close(target.sum(-1), torch.ones_like(target[..., 0]))
    torch.testing.assert_close(target, plain_target(q, k, 8, softcap), atol=1e-5, rtol=1e-4)


def test_loss_is_the_divergence_of_the_late_rows():
    (q, k, v), call, before = rotated(64)
    learner = foveate.create("seerattention", block=8).learner(SHAPE)
    learner.attend(q, k, v, call)
    gate, target = plain_gate(*before, _means_only(4, 16), 8), plain_target(q, k, 8)
    seen = torch.ones(8, 8).tril().bool()
    gap = torch.zeros_like(gate)
    gap[..., seen] = (target * (target / gate).log())[..., seen]
    want = 10 * gap[:, :, 2:].mean()
    torch.testing.assert_close(learner.loss(0.0, None, 0), want, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def trained(tiny_llama):
    """A gate taught on one sequence, and that sequence."""
    ids = torch.randint(3, 128, (1, 256), generator=torch.Generator().manual_seed(0))
    before = {n: p.clone() for n, p in tiny_llama.named_parameters()}
    result = train(tiny_llama, foveate.create("seerattention", block=16), [ids], steps=150, lr=1e-2)
    for name, p in tiny_llama.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and p.requires_grad
    return result


def test_training_lowers_the_divergence_and_finds_more_than_means(trained):
    assert trained.losses[-1] < 0.5 * trained.losses[0]
    recall = {"means": 0.0, "gate": 0.0}
    for layer, notes in trained.learner.notes.items():
        seen, target = notes[0]
        best = ops.top_k(target, 3, visible=seen.visible)
        for name, w in (("means", _means_only(4, 16)), ("gate", trained.learner.key[layer])):
            found = ops.top_k(_gate(seen, w), 3, visible=seen.visible)
            recall[name] += float((found & best).sum() / best.sum()) / 2
    assert recall["gate"] > recall["means"] + 0.05


def test_a_trained_gate_serves_the_model_it_was_trained_on(trained, tiny_llama, tmp_path):
    trained.write(tmp_path / "gate")
    assert [p.name for p in tmp_path.iterdir()] == ["gate"]
    made = foveate.create(
        f"seerattention:block=16,threshold=0.1,last_rows=0,gate={tmp_path / 'gate'}"
    )
    assert torch.equal(made.read().weights["key"], trained.learner.key)
    ids = torch.randint(3, 128, (1, 256), generator=torch.Generator().manual_seed(0))
    records = []
    with torch.no_grad():
        dense = tiny_llama(ids).logits
        with foveate.attach(tiny_llama, prefill=made) as attached:
            attached.record = records.append
            got = tiny_llama(ids).logits
    assert all(r.density < 0.9 and r.retained_mass > r.density for r in records)
    assert float((got - dense).abs().max()) > 1e-3


def test_a_gate_that_was_trained_anew_is_read_anew(tmp_path):
    path = gate_file(tmp_path / "g")
    one = foveate.create("seerattention", block=8, gate=path).read().weights["key"]
    gate_file(tmp_path / "g", weights(5))
    two = foveate.create("seerattention", block=8, gate=path).read().weights["key"]
    assert not torch.equal(one, two)


def test_refuses_files_that_are_no_gate_for_it(tmp_path):
    def refuse(path, said, **options):
        with pytest.raises(ValueError, match=said):
            foveate.create("seerattention", **{"block": 8, "gate": str(path), **options})

    path = gate_file(tmp_path / "good")
    refuse(tmp_path / "none", "cannot read .*none")
    refuse(tmp_path, "no safetensors file|cannot read")
    refuse(path, "block=8.*block=16", block=16)
    torch.save({"key": weights()}, tmp_path / "pickle")
    refuse(tmp_path / "pickle", "no safetensors file")
    (tmp_path / "cut").write_bytes((tmp_path / "good").read_bytes()[:-100])
    refuse(tmp_path / "cut", "damaged")
    save_file({"key": weights()}, tmp_path / "plain")
    refuse(tmp_path / "plain", "not written by")
    about = {"format": "foveate.trained/1", "mechanism": "seerattention", "options": "{}"}
    save_file({"key": weights()}, tmp_path / "halved", about)
    refuse(tmp_path / "halved", "damaged metadata")
    about["shape"] = json.dumps(SHAPE._asdict())
    save_file({"key": weights()}, tmp_path / "other", {**about, "mechanism": "flux"})
    refuse(tmp_path / "other", "trained for flux")
    save_file({"key": weights()[:2]}, tmp_path / "small", {**about, "options": '{"block": 8}'})
    refuse(tmp_path / "small", "holds no gate")


@pytest.mark.parametrize("layers", [1, 3])
def test_refuses_a_model_of_another_shape(tmp_path, layers):
    made = foveate.create("seerattention", block=8, gate=gate_file(tmp_path / "g"))
    (q, k, v), call, _ = rotated(75)
    call.layers = layers
    with pytest.raises(ValueError, match=f"2 layers, 4 query heads.*{layers} layers"):
        made(q, k, v, call=call)


@pytest.mark.parametrize(
    "options", [{"ratio": 0.0}, {"ratio": 1.5}, {"last_rows": -1}, {"block": 0}]
)
def test_refuses_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        foveate.create("seerattention", **options)
