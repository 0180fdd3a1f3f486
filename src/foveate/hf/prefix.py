"""`prefix`: let a model read a system prompt or documents once for all requests after it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.attention.base import Shared
from foveate.hf.attach import attach
from foveate.hf.tails import Prefix, refuse_windows

Text = str | Sequence[int] | Tensor


def prefix(
    model: Any, text: Text, *, documents: Sequence[Text] = (), tokenizer: Any = None
) -> Prefix:
    """Read `text` once, and `documents` after it without sight of each other.

    Texts are strings, which take the model's `tokenizer`, or token ids, (n,) or (1, n). The
    tokenizer's start token stands before the text only: split requests with
    add_special_tokens=False. Use it as `foveate.attach(model, prefix=…)`, where the slots prefill
    and decode may hold relay (as when empty: exact) or ape. Raises ValueError for an empty text,
    ids that are not the model's, and models with sliding windows.
    """
    ids = _ids(model, "text", text, tokenizer, first=True)
    read = _read(model, ids, None)
    layers = tuple(Shared(x.keys, x.values) for x in read.layers)
    own = weakref.ref(model.get_decoder())
    whole = Prefix(layers, ids.shape[1], (), own)
    if isinstance(documents, str):
        raise TypeError("documents must be a sequence of texts, got one string")
    every = [
        _ids(model, f"document {n}", x, tokenizer, first=False) for n, x in enumerate(documents)
    ]
    if not every:
        return whole
    caches = [_read(model, one, whole) for one in every]
    held = [
        shared._replace(
            documents=(
                torch.cat([cache.layers[i].keys for cache in caches], 2),
                torch.cat([cache.layers[i].values for cache in caches], 2),
            )
        )
        for i, shared in enumerate(layers)
    ]
    return Prefix(tuple(held), ids.shape[1], tuple(x.shape[1] for x in every), own)


@torch.no_grad()
def _read(model: Any, ids: Tensor, after: Prefix | None) -> Any:
    """The cache of a text (1, n) after a prefix."""
    with attach(model, prefix=after):
        cache = model.get_decoder()(ids, use_cache=True).past_key_values
    refuse_windows(cache)
    return cache


def _ids(model: Any, what: str, text: Text, tokenizer: Any, *, first: bool) -> Tensor:
    """Token ids (1, n) of a text, on the model's device."""
    known = model.get_input_embeddings().weight
    if tokenizer is not None and len(tokenizer) > known.shape[0]:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model knows {known.shape[0]}: it "
            "belongs to another model"
        )
    if isinstance(text, str):
        if tokenizer is None:
            raise TypeError(f"{what} is a string: give tokenizer=…, or token ids")
        text = tokenizer(text, add_special_tokens=first, verbose=False)["input_ids"]
    ids = torch.as_tensor(text, dtype=torch.long, device=known.device)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[0] != 1 or not ids.numel():
        raise ValueError(
            f"{what} must hold at least one token, as ids (n,) or (1, n), got {tuple(ids.shape)}"
        )
    if not 0 <= int(ids.min()) <= int(ids.max()) < known.shape[0]:
        raise ValueError(
            f"{what} holds token {int(ids.max())}, the model knows {known.shape[0]}: was it split "
            "by another model's tokenizer?"
        )
    return ids
