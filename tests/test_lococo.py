import pytest
import torch
from transformers import DynamicCache

import foveate
from attached import check_bytes, prompt
from foveate import ops
from foveate.attention._trained import ModelShape, write_trained
from foveate.bench import train as training
from foveate.cache.base import Slots
from tiny_models import build

SMALL = {"budget": 12, "buffer": 4, "kernel": 5, "chunk": 10}


def layer_of(policy, dim=8, blend=0.3):
    """A random convolution of one layer."""
    learner = policy.learner(ModelShape(1, 4, 2, dim))
    part = {name: x[0].detach() for name, x in learner.named_parameters()}
    return part | {"blend": torch.tensor(blend)}


def case(n=30, dim=8):
    torch.manual_seed(0)
    return torch.randn(2, n, dim), torch.randn(2, n, dim), torch.rand(2, n)


@torch.no_grad()
def chunked(model, ids, spec, size):
    """Logits of tokens fed in chunks."""
    cache = DynamicCache()
    with foveate.attach(model, cache=spec):
        return torch.cat([model(x, past_key_values=cache).logits for x in ids.split(size, 1)], 1)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A tiny model, the file of a convolution trained on it, its losses."""
    path, model = tmp_path_factory.mktemp("lococo") / "conv.safetensors", build("qwen3")
    texts = prompt(240, 3).view(4, 60)
    done = training.train(model, foveate.create("lococo", **SMALL), [texts], steps=12, lr=0.05)
    done.write(path)
    return model, path, done


@pytest.mark.parametrize("blend", [0.3, -1.0, 2.0])
def test_mixtures_equal_the_definition(blend):
    policy, (k, v, scores) = foveate.create("lococo", **SMALL), case()
    part = layer_of(policy, blend=blend)
    kept = policy.keep(scores)
    share = min(max(blend, 0), 1)
    got = policy.blended(k, v, scores, kept, part)
    for h in range(2):
        ranked = scores[h].argsort(descending=True).tolist()
        heavy, rest = ranked[:6], sorted(ranked[6:])
        x = torch.cat([k[h, rest], v[h, rest]], 1)
        padded = torch.nn.functional.pad(x.T, (2, 2))
        logits = torch.stack(
            [
                torch.stack(
                    [
                        (padded[:, t : t + 5] * part["weight"][i]).sum() + part["bias"][i]
                        for t in range(len(rest))
                    ]
                )
                for i in range(6)
            ]
        )
        weights = (1 - share) * torch.zeros_like(logits)
        for i, t in enumerate(sorted(ranked[6:12])):
            weights[i, rest.index(t)] += 1 - share
        weights = weights + share * torch.softmax(logits.relu(), 1)
        torch.testing.assert_close(weights.sum(1), torch.ones(6))
        for x, mixed in zip((k, v), got, strict=True):
            slots = dict(zip(sorted(ranked[6:12]), weights @ x[h, rest], strict=True))
            slots |= {t: x[h, t] for t in heavy}
            expected = torch.stack([slots[t] for t in sorted(slots)])
            torch.testing.assert_close(mixed[h], expected, rtol=1e-4, atol=1e-5)


def test_without_a_share_of_mixtures_it_keeps_the_best_tokens():
    policy, (k, v, scores) = foveate.create("lococo", **SMALL), case()
    kept = policy.keep(scores)
    found = policy.blended(k, v, scores, kept, layer_of(policy, blend=0.0))
    assert torch.equal(found[0].flatten(0, 1), k[kept])
    assert torch.equal(found[1].flatten(0, 1), v[kept])


def test_scores_are_those_of_the_last_chunk_and_of_decoded_tokens_since():
    policy, (k, _, _) = foveate.create("lococo", **SMALL), case(12)
    q, k = torch.randn(1, 4, 12, 8), k[None]
    old = {"score": torch.full((2, 12), 7.0)}
    chunk = policy.observe(q[:, :, -4:], k, old, scale=None)["score"]
    torch.testing.assert_close(chunk.sum(1), torch.full((2,), 4.0))
    step = policy.observe(q[:, :, -1:], k, {"score": chunk}, scale=None)["score"]
    torch.testing.assert_close(step.sum(1), torch.full((2,), 5.0))


def test_local_tokens_are_heavy_hitters():
    policy, (k, _, scores) = foveate.create("lococo", **SMALL, local=3), case()
    found = policy.score(k[None], k[None], {"score": scores}, scale=None)
    assert bool(torch.isinf(found[:, -3:]).all()) and bool(policy.keep(found)[:, -3:].all())


@torch.no_grad()
def test_the_store_stays_between_budget_and_budget_with_buffer_and_chunk(tiny_llama):
    cache, ids = DynamicCache(), prompt(70)
    with foveate.attach(tiny_llama, cache=foveate.create("lococo", **SMALL)):
        for part in ids[:, :50].split(10, 1):
            tiny_llama(part, past_key_values=cache)
            assert cache.layers[0].stored() <= 12 + 4
        for i in range(50, 70):
            tiny_llama(ids[:, i : i + 1], past_key_values=cache)
            assert 12 <= cache.layers[0].stored() <= 16


def test_training_goes_through_a_text_as_the_cache_does(taught):
    model, path, done = taught
    ids = prompt(60, 9)
    policy = foveate.create("lococo", **SMALL, conv=str(path))
    place = training.InTraining(learner=done.learner)
    with torch.no_grad(), foveate.attach(model, prefill=place):
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(chunked(model, ids, policy, 10), whole, rtol=1e-4, atol=1e-4)
    plain = chunked(model, ids, foveate.create("lococo", **SMALL), 10)
    assert float((plain - whole).abs().max()) > 1e-3


def test_results_depend_on_the_past_only(taught):
    model, path, _ = taught
    ids, spec = prompt(60, 9), foveate.create("lococo", **SMALL, conv=str(path))
    other = torch.cat([ids[:, :40], prompt(20, 10)], 1)
    one, two = (chunked(model, x, spec, 10)[:, :40] for x in (ids, other))
    assert torch.equal(one, two)


def test_training_moves_the_convolutions_only(taught):
    model, _, done = taught
    start = done.mechanism.learner(done.shape)
    for name, x in done.learner.named_parameters():
        assert not torch.equal(x, start.get_parameter(name)), name
    assert all(p.grad is None for p in model.parameters())


def test_the_command_prints_the_line_that_uses_it(foveate_command, tiny_model_dir, tmp_path):
    file = tmp_path / "conv.safetensors"
    args = ["--tokens=80", "--window=40", "--steps=2", "--out", file]
    code, out, _ = foveate_command(
        "train", "lococo:budget=12,kernel=5,chunk=10", tiny_model_dir, *args
    )
    assert code == 0
    assert f'cache="lococo:budget=12,kernel=5,chunk=10,conv={file}"' in out


def test_other_options_than_those_of_the_training_are_refused(taught):
    with pytest.raises(ValueError, match="trained with budget=12, but lococo has budget=14"):
        foveate.create("lococo", **{**SMALL, "budget": 14}, conv=str(taught[1]))


def test_other_heads_are_refused(taught):
    policy = foveate.create("lococo", **SMALL, conv=str(taught[1]))
    held = {name: torch.rand(90, 16) for name in "kv"}
    row = Slots.of(held | {"score": torch.rand(90)}, [30] * 3)
    scores = row.padded("score")
    with pytest.raises(ValueError, match=r"4 layers, 4 query heads, 2 kv .* has .* 3 kv heads"):
        policy.merge(row, scores, policy.keep(scores), rope=None, layer=0)


@pytest.mark.parametrize("layers", [2, 6])
def test_a_model_with_other_layers_is_refused_before_it_runs(taught, tmp_path, layers):
    model, _, done = taught
    weights = {
        name: x[:1].expand(layers, *x.shape[1:]) for name, x in done.learner.weights().items()
    }
    file = tmp_path / "conv"
    write_trained(file, done.mechanism, done.shape._replace(layers=layers), weights)
    with pytest.raises(ValueError, match=rf"with {layers} layers.* but this one has 4 layers"):
        foveate.attach(model, cache=foveate.create("lococo", **SMALL, conv=str(file)))


def test_other_files_are_refused(taught, tmp_path):
    done = taught[2]
    weights = {**done.learner.weights(), "bias": torch.zeros(3)}
    write_trained(tmp_path / "conv", done.mechanism, done.shape, weights)
    with pytest.raises(ValueError, match="holds no convolutions for its model"):
        foveate.create("lococo", **SMALL, conv=str(tmp_path / "conv"))


@pytest.mark.parametrize("size", [30, 14])
def test_bytes_held_are_those_claimed_at_every_step(tiny_llama, size):
    check_bytes(tiny_llama, foveate.create("lococo", **SMALL), size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 4}, "kernel must be odd, got 4"),
        ({"keep_share": 0.0}, "keep_share must be above 0 and at most 1, got 0.0"),
        ({"local": 65}, "at most the 64 slots of heavy hitters, got 65"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        foveate.create("lococo", **options)


def test_a_share_of_one_mixes_nothing():
    policy = foveate.create("lococo", **SMALL, keep_share=1.0)
    assert policy.mixed == 0
    assert ops.top_k(torch.rand(2, 30), policy.budget).sum(1).tolist() == [12, 12]
