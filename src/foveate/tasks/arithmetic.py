"""Sums in text and modular addition.

"Interpreting and Improving Large Language Models in Arithmetic Calculation" (2024, paper 53).
"""

from __future__ import annotations

from typing import Any

import torch

from foveate.tasks.batch import Batch, check_at_least, check_choice
from foveate.tasks.prompt import Prompt, draw, write

OPERATIONS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
Sum = tuple[int, int, int]  # both operands and the result


def arithmetic(
    tokenizer: Any,
    *,
    rows: int,
    seed: int,
    operation: str = "+",
    digits: int = 1,
    words: bool = False,
    shots: int = 0,
) -> list[Prompt]:
    """ "a + b =" after `shots` solved examples, or "three plus four is" with `words`.

    Operands have `digits` (1 or 2) digits, results are whole and not negative; a row's examples
    are others than its question. Where the tokenizer writes a blank and a digit as two tokens, the
    prompt ends with the blank; of an answer of several tokens the first one counts. Spans: "a",
    "operator", "b" of the question. `corrupt` has the same examples, operands that both differ and
    an answer of another first token; its only wrong option is the prompt's answer and the other way
    round. Raises ValueError for unknown operations, or when no such counterfactual exists.
    """
    check_at_least(1, rows=rows)
    check_at_least(0, shots=shots)
    check_choice("operation", operation, tuple(OPERATIONS))
    if digits not in (1, 2) or (words and digits == 2):
        raise ValueError(f"digits must be 1 or, without words, 2, got {digits}")
    made = torch.Generator().manual_seed(seed)
    sums = _sums(operation, digits)
    if shots + 2 > len(sums):
        raise ValueError(f"shots must be at most {len(sums) - 2}, got {shots}")
    prompts = []
    for _ in range(rows):
        mixed = draw(sums, len(sums), made)
        examples = "".join(_solved(one, operation, words) for one in mixed[:shots])
        asked, *others = mixed[shots:]
        prompts.append(_pair(tokenizer, examples, asked, others, operation, words))
    return prompts


def modular_addition(rows: int, *, seed: int, modulus: int = 97) -> Batch:
    """Rows (a, b, =) with a + b modulo `modulus` to predict at the last token, which is `modulus`.

    All rows differ: cut them for training and test. The vocabulary has modulus + 1 tokens; chance
    is 1 / modulus. Raises ValueError for more rows than the modulus² there are.
    """
    check_at_least(1, rows=rows)
    check_at_least(2, modulus=modulus)
    if rows > modulus**2:
        raise ValueError(f"rows must be at most modulus² = {modulus**2}, got {rows}")
    made = torch.Generator().manual_seed(seed)
    pairs = torch.randperm(modulus**2, generator=made)[:rows]
    a, b = pairs // modulus, pairs % modulus
    inputs = torch.stack((a, b, torch.full_like(a, modulus)), 1)
    targets = torch.zeros_like(inputs)
    targets[:, 2] = (a + b) % modulus
    return Batch(inputs, targets, inputs == modulus)


def _sums(operation: str, digits: int) -> list[Sum]:
    """All questions whose result is whole and not negative."""
    span = range(10) if digits == 1 else range(10, 100)
    pairs = [(a, b) for a in span for b in span]
    if operation == "+":
        return [(a, b, a + b) for a, b in pairs]
    if operation == "-":
        return [(a, b, a - b) for a, b in pairs if a >= b]
    if operation == "*":
        return [(a, b, a * b) for a, b in pairs]
    return [(a, b, a // b) for a, b in pairs if b and a % b == 0]


def _pair(
    tokenizer: Any, examples: str, asked: Sum, others: list[Sum], operation: str, words: bool
) -> Prompt:
    """The question with the first of `others` that can be its counterfactual."""

    def ask(one: Sum, wrong: Sum, corrupt: Prompt | None = None) -> Prompt:
        pieces, answer = _tell(one, operation, words)
        option = _tell(wrong, operation, words)[1]
        return write(tokenizer, [examples, *pieces], answer, wrong=[option], corrupt=corrupt)

    for other in others:
        if asked[0] == other[0] or asked[1] == other[1]:
            continue
        clean, corrupt = ask(asked, other), ask(other, asked)
        if clean.answer[0] != corrupt.answer[0] and clean.ids.shape == corrupt.ids.shape:
            return ask(asked, other, corrupt)
    raise ValueError(f"no counterfactual of {asked[0]} {operation} {asked[1]} has as many tokens")


def _tell(one: Sum, operation: str, words: bool) -> tuple[list[tuple[str, ...]], str]:
    """The pieces of a question, and its answer."""
    a, b, result = (spell(number) if words else str(number) for number in one)
    sign, equals = (OPERATIONS[operation], " is") if words else (operation, " =")
    return [(a, "a"), (f" {sign}", "operator"), (f" {b}", "b"), (equals,)], f" {result}"


def _solved(one: Sum, operation: str, words: bool) -> str:
    pieces, answer = _tell(one, operation, words)
    return "".join(piece[0] for piece in pieces) + answer + "\n"


def spell(number: int) -> str:
    """A number from 0 to 99 in words."""
    small, tens = SMALL.split(), TENS.split()
    if number < 20:
        return small[number]
    unit = f"-{small[number % 10]}" if number % 10 else ""
    return tens[number // 10 - 2] + unit
