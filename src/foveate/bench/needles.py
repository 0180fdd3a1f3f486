"""Needle in a haystack: a pass key hidden at some depth of the text, asked for at the end."""

from __future__ import annotations

import random
import re
from typing import Any

import torch
from torch import Tensor

_NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
_QUESTION = "\n\nWhat is the pass key? The pass key is"
# Tokens that an answer of five digits may take.
ANSWER_TOKENS = 8


def pass_key(depth: float, seed: int) -> str:
    """Five digits, the same for the same depth and seed."""
    return str(random.Random(f"{seed}:{depth}").randint(10000, 99999))


def needle_prompt(tokenizer: Any, hay: Tensor, depth: float, key: str, tokens: int) -> Tensor:
    """A prompt (1, tokens): the text with the key at `depth` (0 = start, 1 = end) and the question.

    hay (1, n) are tokens of the text, n >= tokens.
    """

    needle, question = _ids(tokenizer, _NEEDLE.format(key=key)), _ids(tokenizer, _QUESTION)
    room = tokens - needle.shape[1] - question.shape[1]
    if room < 1:
        raise ValueError(f"a needle prompt needs more than {tokens - room} tokens, got {tokens}")
    cut = round(depth * room)
    return torch.cat([hay[:, :cut], needle, hay[:, cut:room], question], 1)


def question_tokens(tokenizer: Any) -> int:
    """How many tokens at the end of a needle prompt are the question."""
    return _ids(tokenizer, _QUESTION).shape[1]


def _ids(tokenizer: Any, text: str) -> Tensor:
    found = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([found], dtype=torch.long)


def answered(text: str) -> str:
    """The first run of digits of an answer."""
    found = re.search(r"\d+", text)
    return found.group() if found else ""
