"""Keys and values as leading coordinates along trained orthogonal axes."""

import itertools

import pytest
import torch
from transformers import DynamicCache

import foveate
from attached import check_bytes, prompt, step_logits
from foveate import ops
from foveate.attention._trained import InTraining, ModelShape, write_trained
from foveate.attention.base import Attention, dense_result
from foveate.bench import train as training
from foveate.cache._bases import lowering, parts_after
from tiny_models import build

Q_HEADS, HEADS, DIM, LAYERS = 6, 3, 16, 2
SHAPE = ModelShape(LAYERS, Q_HEADS, HEADS, DIM)


def policy(**options):
    """A policy that keeps no token exact unless it is told to."""
    return foveate.create("matryoshka_kv", **{"block": 1, **options})


def tokens(count=60, seed=0):
    """q, k, v of one row; keys and values lie near a subspace away from the origin."""
    made = torch.Generator().manual_seed(seed)
    q = torch.randn(1, Q_HEADS, count, DIM, generator=made)
    fall = 0.6 ** torch.arange(DIM)
    k, v = (torch.randn(1, HEADS, count, DIM, generator=made) * fall + 1 for _ in "kv")
    return q, k, v


def orthogonal(seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(2, LAYERS, HEADS, DIM, DIM, generator=made)).Q


@pytest.fixture
def file(tmp_path):
    """A file of random bases and means, of a search that went down to a half."""
    weights = {
        "basis": orthogonal(),
        "mean": torch.randn(2, LAYERS, HEADS, DIM, generator=torch.Generator().manual_seed(1)),
        "order": torch.arange(12, dtype=torch.int32).repeat(2),
    }
    path = tmp_path / "bases.safetensors"
    write_trained(path, policy(), SHAPE, weights)
    return path, weights


def held_after(made, k, v, cuts=(), layer=0):
    """What is held after the tokens came in pieces that end at the cuts."""
    held = made.empty(k, v, layer=layer)
    for lo, hi in zip((0, *cuts), (*cuts, k.shape[2]), strict=True):
        held = made.extended(held, k[:, :, lo:hi], v[:, :, lo:hi])
    return held


def seen(held, k, v):
    """Keys and values like k and v as what is held tells them, the newest as they are."""
    k, v = k.clone(), v.clone()
    coded = k.shape[2] - held.newest[0].shape[2]
    for group, (own_k, own_v) in zip(held.groups, held.parts, strict=True):
        for i, h in enumerate(group.heads):
            for x, axes, own in ((k, group.k, own_k), (v, group.v, own_v)):
                x[0, h, :coded] = own[0, i] @ axes.basis[i].T + axes.mean[i]
    for x, newest in zip((k, v), held.newest, strict=True):
        x[:, :, coded:] = newest
    return k, v


NONE = {"scale": None, "softcap": None}


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    "options", [{"rate": 0.25}, {"rate": 0.8, "ranks": "searched"}, {"rate": 0.5, "block": 16}]
)
def test_attention_is_that_over_what_the_coordinates_tell(file, options, softcap):
    made, (q, k, v) = policy(**options, basis=str(file[0])), tokens()
    held = held_after(made, k[:, :, :50], v[:, :, :50], layer=1)
    want_k, want_v = (
        torch.cat((x, y[:, :, 50:]), 2)
        for x, y in zip(seen(held, k[:, :, :50], v[:, :, :50]), (k, v), strict=True)
    )
    got = made.attend(q[:, :, 50:], held, k[:, :, 50:], v[:, :, 50:], scale=0.3, softcap=softcap)
    want = ops.attend(q[:, :, 50:], want_k, want_v, causal=True, scale=0.3, softcap=softcap)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_coordinates_are_those_of_the_definition(file):
    made, (_, k, v) = policy(rate=0.375, basis=str(file[0])), tokens()
    ((own_k, own_v),) = held_after(made, k, v, (7, 30), layer=1).parts
    for kind, (x, own) in enumerate(((k, own_k), (v, own_v))):
        basis, mean = file[1]["basis"][kind, 1], file[1]["mean"][kind, 1]
        want = (x[0] - mean[:, None]) @ basis[..., :6]
        torch.testing.assert_close(own[0], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", [True, False])
def test_all_coordinates_give_dense_attention(file, trained):
    """Whatever the orthogonal bases."""
    made = policy(rate=1.0, calibrate=20, basis=str(file[0]) if trained else "")
    q, k, v = tokens()
    held = held_after(made, k[:, :, :-1], v[:, :, :-1])
    got = made.attend(q[:, :, -1:], held, k[:, :, -1:], v[:, :, -1:], **NONE)
    torch.testing.assert_close(got, ops.attend(q[:, :, -1:], k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"block": 8}, {"block": 8, "calibrate": 21, "basis": ""}])
