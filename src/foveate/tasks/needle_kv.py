"""Needles in filler and key-value lines: "Retrieval Head" (2024, paper 23)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from foveate.tasks.batch import check_at_least
from foveate.tasks.prompt import Prompt, draw, write

PLACES = (
    "castle library harbour mill lighthouse monastery bakery theatre mine orchard bridge stable"
)
WORDS = (
    "amber falcon cinnamon velvet anchor turquoise walrus saffron lantern marble otter ginger "
    "copper heron nutmeg crimson badger parsley ivory dolphin pepper violet sparrow clove silver "
    "panther mustard scarlet beetle vanilla indigo lobster thyme bronze magpie fennel"
)
FILLER = """The road to the village was long and quiet.
A light rain had fallen in the morning.
People walked slowly through the market.
The children played a game near the old wall.
Nobody knew when the next train would come.
The windows of the house were open all day.
He read the newspaper and drank his coffee.
The river was calm and the boats hardly moved.
She wrote a letter to her sister in the city.
The teacher explained the lesson once more.
In the evening they listened to music.
The garden was full of flowers that year.
A dog slept in the shade of a tall tree.
The meeting took longer than anyone expected.
They talked about the weather and the harvest.
The shop on the corner sells bread and milk.
Winter came early and the days grew short.
The old clock in the hall had stopped again.
He put the books back on the shelf.
The farmers were happy with the warm summer."""
KEY, VALUE = '{"key": "', '", "value": "'


def needles(
    tokenizer: Any,
    *,
    rows: int,
    seed: int,
    length: int = 273,
    depth: float = 0.5,
    count: int = 1,
    distractors: int = 0,
) -> list[Prompt]:
    """Sentences "The secret password of the castle is X." in neutral ones, X three rare words.

    Gives rows × count prompts: in each context `count` needles are asked for in turn, and
    `distractors` of the same form never. The first needle stands at `depth` in [0, 1] of the
    filler, all others anywhere. A prompt has at most `length` tokens and lacks less than a
    sentence. Spans: "needle" and, in it, "answer" of what is asked; "other i" of the rest, i
    counting needles, then distractors.
    Raises ValueError for numbers out of range, a length without room for the needles, or an
    answer that the tokenizer writes otherwise in the context than after the question.
    """
    check_at_least(1, rows=rows, count=count)
    check_at_least(0, distractors=distractors)
    _check_depth(depth)
    total, made = count + distractors, torch.Generator().manual_seed(seed)
    places = PLACES.split()
    if total > len(places):
        raise ValueError(f"count + distractors must be at most {len(places)}, got {total}")
    prompts = []
    for _ in range(rows):
        words = iter(draw(WORDS.split(), 3 * total, made))
        answers = [" ".join(three) for three in zip(words, words, words, strict=True)]
        facts = list(zip(draw(places, total, made), answers, strict=True))
        at = [0] * total
        bare = max(_ask(tokenizer, facts, i, [], at).ids.shape[1] for i in range(count))
        if length < bare:
            raise ValueError(f"length must be at least {bare} for the needles alone, got {length}")
        filler = _fit(tokenizer, _sentences(made), length - bare)
        at = torch.randint(len(filler) + 1, (total,), generator=made).tolist()
        at[0] = round(depth * len(filler))
        prompts += [_ask(tokenizer, facts, asked, filler, at) for asked in range(count)]
    return prompts


def key_values(
    tokenizer: Any, *, rows: int, seed: int, length: int = 273, depth: float = 0.5
) -> list[Prompt]:
    """Lines {"key": "4821", "value": "7730"} and the start of one of them again.

    The line that is asked stands at `depth` in [0, 1] of as many lines as `length` tokens hold,
    which must be two. All numbers differ. Spans: "needle" (the line) and, in it, "key", "answer".
    Raises ValueError as `needles` does.
    """
    check_at_least(1, rows=rows)
    _check_depth(depth)
    made = torch.Generator().manual_seed(seed)
    prompts = []
    for _ in range(rows):
        numbers = iter((torch.randperm(9000, generator=made) + 1000).tolist())
        pairs = list(zip(numbers, numbers, strict=True))
        start = len(tokenizer(KEY + "1000" + VALUE)["input_ids"])
        lines = (f'{KEY}{key}{VALUE}{value}"}}\n' for key, value in pairs)
        held = len(_fit(tokenizer, lines, length - start))
        if held < 2:
            raise ValueError(f"length must hold two lines and the start of a third, got {length}")
        prompts.append(_look_up(tokenizer, pairs[:held], round(depth * (held - 1))))
    return prompts


def _ask(
    tokenizer: Any,
    facts: Sequence[tuple[str, str]],
    asked: int,
    filler: Sequence[str],
    at: Sequence[int],
) -> Prompt:
    """The facts, each before sentence `at` of the filler, and the question for one of them."""
    slots = [list[tuple[str, ...]]() for _ in range(len(filler) + 1)]
    for i, (place, answer) in enumerate(facts):
        says = f" The secret password of the {place} is"
        if i == asked:
            slots[at[i]] += [(says, "needle"), (f" {answer}", "needle", "answer"), (".", "needle")]
        else:
            slots[at[i]].append((f"{says} {answer}.", f"other {i}"))
    for slot, sentence in zip(slots, filler, strict=False):
        slot.append((sentence,))
    (first, *names), *pieces = [piece for slot in slots for piece in slot]
    place, answer = facts[asked]
    subject = f"the secret password of the {place}"
    question = f"\nWhat is {subject}? T{subject[1:]} is"
    return _told_alike(
        write(tokenizer, [(first.lstrip(), *names), *pieces, question], f" {answer}")
    )


def _look_up(tokenizer: Any, pairs: Sequence[tuple[int, int]], asked: int) -> Prompt:
    """All pairs as lines, and the start of the line that is asked."""
    pieces: list[tuple[str, ...]] = []
    for i, (key, value) in enumerate(pairs):
        line = [(KEY,), (f"{key}", "key"), (VALUE,), (f"{value}", "answer"), ('"}',)]
        pieces += [(*part, "needle") if i == asked else part[:1] for part in line]
        pieces.append(("\n",))
    key, value = pairs[asked]
    return _told_alike(write(tokenizer, [*pieces, f"{KEY}{key}{VALUE}"], f"{value}"))


def _sentences(made: torch.Generator) -> Iterator[str]:
    """Random neutral sentences without end, a blank before each."""
    sentences = FILLER.split("\n")
    while True:
        yield " " + sentences[int(torch.randint(len(sentences), (), generator=made))]


def _fit(tokenizer: Any, parts: Iterable[str], room: int) -> list[str]:
    """The first parts that `room` tokens hold."""
    held: list[str] = []
    for part in parts:
        room -= len(tokenizer(part, add_special_tokens=False)["input_ids"])
        if room < 0:
            break
        held.append(part)
    return held


def _told_alike(prompt: Prompt) -> Prompt:
    """Refuse a prompt whose answer has other tokens in the context."""
    a, b = prompt.spans["answer"]
    if not torch.equal(prompt.ids[0, a:b], prompt.answer):
        raise ValueError(
            f"the tokenizer writes the answer in the context as {prompt.ids[0, a:b].tolist()}, "
            f"after the question as {prompt.answer.tolist()}"
        )
    return prompt


def _check_depth(depth: float) -> None:
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be in [0, 1], got {depth}")
