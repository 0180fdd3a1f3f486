"""The page of `foveate compare`: complete, offline, small, safe, and written in one step."""

from __future__ import annotations

import io
import json
import re
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from foveate.report import answer, compare, decoding, figures, numbers, records, table, terminal
from foveate.report.page import HERE
from report_example import example_results, interrupted_results

HOSTILE = "</script><script>alert('x')</script>\"&<img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text found inside each tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while tag in self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self.open), data))


def body_of(page: str) -> str:
    """The page without the vendored plotting library."""
    library = (HERE / "vendor/plotly-basic-4.1.1.min.js").read_text(encoding="utf-8")
    assert library in page
    return page.replace(library, "")


def plot_data(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found.group(1))


@pytest.fixture(scope="module")
def page() -> str:
    return compare.render(example_results())


def test_every_mechanism_is_in_table_plots_needles_and_maps(page: str) -> None:
    specs = [mechanism["spec"] for mechanism in example_results()["mechanisms"]]
    shown = unescape(body_of(page).replace("<wbr>", ""))
    sections = shown.split("<section")
    for title in ("Every mechanism", "Speed against fidelity", "Needles by", "What each"):
        section = next(text for text in sections if title in text)
        assert all(f"<code>{spec}</code>" in section for spec in specs), title
    assert [m["spec"] for m in plot_data(page)["mechanisms"]] == specs


def test_answer_names_the_winner_its_gain_its_cost_and_its_code(page: str) -> None:
    results = example_results()
    winner = next(record for record in results["summary"] if record["winner"])
    said = answer.answer(results)
    assert said.spec == "flexprefill"
    assert f"{winner['end_to_end_speedup']['median']:.2f}×" in said.after
    assert "+0.6% perplexity" in said.after
    assert results["winner"]["python"] in unescape(page)
    assert "This run is not finished" not in page


def test_dense_stays_when_nothing_is_faster() -> None:
    results = example_results() | {"winner": None}
    for record in results["summary"]:
        record["end_to_end_speedup"] = {"median": 0.9, "min": 0.8, "max": 1.0}
    results["summary"][2]["end_to_end_speedup"]["median"] = 0.95
    said = answer.answer(results)
    assert said.before == (
        "Dense attention stays the best choice here, because nothing ran faster end to end "
        "(the fastest, moba: 0.95×)."
    )
    assert "Dense attention stays" in compare.render(results)


def test_dense_stays_when_the_faster_ones_lose_quality() -> None:
    results = example_results()
    results["winner"] = {"spec": "dense", "python": "", "reason": "moba lost a needle"}
    said = answer.answer(results)
    assert said.before.endswith("no mechanism that ran faster kept the quality asked for.")
    assert (said.spec, said.reason) == ("", "moba lost a needle")


@pytest.mark.parametrize("kept", [0, 3, 40])
def test_an_interrupted_run_says_what_is_missing(kept: int) -> None:
    results = interrupted_results(kept)
    page = compare.render(results)
    assert "This run is not finished" in page
    assert "No answer yet" in page
    assert {row.cells[0].text for row in table.rows(results)} == {numbers.MISSING}
    missing = dict(answer.missing(results))
    everything = "timing (0 of 5 repeats), quality, needles at 10%, 30%, 50%, 70%, 90%"
    assert missing["cache=rotate_kv:bits=4"] == "; ".join(
        f"at {tokens} tokens {everything}" for tokens in ("1,024", "2,048", "4,096")
    )


def test_a_partly_measured_mechanism_owes_only_the_rest() -> None:
    results = example_results()
    results["measurements"] = [
        m
        for m in results["measurements"]
        if not (m["spec"] == "moba" and (m.get("repeat") == 4 or m.get("depth") == 0.3))
        or m["tokens"] == 1024
    ]
    owed = "timing (4 of 5 repeats), needles at 30%"
    assert answer.missing(results) == [("moba", f"at 2,048 tokens {owed}; at 4,096 tokens {owed}")]
    results["settings"]["lengths"] = [4096]
    assert answer.missing(results) == [("moba", owed)]


def test_a_summary_of_nulls_shows_dashes() -> None:
    results = example_results() | {"complete": False, "winner": None}
    empty = dict.fromkeys(results["summary"][0])
    results["summary"] = [
        empty | {"spec": m["spec"], "pareto": False, "winner": False, "notes": []}
        for m in results["mechanisms"]
    ]
    compare.render(results)
    assert {cell.text for row in table.rows(results) for cell in row.cells} == {numbers.MISSING}


