"""`foveate bench kernels`: its file, its page, its refusals, and that it measures what it says."""

import json
import re
import warnings
from functools import partial

import pytest
import torch

from foveate import native, ops
from foveate.bench.kernels import benches, inputs, race, rivals, run, trial
from foveate.bench.lengths import lengths_of
from foveate.report import kernels as page
from foveate.report import kernels_rows
from foveate.report.page import HERE

QUICK = ["--quick", "--sizes=64"]
FEW = [*QUICK, "--only=attend,window"]


@pytest.fixture
def call(foveate_command):
    """Call `foveate bench kernels`."""
    return partial(foveate_command, "bench", "kernels")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A quick run of every bench."""
    settings = run.Settings(sizes=(64,), rounds=1, quick=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an installation without kernels says so
        job = run.KernelRun(tmp_path_factory.mktemp("kernels"), settings, command="foveate …")
    for _, step in job.todo():
        step()
    job.finish()
    return json.loads(job.path.read_text())


def held(folder):
    return json.loads((folder / "kernels.json").read_text())


def data_of(text):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found.group(1))


def test_a_quick_run_prints_a_table_and_writes_file_and_page(call, tmp_path):
    code, out, err = call(*FEW, "--out", tmp_path)
    assert code == 0 and "dense, causal, with lse" in out and "kernels.html" in err
    assert held(tmp_path)["complete"] and (tmp_path / "kernels.html").exists()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["kernels.html", "kernels.json"]


def test_the_file_holds_what_it_promises(results):
    assert results["schema"] == "foveate.kernels/1" and results["complete"]
    assert results["machine"]["isa"] == native.isa() and results["machine"]["torch"]
    assert {line["bench"] for line in results["lines"]} == set(benches.BENCHES)
    for line in results["lines"]:
        spreads = [line["seconds"], line["gflops"], *line["limits"].values()]
        spreads += [rival["ratio"] for rival in line["rivals"].values() if "ratio" in rival]
        assert all(0 < x["min"] <= x["median"] <= x["max"] for x in spreads)
        rate = line["flops"] / line["seconds"]["median"] / 1e9
        assert line["gflops"]["median"] == pytest.approx(rate, rel=1e-6)
        assert all(rival.get("ratio") or rival["skipped"] for rival in line["rivals"].values())


def test_an_interrupt_keeps_what_is_finished_and_the_next_run_goes_on(call, tmp_path, monkeypatch):
    measured, true = [], run.measure

    def stopped(*args):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(args)
        return true(*args)

    monkeypatch.setattr(run, "measure", stopped)
    code, _, err = call(*FEW, "--out", tmp_path)
    kept = held(tmp_path)
    assert code == 130 and "interrupted" in err and not kept["complete"]
    assert len({line["trial"] for line in kept["lines"]}) == 2
    assert "This run is not finished" in (tmp_path / "kernels.html").read_text()
    monkeypatch.setattr(run, "measure", true)
    code, _, err = call(*FEW, "--out", tmp_path)
    done = held(tmp_path)
    assert code == 0 and f"resuming: {len(kept['lines'])}" in err and done["complete"]
    assert done["lines"][: len(kept["lines"])] == kept["lines"] != done["lines"]


def test_a_run_of_other_settings_is_overwritten_only_when_asked(call, tmp_path):
    few = [*QUICK, "--only=attend", "--out", tmp_path]
    call(*few)
    before = held(tmp_path)
    code, _, err = call(*few, "--rounds=2")
    assert code == 2 and "rounds=5, now it is 2" in err and "--fresh" in err
    assert held(tmp_path) == before
    code, _, _ = call(*few, "--rounds=2", "--fresh")
    assert code == 0 and held(tmp_path)["settings"]["rounds"] == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": "foveate.compare/1"}'])
def test_a_file_of_something_else_is_refused(text, call, tmp_path):
    (tmp_path / "kernels.json").write_text(text)
    code, _, err = call(*FEW, "--out", tmp_path)
    assert code == 2 and "--fresh" in err and (tmp_path / "kernels.json").read_text() == text


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--only=attend,nothing", "unknown bench 'nothing'; known: attend, window"),
        ("--sizes=1k,4x", "'4x' is no length"),
        ("--sizes=1k,,2k", "'' is no length"),
        ("--sizes=0", "sizes must be from 64"),
        ("--sizes=2048k", "got 2,097,152"),
        ("--rounds=0", "rounds must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(option, said, call, tmp_path):
    code, _, err = call(option, "--out", tmp_path / "new")
    assert code == 2 and said in err and "Traceback" not in err
    assert not (tmp_path / "new").exists()


def test_lengths_are_read():
    assert lengths_of("512, 4k,1K", "--sizes") == (512, 4096, 1024)
    assert lengths_of("", "--sizes") == ()


# --- the page --------------------------------------------------------------------------------


def test_the_page_stands_alone_and_is_small(results):
    text = page.render(results)
    assert len(text.encode()) < 2e6 and text.endswith("</html>\n")
    library = (HERE / "vendor/plotly-basic-4.1.1.min.js").read_text(encoding="utf-8")
    assert library in text
    ours = text.replace(library, "")
    assert not re.search(r"https?://|@import|url\(|\bfetch\(|\ssrc=|<link", ours)
    assert "default-src 'none'" in ours


def test_plots_hold_every_line(results):
    data = data_of(page.render(results))
    lines = results["lines"]
    want = [(x["flops"] / x["bytes"], x["gflops"]["median"]) for x in lines]
    assert [(p["x"], p["y"]) for p in data["points"]] == want
    assert set(data["bars"]) == set(benches.BENCHES)
    assert sum(len(bars) for bars in data["bars"].values()) == len(lines)
    for roof in data["roofs"]:
        assert roof["GEMM"] > 0 and roof["copy"] > 0
    for box in ("roofline", "ratios", "shares"):
        assert f'id="{box}"' in page.render(results)


def test_goals_are_counted_and_those_missed_are_named(results):
    line = results["lines"][0] | {
        "goals": [
            {"over": "GEMM", "bar": 0.6, "value": 0.65, "met": True},
            {"over": "dense SDPA", "bar": 1.5, "value": 1.25, "met": False},
            {"over": "dense SDPA", "bar": 9.0, "value": None, "met": None},
        ]
    }
    changed = results | {"lines": [line]}
    assert kernels_rows.tally(changed) == (1, 2)
    (said,) = kernels_rows.missed(changed)
    assert "1.25× where ≥ 1.50× dense SDPA was the goal" in said
    text = page.render(changed)
    assert "1 of 2 goals met" in text and said in text and "≥ 60.0 % of the GEMM rate" in text


def test_an_empty_run_has_a_page(results):
    text = page.render(results | {"lines": [], "complete": False})
    assert "Nothing measured yet" in text and "This run is not finished" in text


def test_hostile_names_stay_text(results):
    hostile = "</script><script>alert('x')</script>\"&<img src=x onerror=alert(1)>"
    lines = [line | {"name": hostile, "bench": hostile} for line in results["lines"][:1]]
    machine = results["machine"] | {"cpu": hostile}
    text = page.render(results | {"lines": lines, "machine": machine, "command": hostile})
    assert "<img" not in text and "<script>alert" not in text
    assert list(data_of(text)["bars"]) == [hostile]


def test_another_schema_is_refused():
    with pytest.raises(ValueError, match="schema is 'other/1'"):
        page.render({"schema": "other/1"})


def test_markdown_has_a_row_for_every_line(results):
    rows = [x for x in page.markdown(results).splitlines() if x.startswith("|")]
    assert len(rows) == 2 + len(results["lines"])
    assert {row.count("|") for row in rows} == {9}


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.345, "12.3 s"), (0.01234, "12.3 ms"), (4.2e-5, "42.0 µs")]
)
def test_durations_read_well(seconds, text):
    assert kernels_rows.duration(seconds) == text


# --- what is measured ------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that contenders wind on by themselves: `take(name, seconds…)`, and who ran when."""
    now, order = [0.0], []
    monkeypatch.setattr(race.time, "perf_counter", lambda: now[0])

    def take(name, *seconds):
        left = list(seconds)

        def step():
            order.append(name)
            now[0] += left.pop(0) if len(left) > 1 else left[0]

        return step

    return take, order


