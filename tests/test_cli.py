"""The command line: what it prints, and how it refuses bad input."""

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers as hf

from foveate import registry
from foveate.bench import compare as bench_compare

SMALL = [
    "--tokens=96",
    "--decode-tokens=4",
    "--repeats=2",
    "--needles=1",
    "--needle-tokens=80",
    "--with=sink_window:window=16,sinks=2,block=16",
]


@pytest.fixture
def run(foveate_command):
    """Call `foveate`."""
    return foveate_command


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_compare_measures_and_writes_the_report(run, tiny_model_dir, tmp_path):
    code, out, err = run("compare", tiny_model_dir, *SMALL, "--out", tmp_path / "new")
    assert code == 0
    data = results(tmp_path / "new")
    assert data["complete"] and data["schema"] == "foveate.compare/2"
    assert [m["spec"] for m in data["mechanisms"]] == ["dense", SMALL[-1].removeprefix("--with=")]
    assert "sink_window" in out and "report.html" in err and "peak" not in out
    maps = {m["spec"]: m["map"] for m in data["measurements"] if m["kind"] == "map"}
    assert list(maps) == data["settings"]["specs"] and maps["dense"][1][:3] == [1.0, 1.0, None]
    page = (tmp_path / "new" / "report.html").read_text()
    assert "sink_window" in page and len(page) < 3e6


def test_a_second_run_finds_everything_measured(run, tiny_model_dir, tmp_path):
    run("compare", tiny_model_dir, *SMALL, "--out", tmp_path)
    before = results(tmp_path)["measurements"]
    code, _, err = run("compare", tiny_model_dir, *SMALL, "--out", tmp_path)
    assert code == 0 and f"resuming: {len(before)}" in err
    assert results(tmp_path)["measurements"] == before


def test_an_interrupt_keeps_what_is_finished_and_the_next_run_goes_on(
    run, tiny_model_dir, tmp_path, monkeypatch
):
    measure = bench_compare.Comparison._measure_round

    def interrupted(self, tokens, repeat, specs):
        if repeat == 1:
            raise KeyboardInterrupt
        measure(self, tokens, repeat, specs)

    monkeypatch.setattr(bench_compare.Comparison, "_measure_round", interrupted)
    code, _, err = run("compare", tiny_model_dir, *SMALL, "--out", tmp_path)
    kept = results(tmp_path)
    assert code == 130 and "interrupted" in err and "Traceback" not in err
    assert not kept["complete"] and (tmp_path / "report.html").exists()
    assert {m["kind"] for m in kept["measurements"]} >= {"quality", "timing"}
    monkeypatch.setattr(bench_compare.Comparison, "_measure_round", measure)
    code, _, err = run("compare", tiny_model_dir, *SMALL, "--out", tmp_path)
    done = results(tmp_path)
    assert code == 0 and "resuming" in err and done["complete"]
    assert done["measurements"][: len(kept["measurements"])] == kept["measurements"]


def test_every_length_is_measured_and_more_can_follow(run, tiny_model_dir, tmp_path):
    options = [*SMALL[1:-1], "--with=cache=window:budget=16,sinks=2", "--out", tmp_path]
    code, out, _ = run("compare", tiny_model_dir, "--tokens=128,96", *options)
    first = results(tmp_path)
    assert code == 0 and first["complete"] and first["settings"]["lengths"] == [96, 128]
    assert "peak" in out
    for kind, count in {"quality": 4, "timing": 8, "needle": 4, "map": 2}.items():
        found = [m["tokens"] for m in first["measurements"] if m["kind"] == kind]
        assert len(found) == count and set(found) == ({128} if kind == "map" else {96, 128})
    dense, window = first["summary"]
    assert [x["tokens"] for x in window["by_length"]] == [96, 128] and window["tokens"] == 128
    assert (
        window["kv_bytes"] < dense["kv_bytes"] / 4 and window["peak_kv_bytes"] > window["kv_bytes"]
    )
    code, _, err = run("compare", tiny_model_dir, "--tokens=96,128,160", *options)
    grown = results(tmp_path)
    assert code == 0 and "resuming" in err and grown["complete"]
    assert grown["measurements"][: len(first["measurements"])] == first["measurements"]
    assert {m["tokens"] for m in grown["measurements"]} == {96, 128, 160}
    assert "128" in (tmp_path / "report.html").read_text()


