import pytest
import torch

from foveate.tasks.factual import FACTS, TEMPLATES, factual

RELATIONS = list(FACTS)


@pytest.fixture(scope="module")
def tokenizer(builtin):
    return builtin[1]


def facts(relation):
    return dict(fact.split(": ") for fact in FACTS[relation].split(", "))


def subject(tokenizer, prompt):
    a, b = prompt.spans["subject"]
    return tokenizer.decode(prompt.ids[0, a:b]).strip()


@pytest.mark.parametrize("relation", RELATIONS)
def test_prompts_ask_for_the_fact_and_span_its_subject(tokenizer, relation):
    for template, form in enumerate(TEMPLATES[relation]):
        for prompt in factual(tokenizer, seed=0, relation=relation, template=template):
            named = subject(tokenizer, prompt)
            assert prompt.text == form.format(named)
            assert tokenizer.decode(prompt.answer) == f" {facts(relation)[named]}"
            assert (
                prompt.with_answer()[0].tolist()
                == (tokenizer(f"{prompt.text} {facts(relation)[named]}")["input_ids"])
            )


@pytest.mark.parametrize("relation", RELATIONS)
def test_first_tokens_of_the_answers_are_distinct(tokenizer, relation):
    prompts = factual(tokenizer, seed=0, relation=relation)
    assert len({int(prompt.answer[0]) for prompt in prompts}) == len(prompts)
    assert len(prompts) == len(facts(relation)) >= (30 if relation == "capital" else 20)


def test_of_answers_with_the_same_first_token_one_stays(tokenizer):
    def short(text, **options):  # every answer that starts with a B has the same first token
        made = tokenizer(text, **options)
        return {"input_ids": [7] if text.startswith(" B") else made["input_ids"]} | {
            name: made[name] for name in made if name != "input_ids"
        }

    kept = {subject(tokenizer, prompt) for prompt in factual(short, seed=0)}
    starts = [name for name, answer in facts("capital").items() if answer.startswith("B")]
    assert starts[0] in kept and not kept & set(starts[1:])


def test_counterfactuals_have_another_subject_of_as_many_tokens(tokenizer):
    prompts = factual(tokenizer, seed=0, shots=2)
    opposed = [prompt for prompt in prompts if prompt.corrupt]
    assert len(opposed) >= 30
    for prompt in opposed:
        corrupt = prompt.corrupt
        assert corrupt.ids.shape == prompt.ids.shape and corrupt.spans == prompt.spans
        a, b = prompt.spans["subject"]
        assert (corrupt.ids != prompt.ids)[0].nonzero()[:, 0].min() >= a
        assert (corrupt.ids != prompt.ids)[0].nonzero()[:, 0].max() < b
        assert prompt.wrong.tolist() == corrupt.answer[:1].tolist() != prompt.answer[:1].tolist()
        assert corrupt.wrong.tolist() == prompt.answer[:1].tolist()


def test_shots_are_solved_in_front_and_never_asked(tokenizer):
    prompts = factual(tokenizer, rows=5, seed=1, shots=3)
    assert len(prompts) == 5
    solved = {prompt.text.rsplit("\n", 1)[0] for prompt in prompts}
    (shared,) = solved
    for line in shared.split("\n"):
        country, capital = line.removeprefix("The capital of ").removesuffix(".").split(" is ")
        assert facts("capital")[country] == capital
        assert country not in {subject(tokenizer, prompt) for prompt in prompts}
    assert shared.count("\n") == 2


def test_seeds_reproduce_and_leave_the_global_generator_alone(tokenizer):
    before = torch.random.get_rng_state()
    one, two, other = ([p.text for p in factual(tokenizer, rows=6, seed=s)] for s in (3, 3, 4))
    assert one == two != other
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"relation": "river"}, "relation must be one of capital, landmark, language, got 'river'"),
        ({"template": 3}, "template must be from 0 to 2 for capital, got 3"),
        ({"shots": -1}, "shots must be at least 0, got -1"),
        ({"rows": 0}, "rows must be at least 1 .* got 0"),
        ({"rows": 40, "shots": 1}, "with 1 shots, at most the 40 facts .* got 40"),
        ({"shots": 40}, "got 0"),
    ],
)
def test_refuses_bad_input(tokenizer, options, says):
    with pytest.raises(ValueError, match=says):
        factual(tokenizer, seed=0, **options)
