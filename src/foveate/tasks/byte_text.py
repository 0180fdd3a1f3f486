"""Real text as bytes: language modelling, and needles in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.tasks.batch import Batch, check_at_least

VOCABULARY = 256


@dataclass(frozen=True, eq=False)
class ByteText:
    """Bytes of a text (n,), the first `held_out` of which no training row is drawn from."""

    content: Tensor
    held_out: int

    @classmethod
    def of(cls, text: str, held_out: int = 1 << 16) -> ByteText:
        """The UTF-8 bytes of a text; ValueError when nothing of it is left to train on."""
        content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
        if len(content) < held_out + 2:
            raise ValueError(
                f"a text must have more than the {held_out} bytes that are held out, "
                f"got {len(content)}"
            )
        return cls(content, held_out)

    def batch(self, rows: int, *, seed: int, length: int = 256) -> Batch:
        """Random rows of the part to train on; the target of a byte is the next one."""
        seen = self.content[self.held_out :]
        self._check(rows, length, len(seen))
        made = torch.Generator().manual_seed(seed)
        at = torch.randint(len(seen) - length, (rows, 1), generator=made)
        return _next_byte(seen[at + torch.arange(length + 1)])

    def test(self, *, length: int = 256, limit: int | None = None) -> Batch:
        """The held-out bytes as rows one after the other, `limit` of them at most."""
        rows = self.held_out // (length + 1)
        rows = rows if limit is None else min(rows, limit)
        self._check(rows, length, self.held_out)
        return _next_byte(self.content[: rows * (length + 1)].view(rows, length + 1))

    def _check(self, rows: int, length: int, size: int) -> None:
        check_at_least(1, rows=rows, length=length)
        if length >= size:
            raise ValueError(f"length must be below the {size} bytes there are, got {length}")


def needle_bytes(
    text: ByteText,
    rows: int,
    *,
    seed: int,
    length: int = 256,
    digits: int = 4,
    depth: float | None = None,
) -> Batch:
    """Text that holds " The code is 4821. " and ends in the question: its digits are the targets.

    `depth` is where the needle begins, from 0 (first) to 1 (last), None for anywhere. Guessing
    scores 1 / 10. Raises ValueError for a depth out of range and for rows too short for both.
    """
    check_at_least(1, digits=digits)
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must be in [0, 1], got {depth}")
    say, stop = (torch.tensor(list(x)) for x in (b" The code is ", b". "))
    needle, end = len(say) + digits + len(stop), len(say) + digits - 1
    room = length - end - needle
    if room < 0:
        raise ValueError(f"length must be at least {needle + end}, got {length}")
    inputs = text.batch(rows, seed=seed, length=length).inputs.clone()
    made = torch.Generator().manual_seed(seed)
    code = torch.randint(48, 58, (rows, digits), generator=made)
    at = torch.randint(room + 1, (rows,), generator=made)
    if depth is not None:
        at = torch.full_like(at, round(depth * room))
    said = torch.cat((say.expand(rows, -1), code, stop.expand(rows, -1)), 1)
    inputs.scatter_(1, at[:, None] + torch.arange(needle), said)
    inputs[:, length - end :] = torch.cat((say.expand(rows, -1), code[:, :-1]), 1)
    targets, mask = torch.zeros_like(inputs), torch.zeros_like(inputs, dtype=torch.bool)
    targets[:, -digits:], mask[:, -digits:] = code, True
    return Batch(inputs, targets, mask)


def _next_byte(rows: Tensor) -> Batch:
    """Every byte but the last of a row, with the next one as its target."""
    inputs = rows[:, :-1]
    return Batch(inputs, rows[:, 1:], torch.ones_like(inputs, dtype=torch.bool))
