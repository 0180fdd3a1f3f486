"""Lengths as they are typed: "512,4k,8000"."""

from __future__ import annotations

import re


def lengths_of(text: str, option: str) -> tuple[int, ...]:
    """The lengths of a list with commas (4k is 4096), none for "".

    ValueError, with the name of the option they come from, for what is no length.
    """
    return tuple(_length(part, option) for part in text.split(",")) if text else ()


def _length(text: str, option: str) -> int:
    found = re.fullmatch(r"(\d+)(k?)", text.strip().lower())
    if not found:
        raise ValueError(f"{option}: {text!r} is no length; give some like 512,4k,8000")
    return int(found[1]) * (1024 if found[2] else 1)