def test_the_newest_tokens_are_exact_until_they_fill_a_block(file, options):
    made, (_, k, v) = policy(**{"rate": 0.5, "basis": str(file[0]), **options}), tokens()
    for count in range(1, 50):
        held = held_after(made, k[:, :, :count], v[:, :, :count], tuple(range(1, count)))
        coded = count - count % 8 if "basis" not in options or count >= 21 else 0
        for x, newest in zip((k, v), held.newest, strict=True):
            assert torch.equal(newest, x[:, :, coded:count])
        assert sum(part[0].shape[2] for part in held.parts) == coded
        sizes = {"kv_heads": HEADS, "dim": DIM, "itemsize": 4}
        total = sum(x.untyped_storage().nbytes() for x in made.tensors(held))
        assert total == made.claimed_bytes(count, 1, **sizes)


def test_errors_fall_with_the_rate_along_principal_axes():
    q, k, v = tokens()
    errors = []
    for eighths in range(1, 9):
        held = held_after(policy(rate=eighths / 8, calibrate=60), k, v)
        keys, values = seen(held, k, v)
        wrong = q @ (k - keys).repeat_interleave(2, 1).mT
        errors.append([float(x.norm()) for x in (k - keys, v - values, wrong)])
    for kind in zip(*errors, strict=True):
        assert all(a > b for a, b in itertools.pairwise(kind)), kind
        assert kind[-1] < 1e-3 < kind[0]


