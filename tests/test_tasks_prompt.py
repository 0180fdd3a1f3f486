import pytest
import torch

from foveate.tasks.prompt import draw, first_token, single_tokens, write


@pytest.fixture(scope="module")
def tokenizer(builtin):
    return builtin[1]


def encode(tokenizer, text):
    return tokenizer(text)["input_ids"]


def test_spans_decode_to_what_they_name(tokenizer):
    pieces = ["See:", (" the old", "all"), (" red barn ", "all", "thing"), ("now", "all"), ". So"]
    prompt = write(tokenizer, pieces, " quickly")
    said = {name: tokenizer.decode(prompt.ids[0, a:b]) for name, (a, b) in prompt.spans.items()}
    assert said == {"all": " the old red barn now", "thing": " red barn"}
    assert prompt.text == "See: the old red barn now. So"
    assert prompt.ids[0].tolist() == encode(tokenizer, prompt.text)
    assert tokenizer.decode(prompt.answer) == " quickly"
    assert prompt.with_answer()[0].tolist() == encode(tokenizer, prompt.text + " quickly")


def test_a_token_of_a_blank_belongs_to_the_prompt(tokenizer):
    prompt = write(tokenizer, [("7", "a"), " +", (" 5", "b"), " ="], " 12", wrong=[" 13", " 35"])
    assert prompt.text == "7 + 5 = " and tokenizer.decode(prompt.answer) == "12"
    assert prompt.ids[0].tolist() == encode(tokenizer, "7 + 5 = ")
    assert tokenizer.decode(prompt.ids[0, slice(*prompt.spans["b"])]) == "5"
    assert [tokenizer.decode(token) for token in prompt.wrong] == ["1", "3"]


def test_a_prompt_without_answer_is_the_whole_text(tokenizer):
    prompt = write(tokenizer, ["A list: ", ("x, y.", "list")])
    assert prompt.answer.numel() == 0 and prompt.answer.dtype == torch.long
    assert prompt.ids[0].tolist() == encode(tokenizer, "A list: x, y.")
    assert torch.equal(prompt.with_answer(), prompt.ids)


class Letters:
    """A token a letter between a start token and an end token; no offsets when told so."""

    def __init__(self, offsets=True):
        self.offsets = offsets

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
        if return_offsets_mapping and not self.offsets:
            raise NotImplementedError
        ids = [1, *map(ord, text), 2] if add_special_tokens else list(map(ord, text))
        places = [(0, 0), *((i, i + 1) for i in range(len(text))), (0, 0)]
        return {"input_ids": ids, "offset_mapping": places}


def test_special_tokens_stay_in_front_and_go_from_the_end():
    prompt = write(Letters(), [("ab", "word"), " c"], " d")
    assert prompt.ids[0].tolist() == [1, *map(ord, "ab c ")] and prompt.spans == {"word": (1, 3)}
    assert prompt.answer.tolist() == [ord("d")] and prompt.text == "ab c "
    assert first_token(Letters(), "ab", " xy") == ord("x")


def test_scores_compare_the_answer_with_the_wrong_options(tokenizer):
    prompt = write(tokenizer, ["The sky is"], " blue", wrong=[" red", " green"])
    logits = torch.zeros(1, prompt.ids.shape[1], len(tokenizer))
    logits[0, -1, prompt.answer[0]] = 5
    logits[0, -1, prompt.wrong] = torch.tensor([1.0, 3.0])
    logits[0, 0, 0] = 9
    assert prompt.is_right(logits) and prompt.is_right(logits[0, -1])
    assert float(prompt.difference(logits[0, -1])) == 3
    logits[0, -1, prompt.wrong[0]] = 6
    assert not prompt.is_right(logits)


def test_single_tokens_keeps_words_of_one_token(tokenizer):
    words = single_tokens(tokenizer, ["Mary", "Ouagadougou", "Tom", "Mary"], least=2)
    assert words == ["Mary", "Tom"]
    assert all(len(encode(tokenizer, " " + word)) == 1 for word in words)


def test_draw_gives_different_items_and_follows_its_generator():
    made = [torch.Generator().manual_seed(s) for s in (0, 0)]
    one, two = (draw("abcdefgh", 5, generator) for generator in made)
    assert one == two and len(set(one)) == 5


def test_refuses_what_has_no_answer_or_no_span(tokenizer):
    with pytest.raises(ValueError, match=r"3 of 2 words .* got 1: Tom"):
        single_tokens(tokenizer, ["Tom", "Ouagadougou"], least=3)
    with pytest.raises(ValueError, match="got 0: none"):
        single_tokens(Letters(), ["Tom"], least=1)
    with pytest.raises(ValueError, match="joins the prompt's end 'I know' and 'n'"):
        write(tokenizer, ["I know"], "n")
    with pytest.raises(ValueError, match="no token holds '  '"):
        write(tokenizer, ["a", ("  ", "gap")])
    with pytest.raises(ValueError, match=r"offsets .*got Letters"):
        write(Letters(offsets=False), ["a"], " b")
    with pytest.raises(ValueError, match="the prompt's 2 tokens, got 3"):
        write(tokenizer, ["one two"], " x", corrupt=write(tokenizer, ["one two three"], " x"))
