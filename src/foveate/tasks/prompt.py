"""Prompts for a pretrained model, whose answer and whose spans of tokens are known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Piece = str | tuple[str, ...]  # text, or text and the names of the spans that it belongs to
Item = TypeVar("Item")


@dataclass(frozen=True)
class Prompt:
    """Text up to right before its answer.

    ids (1, L) are its tokens, answer (n,) those that should follow; where a tokenizer writes a
    blank as a token of its own, that token is the prompt's last. `spans` names ranges [a, b) of
    ids. `wrong` (m,) holds the first token of each wrong option; `corrupt` is the counterfactual:
    as many tokens, another content.
    """

    text: str
    ids: Tensor
    answer: Tensor
    spans: dict[str, tuple[int, int]]
    wrong: Tensor
    corrupt: Prompt | None = None

    def with_answer(self) -> Tensor:
        """Prompt and answer (1, L + n): rows L - 1 to L + n - 2 predict the answer's tokens."""
        return torch.cat((self.ids, self.answer[None]), 1)

    def difference(self, logits: Tensor) -> Tensor:
        """Logit of the answer's first token less the mean of the wrong options', from (…, V)."""
        if not len(self.wrong):
            raise ValueError("the prompt has no wrong option to compare its answer with")
        return logits[..., self.answer[0]] - logits[..., self.wrong].mean(-1)

    def is_right(self, logits: Tensor) -> bool:
        """Whether the last row of logits (…, V) is largest at the answer's first token."""
        return int(logits.reshape(-1, logits.shape[-1])[-1].argmax()) == int(self.answer[0])


def write(
    tokenizer: Any,
    pieces: Iterable[Piece],
    answer: str = "",
    *,
    wrong: Sequence[str] = (),
    corrupt: Prompt | None = None,
) -> Prompt:
    """The prompt of `pieces`, one after the other, that `answer` continues.

    A span reaches from the first to the last piece of its name; blanks at its ends do not count,
    unless a token joins them to a word. Tokens are those of text and answer together, so that the
    answer follows as it would in running text; without an answer the prompt is the whole text.
    `wrong` are texts in the answer's place. Raises ValueError when the tokenizer gives no offsets,
    joins prompt and answer in a token, or a counterfactual has another number of tokens.
    """
    text, marks = "", dict[str, tuple[int, int]]()
    for piece in pieces:
        words, *names = (piece,) if isinstance(piece, str) else piece
        for name in names:
            marks[name] = (marks.get(name, (len(text),))[0], len(text) + len(words))
        text += words
    ids, offsets = _encode(tokenizer, text + answer)
    end, stop = len(ids), len(text)
    if answer:
        end, _ = _tokens(text + answer, offsets, len(text), len(text) + len(answer))
        stop = offsets[end - 1][1] if end else 0
        if offsets[end][0] < len(text.rstrip()):
            raise ValueError(f"a token joins the prompt's end {text[-10:]!r} and {answer!r}")
    if corrupt is not None and corrupt.ids.shape[1] != end:
        raise ValueError(
            f"a counterfactual must have the prompt's {end} tokens, got {corrupt.ids.shape[1]}"
        )
    return Prompt(
        text=(text + answer)[:stop],
        ids=torch.tensor([ids[:end]]),
        answer=torch.tensor(ids[end:], dtype=torch.long),
        spans={name: _tokens(text, offsets, *mark) for name, mark in marks.items()},
        wrong=torch.tensor([first_token(tokenizer, text, option) for option in wrong]).long(),
        corrupt=corrupt,
    )


def first_token(tokenizer: Any, text: str, answer: str) -> int:
    """First token of what `answer` adds to `text`; a token of blanks alone does not count."""
    ids, offsets = _encode(tokenizer, text + answer)
    return ids[_tokens(text + answer, offsets, len(text), len(text) + len(answer))[0]]


def single_tokens(tokenizer: Any, words: Sequence[str], least: int) -> list[str]:
    """The words that are one token, each its own, with a blank before; ValueError below `least`."""
    kept = dict[int, str]()
    for word in words:
        ids = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            kept.setdefault(ids[0], word)
    if len(kept) < least:
        raise ValueError(
            f"{least} of {len(words)} words must be one token of the tokenizer with a blank "
            f"before, got {len(kept)}: {', '.join(kept.values()) or 'none'}"
        )
    return list(kept.values())


def draw(items: Sequence[Item], count: int, made: torch.Generator) -> list[Item]:
    """`count` different items in random order."""
    return [items[i] for i in torch.randperm(len(items), generator=made)[:count].tolist()]


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens and their characters [a, b), without special tokens at the end."""
    try:
        made = tokenizer(text, return_offsets_mapping=True)
    except NotImplementedError as error:
        raise ValueError(
            f"spans need a tokenizer with offsets (a fast one), got {type(tokenizer).__name__}"
        ) from error
    ids, offsets = list(made["input_ids"]), [tuple(pair) for pair in made["offset_mapping"]]
    while offsets and offsets[-1][0] == offsets[-1][1]:
        ids.pop()
        offsets.pop()
    return ids, offsets


def _tokens(text: str, offsets: list[tuple[int, int]], start: int, stop: int) -> tuple[int, int]:
    """Range of the tokens that hold characters [start, stop) of the text, blank ends left out."""
    words = text[start:stop]
    start, stop = start + len(words) - len(words.lstrip()), start + len(words.rstrip())
    held = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start]
    if not held:
        raise ValueError(f"no token holds {words!r}")
    return held[0], held[-1] + 1
