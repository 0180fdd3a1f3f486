import pytest
import torch

from attached import prompt
from foveate.analysis.retrieval_head import RetrievalHead, answer_accuracy, found
from foveate.hf.ablate import ablate
from foveate.tasks.prompt import Prompt
from test_watch import eager_maps
from tiny_models import build

IDS = torch.tensor([9, 5, 6, 7, 8, 3, 4])
SPAN = (1, 5)


def asked(ids, answer, span):
    return Prompt("", ids, answer, {"answer": span}, torch.empty(0, dtype=torch.long))


def answered(model, seed=0, length=30, words=4):
    """A prompt whose answer is what the model says, and a span of as many tokens before it."""
    ids = prompt(length, seed)
    options = {"max_new_tokens": words, "min_new_tokens": words, "do_sample": False}
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, length:]
    ids[0, 10 : 10 + words] = answer  # so that there is something to be copied
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, length:]
    return asked(ids, answer, (10, 10 + words))


def test_a_head_that_copies_all_scores_1_and_one_that_looks_next_to_it_0():
    told, copies = IDS[1:5], torch.arange(1, 5)
    strongest = torch.stack([copies, copies + 1, copies - 1, torch.zeros(4, dtype=torch.long)])
    assert found(strongest, told, IDS, SPAN).tolist() == [1, 0, 0, 0]
    assert found(copies[:2], told[:2], IDS, SPAN) == 0.5
    assert found(copies, told, IDS, (1, 3)) == 1  # what was hit outside the span is nothing


def test_a_position_that_is_hit_twice_counts_once():
    told, strongest = torch.tensor([5, 5, 5, 5, 5]), torch.ones(5, dtype=torch.long)
    assert found(strongest, told, IDS, SPAN) == 0.25
    assert found(strongest, told, IDS, SPAN, distinct=False) == 1.25


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_hits_are_those_of_the_models_own_map(family):
    model = build(family)
    prompts = [answered(model, seed) for seed in range(3)]
    record = RetrievalHead(recall=None)(model, prompts)
    want = torch.zeros(4, 4)
    for p in prompts:
        ids, (a, b) = p.with_answer()[0], p.spans["answer"]
        for layer, weights in enumerate(eager_maps(model, ids[None])):
            for head in range(4):
                hit = set()
                for row in range(len(p.ids[0]) - 1, len(ids) - 1):
                    at = int(weights[0, head, row].argmax())
                    if a <= at < b and ids[at] == ids[row + 1]:
                        hit.add(at)
                want[layer, head] += len(hit) / (b - a) / len(prompts)
    torch.testing.assert_close(record["retrieval"], want)


def test_decoding_is_teacher_forcing_of_what_the_model_says():
    model = build("llama")
    prompts = [answered(model, seed) for seed in range(4)]
    forced = RetrievalHead(recall=None)(model, prompts)
    spoken = RetrievalHead(recall=None, decode=True, new_tokens=4)(model, prompts)
    assert torch.equal(forced["retrieval"], spoken["retrieval"])
    assert answer_accuracy(model, prompts) == 1 == float(spoken["recalled"].min())
    first = int(prompts[0].answer[0])
    short = RetrievalHead(recall=None, decode=True, stop=(first,))(model, prompts[:1])
    assert float(short["recalled"][0]) == 1 / len(prompts[0].answer.unique())


def test_a_random_model_retrieves_next_to_nothing():
    model = build("llama")
    prompts = []
    for seed in range(20):
        ids = prompt(60, seed)
        prompts.append(asked(ids, ids[0, 20:24], (20, 24)))
    record = RetrievalHead(recall=None)(model, prompts)
    assert float(record["retrieval"].mean()) < 0.04
    assert 0 <= float(record["retrieval"].min()) <= float(record["retrieval"].max()) < 0.2
    assert bool(RetrievalHead()(model, prompts)["retrieval"].isnan().all())  # none is recalled


def test_only_prompts_that_are_recalled_count():
    model = build("llama")
    good, ids = answered(model), prompt(30, 9)
    wrong = asked(ids, (answered(model, 9).answer + 1) % 128, (3, 7))
    both, alone = (RetrievalHead()(model, p) for p in ([good, wrong], [good]))
    assert torch.equal(both["retrieval"], alone["retrieval"])
    assert both.about["counted"] == 1 and both.about["prompts"] == 2


def test_a_score_is_of_the_head_alone():
    model = build("llama")
    prompts = [answered(model, seed) for seed in range(3)]
    plain = RetrievalHead(recall=None)(model, prompts)
    with ablate(model, [(3, h) for h in range(4)] + [(2, 1)]):
        masked = RetrievalHead(recall=None)(model, prompts)
    assert torch.equal(plain["retrieval"][:3], masked["retrieval"][:3])
    assert not torch.equal(plain["recalled"], masked["recalled"])


def test_bad_input_is_named():
    model = build("llama")
    with pytest.raises(ValueError, match="at least one prompt"):
        RetrievalHead()(model, [])
    ids = prompt(9)
    nameless = Prompt("", ids, ids[0, :2], {"needle": (0, 2)}, ids[0, :0])
    with pytest.raises(ValueError, match=r"no span 'answer', only \['needle'\]"):
        RetrievalHead()(model, [nameless])
    with pytest.raises(ValueError, match=r"recall must be in \[0, 1\) or None, got 1"):
        RetrievalHead(recall=1.0)
    with pytest.raises(ValueError, match="new_tokens must be at least 1"):
        RetrievalHead(new_tokens=0)
