"""Training the learned part of a mechanism, as a function and from the command line."""

import re
from functools import partial

import pytest
import torch

import foveate
from foveate import files
from foveate.attention import _trained
from foveate.bench import train as training
from foveate.tasks import train as loop
from tiny_models import build

SMALL = ["--tokens=128", "--window=64", "--steps=6"]


@pytest.fixture
def run(foveate_command):
    """Call `foveate train`."""
    return partial(foveate_command, "train")


def test_the_line_it_prints_uses_what_it_learned(run, tiny_model_dir, tmp_path):
    file = tmp_path / "gate.safetensors"
    code, out, err = run("seerattention:block=16", tiny_model_dir, *SMALL, "--out", file)
    assert code == 0 and str(file) in err
    assert f'prefill="seerattention:block=16,gate={file}"' in out
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    held = foveate.create(f"seerattention:block=16,gate={file}").read()
    assert held.shape == (2, 2, 1, 16)


def test_texts_of_ones_own_and_progress(run, tiny_model_dir, tmp_path):
    texts = []
    for i in range(2):
        texts += ["--text", tmp_path / f"{i}.txt"]
        texts[-1].write_text(f"A short text of number {i}.\n" * 60)
    args = ["seerattention:block=16", tiny_model_dir, *SMALL, *texts, "--out", tmp_path / "g"]
    assert run(*args)[0] == 0
    heard = []
    ids = torch.randint(3, 100, (2, 3, 40))
    training.train(
        build("qwen3"),
        foveate.create("seerattention", block=8),
        list(ids),
        steps=4,
        progress=lambda *x: heard.append(x),
    )
    assert [x[1:] for x in heard[:6]] == [(i, 6) for i in range(1, 7)]
    assert [x[1:] for x in heard[6:]] == [(i, 4) for i in range(1, 5)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("a loss of nan")])
def test_stopped_or_failed_it_leaves_nothing(run, tiny_model_dir, tmp_path, monkeypatch, error):
    def stop(*args):
        raise error

    monkeypatch.setattr(loop, "schedule", stop)
    code, _, err = run("seerattention:block=16", tiny_model_dir, *SMALL, "--out", tmp_path / "g")
    assert code == (130 if error is KeyboardInterrupt else 2) and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(run, tiny_model_dir, tmp_path, monkeypatch):
    def full(tensors, path, about):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "g").write_text("old")
    monkeypatch.setattr(files, "save_file", full)
    code, _, err = run("seerattention:block=16", tiny_model_dir, *SMALL, "--out", tmp_path / "g")
    assert code == 2 and "No space left" in err
    assert (tmp_path / "g").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["moba", "--out", "g"], "moba has nothing to train; known: .*seerattention"),
        (["nothing", "--out", "g"], "unknown mechanism"),
        (["seerattention", "--out", "missing/g"], "directory that exists"),
        (["seerattention", "--tokens=8", "--window=16", "--out", "g"], "--tokens >= --window"),
        (["seerattention", "--steps=0", "--out", "g"], "needs at least 1 steps, got 0"),
        (["seerattention", "--text", "missing.txt", "--out", "g"], "cannot read"),
    ],
)
def test_refuses_before_the_model_is_loaded(run, tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*args)
    assert code == 2 and re.search(said, err)


def test_refuses_a_text_without_a_second_token(tiny_llama):
    with pytest.raises(ValueError, match=r"tokens >= 2\) each, got \(3, 1\)"):
        training.train(tiny_llama, foveate.create("seerattention"), [torch.ones(3, 1).long()])


def test_a_model_is_left_as_it_was_when_training_fails(tiny_llama, monkeypatch):
    def stop(*args, **options):
        raise RuntimeError("stopped")

    monkeypatch.setattr(training, "fit", stop)
    frozen = tiny_llama.lm_head.weight
    frozen.requires_grad_(False)
    with pytest.raises(RuntimeError, match="stopped"):
        training.train(tiny_llama, foveate.create("seerattention"), [torch.ones(1, 9).long()])
    still = {name for name, p in tiny_llama.named_parameters() if not p.requires_grad}
    frozen.requires_grad_(True)
    assert still == {"lm_head.weight"}
    with foveate.attach(tiny_llama):
        pass


HYSPARSE = {"dim": 64, "heads": 4, "sparse_layers": 1, "block": 4, "blocks": 4, "window": 8}


def test_a_layer_learns_what_the_layers_in_the_middle_of_a_model_do(tmp_path):
    model = build("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = foveate.create("hysparse", **HYSPARSE)
    result = training.train(model, layer, [ids], steps=60, lr=3e-3)
    assert result.losses[-1] < 0.5 < result.losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None
    result.write(tmp_path / "layer")
    again = training.load_layer(tmp_path / "layer", "hysparse")
    with torch.no_grad():
        states = model.model(ids[1:], output_hidden_states=True).hidden_states
        want, way = states[3], (states[3] - states[1]).square().sum(-1)
        assert torch.equal(again(states[1]), layer(states[1]))
        missed = (again(states[1]) - want).square().sum(-1)
    assert float((missed / way).mean()) < 0.5


def test_a_layer_from_the_command_line(run, tiny_model_dir, tmp_path):
    file, spec = tmp_path / "layer", "hysparse:dim=32,heads=2,sparse_layers=0,block=16"
    code, out, err = run(spec, tiny_model_dir, *SMALL, "--out", file)
    assert code == 0, err
    assert f'load_layer("{file}", "hysparse")' in out
    assert training.load_layer(file, "hysparse").options["block"] == 16


@pytest.mark.parametrize("options", [{"dim": 32}, {"sparse_layers": 3}])
def test_refuses_a_layer_that_does_not_fit_the_model(options):
    layer = foveate.create("hysparse", **{**HYSPARSE, **options})
    with pytest.raises(ValueError, match="got width 64 and 4 layers"):
        training.train(build("llama"), layer, [torch.ones(1, 9).long()], steps=1)


def test_refuses_the_file_of_another_layer(tmp_path):
    layer = foveate.create("hysparse", **HYSPARSE)
    held = training.Training(layer, layer, _trained.ModelShape(4, 4, 2, 16), [])
    held.write(tmp_path / "layer")
    with pytest.raises(ValueError, match="was trained for hysparse, not for seerattention"):
        training.load_layer(tmp_path / "layer", "seerattention")
    layer.sparse = None
    held.write(tmp_path / "layer")
    with pytest.raises(ValueError, match="holds no hysparse"):
        training.load_layer(tmp_path / "layer", "hysparse")