def test_page_stays_small_even_with_many_mechanisms(page: str) -> None:
    assert len(page.encode()) < 1.6e6
    results = example_results()
    for kind in ("mechanisms", "measurements", "summary"):
        results[kind] = [
            record | {"spec": f"{record['spec']}#{i}" if i else record["spec"]}
            for i in range(20)
            for record in results[kind]
        ]
    assert len(compare.render(results).encode()) < 3e6


def test_page_loads_nothing_from_outside(page: str) -> None:
    parsed = Page(page)
    loads = [
        attrs[name]
        for _, attrs in parsed.elements
        for name in ("src", "href", "data", "action", "srcset", "poster")
        if name in attrs
    ]
    assert loads
    assert all(target and target.startswith("#") for target in loads)
    ours = body_of(page)
    assert not re.search(r"https?://|@import|url\(|\bfetch\(|XMLHttpRequest|\bimport\(", ours)
    policy = next(a["content"] for tag, a in parsed.elements if "http-equiv" in a)
    assert policy and policy.startswith("default-src 'none'")


def test_library_cannot_close_its_own_script_element() -> None:
    library = (HERE / "vendor/plotly-basic-4.1.1.min.js").read_text(encoding="utf-8")
    assert not re.search(r"</script|<!--", library, re.I)


def test_hostile_names_stay_text() -> None:
    results = example_results()
    results["model"]["name"] = results["settings"]["text"] = HOSTILE
    results["command"] = results["machine"]["cpu"] = HOSTILE
    results["winner"] = {"spec": HOSTILE, "python": HOSTILE, "reason": HOSTILE}
    results["mechanisms"][1] |= {"title": HOSTILE, "slots": {HOSTILE: HOSTILE}}
    for kind in ("mechanisms", "measurements", "summary"):
        for record in results[kind]:
            if record["spec"] == "flexprefill":
                record |= {"spec": HOSTILE, "answer": HOSTILE, "notes": [HOSTILE]}
    page = compare.render(results)
    plain, hostile = Page(compare.render(example_results())), Page(page)

    def scripts(parsed: Page) -> int:
        return sum(tag == "script" for tag, _ in parsed.elements)

    assert scripts(hostile) == scripts(plain)
    assert not any(tag == "img" or "onerror" in attrs for tag, attrs in hostile.elements)
    assert plot_data(page)["mechanisms"][1]["spec"] == HOSTILE
    title = "".join(text for inside, text in hostile.texts if inside[-1:] == ("title",))
    assert HOSTILE in title


def test_marks_go_where_they_belong(page: str) -> None:
    rows = {row.spec: row for row in table.rows(example_results())}
    assert [spec for spec, row in rows.items() if row.winner] == ["flexprefill"]
    assert [spec for spec, row in rows.items() if row.looks_ahead] == ["flexprefill", "prism"]
    assert rows["decode=tidal"].pareto and not rows["moba"].pareto
    assert page.count('href="#ahead"') == 2


def test_notes_become_numbered_footnotes_without_repeating_the_dagger() -> None:
    results = example_results()
    results["summary"][2]["notes"] = results["summary"][3]["notes"] = ["needs block 64"]
    assert table.footnotes(results) == ["needs block 64"]
    assert [row.notes for row in table.rows(results)][:4] == [[], [], [1], [1]]


