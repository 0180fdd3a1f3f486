"""Facts in templates.

"Interpreting Key Mechanisms of Factual Recall in Transformer-Based Language Models" (2024,
paper 264).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from foveate.tasks.batch import check_at_least, check_choice
from foveate.tasks.prompt import Piece, Prompt, draw, write

FACTS = {
    "capital": (
        "France: Paris, Germany: Berlin, Italy: Rome, Spain: Madrid, Portugal: Lisbon, "
        "England: London, Ireland: Dublin, Austria: Vienna, Greece: Athens, Egypt: Cairo, "
        "Japan: Tokyo, China: Beijing, Russia: Moscow, Poland: Warsaw, Hungary: Budapest, "
        "Sweden: Stockholm, Norway: Oslo, Finland: Helsinki, Denmark: Copenhagen, "
        "Belgium: Brussels, Turkey: Ankara, Iran: Tehran, Iraq: Baghdad, Thailand: Bangkok, "
        "Vietnam: Hanoi, Indonesia: Jakarta, Canada: Ottawa, Cuba: Havana, Peru: Lima, "
        "Chile: Santiago, Ecuador: Quito, Kenya: Nairobi, Bulgaria: Sofia, Serbia: Belgrade, "
        "Venezuela: Caracas, Afghanistan: Kabul, Syria: Damascus, Nepal: Kathmandu, "
        "Australia: Canberra, Pakistan: Islamabad"
    ),
    "landmark": (
        "the Eiffel Tower: France, the Colosseum: Italy, Big Ben: England, the Taj Mahal: India, "
        "the Great Wall: China, Machu Picchu: Peru, the Acropolis: Greece, the Kremlin: Russia, "
        "the Brandenburg Gate: Germany, the Alhambra: Spain, Petra: Jordan, "
        "Angkor Wat: Cambodia, the Great Sphinx: Egypt, Mount Fuji: Japan, "
        "Christ the Redeemer: Brazil, the Sydney Opera House: Australia, the CN Tower: Canada, "
        "Chichen Itza: Mexico, the Hagia Sophia: Turkey, the Atomium: Belgium, "
        "the Matterhorn: Switzerland, Borobudur: Indonesia, Edinburgh Castle: Scotland"
    ),
    "language": (
        "France: French, Germany: German, Italy: Italian, Mexico: Spanish, Brazil: Portuguese, "
        "England: English, Greece: Greek, Egypt: Arabic, Japan: Japanese, Russia: Russian, "
        "Poland: Polish, Hungary: Hungarian, Sweden: Swedish, Norway: Norwegian, "
        "Finland: Finnish, Denmark: Danish, Turkey: Turkish, Iran: Persian, Thailand: Thai, "
        "Vietnam: Vietnamese"
    ),
}
TEMPLATES = {
    "capital": (
        "The capital of {} is",
        "Q: What is the capital city of {}? A:",
        "People who visit {} often begin in its capital,",
    ),
    "landmark": (
        "The country where one finds {} is",
        "Q: In which country is {}? A:",
        "To see {} one has to travel to",
    ),
    "language": (
        "The language that most people in {} speak is",
        "Q: Which language do people speak in {}? A:",
    ),
}


def factual(
    tokenizer: Any,
    *,
    rows: int | None = None,
    seed: int,
    relation: str = "capital",
    template: int = 0,
    shots: int = 0,
) -> list[Prompt]:
    """What facts of a relation (capital, landmark, language) say, subjects in random order.

    `shots` facts are solved in front of every prompt and never asked; `rows` (all the rest) are
    asked. No two facts, asked or solved, have answers of the same first token: of those that do in
    this tokenizer the first one stays. Span: "subject". `corrupt` asks for another subject of as
    many tokens, None where there is none; its only wrong option is the prompt's answer and the
    other way round. Raises ValueError for unknown relations and for more than there is.
    """
    check_choice("relation", relation, tuple(FACTS))
    check_at_least(0, shots=shots)
    if not 0 <= template < len(TEMPLATES[relation]):
        raise ValueError(
            f"template must be from 0 to {len(TEMPLATES[relation]) - 1} for {relation}, "
            f"got {template}"
        )
    form = TEMPLATES[relation][template]
    facts = _distinct(tokenizer, relation)
    wanted = len(facts) - shots if rows is None else rows
    if wanted < 1 or shots + wanted > len(facts):
        raise ValueError(
            f"rows must be at least 1 and, with {shots} shots, at most the {len(facts)} facts of "
            f"{relation}, got {wanted}"
        )
    facts = draw(facts, shots + wanted, torch.Generator().manual_seed(seed))
    solved = "".join(f"{form.format(subject)} {answer}.\n" for subject, answer in facts[:shots])
    asked = [_ask(tokenizer, solved, form, *fact) for fact in facts[shots:]]
    return [_opposed(asked, i) for i in range(len(asked))]


def _distinct(tokenizer: Any, relation: str) -> list[tuple[str, str]]:
    """The facts of a relation, less those whose answer starts as that of an earlier one."""
    kept: dict[int, tuple[str, str]] = {}
    for fact in FACTS[relation].split(", "):
        subject, answer = fact.split(": ")
        first = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"][0]
        kept.setdefault(first, (subject, answer))
    return list(kept.values())


def _ask(tokenizer: Any, solved: str, form: str, subject: str, answer: str) -> Prompt:
    before, after = form.split("{}")
    pieces: list[Piece] = [solved + before, (subject, "subject"), after]
    return write(tokenizer, pieces, f" {answer}")


def _opposed(prompts: list[Prompt], i: int) -> Prompt:
    """The prompt with the next one whose subject has as many tokens as its counterfactual."""
    prompt = prompts[i]
    for other in prompts[i + 1 :] + prompts[:i]:
        if other.ids.shape == prompt.ids.shape:
            corrupt = replace(other, wrong=prompt.answer[:1])
            return replace(prompt, wrong=other.answer[:1], corrupt=corrupt)
    return prompt
