"""Indirect objects and colored objects.

"Circuit Component Reuse Across Tasks in Transformer Language Models" (2023, paper 135).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from foveate.tasks.batch import check_at_least
from foveate.tasks.prompt import Prompt, draw, single_tokens, write

NAMES = (
    "Mary John Tom James Dan Sarah Paul Mark Laura Kate Anna Peter Robert Michael David Emma Alice "
    "Bob Jack Jane Susan George Henry Karen Lisa Linda Martin Daniel Simon Adam Scott Kevin Brian "
    "Alex Sam Max Rose Grace Charlie Steve"
)
PLACES = "store park school garden station hospital office restaurant library museum"
GIFTS = "drink book ring ball letter map key gift camera pen"
COLORS = "red blue green yellow purple black white brown pink gray"
OBJECTS = "book cup pen ball key plate phone hat bag box lamp ring knife pencil watch bottle"


def ioi(tokenizer: Any, *, rows: int, seed: int) -> list[Prompt]:
    """ "When A and B went to the P, S gave a O to" with S one of A and B: the other is the answer.

    The giver stands first in every second row. The names are one token each, with a blank before;
    the wrong option is the giver. Spans: "answer" and "wrong" (where A and B are named) and
    "giver". `corrupt` has a third name as the giver, and so no right answer; its `answer` and
    `wrong` are those of the prompt. Raises ValueError when fewer than four names are one token.
    """
    check_at_least(1, rows=rows)
    made = torch.Generator().manual_seed(seed)
    names = single_tokens(tokenizer, NAMES.split(), 4)
    places = single_tokens(tokenizer, PLACES.split(), 1)
    gifts = single_tokens(tokenizer, GIFTS.split(), 1)
    prompts = []
    for row in range(rows):
        other, giver, third = draw(names, 3, made)
        (place,), (gift,) = draw(places, 1, made), draw(gifts, 1, made)
        named = [(f" {giver}", "wrong"), (f" {other}", "answer")]
        first, second = named if row % 2 == 0 else named[::-1]
        scene = ("When",), first, (" and",), second, (f" went to the {place},",)
        tell = partial(_give, tokenizer, scene, gift, f" {other}", f" {giver}")
        prompts.append(tell(giver, corrupt=tell(third)))
    return prompts


def _give(
    tokenizer: Any,
    scene: tuple[tuple[str, ...], ...],
    gift: str,
    answer: str,
    wrong: str,
    who: str,
    corrupt: Prompt | None = None,
) -> Prompt:
    """After the scene `who` gives."""
    pieces = [*scene, (f" {who}", "giver"), (f" gave a {gift} to",)]
    return write(tokenizer, pieces, answer, wrong=[wrong], corrupt=corrupt)


def colored_objects(tokenizer: Any, *, rows: int, seed: int) -> list[Prompt]:
    """ "Q: On the table, I see a c1 o1, a c2 o2 and a c3 o3. What color is the o2? A:" -> c2.

    The three objects are asked for in turn, row by row. Colors and objects are one token each, with
    a blank before; the wrong options are the other two colors. Spans: "answer" (the color),
    "object", "wrong 0", "wrong 1" (the other colors in order) and "asked". `corrupt` asks for
    another of the three, with its own answer. Raises ValueError as `ioi` does.
    """
    check_at_least(1, rows=rows)
    made = torch.Generator().manual_seed(seed)
    colors = single_tokens(tokenizer, COLORS.split(), 4)
    objects = single_tokens(tokenizer, OBJECTS.split(), 4)
    prompts = []
    for row in range(rows):
        seen = list(zip(draw(colors, 3, made), draw(objects, 3, made), strict=True))
        (another,) = draw([i for i in range(3) if i != row % 3], 1, made)
        prompts.append(_table(tokenizer, seen, row % 3, _table(tokenizer, seen, another)))
    return prompts


def _table(
    tokenizer: Any, seen: list[tuple[str, str]], asked: int, corrupt: Prompt | None = None
) -> Prompt:
    """The three colored objects and the question for one of them."""
    others = [color for i, (color, _) in enumerate(seen) if i != asked]
    pieces: list[tuple[str, ...]] = [("Q: On the table, I see",)]
    for i, (color, thing) in enumerate(seen):
        role = ("answer", "object") if i == asked else (f"wrong {others.index(color)}",)
        pieces += [(" a",), (f" {color}", role[0]), (f" {thing}", *role[1:])]
        pieces.append(((",", " and", ".")[i],))
    color, thing = seen[asked]
    pieces += [(" What color is the",), (f" {thing}", "asked"), ("? A:",)]
    return write(tokenizer, pieces, f" {color}", wrong=[f" {c}" for c in others], corrupt=corrupt)
