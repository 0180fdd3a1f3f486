import pytest
import torch

from foveate.tasks.needle_kv import FILLER, PLACES, WORDS, key_values, needles


@pytest.fixture(scope="module")
def tokenizer(builtin):
    return builtin[1]


def said(tokenizer, prompt, name):
    a, b = prompt.spans[name]
    return tokenizer.decode(prompt.ids[0, a:b])


def test_the_answer_stands_once_in_the_context_with_the_same_tokens(tokenizer):
    for prompt in needles(tokenizer, rows=8, seed=0, count=2, distractors=2):
        answer = tokenizer.decode(prompt.answer)
        assert said(tokenizer, prompt, "answer") == answer
        assert prompt.text.count(answer) == 1 and len(answer.split()) == 3
        a, b = prompt.spans["answer"]
        assert torch.equal(prompt.ids[0, a:b], prompt.answer)
        needle = said(tokenizer, prompt, "needle")
        asked = needle.removesuffix(f"{answer}.").lstrip()
        assert needle.endswith(f"{answer}.") and prompt.text.endswith(asked)
        assert f"\nWhat is t{asked[1:].removesuffix(' is')}? {asked}" in prompt.text
        assert prompt.ids[0].tolist() == tokenizer(prompt.text)["input_ids"]
        whole = tokenizer(prompt.text + answer)["input_ids"]
        assert prompt.with_answer()[0].tolist() == whole


def test_prompts_of_a_row_share_their_context(tokenizer):
    prompts = needles(tokenizer, rows=2, seed=1, count=3, distractors=2)
    assert len(prompts) == 6
    for row in (prompts[:3], prompts[3:]):
        contexts = {prompt.text.split("\n")[0] for prompt in row}
        assert len(contexts) == 1
        assert len({said(tokenizer, prompt, "answer") for prompt in row}) == 3
        for i, prompt in enumerate(row):
            others = {name for name in prompt.spans if name.startswith("other")}
            assert others == {f"other {j}" for j in range(5) if j != i}
            for j in {0, 1, 2} - {i}:
                assert said(tokenizer, prompt, f"other {j}") == said(tokenizer, row[j], "needle")


@pytest.mark.parametrize("length", [60, 273, 700])
def test_length_is_kept_to_a_sentence(tokenizer, length):
    longest = max(len(tokenizer(" " + line)["input_ids"]) for line in FILLER.split("\n"))
    for prompt in needles(tokenizer, rows=5, seed=2, length=length):
        assert length - longest < prompt.ids.shape[1] <= length


def test_the_needle_stands_at_its_depth(tokenizer):
    for depth in (0.0, 0.25, 0.5, 1.0):
        for prompt in needles(tokenizer, rows=3, seed=3, length=500, depth=depth):
            a, b = prompt.spans["needle"]
            context = len(tokenizer(prompt.text.split("\n")[0])["input_ids"])
            assert abs(a / (context - (b - a)) - depth) < 0.06
            assert (a == 0) == (depth == 0) and (b == context) == (depth == 1)


def test_seeds_reproduce_and_leave_the_global_generator_alone(tokenizer):
    before = torch.random.get_rng_state()
    for make in (needles, key_values):
        one, two, other = (make(tokenizer, rows=2, seed=s) for s in (5, 5, 6))
        assert [p.text for p in one] == [p.text for p in two] != [p.text for p in other]
        assert one[0].text != one[1].text
    assert torch.equal(torch.random.get_rng_state(), before)


def test_answers_share_no_word_with_the_rest():
    words, places = WORDS.split(), PLACES.split()
    assert len(set(words)) == len(words) >= 3 * len(set(places)) == 3 * len(places)
    assert not set(words) & set(f"{FILLER} {PLACES}".lower().replace(".", "").split())


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_key_value_lines_hold_the_answer_once(tokenizer, depth):
    for prompt in key_values(tokenizer, rows=3, seed=0, length=300, depth=depth):
        *lines, start = prompt.text.split("\n")
        answer, key = tokenizer.decode(prompt.answer), said(tokenizer, prompt, "key")
        whole = f'{{"key": "{key}", "value": "{answer}"}}'
        assert start + answer + '"}' == whole and lines.index(whole) == round(
            depth * len(lines[1:])
        )
        assert said(tokenizer, prompt, "needle") == whole
        assert said(tokenizer, prompt, "answer") == answer and prompt.text.count(answer) == 1
        assert 300 - 24 < prompt.ids.shape[1] <= 300
        assert prompt.with_answer()[0].tolist() == tokenizer(prompt.text + answer)["input_ids"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"count": 0}, "count must be at least 1"),
        ({"distractors": -1}, "distractors must be at least 0"),
        ({"count": 10, "distractors": 3}, "at most 12, got 13"),
        ({"depth": 1.5}, "depth must be in .* got 1.5"),
        ({"length": 20}, "length must be at least .* got 20"),
    ],
)
def test_refuses_what_does_not_fit(tokenizer, options, says):
    with pytest.raises(ValueError, match=says):
        needles(tokenizer, **{"rows": 1, "seed": 0} | options)


def test_refuses_lines_that_do_not_fit_and_answers_told_in_two_ways(tokenizer):
    with pytest.raises(ValueError, match=r"two lines .* got 40"):
        key_values(tokenizer, rows=1, seed=0, length=40)
    with pytest.raises(ValueError, match="depth"):
        key_values(tokenizer, rows=1, seed=0, depth=-0.1)

    class Last:
        """Writes the last word of a text in capitals."""

        def __call__(self, text, **options):
            head, _, tail = text.rpartition(" ")
            return tokenizer(f"{head} {tail.upper()}", **options)

    with pytest.raises(ValueError, match=r"in the context as .* after the question as"):
        needles(Last(), rows=1, seed=0)