def test_markdown_prints_the_table_alone(run, tiny_model_dir, tmp_path):
    code, out, err = run("compare", tiny_model_dir, *SMALL, "--markdown", "--out", tmp_path)
    lines = out.strip().splitlines()
    assert code == 0 and lines[0].startswith("96 tokens, 4 decoded") and "report.html" in err
    assert [line.split("|")[1].strip() for line in lines[4:]] == [
        "`dense`",
        f"`{SMALL[-1].removeprefix('--with=')}`",
    ]


def test_a_true_ctrl_c_ends_with_130_and_no_traceback(tiny_model_dir, tmp_path):
    command = [sys.executable, "-c", "from foveate.cli import main; main()", "compare"]
    many = [*SMALL, "--repeats=500", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [*command, str(tiny_model_dir), *many],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Background jobs of a shell ignore interrupts, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        file = tmp_path / "results.json"
        if file.exists() and len(json.loads(file.read_text())["measurements"]) > 3:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err and b"interrupted" in err
    assert len(results(tmp_path)["measurements"]) > 3


def test_a_full_disk_is_told_and_the_old_results_stay(run, tiny_model_dir, tmp_path, monkeypatch):
    run("compare", tiny_model_dir, *SMALL, "--out", tmp_path)
    before = (tmp_path / "results.json").read_text()

    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    more = ["--with=sink_window:window=8,sinks=1,block=8"]
    code, _, err = run("compare", tiny_model_dir, *SMALL, *more, "--out", tmp_path)
    assert code == 2 and "No space left" in err and "Traceback" not in err
    monkeypatch.undo()
    assert (tmp_path / "results.json").read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "results.json"]


def test_other_settings_need_another_folder_or_fresh(run, tiny_model_dir, tmp_path):
    run("compare", tiny_model_dir, *SMALL, "--out", tmp_path)
    code, _, err = run("compare", tiny_model_dir, *SMALL, "--seed=3", "--out", tmp_path)
    assert code == 2 and "seed=0" in err and "--fresh" in err
    code, _, _ = run("compare", tiny_model_dir, *SMALL, "--seed=3", "--fresh", "--out", tmp_path)
    assert code == 0 and results(tmp_path)["settings"]["seed"] == 3


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": "other/9"}'])
def test_a_file_that_is_no_results_file_is_not_overwritten(run, tiny_model_dir, tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    code, _, err = run("compare", tiny_model_dir, *SMALL, "--out", tmp_path)
    assert code == 2 and "--fresh" in err
    assert (tmp_path / "results.json").read_text() == content


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--with=flexprefil"], "did you mean 'flexprefill'"),
        (["--with=sink_window:windw=8"], "did you mean 'window'"),
        (["--with=sink_window:window=x"], "must be int, got 'x'"),
        (["--with=sink_window:window=0"], "window must be at least 1"),
        (["--with=sink_window:window"], "must read key=value"),
        (["--with=prefill=tidal"], "cannot fill the slot prefill"),
        (["--with=tidal+decode=recycled"], "twice"),
        (["--tokens=0"], "tokens must be at least 1"),
        (["--tokens=1k,x"], "--tokens: 'x' is no length"),
        (["--tokens="], "at least one"),
        (["--needle-tokens=0"], "needle_tokens must be at least 1"),
        (["--tokens=96", "--needle-tokens=9"], "a needle prompt needs more than"),
        (["--repeats=0"], "repeats must be at least 1"),
        (["--threads=0"], "at least 1"),
    ],
)
def test_bad_options_are_refused_in_one_line(run, tiny_model_dir, tmp_path, args, words):
    code, _, err = run("compare", tiny_model_dir, *args, "--out", tmp_path)
    assert code == 2 and words in err and "Traceback" not in err
    assert err.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\0\1binary", "binary"),
        (b"\xff\xfe\xfa", "UTF-8"),
        (b"a few words", "has"),
    ],
)
def test_bad_texts_are_refused(run, tiny_model_dir, tmp_path, content, words):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    code, _, err = run("compare", tiny_model_dir, *SMALL, "--text", text, "--out", tmp_path / "out")
    assert code == 2 and words in err and "Traceback" not in err


def test_a_missing_text_is_refused(run, tmp_path):
    code, _, err = run("compare", "--text", tmp_path / "none.txt", "--out", tmp_path / "out")
    assert code == 2 and "none.txt" in err


def test_a_directory_without_a_model_is_refused(run, tmp_path):
    code, _, err = run("compare", tmp_path, "--out", tmp_path / "out")
    assert code == 2 and "config.json is missing" in err


def test_an_encoder_is_refused(run, tmp_path):
    config = hf.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    hf.BertModel(config).save_pretrained(tmp_path / "bert")
    code, _, err = run("compare", tmp_path / "bert", "--out", tmp_path / "out")
    assert code == 2 and "encoder-only" in err


