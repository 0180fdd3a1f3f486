"""The text a comparison reads, as a string and as tokens."""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch

# A lone line break between words: the tokens before it are the same whatever follows. At a run of
# blanks they are not, for tokenizers group a run by what comes after it.
_CUT = re.compile(r"(?<=\S)\n(?=\S)")


def builtin_text() -> str:
    """The Python language reference that ships with CPython, topic after topic in sorted order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str | Path) -> str:
    """The content of a UTF-8 file; ValueError when it is missing, a directory, empty or binary."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"text: {path} is a directory; give a UTF-8 text file.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"text: cannot read {path}: {error.strerror or error}.") from error
    if b"\0" in content:
        raise ValueError(f"text: {path} is a binary file (it has NUL bytes); give UTF-8 text.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text: {path} is not UTF-8 (byte {error.start} is 0x{content[error.start]:02x}); "
            "convert it or give another file."
        ) from error
    if not text.strip():
        raise ValueError(f"text: {path} is empty; give a UTF-8 file with some text.")
    return text


def encode(tokenizer: Any, text: str, tokens: int) -> torch.LongTensor:
    """The first `tokens` tokens of `text`, (1, tokens), with the tokenizer's own special tokens.

    Reads no more of the text than it must. ValueError when `tokens` < 1 or the text has fewer.
    """
    if tokens < 1:
        raise ValueError(f"tokens: got {tokens}, want at least 1.")
    size = 8 * tokens
    while True:
        cut = _CUT.search(text, size)
        prefix = text[: cut.end()] if cut else text
        ids = tokenizer(prefix, verbose=False)["input_ids"]
        if not cut or len(ids) > tokens:  # one to spare: the last may be an end-of-text token
            break
        size *= 2
    if len(ids) < tokens:
        raise ValueError(f"text: it has {len(ids)} tokens, {tokens} were asked for.")
    return torch.tensor([ids[:tokens]], dtype=torch.long)  # type: ignore[return-value]


def text_sha256(text: str) -> str:
    """SHA-256 of the text's UTF-8 bytes, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