def test_a_row_reads_as_the_summary_says() -> None:
    record = {
        "spec": "dense",
        "end_to_end_speedup": {"median": 1.416, "min": 1.371, "max": 1.452},
        "kv_bytes": 25_804_800,
        "kv_ratio": 0.1344,
        "needle": {"accuracy": 0.8, "by_depth": [[0.1, 0], [0.3, 1], [0.5, None]]},
        "prefill_quality": {"perplexity": 11.484, "perplexity_change": 0.58, "kl": 0.0, "top1": 1},
    }
    results = {"mechanisms": [{"spec": "dense"}], "summary": [record]}
    (row,) = table.rows(results)
    cells = {
        (group, column.title): (cell.text, cell.small)
        for (group, column), cell in zip(
            ((group, column) for group, columns in table.GROUPS.items() for column in columns),
            row.cells,
            strict=True,
        )
    }
    assert cells["Whole run", table.COLUMNS[0].title] == ("1.42", "1.37–1.45")
    assert cells["Whole run", "KV cache"] == ("25.8", "13.4%")
    assert cells["Whole run", "Needles found"] == ("80.0", "1 of 2")
    assert cells["Prefill", "Perplexity"] == ("11.5", "+0.6%")
    assert cells["Prefill", "KL to dense"] == ("0", "")
    assert cells["Decode", "Perplexity"] == (numbers.MISSING, "")


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (numbers.significant, 12.345, "12.3"),
        (numbers.significant, 0.01234, "0.0123"),
        (numbers.significant, 12345.6, "12,346"),
        (numbers.significant, 0.0, "0"),
        (numbers.significant, None, "—"),
        (numbers.speedup, 1.5, "1.50"),
        (numbers.percent, 0.957, "95.7"),
        (numbers.percent, 1.0, "100"),
        (numbers.change, 0.583, "+0.6%"),
        (numbers.change, -0.02, "−0.02%"),
        (numbers.change, 0.001, "±0%"),
        (numbers.change, 1234.5, "+1,234.5%"),
        (numbers.divergence, 0.0091, "0.0091"),
        (numbers.divergence, 3.14e-7, "3.1e−7"),
        (numbers.divergence, 0.0, "0"),
        (numbers.megabytes, 191_692_800, "192"),
        (numbers.megabytes, None, "—"),
    ],
)
def test_numbers_read_well(show: Any, value: float | None, text: str) -> None:
    assert show(value) == text


def test_pick_stops_at_the_first_null() -> None:
    assert records.pick({"a": {"b": None}}, "a", "b", "c") is None
    assert records.pick({"a": {"b": {"c": 0}}}, "a", "b", "c") == 0


def test_styles_are_distinct_and_dense_is_neutral() -> None:
    results = {"mechanisms": [{"spec": "dense"}] + [{"spec": f"m{i}"} for i in range(40)]}
    chosen = figures.styles(results)
    assert chosen["dense"][0] == 0
    assert all(colour > 0 for spec, (colour, _) in chosen.items() if spec != "dense")
    assert len(set(chosen.values())) == len(chosen)


def test_views_hold_only_what_acts_there_and_fronts_are_not_beaten(page: str) -> None:
    data = plot_data(page)
    mechanisms = data["mechanisms"]
    for view, absent in (("prefill", "decode=tidal"), ("decode", "moba")):
        points = {m["spec"]: m["points"][view] for m in mechanisms}
        assert points[absent] is None and points["dense"] is not None
        front = [mechanisms[i]["points"][view] for i in data["fronts"][view]]
        assert all(a["x"] < b["x"] and a["kl"] < b["kl"] for a, b in pairwise(front))
        for point in filter(None, points.values()):
            assert any(f["x"] >= point["x"] and f["kl"] <= point["kl"] for f in front)
    marked = {record["spec"] for record in example_results()["summary"] if record["pareto"]}
    assert {mechanisms[i]["spec"] for i in data["fronts"]["end_to_end"]} == marked


def test_dense_times_come_from_its_paired_runs() -> None:
    results = example_results()
    assert len(figures.prefill_times(results, "dense")) == 8 * 5
    assert len(figures.prefill_times(results, "moba")) == 5


def test_every_chart_has_a_line_per_mechanism_and_a_value_per_length(page: str) -> None:
    data = plot_data(page)
    assert data["lengths"] == [1024, 2048, 4096]
    assert [chart["title"] for chart in data["charts"]] == [c.title for c in decoding.CHARTS]
    results = example_results()
    for chart, drawn in zip(decoding.CHARTS, data["charts"], strict=True):
        for record, line in zip(results["summary"], drawn["lines"], strict=True):
            expected = [records.pick(x, *chart.column.path) for x in record["by_length"]]
            assert line["values"] == expected and len(line["texts"]) == 3
    per_token = next(c for c in data["charts"] if c["title"].startswith("Cache per token"))
    snapkv = per_token["lines"][list(figures.styles(results)).index("cache=snapkv:budget=512")]
    assert snapkv["texts"] == ["6.31 kB"] * 3
    boxes = [attrs for tag, attrs in Page(page).elements if attrs.get("class") == "plot chart"]
    assert len(boxes) == len(decoding.CHARTS) and all(box["aria-label"] for box in boxes)


