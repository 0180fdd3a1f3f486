import importlib
import json
from functools import partial

import pytest

from foveate import registry
from foveate.bench import claims
from foveate.bench.claims import run
from foveate.report import claims as page

# Compared with by everyone, but no papers of the list.
BASELINES = {"auto", "core_stats", "duo", "h2o", "quarot", "snapkv", "window"}
# Nor are building blocks of papers of the list.
BASELINES |= {"gated_deltanet", "gla", "hgrn", "hgrn2", "linattn", "mamba2", "retnet", "s6"}


@pytest.fixture
def call(foveate_command):
    """Call `foveate claims`."""
    return partial(foveate_command, "claims")


@pytest.fixture
def experiment(monkeypatch):
    """Experiments of no cost in place of the real ones; counts how often each ran."""
    ran = []

    def check(family, name):
        ran.append(name)
        outcome = claims.Outcome({"gain": 2.0}, name != "hip", "small | sample")
        word = claims.VERDICTS[outcome.holds]
        return claims.Verdict(name, family, "less is more", word, outcome.figures, "a | b", 0.1)

    monkeypatch.setattr(run, "check", check)
    return ran


def test_every_claim_belongs_to_a_mechanism_and_says_what_is_to_be_seen():
    for family, name in claims.chosen():
        card = registry.lookup(name).card
        experiment = importlib.import_module(f"foveate.bench.claims.{family}.{name}")
        assert card.family == family and (card.paper is not None or name in BASELINES)
        assert len(experiment.CLAIM.split()) > 5


def test_verdicts_are_kept_and_not_found_again(call, experiment, tmp_path):
    names = [name for _, name in claims.chosen()][:2]
    code, out, err = call(*names, "--out", tmp_path / "c.json")
    assert code == 0 and all(name in out for name in names) and "c.json" in err
    assert call(*names, "--out", tmp_path / "c.json")[0] == 0
    assert experiment == names
    assert set(json.loads((tmp_path / "c.json").read_text())["verdicts"]) == set(names)
    call(names[0], "--out", tmp_path / "c.json", "--fresh")
    assert experiment == [*names, names[0]]


def test_markdown_has_a_row_for_each_and_bars_do_not_break_it(call, experiment, tmp_path):
    call("--out", tmp_path / "c.json", "--markdown", tmp_path / "c.md")
    rows = [x for x in (tmp_path / "c.md").read_text().splitlines() if x.startswith("| ")]
    assert len(rows) == len(claims.chosen()) + len(claims.families())
    assert all(row.replace(r"\|", "").count("|") == 5 for row in rows)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nothing"], "no claim for 'nothing'"),
        (["--family", "none"], "no claims for family 'none'; known:"),
        (["--out", "kept.json"], "kept.json is not a file of this version"),
    ],
)
def test_refuses_what_it_does_not_know(call, tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept.json").write_text('{"schema": "other"}')
    code, _, err = call(*args)
    assert code == 2 and said in err and "Traceback" not in err


def test_a_claim_that_fails_stays_in_the_table():
    verdict = {"family": "sparse", "name": "x", "verdict": claims.VERDICTS[False], "claim": "c"}
    lines = page.markdown([verdict | {"figures": {"KL": 0.25}, "remark": "small"}], machine())
    assert "| x | not reproduced | c | KL: 0.250<br>small |" in lines


def machine():
    return {"cpu": "a processor", "threads": 2, "torch": "2"}