def test_encoding_what_was_decoded_changes_nothing(file):
    made, (_, k, v) = policy(rate=0.5, basis=str(file[0])), tokens()
    held = held_after(made, k, v)
    again = held_after(made, *seen(held, k, v))
    for one, two in zip(held.parts[0], again.parts[0], strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_axes_come_from_the_first_tokens_of_the_row():
    made, (_, k, v) = policy(rate=0.5, calibrate=20), tokens()
    assert not held_after(made, k[:, :, :19], v[:, :, :19]).groups
    first, later = (held_after(made, k, v, cuts).groups[0] for cuts in ((25,), (25, 26, 40)))
    whole = held_after(made, k[:, :, :25], v[:, :, :25]).groups[0]
    for group in (first, later):
        assert torch.equal(group.k.basis, whole.k.basis)
    assert torch.equal(whole.k.mean, k[0, :, :25].double().mean(1).float())


@pytest.mark.parametrize("rate", [0.75, 0.8, 0.6, 0.5])
def test_searched_ranks_reach_the_rate(file, rate):
    order = file[1]["order"]
    parts = parts_after(order, (2, LAYERS, HEADS), rate)
    mean = float(parts.float().mean()) / 8
    assert rate - 1 / 48 < mean <= rate
    flat = torch.full((12,), 8)
    for i in order[: int((8 * 12 - parts.sum()) / 2)].tolist():
        flat[i] -= 2
    assert torch.equal(parts.flatten(), flat)


def test_heads_of_like_ranks_form_a_group_and_hold_what_is_claimed(file):
    made, (_, k, v) = policy(rate=0.8, ranks="searched", basis=str(file[0])), tokens()
    ranks = 2 * parts_after(file[1]["order"], (2, LAYERS, HEADS), 0.8)
    total = 0
    for layer in range(LAYERS):
        held = held_after(made, k, v, layer=layer)
        pairs = ranks[:, layer].T.tolist()
        assert len(held.groups) == len({tuple(x) for x in pairs})
        for group, (own_k, own_v) in zip(held.groups, held.parts, strict=True):
            for h in group.heads:
                assert pairs[h] == [own_k.shape[3], own_v.shape[3]]
        total += sum(x.untyped_storage().nbytes() for x in made.tensors(held))
    claim = made.claimed_bytes(60, 60, kv_heads=HEADS, dim=DIM, itemsize=4)
    assert total == LAYERS * claim == 4 * 60 * int(ranks.sum())


def test_bytes_held_are_those_claimed_at_every_step(tiny_llama):
    for calibrate, block in ((20, 1), (35, 1), (20, 4)):
        check_bytes(tiny_llama, policy(rate=0.375, calibrate=calibrate, block=block), 30)


def test_the_search_lowers_what_changes_least():
    """Entry i hurts i + 1 times the square of what it lacks: an order that can be told."""
    weigh = torch.arange(1.0, 9.0)
    heard = []

    def hidden(parts):
        return torch.cat((torch.tensor([100.0]), weigh * (8 - parts.flatten()) ** 2))

    order = lowering(hidden, (2, 4), 0.5, lambda *x: heard.append(x)).tolist()
    assert order[:6] == [0, 1, 2, 3, 4, 5]  # of eight, three quarters a round
    # The second step adds 12 times the weight, the first only 4: 6 and 7 come before 2.
    assert order[6:12] == [0, 1, 6, 7, 2, 3]
    assert len(order) == 16 and max(map(order.count, range(8))) <= 3
    assert heard[0] == ("lowering ranks from 100%", 1, 8)


def test_a_search_keeps_a_quarter_everywhere():
    def hidden(parts):
        return torch.cat((torch.ones(1), (8.0 - parts.flatten())))

    order = lowering(hidden, (2, 2), 0.25, lambda *x: None)
    assert torch.equal(parts_after(order, (2, 2), 0.25), torch.full((2, 2), 2))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A tiny model, its principal axes, what training made of them and the file of that."""
    path, model = tmp_path_factory.mktemp("matryoshka") / "bases", build("llama")
    texts = [prompt(240, 3).view(4, 60)]
    made = policy(rate=0.5, ranks="searched")
    start = training.train(model, policy(rate=0.5), texts, steps=0)
    done = training.train(model, made, texts, steps=40, lr=3e-3)
    done.write(path)
    return model, start, done, path


def test_without_a_step_the_bases_are_principal_axes(taught):
    model, start, _, _ = taught
    watched = {}

    class Watch(Attention):
        card = InTraining.card

        def compute(self, q, k, v, call):
            watched.setdefault(call.layer, []).append(torch.cat((k, v)))
            return dense_result(q, k, v, call)

    with torch.no_grad(), foveate.attach(model, prefill=Watch()):
        for ids in prompt(240, 3).view(4, 1, 60):
            model(ids, use_cache=False)
    weights = start.learner.weights()
    assert start.losses == [] and "order" not in weights
    for layer, calls in watched.items():
        x = torch.cat(calls, 2)
        mean, basis = (weights[name][:, layer] for name in ("mean", "basis"))
        torch.testing.assert_close(mean, x.mean(2), atol=1e-5, rtol=0)
        turned = (x - x.mean(2, keepdim=True)) @ basis
        spread = turned.square().mean(2)
        assert bool((spread.diff(dim=2) <= 1e-4).all())
        cross = turned.mT @ turned / x.shape[2] - torch.diag_embed(spread)
        assert float(cross.abs().max()) < 1e-3 * float(spread.max())


def test_training_leaves_the_bases_orthogonal_and_the_loss_lower(taught):
    model, start, done, _ = taught
    basis = done.learner.weights()["basis"]
    one = torch.eye(16).expand_as(basis)
    torch.testing.assert_close(basis.mT @ basis, one, atol=1e-5, rtol=0)
    assert float((basis - start.learner.weights()["basis"]).abs().max()) > 1e-2
    assert all(p.grad is None for p in model.parameters())

    def loss(learner):
        learner.parts = torch.full((2, 4, 2), 3)
        with torch.no_grad(), foveate.attach(model, prefill=InTraining(learner=learner)):
            return float(training.text_loss(model, prompt(240, 3).view(4, 60)))

    assert loss(done.learner) < loss(start.learner)


def test_the_cache_reads_what_training_showed(taught):
    _, _, done, path = taught
    done.learner.parts = torch.full((2, 4, 2), 4)
    k, v = (torch.randn(1, 2, 30, 16, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    for layer in range(4):
        held = held_after(policy(rate=0.5, basis=str(path)), k, v, layer=layer)
        want = (done.learner._kept(x, kind, layer) for kind, x in enumerate((k, v)))
        for x, y in zip(seen(held, k, v), want, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_the_loss_is_a_quarter_divergence(taught):
    """From the predictions of the model itself; nothing else where they are the same."""
    model, ids = taught[0], prompt(60, 9)
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].log_softmax(-1)
        known = model.model(ids).last_hidden_state
        text = training.text_loss(model, ids)
        same = training.text_loss(model, ids, known, 0.25)
        other = training.text_loss(model, ids, -known, 0.25)
        wanted = model.lm_head(-known)[0, :-1].log_softmax(-1)
    torch.testing.assert_close(same, 0.75 * text)
    away = (wanted.exp() * (wanted - logits)).sum(-1).mean()
    torch.testing.assert_close(other, 0.75 * text + 0.25 * away)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "qwen3"])
def test_at_a_rate_of_one_models_of_many_kinds_are_as_they_were(family):
    """Capped logits and learned positions among them."""
    model, ids = build(family), prompt(40)

    def logits(cache=None):
        return step_logits(model, ids, 28, DynamicCache(config=model.config), cache=cache)

    plain = logits()
    got = logits("matryoshka_kv:rate=1,calibrate=20,block=8")
    torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)
    less = logits("matryoshka_kv:rate=0.375,calibrate=20,block=8")
    assert float((less - plain)[:, 1:].abs().max()) > 1e-3


def test_trained_bases_serve_a_model_at_every_rate(taught):
    model, path, ids = taught[0], taught[3], prompt(40, 5)
    plain = step_logits(model, ids, 28)
    gaps = []
    for options in ("rate=1", "rate=0.75", "rate=0.75,ranks=searched", "rate=0.25"):
        got = step_logits(model, ids, 28, cache=f"matryoshka_kv:{options},block=1,basis={path}")
        gaps.append(float((got - plain)[:, 1:].norm()))
    assert gaps[0] < 1e-3 < min(gaps[1:]) and gaps[3] > max(gaps[:3])


def test_the_command_calibrates_without_steps(foveate_command, tiny_model_dir, tmp_path):
    args = [tiny_model_dir, "--tokens=128", "--window=64", "--out", tmp_path / "b"]
    code, out, err = foveate_command("train", "matryoshka_kv:rate=0.25", *args, "--steps=0")
    assert code == 0 and "calibrated" in err
    assert f'cache="matryoshka_kv:rate=0.25,basis={tmp_path / "b"}"' in out
    assert foveate_command("train", "matryoshka_kv", *args, "--steps=-1")[0] == 2


@pytest.mark.parametrize("layers", [1, 3])
def test_a_model_with_other_layers_is_refused_before_it_runs(file, tiny_llama, layers):
    shape = SHAPE._replace(layers=layers)
    weights = {"basis": orthogonal()[:, :1].expand(-1, layers, -1, -1, -1)}
    weights["mean"] = torch.zeros(weights["basis"].shape[:4])
    write_trained(file[0], policy(), shape, weights)
    with pytest.raises(ValueError, match=rf"with {layers} layers.* but this one has 2 layers"):
        foveate.attach(tiny_llama, cache=policy(basis=str(file[0])))
    with foveate.attach(tiny_llama):
        pass


def test_other_heads_are_refused(file):
    k = torch.zeros(1, 2, 4, DIM)
    with pytest.raises(ValueError, match=r"3 kv heads of 16, but this one has .* 2 kv heads of 16"):
        policy(basis=str(file[0])).empty(k, k, layer=0)


def test_ranks_that_were_not_searched_are_refused(file):
    with pytest.raises(ValueError, match=r"searched down to rate 0.5, not to 0.4; train with"):
        policy(rate=0.4, ranks="searched", basis=str(file[0]))
    k = torch.zeros(1, 2, 4, DIM)
    with pytest.raises(ValueError, match="give basis=FILE"):
        policy(ranks="searched").empty(k, k, layer=0)


@pytest.mark.parametrize("change", ["basis", "mean", "more"])
def test_other_files_are_refused(file, change):
    path, weights = file
    made = {
        "basis": {**weights, "basis": 2 * weights["basis"]},
        "mean": {**weights, "mean": weights["mean"][:, :1]},
        "more": {**weights, "more": torch.zeros(1)},
    }
    write_trained(path, policy(), SHAPE, made[change])
    with pytest.raises(ValueError, match=r"holds bases that are not|holds no bases for its model"):
        policy(basis=str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.1}, "rate must be from 0.125 to 1 with even ranks, got 0.1"),
        ({"rate": 0.2, "ranks": "searched"}, "rate must be from 0.25 to 1 with searched"),
        ({"rate": 1.5}, "got 1.5"),
        ({"calibrate": 0}, "calibrate must be at least 1"),
        ({"block": 0}, "block must be at least 1"),
        ({"basis": "nowhere"}, "cannot read nowhere"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        policy(**options)