def test_rounds_are_interleaved_and_the_first_does_not_count(clock):
    take, order = clock
    who = {
        "a": race.Contender(take("a", 9e-3, 0.1, 0.1)),
        "b": race.Contender(take("b", 0.1, 0.2, 0.05)),
    }
    times = race.race(who, 2)
    assert "".join(order) == "abbaab"
    assert list(times.seconds["a"].values()) == pytest.approx([0.1, 0.1])
    assert list(times.seconds["b"].values()) == pytest.approx([0.2, 0.05])
    assert times.ratios("b", "a") == pytest.approx([2.0, 0.5])
    assert times.ratios("b", "a", factor=3) == pytest.approx([6.0, 1.5])


def test_what_takes_long_runs_once_and_is_set_against_every_round(clock):
    take, order = clock
    who = {
        "slow": race.Contender(take("slow", 20.0)),
        "own": race.Contender(take("own", 0.1, 0.2, 0.4)),
    }
    times = race.race(who, 2)
    assert order.count("slow") == 1 and times.ratios("slow", "own") == pytest.approx([100, 50])


def test_seconds_are_those_of_one_call(clock):
    take, _ = clock
    times = race.race({"a": race.Contender(take("a", 1.0), calls=4)}, 1)
    assert times.seconds["a"] == {1: 0.25}


