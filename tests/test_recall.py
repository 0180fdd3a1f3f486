"""`foveate recall`: what it trains, its file, its page, its refusals."""

import json
import re
from functools import partial

import pytest

from foveate.bench.recall import run
from foveate.bench.recall.learn import Recall, learn, state_of
from foveate.report import recall as page

TINY = Recall(pairs=2, length=16, vocabulary=32, width=16, steps=3, batch=4, test_rows=8)
FEW = [
    "--layers", "linattn", "--layers", "linattn, dense", "--widths", "8,16", "--seeds", "1",
    "--pairs", "2", "--length", "16", "--steps", "2",
]  # fmt: skip


@pytest.fixture
def call(foveate_command):
    """Call `foveate recall`."""
    return partial(foveate_command, "recall")


def settings(**options):
    own = {"layers": ("linattn", "dense"), "widths": (8, 16), "seeds": 2, "task": TINY}
    return run.Settings(**own | options)


def done(folder, **options):
    job = run.RecallRun(folder, settings(**options))
    for _, step in job.todo():
        step()
    job.finish()
    return job


def test_attention_learns_to_recall_and_a_model_without_it_does_not():
    task = Recall(pairs=2, length=16, vocabulary=32, steps=150, lr=1e-2, test_rows=200)
    dense, none = learn("dense", task), learn("mlp", task)
    assert dense.accuracy > 0.9 and none.accuracy < 0.5
    assert dense.parameters == sum(p.numel() for p in dense.model.parameters())


def test_a_seed_gives_one_model_and_another_seed_another():
    one, two, other = (learn("linattn", TINY, seed=s) for s in (1, 1, 2))
    weights = [m.model.head.weight for m in (one, two, other)]
    assert (weights[0] == weights[1]).all() and (weights[0] != weights[2]).any()
    assert one.accuracy == two.accuracy


def test_states_are_what_decoding_keeps():
    conv = 2 * 2 * 16 * 4
    assert state_of("linattn", TINY) == 2 * (16 * 16 + 16) * 4 + conv
    assert state_of("dense", TINY) == 2 * 2 * 16 * 16 * 4 + conv


def test_widths_are_found_for_a_size_of_state():
    for size in (600, 5000):
        width = run.width_for("linattn", size, TINY)
        off = {w: abs(2 * (w * w + w) + 4 * w - size) for w in range(8, 200, 8)}
        assert off[width] == min(off.values())
    models = list(settings(widths=(), state_sizes=(600,), layers=("linattn",)).models())
    assert models == [("linattn", run.width_for("linattn", 600, TINY), s) for s in (0, 1)]


def test_a_run_that_was_cut_short_goes_on(tmp_path):
    job = run.RecallRun(tmp_path, settings())
    for _, step in job.todo()[:3]:
        step()
    again = run.RecallRun(tmp_path, settings())
    assert again.resumed == 3 and len(again.todo()) == 5 and not again.data["complete"]
    whole = done(tmp_path)
    assert whole.data["complete"] and len(whole.data["models"]) == 8
    held = json.loads((tmp_path / "recall.json").read_text())
    assert held["summary"] == whole.data["summary"]
    with pytest.raises(ValueError, match="was made with seeds=2, now it is 1"):
        run.RecallRun(tmp_path, settings(seeds=1))
    assert run.RecallRun(tmp_path, settings(seeds=1), fresh=True).resumed == 0


def test_the_summary_is_over_seeds():
    models = [
        {"layers": "x", "width": 8, "accuracy": a, "parameters": 5, "state_bytes": 7, "seconds": a}
        for a in (0.25, 0.75)
    ]
    (line,) = run.summary(models)
    assert line["accuracy"] == 0.5 and (line["low"], line["high"]) == (0.25, 0.75)
    assert line["spread"] == pytest.approx(0.125**0.5) and line["seeds"] == 2
    assert run.summary(models[:1])[0]["spread"] is None


def test_the_page_has_every_figure_and_needs_no_network(tmp_path):
    data = done(tmp_path).data
    text = page.render(data)
    found = json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    )
    assert found["chance"] == 0.5
    points = {(p["spec"], q["state"], q["y"]) for p in found["patterns"] for q in p["points"]}
    assert points == {(x["layers"], x["state_bytes"], x["accuracy"]) for x in data["summary"]}
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text) and len(text) < 3_000_000
    for row in page.rows(data):
        assert all(cell in text for cell in row)
    with pytest.raises(ValueError, match="schema is None"):
        page.render({})


def test_the_page_names_the_smallest_state_that_recalls():
    lines = [
        {"layers": "a", "width": 8, "accuracy": 0.97, "state_bytes": 900},
        {"layers": "b", "width": 8, "accuracy": 0.96, "state_bytes": 300},
        {"layers": "c", "width": 8, "accuracy": 0.5, "state_bytes": 100},
    ]
    assert page.best({"summary": lines})["layers"] == "b"
    found = page.best({"summary": lines[2:]})
    assert found["layers"] == "c" and not found["good"]
    assert page.best({"summary": []}) is None


def test_the_command_writes_file_and_page(call, tmp_path):
    code, out, err = call(*FEW, "--out", tmp_path)
    assert code == 0 and "linattn, dense" in out and "recall.html" in err
    assert sorted(x.name for x in tmp_path.iterdir()) == ["recall.html", "recall.json"]
    code, out, err = call(*FEW, "--out", tmp_path, "--markdown")
    assert code == 0 and "resuming: 4" in err and "| `linattn` | 8 |" in out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--layers", "lineattn"], "did you mean"),
        (["--layers", "linattn", "--widths", "1000"], "widths must be from 2 to 512"),
        (["--widths", "big"], "is no length"),
        (["--seeds", "0"], "seeds must be at least 1"),
        (["--layers", "linattn", "--length", "15"], "length must be even"),
        (["--layers", "linattn", "--steps", "0"], "steps must be at least 1"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(call, tmp_path, given, said):
    code, _, err = call(*given, "--out", tmp_path / "new")
    assert code == 2 and said in err and "Traceback" not in err
    assert not (tmp_path / "new").exists()
