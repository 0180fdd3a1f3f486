"""A memory that learns while it reads, one token at a time."""

import torch
from torch.nn.functional import silu


def said(x, weights):
    y = x
    for i, w in enumerate(weights):
        y = (silu(y) if i else y) @ w
    return y + x if len(weights) > 1 else y


def loop(q, k, v, start, rate, momentum, keep, chunk, read):
    """One row and head at a time, one token at a time, the gradient by autograd."""
    out, ends = torch.zeros_like(v), []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            now = [w[h] for w in start]
            push = [torch.zeros_like(w) for w in now]
            for t in range(q.shape[2]):
                if t % chunk == 0:
                    base = [w.clone() for w in now]
                leaf = [w.detach().clone().requires_grad_() for w in base]
                loss = (said(k[b, h, t], leaf) - v[b, h, t]).square().sum()
                grads = torch.autograd.grad(loss, leaf)
                push = [
                    momentum[b, h, t] * p - rate[b, h, t] * g
                    for p, g in zip(push, grads, strict=True)
                ]
                now = [keep[b, h, t] * w + p for w, p in zip(now, push, strict=True)]
                out[b, h, t] = said(q[b, h, t], now if read == "token" else base)
            ends.append((now, push))
    return out, ends
