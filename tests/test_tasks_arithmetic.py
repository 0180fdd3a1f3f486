import operator
import re

import pytest
import torch

from foveate.tasks.arithmetic import arithmetic, modular_addition, spell

RULES = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
NUMBERS = {spell(n): n for n in range(100)}


@pytest.fixture(scope="module")
def tokenizer(builtin):
    return builtin[1]


def said(tokenizer, prompt, name):
    a, b = prompt.spans[name]
    return tokenizer.decode(prompt.ids[0, a:b]).strip()


@pytest.mark.parametrize("operation", RULES)
@pytest.mark.parametrize("digits", [1, 2])
def test_answers_are_right_and_operands_have_their_digits(tokenizer, operation, digits):
    for prompt in arithmetic(tokenizer, rows=8, seed=0, operation=operation, digits=digits):
        for one in (prompt, prompt.corrupt):
            a, b = said(tokenizer, one, "a"), said(tokenizer, one, "b")
            assert said(tokenizer, one, "operator") == operation
            assert len(a) == len(b) == digits
            whole = one.text.rstrip() + " " + tokenizer.decode(one.answer).strip()
            assert whole == f"{a} {operation} {b} = {RULES[operation](int(a), int(b))}"
            if operation == "/":
                assert int(a) % int(b) == 0
            assert one.with_answer()[0].tolist() == tokenizer(whole)["input_ids"]


@pytest.mark.parametrize("operation", RULES)
def test_words_say_the_same(tokenizer, operation):
    for prompt in arithmetic(tokenizer, rows=8, seed=0, operation=operation, words=True):
        a, b = (NUMBERS[said(tokenizer, prompt, name)] for name in "ab")
        assert NUMBERS[tokenizer.decode(prompt.answer).strip()] == RULES[operation](a, b)
        assert prompt.text.endswith(" is")


def test_numbers_in_words():
    assert [spell(n) for n in (0, 13, 20, 47, 99)] == [
        "zero", "thirteen", "twenty", "forty-seven", "ninety-nine",
    ]  # fmt: skip
    assert len(NUMBERS) == 100


@pytest.mark.parametrize("options", [{}, {"digits": 2}, {"words": True}, {"shots": 3}])
def test_the_counterfactual_differs_in_operands_and_first_token(tokenizer, options):
    for prompt in arithmetic(tokenizer, rows=8, seed=1, **options):
        corrupt = prompt.corrupt
        assert corrupt.ids.shape == prompt.ids.shape and corrupt.answer[0] != prompt.answer[0]
        for name in ("a", "b"):
            assert said(tokenizer, prompt, name) != said(tokenizer, corrupt, name)
        assert prompt.wrong.tolist() == corrupt.answer[:1].tolist()
        assert corrupt.wrong.tolist() == prompt.answer[:1].tolist()


def test_a_blank_of_its_own_ends_the_prompt(tokenizer):
    (prompt,) = arithmetic(tokenizer, rows=1, seed=0)
    assert tokenizer.decode(prompt.ids[0, -1:]) == " " and prompt.text.endswith("= ")
    assert tokenizer.decode(prompt.answer[:1]).isdigit()


def test_solved_examples_are_right_and_not_asked(tokenizer):
    for prompt in arithmetic(tokenizer, rows=10, seed=0, shots=3):
        *solved, asked = prompt.text.split("\n")
        for line in solved:
            a, b, result = map(int, re.fullmatch(r"(\d) \+ (\d) = (\d+)", line).groups())
            assert a + b == result and not line.startswith(asked)
        assert len(set(solved)) == 3
        assert prompt.corrupt.text.split("\n")[:-1] == solved
        assert prompt.spans["a"][0] == len(tokenizer("\n".join(solved) + "\n")["input_ids"])


def test_modular_addition_holds_every_pair_once():
    batch = modular_addition(49, seed=0, modulus=7)
    assert batch.inputs[:, :2].unique(dim=0).shape == (49, 2)
    assert (batch.inputs[:, 2] == 7).all()
    assert torch.equal(batch.mask.nonzero()[:, 1], torch.full((49,), 2))
    assert batch.targets[:, 2].tolist() == [(a + b) % 7 for a, b, _ in batch.inputs.tolist()]
    assert (batch.targets[:, 2].bincount() == 7).all()  # chance is 1 / 7


def test_seeds_reproduce_and_leave_the_global_generator_alone(tokenizer):
    before = torch.random.get_rng_state()
    texts = ([p.text for p in arithmetic(tokenizer, rows=4, seed=s)] for s in (3, 3, 4))
    one, two, other = texts
    assert one == two != other
    one, two, other = (modular_addition(50, seed=s).inputs for s in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rows": 0}, "rows must be at least 1"),
        ({"operation": "%"}, r"operation must be one of \+, -, \*, /, got '%'"),
        ({"digits": 3}, "digits must be 1 or, without words, 2, got 3"),
        ({"digits": 2, "words": True}, "digits .* got 2"),
        ({"shots": 99}, "shots must be at most 98, got 99"),
        ({"shots": -1}, "shots must be at least 0"),
        ({"shots": 98}, "no counterfactual of"),
    ],
)
def test_refuses_bad_input(tokenizer, options, says):
    with pytest.raises(ValueError, match=says):
        arithmetic(tokenizer, **{"rows": 30, "seed": 0} | options)


def test_refuses_sizes_of_modular_addition():
    with pytest.raises(ValueError, match="at most modulus² = 25, got 26"):
        modular_addition(26, seed=0, modulus=5)
    with pytest.raises(ValueError, match="modulus must be at least 2, got 1"):
        modular_addition(1, seed=0, modulus=1)
