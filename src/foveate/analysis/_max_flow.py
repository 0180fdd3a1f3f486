"""The largest flow through a network of small capacities, after Dinic."""

from __future__ import annotations

from collections import deque

# Room below which an edge is full: a rounding error of sums of weights.
_FULL = 1e-12


class Network:
    """Nodes 0 … n - 1 and directed edges between them."""

    def __init__(self, nodes: int) -> None:
        self._out: list[list[int]] = [[] for _ in range(nodes)]
        self._head: list[int] = []
        self._capacity: list[float] = []

    def add(self, tail: int, head: int, capacity: float) -> None:
        """An edge; its reverse, which has no room of its own, takes the next number."""
        for end, start, room in ((head, tail, capacity), (tail, head, 0.0)):
            self._out[start].append(len(self._head))
            self._head.append(end)
            self._capacity.append(room)

    def max_flow(self, source: int, sink: int) -> float:
        """What can flow from source to sink at once; the network stays as it is."""
        room, total = self._capacity.copy(), 0.0
        while True:
            level = self._levels(room, source, sink)
            if level[sink] < 0:
                return total
            total += self._fill(room, level, source, sink)

    def _levels(self, room: list[float], source: int, sink: int) -> list[int]:
        """Steps from the source along edges with room, -1 for what is out of reach."""
        level = [-1] * len(self._out)
        level[source] = 0
        waiting = deque([source])
        while waiting and level[sink] < 0:
            node = waiting.popleft()
            for edge in self._out[node]:
                head = self._head[edge]
                if level[head] < 0 and room[edge] > _FULL:
                    level[head] = level[node] + 1
                    waiting.append(head)
        return level

    def _fill(self, room: list[float], level: list[int], source: int, sink: int) -> float:
        """Push along shortest paths until none is left."""
        tried = [0] * len(self._out)
        total, path, node = 0.0, list[int](), source
        while True:
            if node == sink:
                pushed = min(room[edge] for edge in path)
                for edge in path:
                    room[edge] -= pushed
                    room[edge ^ 1] += pushed
                total += pushed
                # Go on from the tail of the first edge that is full now.
                full = next(i for i, edge in enumerate(path) if room[edge] <= _FULL)
                node = self._head[path[full] ^ 1]
                del path[full:]
            elif tried[node] < len(self._out[node]):
                edge = self._out[node][tried[node]]
                if room[edge] > _FULL and level[self._head[edge]] == level[node] + 1:
                    path.append(edge)
                    node = self._head[edge]
                else:
                    tried[node] += 1
            elif node == source:
                return total
            else:
                node = self._head[path.pop() ^ 1]
                tried[node] += 1
