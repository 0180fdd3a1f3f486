"""Searching a plan for a model, and using it."""

import json
from functools import partial

import pytest
import torch

import foveate
from attached import prompt
from foveate.analysis.base import Record
from foveate.bench.tune import profile, run, search
from foveate.bench.tune.judge import Judge
from foveate.hf.planfile import Plan, load_plan, shape_of
from foveate.registry import create

NARROW, WIDE = "sink_window:sinks=2,window=4,block=4", "sink_window:sinks=2,window=24,block=4"


@pytest.fixture
def plan(tiny_llama):
    return Plan(shape_of(tiny_llama), [NARROW, ["dense", NARROW]])


@pytest.fixture
def file(plan, tmp_path):
    (tmp_path / "plan.json").write_text(plan.text())
    return tmp_path / "plan.json"


@torch.no_grad()
def logits(model, **slots):
    with foveate.attach(model, **slots):
        return model(prompt(40)).logits


def test_a_plan_survives_its_file_and_runs_what_it_names(tiny_llama, plan, file):
    assert load_plan(file) == plan
    by_hand = logits(tiny_llama, prefill=[NARROW, ["dense", NARROW]])
    assert torch.equal(logits(tiny_llama, plan=file), by_hand)
    assert torch.equal(logits(tiny_llama, plan=plan), by_hand)
    assert not torch.equal(by_hand, logits(tiny_llama))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": "foveate.plan/9"}, "has schema 'foveate.plan/9'"),
        ({"prefill": [NARROW]}, "1 entries; the model has 2 layers"),
        ({"prefill": [NARROW, [NARROW] * 3]}, "3 entries for 2 kv heads"),
        ({"prefill": ["nothing", NARROW]}, "unknown mechanism 'nothing'"),
        ({"model": {}}, "cannot be used"),
    ],
)
def test_refuses_a_plan_that_cannot_be_used(file, change, said):
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=said):
        load_plan(file)


def test_refuses_a_missing_or_corrupt_file_and_a_plan_for_another_model(tiny_llama, plan, file):
    with pytest.raises(ValueError, match="cannot read"):
        load_plan(file.with_name("none.json"))
    other = Plan({**plan.model, "kv_heads": 7}, plan.prefill)
    with pytest.raises(ValueError, match="kv_heads 7, this model has 2"):
        foveate.attach(tiny_llama, plan=other)
    with pytest.raises(ValueError, match="a plan fills the slot prefill"):
        foveate.attach(tiny_llama, plan=plan, prefill="moba")
    file.write_text(file.read_text()[:40])
    with pytest.raises(ValueError, match="not valid JSON"):
        load_plan(file)


def test_heads_with_their_own_mechanisms_are_recorded_as_one(tiny_llama, plan):
    held = []
    with torch.no_grad(), foveate.attach(tiny_llama, plan=plan) as attached:
        attached.record = held.append
        tiny_llama(prompt(40))
    whole, half = held
    assert (whole.layer, half.layer) == (0, 1)
    assert half.density == pytest.approx((1 + whole.density) / 2)
    assert whole.retained_mass < half.retained_mass < 1


def test_expected_loss_is_none_for_dense_and_grows_with_what_is_left_out(tiny_llama):
    made = [create(x) for x in ("dense", WIDE, NARROW)]
    loss = profile.expected_loss(tiny_llama, prompt(64), made)
    assert loss.shape == (2, 2, 3) and bool((loss[..., 0] == 0).all())
    assert bool((loss[..., 2] > loss[..., 1]).all()) and bool((loss[..., 1] > 0).all())


def test_expected_loss_is_near_the_divergence_of_a_small_change(tiny_llama):
    """Summed over the heads of a layer, it estimates what a small change of that layer does."""
    ids, made = prompt(96), [create(x) for x in ("dense", "sink_window:sinks=2,window=80,block=4")]
    draws = [profile.expected_loss(tiny_llama, ids, made, seed)[..., 1] for seed in range(40)]
    estimate = float(torch.stack(draws).mean(0).sum(1)[1])
    with torch.no_grad():
        dense = torch.log_softmax(tiny_llama(ids).logits[0].double(), -1)
        with foveate.attach(tiny_llama, prefill={1: made[1]}):
            own = torch.log_softmax(tiny_llama(ids).logits[0].double(), -1)
    kl = float((dense.exp() * (dense - own)).sum(-1)[48:].mean())
    assert 0.3 * kl < estimate < 3 * kl


def test_every_candidate_is_timed(tiny_llama):
    made = [create(x) for x in ("dense", NARROW)]
    assert bool((profile.seconds(tiny_llama, prompt(64), made) > 0).all())


@pytest.mark.parametrize("name", ["greedy", "pareto"])
def test_searchers_keep_the_budget_and_prefer_what_loses_little(name):
    loss = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    loss[:, 0] = 0
    cost = torch.tensor([1.0, 0.5, 0.1]).expand(20, 3)
    before = float("inf")
    for budget in (2.0, 5.0, 12.0, 20.0):
        choice = search.SEARCHERS[name](cost, loss, budget)
        lost = float(loss.gather(1, choice[:, None]).sum())
        assert float(cost.gather(1, choice[:, None]).sum()) <= budget + 1e-6
        assert lost <= before
        before = lost
    assert before == 0
    with pytest.raises(ValueError, match=r"1\.9|costs"):
        search.SEARCHERS[name](cost, loss, 1.9)


