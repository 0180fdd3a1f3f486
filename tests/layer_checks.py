"""What the tests of attention layers share."""

import torch

from foveate import ops
from foveate.nn._attention import rotary
from sparse_checks import causal_keep, softmax_over


def tokens(length, dim=32, batch=2, seed=1):
    """Random x (batch, length, dim)."""
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed))


def heads_of(linear, x, width, theta=None, first=0):
    """Projected heads (B, H, L, width), rotated one position at a time."""
    heads = linear(x).unflatten(-1, (-1, width)).transpose(1, 2)
    if theta is None:
        return heads
    turned = torch.zeros_like(heads)
    for t in range(x.shape[1]):
        cos, sin = (y[0] for y in rotary(torch.tensor([first + t]), width, theta))
        a, b = heads[:, :, t].chunk(2, -1)
        turned[:, :, t] = heads[:, :, t] * cos + torch.cat((-b, a), -1) * sin
    return turned


def plain_attention(q, k, v, causal):
    """Softmax attention head by head with L×L maps."""
    keep = causal_keep(q.shape[2], k.shape[2]) if causal else torch.ones(1, 1).bool()
    return softmax_over(q, k, v, keep.expand(q.shape[2], k.shape[2]))


def hidden_and_output(model, ids):
    """What goes into the first attention layer of a model, and what comes out of it."""
    seen = {}

    def note(module, args, kwargs, out):
        seen["in"], seen["out"] = kwargs["hidden_states"], out[0]

    layer = model.model.layers[0].self_attn
    hook = layer.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(ids)
    hook.remove()
    return layer, seen["in"], seen["out"]


@torch.no_grad()
def check_rows_go_on_as_alone(layer, x, padded):
    """Rows x (2, 20, dim), the second led by `padded` of padding, end step by step as alone."""
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[1, :padded] = False
    y, state = layer(x[:, :10], mask=ops.padding(valid), return_state=True)
    outs = [y]
    for t in range(10, 20):
        y, state = layer.step(x[:, t], state)
        outs.append(y[:, None])
    got = torch.cat(outs, 1)
    torch.testing.assert_close(got[0], layer(x[:1])[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got[1, padded:], layer(x[1:, padded:])[0], atol=1e-5, rtol=1e-4)
