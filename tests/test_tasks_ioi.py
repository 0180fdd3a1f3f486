import pytest
import torch

from foveate.tasks.ioi import colored_objects, ioi


@pytest.fixture(scope="module")
def tokenizer(builtin):
    return builtin[1]


def said(tokenizer, prompt):
    return {n: tokenizer.decode(prompt.ids[0, a:b]) for n, (a, b) in prompt.spans.items()}


def test_the_answer_is_the_name_that_does_not_give(tokenizer):
    for prompt in ioi(tokenizer, rows=20, seed=0):
        names = said(tokenizer, prompt)
        assert names["giver"] == names["wrong"] == tokenizer.decode(prompt.wrong)
        assert names["answer"] == tokenizer.decode(prompt.answer) != names["giver"]
        assert prompt.text.count(names["giver"]) == 2 and prompt.text.count(names["answer"]) == 1
        assert all(b - a == 1 for a, b in prompt.spans.values())
        assert prompt.answer.shape == prompt.wrong.shape == (1,)
        assert prompt.ids[0].tolist() == tokenizer(prompt.text)["input_ids"]
        assert prompt.text.startswith("When ") and prompt.text.endswith(" to")


def test_the_corrupt_prompt_differs_in_the_giver_alone(tokenizer):
    for prompt in ioi(tokenizer, rows=10, seed=1):
        corrupt = prompt.corrupt
        assert corrupt.ids.shape == prompt.ids.shape and corrupt.spans == prompt.spans
        (differs,) = (corrupt.ids != prompt.ids)[0].nonzero()[:, 0].tolist()
        assert differs == prompt.spans["giver"][0]
        third = said(tokenizer, corrupt)["giver"]
        assert third not in (said(tokenizer, prompt)["answer"], said(tokenizer, prompt)["wrong"])
        assert torch.equal(corrupt.answer, prompt.answer)
        assert torch.equal(corrupt.wrong, prompt.wrong)


def test_orders_are_balanced(tokenizer):
    prompts = ioi(tokenizer, rows=30, seed=2)
    assert sum(p.spans["answer"] < p.spans["wrong"] for p in prompts) == 15
    asked = [p.spans["answer"] for p in colored_objects(tokenizer, rows=30, seed=2)]
    assert {place: asked.count(place) for place in set(asked)} == dict.fromkeys(set(asked), 10)
    assert len(set(asked)) == 3


def test_colored_objects_ask_for_one_of_three(tokenizer):
    for prompt in colored_objects(tokenizer, rows=12, seed=0):
        for one in (prompt, prompt.corrupt):
            names = said(tokenizer, one)
            assert names["asked"] == names["object"]
            assert f" a{names['answer']}{names['object']}" in one.text
            assert tokenizer.decode(one.answer) == names["answer"]
            wrong = [tokenizer.decode(token) for token in one.wrong]
            assert wrong == [names["wrong 0"], names["wrong 1"]]
            assert len({names["answer"], *wrong}) == 3
            assert one.ids[0].tolist() == tokenizer(one.text)["input_ids"]
        assert prompt.corrupt.ids.shape == prompt.ids.shape
        (differs,) = (prompt.corrupt.ids != prompt.ids)[0].nonzero()[:, 0].tolist()
        assert differs == prompt.spans["asked"][0]
        assert prompt.corrupt.answer[0] in prompt.wrong


@pytest.mark.parametrize("make", [ioi, colored_objects])
def test_seeds_reproduce_and_leave_the_global_generator_alone(tokenizer, make):
    before = torch.random.get_rng_state()
    one, two, other = ([p.text for p in make(tokenizer, rows=3, seed=s)] for s in (3, 3, 4))
    assert one == two != other and len(set(one)) == 3
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("make", [ioi, colored_objects])
def test_refuses_no_rows_and_tokenizers_without_single_tokens(tokenizer, make):
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        make(tokenizer, rows=0, seed=0)

    def letters(text, **options):
        return {"input_ids": list(map(ord, text))}

    with pytest.raises(ValueError, match=r"4 of .* one token .* got 0"):
        make(letters, rows=1, seed=0)
