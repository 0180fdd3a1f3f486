import base64
import json
import re
import shutil

import numpy
import pytest
import torch

from attached import prompt
from foveate.analysis.base import load_record
from foveate.bench.inspect.run import PARTS, check_parts
from foveate.bench.inspect.views import distances, looks, redundancy, views
from foveate.report import inspect as page
from test_watch import eager_maps
from tiny_models import build


@pytest.fixture(scope="module")
def inspected(tiny_model_dir, tmp_path_factory):
    """A folder that `foveate inspect` wrote, of a tiny model on 96 tokens."""
    from typer.testing import CliRunner

    from foveate.cli import app

    folder = tmp_path_factory.mktemp("inspect")
    args = ["inspect", str(tiny_model_dir), "--tokens", "96", "--out", str(folder)]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    return folder


def test_views_are_those_of_the_maps():
    model, ids = build("llama"), prompt(40)
    seen, maps = views(model, ids), eager_maps(model, ids)
    for layer, p in enumerate(maps):
        p, cell = p[0], torch.arange(40) * 32 // 40
        for i, j in ((0, 0), (5, 2), (31, 30), (20, 31)):
            want = p[:, cell == i][..., cell == j].sum(-1).mean(-1)
            torch.testing.assert_close(seen.maps[layer, :, i, j], want, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            seen.columns[layer], p.sum(1) / torch.arange(40, 0, -1), rtol=1e-4, atol=1e-6
        )
        apart = (torch.arange(40)[:, None] - torch.arange(40)).abs()
        for bin, (a, b) in enumerate(zip(distances(40), [1, 2, 4, 8, 16, 32, 64], strict=True)):
            want = (p * ((apart >= a) & (apart < b))).sum(-1).mean(-1)
            torch.testing.assert_close(seen.profiles[layer, :, bin], want, rtol=1e-4, atol=1e-5)
    assert seen.streams.shape == (5, 40)


def test_looks_are_the_largest_weights_of_every_row():
    model, ids, heads = build("llama"), prompt(40), [(1, 3), (2, 0), (2, 2)]
    found, maps = looks(model, ids, heads), eager_maps(model, ids)
    for i, (layer, head) in enumerate(heads):
        want = maps[layer][0, head].topk(4, -1).values
        torch.testing.assert_close(found.weights[i], want, rtol=1e-4, atol=1e-6)
        taken = maps[layer][0, head].gather(1, found.keys[i])
        torch.testing.assert_close(taken, want, rtol=1e-4, atol=1e-6)


def test_a_twin_is_redundant():
    maps = torch.eye(4).expand(2, 2, 4, 4).clone()
    maps[1, 1] = torch.eye(4).flip(0)
    assert redundancy(maps).flatten().tolist() == pytest.approx([1, 1, 1, 0])


def test_the_record_holds_every_part(inspected):
    data = json.loads((inspected / "inspect.json").read_text())
    assert {m["name"] for m in data["metrics"]} >= {"entropy", "sink", "redundancy", "importance"}
    assert all(len(m["values"]) == 2 and len(m["values"][0]) == 2 for m in data["metrics"])
    assert len(data["tokens"]) == 96
    kept = len(data["looks"]["heads"]) * 96 * data["looks"]["kept"]
    keys = numpy.frombuffer(base64.b64decode(data["looks"]["keys"]), "<u2")
    assert len(keys) == kept and keys.max() < 96
    assert len(base64.b64decode(data["maps"])) == 2 * 2 * 32 * 32
    assert {row["name"] for row in data["ablation"]["rows"]} >= {"none"}
    assert {o["name"] for o in data["overlays"]} == {"columns", "rollout", "lens"}
    assert load_record(inspected / "records" / "core_stats.json")["entropy"].shape == (2, 2)


def test_the_page_stands_alone_and_is_small(inspected):
    path = inspected / "inspect.html"
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 3e6
    assert not re.search(r"https?://(?!www\.w3\.org)|@import|\bfetch\(|\ssrc=|<link", text)


def test_only_the_parts_that_are_asked(foveate_command, tiny_model_dir, tmp_path):
    args = ("--tokens", 64, "--only", "ablation", "--out", tmp_path)
    code, out, err = foveate_command("inspect", tiny_model_dir, *args)
    assert code == 0 and "Spread" in out and "inspect.html" in err
    data = json.loads((tmp_path / "inspect.json").read_text())
    assert "retrieval" not in {m["name"] for m in data["metrics"]} and data["ablation"]
    assert check_parts(None) == PARTS


def test_an_interrupt_keeps_what_is_finished(
    foveate_command, tiny_model_dir, tmp_path, monkeypatch
):
    from foveate.bench.inspect import run

    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Inspection, "_ablation", stop)
    args = ("--tokens", 64, "--only", "ablation", "--out", tmp_path)
    code, _, err = foveate_command("inspect", tiny_model_dir, *args)
    assert code == 130 and "interrupted" in err
    assert (tmp_path / "inspect.html").exists() and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--tokens", "1"], "--tokens must be at least 2, got 1"),
        (["--only", "retreival"], "unknown part 'retreival'; did you mean 'retrieval'?"),
        (["--text", "none.txt"], "cannot read none.txt"),
        (["nowhere/at/all"], "There is no directory nowhere/at/all"),
    ],
)
def test_bad_input_is_named(foveate_command, tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    code, _, err = foveate_command("inspect", *args)
    assert code == 2 and said in err and "Traceback" not in err


def test_a_record_of_another_schema_is_refused():
    with pytest.raises(ValueError, match="schema is 'x'"):
        page.render({"schema": "x"})


@pytest.fixture
def browser():
    """A headless Chromium, where there is one."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_can_be_explored(inspected, browser, width):
    tab = browser.new_context(viewport={"width": width, "height": 900}, offline=True).new_page()
    said = []
    tab.on("console", lambda message: said.append(message.text) if message.type == "error" else 0)
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto((inspected / "inspect.html").as_uri())
    assert tab.locator("#grid button").count() == 4
    # By mouse: a head, a measure, a filter, a token.
    tab.locator('#grid button[data-at="1,1"]').click()
    assert tab.locator("#head-title").inner_text() == "Layer 1, head 1"
    tab.locator("#metric").select_option("sink")
    tab.locator("#from").fill("1")
    assert tab.locator("#table tbody tr").count() == 2
    tab.locator("#table tbody tr").first.click()
    tab.locator("#token-7").hover()
    assert "Token 7" in tab.locator("#reading").inner_text()
    # By keyboard: along the grid, and through the text.
    tab.locator('#grid button[aria-selected="true"]').focus()
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("Enter")
    assert tab.locator("#head-title").inner_text().startswith("Layer 0")
    tab.locator("#text").focus()
    tab.keyboard.press("End")
    assert "Token 95" in tab.locator("#reading").inner_text()
    tab.locator("#overlay").select_option("lens")
    assert "dotted" in tab.locator("#overlay-what").inner_text()
    tab.locator("#theme").click()
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert said == []
