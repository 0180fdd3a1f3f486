"""Load a causal language model and its tokenizer, or say plainly why that cannot be."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from foveate.hf.errors import ModelError
from foveate.hf.quiet import quiet


def require_hf() -> None:
    """Raise ModelError when a package of the extra `hf` is missing."""
    missing = [name for name in ("transformers", "gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"Models need {', '.join(missing)}, not installed here: pip install 'foveate[hf]'."
        )


def load_pretrained(source: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model in evaluation mode and tokenizer of a local directory or a hub id.

    Only safetensors are read and no code of the repository is run. Raises ModelError when `source`
    is not a causal language model with weights and a tokenizer.
    """
    require_hf()
    source = _located(source)
    with quiet():
        _check_causal(source, _read_config(source))
        return _read_model(source, dtype), _read_tokenizer(source)


def _located(source: str) -> str:
    """The hub id as it is, or the absolute path of a directory that holds a model."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{path} holds no model: config.json is missing. Give a directory written by "
                "save_pretrained, or a hub id."
            )
        return str(path.resolve())
    if path.exists():
        raise ModelError(f"{path} is a file. Give the directory that holds the model.")
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise ModelError(f"There is no directory {source}. Check the path, or give a hub id.")
    return source


def _read_config(source: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the hub's, the JSON's and the config's own errors share no base
        raise ModelError(_unreadable(source, "config", error)) from error


def _check_causal(source: str, config: Any) -> None:
    """Refuse what transformers would load but what does not read from left to right."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind = type(config)
    if getattr(config, "is_encoder_decoder", False):
        reason = "is an encoder-decoder model"
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        reason = "is not a language model that transformers can run causally"
    # BERT and its kin have a causal class too, which attends both ways unless it is a decoder.
    elif kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True):
        reason = "is an encoder-only model"
    else:
        return
    raise ModelError(
        f"{source} ({config.model_type}) {reason}; foveate needs a causal language model, such as "
        "a Llama, Qwen or GPT-2."
    )


def _read_model(source: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # missing, cut-short and ill-fitting weights each raise their own
        raise ModelError(_unreadable(source, "weights (safetensors)", error)) from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"The weights of {source} lack {len(missing)} of the model's tensors, {missing[0]} "
            "among them: it would answer at random. Give a complete causal language model."
        )
    return model.eval()


def _read_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        # without its files some tokenizers load all the same, with an empty vocabulary
        if tokenizer("a b", add_special_tokens=False)["input_ids"]:
            return tokenizer
        cause = ""
    except Exception as error:  # each kind of tokenizer fails in its own way
        cause = f" ({type(error).__name__})"
    raise ModelError(
        f"{source} has no tokenizer that can be read{cause}. Save the model's own tokenizer beside "
        "it with tokenizer.save_pretrained."
    )


def _unreadable(source: str, part: str, error: Exception) -> str:
    cause = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if Path(source).is_dir():
        advice = "Check the files in that directory."
    elif os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        advice = "HF_HUB_OFFLINE is set, so only models already in the hub's cache can be read."
    else:
        advice = "Check the id, the network and, for a gated model, your access."
    return f"Cannot read the {part} of {source}: {cause.strip().rstrip('.')}. {advice}"
