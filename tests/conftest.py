import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def foveate_command(monkeypatch, capsys):
    """Call the command line in this process: exit code, standard output, standard error."""
    from foveate import cli

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["foveate", *map(str, args)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture(scope="session")
def builtin():
    """The built-in model with its real weights, and its tokenizer."""
    from foveate.hf.builtin import load_builtin

    return load_builtin()


@pytest.fixture(scope="session")
def tiny_llama():
    """A random Llama of two layers, four query heads on two key-value heads of 16, float32."""
    from foveate.bench.audit.cache import model

    return model()


@pytest.fixture(scope="session")
def tiny_model_dir(builtin, tmp_path_factory):
    """A random two-layer Llama with a context of 512 and a real tokenizer, saved to disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = builtin
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("tiny-model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