def test_tokens_beyond_the_context_need_allow_long(run, tiny_model_dir, tmp_path):
    long = ["--tokens=600", *SMALL[1:]]
    code, _, err = run("compare", tiny_model_dir, *long, "--out", tmp_path)
    assert code == 2 and "context of 512" in err and "--allow-long" in err and "504" in err
    code, _, err = run("compare", tiny_model_dir, *long, "--allow-long", "--out", tmp_path)
    assert code == 0 and "warning" in err and results(tmp_path)["complete"]


def test_an_unwritable_folder_is_refused_before_the_model_is_loaded(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = run("compare", "--out", tmp_path / "file" / "out")
    assert code == 2 and "cannot write to" in err


def test_debug_shows_the_traceback(run, tmp_path):
    with pytest.raises(ValueError, match="unknown mechanism"):
        run("--debug", "compare", "--with=nothing_like_it", "--out", tmp_path)


def test_a_mechanism_of_ones_own_is_compared_through_a_plugin(run, tiny_model_dir, tmp_path):
    plugin = tmp_path / "my_band.py"
    plugin.write_text(
        "from dataclasses import dataclass\n"
        "from foveate import Card, register, window\n"
        "from foveate.attention.base import Pattern\n"
        "@register(Card(name='my_band', title='Mine', claim='near is enough', kind='attention',\n"
        "               family='sparse'))\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class MyBand(Pattern):\n"
        "    width: int = 32\n"
        "    def mask(self, q_len, k_len, call):\n"
        "        return window(self.width)\n"
    )
    try:
        own = ["--with=my_band:width=8", "--out", tmp_path / "out"]
        code, out, _ = run("--plugin", plugin, "compare", tiny_model_dir, *SMALL, *own)
        assert code == 0 and "my_band" in out
        code, out, _ = run("show", "my_band")
        assert code == 0 and "near is enough" in out
    finally:
        registry._classes.pop("my_band")
        sys.modules.pop("my_band")


def test_a_plugin_that_is_not_there_is_refused(run):
    code, _, err = run("--plugin", "missing.py", "list")
    assert code == 2 and "not a Python file" in err


def test_list_shows_every_mechanism(run):
    code, out, _ = run("list")
    assert code == 0 and all(card.name in out for card in registry.find())
    code, out, _ = run("list", "--kind", "cache")
    assert "snapkv" in out and "flexprefill" not in out
    code, _, err = run("list", "--kind", "caches")
    assert code == 2 and "no mechanism matches" in err


def test_show_tells_the_card_and_the_options(run):
    code, out, _ = run("show", "flexprefill")
    assert code == 0 and "FlexPrefill" in out and "gamma" in out
    code, _, err = run("show", "flexprefil")
    assert code == 2 and "did you mean" in err


def test_papers_counts_all_331(run):
    code, out, _ = run("papers")
    assert code == 0 and "331 papers" in out and "28 not a mechanism" in out
    code, out, _ = run("papers", "--family", "sparse", "--missing")
    assert "in the library:" not in out and "planned" in out
    code, _, err = run("papers", "--family", "nonsense")
    assert code == 2 and "known:" in err


def test_model_says_where_the_built_in_model_is(run, monkeypatch, tmp_path):
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    code, out, _ = run("model")
    assert code == 0 and str(tmp_path) in out.replace("\n", "") and "not there yet" in out
    code, out, _ = run("model", "--remove")
    assert code == 0 and "nothing to remove" in out


def test_audit_prints_a_table_without_an_empty_cell(run, tmp_path):
    page = tmp_path / "audit.md"
    code, out, _ = run("audit", "sink_window", "window", "--markdown", page)
    assert code == 0 and "no look-ahead" in out and "bytes held = claimed" in out
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    cells = [cell.strip() for row in rows for cell in row.strip("|").split("|")]
    assert len(rows) > 20 and all(cells)
    assert set("".join(cells[i] for i in range(1, len(cells), 2))) >= {"✓"}
    code, _, err = run("audit", "sink_windo")
    assert code == 2 and "did you mean" in err


def test_a_failed_property_is_shown_and_ends_with_1(run, monkeypatch):
    from foveate.bench.audit import Fault, attention

    def broken(cls):
        raise Fault("off by one")

    monkeypatch.setitem(attention.PROPERTIES, "batch", broken)
    code, out, _ = run("audit", "sink_window")
    assert code == 1 and "failed: off by one" in out and "✗" in out
