"""Attention workers: what they hold, how they are asked, and what travels."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from foveate import ops

SPLITS = ("head", "sequence")


def traffic(
    q_heads: int, kv_heads: int, dim: int, *, workers: int = 1, split: str = "head"
) -> tuple[int, int]:
    """Numbers that go to the attention workers and come back, per row, layer and new token.

    Workers that share the heads each get their own; workers that share the sequence all get the
    query, and send back its log-sum-exp, too. The new key and value go to one of them.
    """
    check_split(workers, split)
    copies, stat = (1, 0) if split == "head" else (workers, 1)
    return (copies * q_heads + 2 * kv_heads) * dim, copies * q_heads * (dim + stat)


class Shard:
    """What one worker holds, k and v (B, Hkv, n, D), and one step after the other.

    A step may bring the query and the new key in any order, and `result` ends it. Work on what is
    held begins as soon as the query is there.
    """

    def __init__(self, k: Tensor, v: Tensor, scale: float | None = None) -> None:
        self.held, self.scale = (k, v), scale
        self.q: Tensor | None = None
        self.new: tuple[Tensor, Tensor] | None = None
        self.parts: list[tuple[Tensor, Tensor]] = []

    def ask(self, q: Tensor) -> None:
        """Take the query (B, Hq, 1, D) and attend to the keys held."""
        self.q = q
        self._attend(self.held)
        if self.new is not None:
            self._attend(self.new)

    def extend(self, k: Tensor, v: Tensor) -> None:
        """Take the key and value (B, Hkv, 1, D) of the new token."""
        self.new = (k, v)
        if self.q is not None:
            self._attend(self.new)

    def result(self) -> tuple[Tensor, Tensor]:
        """(out, lse) of the query over all keys, the new one included once."""
        if not self.parts:
            raise RuntimeError("a result was wanted before a query came")
        found = ops.merge(self.parts)
        if self.new is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(self.held, self.new, strict=True))
            self.held = (k, v)
        self.q, self.new, self.parts = None, None, []
        return found

    def _attend(self, over: tuple[Tensor, Tensor]) -> None:
        if self.q is not None:
            self.parts.append(ops.attend(self.q, *over, scale=self.scale, return_lse=True))


def serve(connection: Connection, k: Any, v: Any, scale: float | None, with_lse: bool) -> None:
    """Be a worker at one end of a pipe until None comes; k, v and all messages are arrays."""
    shard = Shard(torch.from_numpy(k), torch.from_numpy(v), scale)
    while (message := connection.recv()) is not None:
        word, arrays = message
        if word == "result":
            out, lse = shard.result()
            connection.send([x.numpy() for x in ((out, lse) if with_lse else (out,))])
        else:
            tensors = [torch.from_numpy(x) for x in arrays]
            if word == "ask":
                shard.ask(*tensors)
            else:
                shard.extend(*tensors)


class Offloaded:
    """Attention whose keys lie with workers behind pipes; counts the numbers that travel."""

    def __init__(self, connections: Sequence[Connection], split: str) -> None:
        check_split(len(connections), split)
        self.connections, self.split = list(connections), split
        self.sent = self.received = self.steps = 0

    def ask(self, q: Tensor) -> None:
        """Send the query (B, Hq, 1, D), before its key and value are there."""
        for worker, part in enumerate(self._shares(q)):
            self._send(worker, "ask", part)

    def extend(self, k: Tensor, v: Tensor) -> None:
        """Send the key and value (B, Hkv, 1, D) of the new token."""
        if self.split == "head":
            for worker, pair in enumerate(zip(self._shares(k), self._shares(v), strict=True)):
                self._send(worker, "extend", *pair)
        else:
            self._send(self.steps % len(self.connections), "extend", k, v)

    def result(self) -> Tensor:
        """The output (B, Hq, 1, D)."""
        parts = []
        for connection in self.connections:
            connection.send(("result", ()))
        for connection in self.connections:
            found = [torch.from_numpy(x) for x in connection.recv()]
            self.received += sum(x.numel() for x in found)
            parts.append(found)
        self.steps += 1
        if self.split == "head":
            return torch.cat([out for (out,) in parts], 1)
        return ops.merge([(out, lse) for out, lse in parts])[0]

    def _shares(self, x: Tensor) -> Sequence[Tensor]:
        """What each worker gets of a query, or of keys by head."""
        workers = len(self.connections)
        return x.tensor_split(workers, 1) if self.split == "head" else [x] * workers

    def _send(self, worker: int, word: str, *tensors: Tensor) -> None:
        self.sent += sum(x.numel() for x in tensors)
        self.connections[worker].send((word, [x.numpy() for x in tensors]))


def check_split(workers: int, split: str) -> None:
    """Refuse a number of workers, or a way to share the work, that there is not."""
    ops.check_block("workers", workers)
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