def test_one_length_needs_no_charts_but_the_table_is_there() -> None:
    results = example_results()
    results["settings"]["lengths"] = [4096]
    page = compare.render(results)
    assert plot_data(page)["charts"] == [] and "plot chart" not in page
    lines = decoding.figures(results)
    assert [tokens for tokens, _ in lines["moba"]] == [4096]
    assert re.search(r"<details open>\s*<summary>The figures", page)


def test_what_was_not_measured_at_a_length_is_a_gap() -> None:
    results = example_results()
    results["summary"][1]["by_length"][0] = {"tokens": 1024}
    line = decoding.charts(results)[0]["lines"][1]
    assert line["values"][0] is None and None not in line["values"][1:]
    assert {cell.text for cell in decoding.figures(results)["flexprefill"][0][1]} == {"—"}
    compare.render(results)


@pytest.mark.parametrize(("width", "columns"), [(80, decoding.DECISIVE), (160, decoding.COLUMNS)])
def test_a_narrow_terminal_gets_the_columns_that_decide(width: int, columns: Any) -> None:
    shown = terminal.decoding(example_results(), width)
    assert len(shown.columns) == 2 + len(columns)
    console = Console(width=width, file=io.StringIO())
    console.print(shown)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert [line.split()[1] for line in lines if line.startswith(" moba")] == ["1,024"]
    assert sum(" 4,096 " in line for line in lines) == 9


def test_markdown_has_the_four_figures_that_decide_at_the_longest_length() -> None:
    results = example_results()
    results["summary"][7] |= {
        "kv_bytes": 52_000_000,
        "kv_ratio": 0.1372,
        "decode_tokens_per_second": {"median": 16.41, "min": 16.0, "max": 17.0},
        "decode_speedup": {"median": 1.257, "min": 1.2, "max": 1.3},
        "decode_quality": {"perplexity": 10.1, "perplexity_change": 2.6, "kl": 0.05, "top1": 0.9},
        "needle": {"accuracy": 0.6, "by_depth": [[0.1, 0], [0.5, 1], [0.9, 1]]},
    }
    text = decoding.markdown(results).splitlines()
    assert text[0].startswith("4,096 tokens, 64 decoded after them; Intel Xeon")
    head, rule, *lines = text[2:]
    assert head.count("|") == rule.count("|") == 6 and len(lines) == 9
    assert lines[7] == (
        "| `cache=snapkv:budget=512` | 52.0 (13.7%) | 16.4 (1.26×) | 10.1 (+2.6%) | 2 of 3 |"
    )
    results["summary"] = []
    assert decoding.markdown(results).splitlines()[-1].count("—") >= 4


def test_maps_keep_skipped_and_invisible_apart() -> None:
    results = example_results()
    quality = [m for m in results["measurements"] if m["kind"] == "quality"]
    results["measurements"] = [
        *quality,
        {
            "kind": "map",
            "spec": "moba",
            "tokens": 4096,
            "layer": 3,
            "head": 1,
            "phase": "prefill",
            "layers_shape": "30x9",
            "map": [[1.0, None], [0.0, 0.001]],
        },
    ]
    maps = {picture["spec"]: picture for picture in figures.block_maps(results)}
    assert maps["moba"]["cells"] == "z" + figures.NOT_VISIBLE + "01"
    assert maps["moba"]["density"] == "density 31.0%"
    assert maps["hip"]["cells"] is None
    results["measurements"] = results["measurements"][len(quality) :]
    (moba,) = (picture for picture in figures.block_maps(results) if picture["cells"])
    assert moba["density"] == "density not measured"
    assert "no map measured" in compare.render(results)


def test_wrong_schema_is_refused() -> None:
    with pytest.raises(ValueError, match=r"results: schema is 'other/2', expected 'foveate"):
        compare.render({"schema": "other/2"})


def test_write_gives_the_path_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = compare.write(example_results(), tmp_path / "report.html")
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_a_failing_write_leaves_the_old_file(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def half_written(draft: Path, text: str, encoding: str) -> None:
        draft.write_bytes(text[:10].encode(encoding))
        raise OSError("disk full")

    def refused(source: Path, target: Path) -> None:
        raise OSError("disk full")

    if step == "write_text":
        monkeypatch.setattr(Path, "write_text", half_written)
    else:
        monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(OSError, match="disk full"):
        compare.write(example_results(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
