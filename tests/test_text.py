import pytest
import torch

from foveate.hf.text import builtin_text, encode, read_text, text_sha256


@pytest.fixture(scope="module")
def tokenizer(builtin):
    return builtin[1]


def test_builtin_text_is_the_language_reference_in_sorted_order():
    from pydoc_data.topics import topics

    text = builtin_text()
    assert text.startswith(topics[min(topics)])
    assert text.endswith(topics[max(topics)])
    assert len(text) > 100_000


def test_read_text_gives_the_content_without_byte_order_mark(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffnaïve\n".encode())
    assert read_text(file) == "naïve\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "empty"), (b" \n\t", "empty"), (b"ab\0c", "NUL"), (b"ab\xff", "byte 2 is 0xff")],
)
def test_read_text_refuses_what_is_not_text(tmp_path, content, says):
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_text(file)


def test_read_text_refuses_missing_files_and_directories(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="is a directory"):
        read_text(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        builtin_text()[:60_000],
        "information understanding\n \nunderstanding\n \n\ninformation\r\n" * 90,
    ],
    ids=["prose", "blanks"],
)
def test_encode_equals_the_head_of_the_whole_tokenisation(tokenizer, text):
    whole = tokenizer(text)["input_ids"]
    for tokens in [*range(1, min(600, len(whole))), len(whole)]:
        ids = encode(tokenizer, text, tokens)
        assert ids.shape == (1, tokens) and ids.dtype == torch.long
        assert ids[0].tolist() == whole[:tokens]


def test_encode_reads_no_more_than_it_must():
    text = "some words\n" * 100_000
    seen = []

    def letters(text, verbose):
        seen.append(len(text))
        return {"input_ids": [ord(letter) for letter in text]}

    encode(letters, text, 50)
    assert sum(seen) < 1000


def test_encode_says_how_many_tokens_there_are(tokenizer):
    with pytest.raises(ValueError, match="has 2 tokens, 9 were asked for"):
        encode(tokenizer, "Hello world", 9)
    with pytest.raises(ValueError, match="tokens: got 0"):
        encode(tokenizer, "Hello world", 0)


def test_text_sha256_is_that_of_the_utf8_bytes():
    assert text_sha256("abc").startswith("ba7816bf8f01cfea")
    assert text_sha256("é") != text_sha256("e")
