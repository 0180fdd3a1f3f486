import json

import pytest
import torch

from attached import prompt
from foveate import attach
from foveate.analysis.base import Record, load_record, rank_correlation, rank_heads
from tiny_models import build


def record(score, name="a"):
    """A record of one score by layer and head."""
    return Record(name, {"x": score}, {"x": ("layer", "head")}, "x", {"heads": list(score.shape)})


def test_ranking_overlap_and_correlation():
    a = record(torch.tensor([[0.1, 0.9, float("nan")], [0.5, 0.2, 0.3]]))
    assert a.ranked()[:3] == [(0, 1), (1, 0), (1, 2)]
    assert a.ranked()[-1] == (0, 2)
    assert a.ranked(ascending=True)[0] == (0, 0)
    b = record(torch.tensor([[0.0, 9.0, 1.0], [5.0, 2.0, 3.0]]))
    assert a.overlap(b, 2) == 1
    assert record(torch.arange(6.0).view(2, 3)).overlap(b, 1) == 0
    assert b.correlation(record(-b["x"])) == pytest.approx(-1)
    tied = rank_correlation(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert tied == pytest.approx(0.8660254)


def test_a_plan_keeps_the_kv_heads_that_the_best_heads_read_dense():
    score = torch.zeros(3, 4)
    score[0, 1], score[2, 3], score[2, 2] = 3.0, 2.0, 1.0
    made = record(score)
    assert made.kv_heads(2, 2) == [(0, 0), (2, 1)] == made.kv_heads(3, 2)
    rest = "sink_window:sinks=1,window=3"
    plan = made.plan(2, 2, rest)
    assert plan == [["dense", rest], [rest, rest], [rest, "dense"]]
    with pytest.raises(ValueError, match="4 query heads do not divide evenly over 3"):
        made.kv_heads(2, 3)
    model = build("llama")
    with torch.no_grad():
        plain = model(prompt(20)).logits
        for slots in ({"prefill": record(torch.ones(4, 4)).plan(16, 2, rest)}, {}):
            with attach(model, **slots):
                torch.testing.assert_close(model(prompt(20)).logits, plain, rtol=1e-4, atol=1e-4)
        some = record(torch.rand(4, 4)).plan(3, 2, rest)
        with attach(model, prefill=some):
            assert not torch.allclose(model(prompt(20)).logits, plain, atol=1e-3)


def test_a_record_survives_its_files(tmp_path):
    made = record(torch.randn(4, 4))
    back = load_record(made.save(tmp_path))
    assert torch.equal(back["x"], made["x"]) and back.about == made.about
    assert back.score == "x" and back.axes == made.axes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.safetensors"]
    back.fit(build("llama"))
    with pytest.raises(ValueError, match="2 layers of 3 heads; this model has 4 of 4"):
        record(torch.zeros(2, 3)).fit(build("llama"))


def test_files_that_are_no_records_are_refused(tmp_path):
    path = record(torch.randn(2, 2)).save(tmp_path)
    with pytest.raises(ValueError, match="cannot be used"):
        load_record(tmp_path / "none.json")
    text = json.loads(path.read_text())
    path.write_text(json.dumps(text | {"format": "foveate.record/9"}))
    with pytest.raises(ValueError, match=r"format is 'foveate.record/9'"):
        load_record(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot be used"):
        load_record(path)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="x has shape"):
        Record("a", {"x": torch.zeros(2, 3)}, {"x": ("layer",)})
    with pytest.raises(ValueError, match="no score by layer and head"):
        Record("a", {"x": torch.zeros(2)}, {"x": ("layer",)}, "x")
    with pytest.raises(KeyError, match="a has no 'y'; it has x"):
        record(torch.zeros(2, 2))["y"]
    with pytest.raises(ValueError, match="score must be"):
        rank_heads(torch.zeros(3))