def test_compiling_is_reported_apart_and_a_failure_has_its_reason(clock):
    take, _ = clock

    def broken():
        raise RuntimeError("no such header\nmore")

    who = {
        "flex": race.Contender(take("flex", 10.0, 0.5), compiles=True),
        "broken": race.Contender(broken, compiles=True),
    }
    times = race.race(who, 2)
    assert times.compiling == {"flex": pytest.approx(9.5)}
    assert times.seconds["flex"] == {1: 0.5, 2: 0.5} and "broken" not in times.seconds
    assert times.skipped == {"broken": "did not compile: no such header"}


def test_shares_ratios_and_goals_come_from_the_same_rounds(clock):
    take, _ = clock
    limits = trial.Limits(8, 1)
    limits.contenders = lambda: {
        trial.GEMM: race.Contender(take("gemm", 1.0)),
        trial.COPY: race.Contender(take("copy", 0.5)),
    }
    line = trial.Line(
        "x",
        "own",
        {"tokens": 1},
        flops=limits.flops / 2,
        bytes=limits.bytes,
        rivals={"rival": trial.Rival("r"), "absent": trial.Rival("gone")},
        goals={"GEMM": 0.25, "rival": 4.0, "absent": 1.0},
    )
    who = {"own": race.Contender(take("own", 2.0)), "r": race.Contender(take("r", 6.0))}
    cast = trial.Cast(who, [line], {"gone": "too long"})
    (record,) = trial.measure(trial.Trial("b", "t", 1, lambda: cast), limits, 1)
    assert record["shares"]["GEMM"]["median"] == pytest.approx(0.25)
    assert record["shares"]["copy"]["median"] == pytest.approx(0.25)
    assert record["rivals"]["rival"]["ratio"]["median"] == pytest.approx(3.0)
    assert record["rivals"]["absent"] == {"skipped": "too long"}
    assert [goal["met"] for goal in record["goals"]] == [True, False, None]


def test_useful_work_is_that_of_the_visible_pairs():
    tokens, heads = 300, inputs.SMALL
    per_pair = 4 * heads.dim * heads.q
    seen = (ops.window(256) & ops.causal()).to_dense(tokens, tokens)
    cast = benches._window_cast(tokens, 1, quick=True)
    assert cast.lines[0].flops == per_pair * int(seen.sum())
    dense = benches._attend_cast(heads, tokens).lines[0]
    assert dense.flops == per_pair * tokens * (tokens + 1) // 2


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_layouts_have_their_density_and_every_query_its_own_block(density):
    layout = inputs.random_layout(inputs.SMALL, 2048, 32, density)
    chosen = layout.to_bool()
    visible = ops.causal_map((2048, 2048), (32, 32))
    share = chosen.sum((-1, -2)) / visible.sum()
    assert bool((share - density).abs().max() < 0.01)
    assert bool(chosen.diagonal(dim1=-2, dim2=-1).all()) and not bool((chosen & ~visible).any())


@pytest.mark.filterwarnings("ignore")  # FlexAttention advises against running uncompiled
def test_flex_attention_is_given_the_same_window(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    q, k, v = held_inputs = inputs.random_qkv(inputs.SMALL, 256)
    with torch.inference_mode():
        near = rivals.flex_window(held_inputs, 100)
        want = ops.attend(q, k, v, mask=ops.window(100), causal=True)
        torch.testing.assert_close(near.run(), want)


def test_flex_attention_is_given_the_same_lists(monkeypatch):
    # Uncompiled it ignores lists, so what it is given is compared instead of what it gives.
    given = []
    monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda *_, **more: given.append(more))
    layout = inputs.random_layout(inputs.SMALL, 512, 64, 0.4)
    (contender,) = rivals.flex_lists(inputs.random_qkv(inputs.SMALL, 512), [layout])
    contender.run()
    mask = given[0]["block_mask"]
    assert mask.BLOCK_SIZE == (64, 64) and given[0]["enable_gqa"]
    assert torch.equal(mask.to_dense().bool(), layout.to_bool())
    assert bool((mask.kv_num_blocks == 1).all())  # only the own block is looked into


def test_caches_are_far_from_the_processor():
    small, large = (torch.zeros(n) for n in (1 << 10, 1 << 23))
    assert len(inputs.layers_of([small])) == 32 and len(inputs.layers_of([large, large])) == 2
    copies = inputs.layers_of([small])
    assert len({x.data_ptr() for (x,) in copies}) == 32