def test_what_loses_infinitely_much_is_never_chosen():
    loss = torch.tensor([[0.0, torch.inf], [0.0, 0.1]])
    cost = torch.tensor([[1.0, 0.1], [1.0, 0.1]])
    for name in ("greedy", "pareto"):
        assert search.SEARCHERS[name](cost, loss, 1.1).tolist() == [0, 1]


@pytest.fixture
def tune(foveate_command, monkeypatch, tiny_model_dir, tmp_path):
    """Call `foveate tune` on a tiny model: exit code, standard output, standard error."""
    monkeypatch.setattr(run, "_TRIALS", 2)
    # On a few hundred tokens nothing is faster than dense attention.
    monkeypatch.setattr(run, "seconds", lambda *_: torch.tensor([1.0, 0.2, 0.5]))

    line = ["tune", tiny_model_dir, "--tokens", "256"]
    line += ["--with", NARROW, "--with", WIDE, "--out", tmp_path / "out"]
    return partial(foveate_command, *line)


def test_tune_writes_a_plan_that_attach_and_compare_take(tune, tiny_model_dir, tmp_path):
    code, out, err = tune("--max-loss", "50%")
    path = tmp_path / "out" / "plan.json"
    assert code == 0 and "plan.json" in out, err
    plan = load_plan(path)
    assert plan.measured["held_out_loss_percent"] <= 50
    assert any(entry != "dense" for entry in plan.prefill)
    code, out, err = tune("--max-loss", "50%")
    assert code == 0 and "resuming: 7 finished" in err


def test_the_heads_of_a_record_stay_dense(tune, tmp_path):
    score = torch.tensor([[0.1, 0.2], [0.9, 0.0]])
    about = {"model": "tiny", "heads": [2, 2]}
    made = Record("scores", {"x": score}, {"x": ("layer", "head")}, "x", about)
    given = ("--heads", made.save(tmp_path), "--keep", "1", "--searchers", "pareto,influence")
    code, _, err = tune("--max-loss", "100%", *given)
    assert code == 0, err
    tried = json.loads((tmp_path / "out" / "tune.json").read_text())["tried"]
    assert tried and all(x["choice"][1] == [0] for x in tried)
    assert any(x["choice"][0] != [0] for x in tried)
    score = torch.zeros(4, 2)
    wrong = Record("scores", {"x": score}, {"x": ("layer", "head")}, "x", {"heads": [4, 2]})
    code, _, err = tune("--heads", wrong.save(tmp_path), "--fresh")
    assert code == 2 and "4 layers of 2 heads; this model has 2 of 2" in err


def test_compare_takes_a_plan(foveate_command, tiny_model_dir, tmp_path):
    model = {"name": "tiny", "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16}
    (tmp_path / "plan.json").write_text(Plan(model, [NARROW, "dense"]).text())
    spec = f"plan={tmp_path}/plan.json"
    line = ["compare", tiny_model_dir, "--tokens", "96", "--decode-tokens", "4"]
    line += ["--repeats", "1", "--needles", "0", "--out", tmp_path, "--with", spec]
    assert foveate_command(*line)[0] == 0
    held = json.loads((tmp_path / "results.json").read_text())
    row = next(x for x in held["summary"] if x["spec"] == spec)
    assert held["complete"] and 0 < row["density"]["prefill"] < 1
    assert next(m for m in held["mechanisms"] if m["spec"] == spec)["python"].count(spec[5:]) == 1
    (tmp_path / "plan.json").write_text(Plan({**model, "layers": 3}, ["dense"] * 3).text())
    code, _, err = foveate_command(*line)
    assert code == 2 and "layers 3, this model has 2" in err


def test_an_interrupted_search_goes_on_from_its_steps(tune, monkeypatch, tmp_path):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "expected_loss", stop)
        code, _, err = tune("--max-loss", "50%")
    assert code == 130 and "interrupted" in err and not (tmp_path / "out" / "plan.json").exists()
    code, _, err = tune("--max-loss", "50%")
    assert code == 0 and "resuming: 1 finished" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--max-loss", "0"], "max loss must be above 0"),
        (["--max-loss", "101%"], "at most 100 %"),
        (["--max-loss", "little"], "--max-loss must be a number"),
        (["--metric", "speed"], "unknown metric 'speed'"),
        (["--searchers", "luck"], "unknown searcher 'luck'"),
        (["--minutes", "0"], "minutes must be above 0"),
        (["--tokens", "10"], "tokens must be at least 256"),
        (["--with", "nothing"], "unknown mechanism 'nothing'"),
    ],
)
def test_refuses_what_it_cannot_tune(tune, args, said):
    code, _, err = tune(*args)
    assert code == 2 and said in err and "Traceback" not in err


def test_refuses_a_text_too_short_for_a_held_out_part(tune, tmp_path):
    (tmp_path / "short.txt").write_text("some words " * 200)
    code, _, err = tune("--text", str(tmp_path / "short.txt"))
    assert code == 2 and "held out" in err


@pytest.mark.parametrize("metric", ["perplexity", "kl"])
def test_a_judge_finds_no_loss_in_dense_attention(tiny_llama, metric):
    judge = Judge(tiny_llama, None, prompt(101), metric)
    assert judge.loss("dense") == pytest.approx(0, abs=1e-3)
    assert judge.loss(NARROW) != pytest.approx(0, abs=1e-3)
