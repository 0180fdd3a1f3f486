import pytest
import torch

import foveate
from foveate import ops
from layer_checks import tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("deltanet", **{"dim": 32, "heads": 4} | options)


def conv(x, weight):
    """Causal convolution with SiLU, token by token: x (B, L, C), weight (C, width)."""
    out = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for i in range(weight.shape[1]):
            if t - i >= 0:
                out[:, t] += weight[:, -1 - i] * x[:, t - i]
    return out * out.sigmoid()


def plain(layer, x, negative=1.0):
    """The layer by its definition, token by token, in float64."""
    layer, x = layer.double(), x.double()
    q, k, v = conv(layer.qkv(x), layer.convs.weight).split(layer.sizes, -1)
    q, k, v = (y.unflatten(-1, (layer.v_heads, -1)) for y in (q, k, v))
    q, k = (y / (y.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    beta = negative * torch.sigmoid(layer.beta(x))
    state = torch.zeros(*v.shape[:1], *v.shape[2:3], k.shape[-1], v.shape[-1]).double()
    outs = []
    for t in range(x.shape[1]):
        step = torch.eye(k.shape[-1]) - beta[:, t, :, None, None] * outer(k[:, t], k[:, t])
        state = step @ state + beta[:, t, :, None, None] * outer(k[:, t], v[:, t])
        outs.append((state.mT @ q[:, t, :, :, None])[..., 0] / k.shape[-1] ** 0.5)
    heads = torch.stack(outs, 1)
    heads = heads / (heads.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    if layer.readout.gate is not None:
        gate = layer.readout.gate(x).unflatten(-1, (layer.v_heads, -1))
        heads = heads * gate * gate.sigmoid()
    return layer.readout.out(heads.flatten(2))


def outer(a, b):
    return a[..., :, None] * b[..., None, :]


@pytest.mark.parametrize(
    "options",
    [{}, {"negative": True}, {"gate": True, "expand_k": 0.5, "expand_v": 2.0, "conv": 2}],
)
def test_equals_the_definition_token_by_token(options):
    layer, x = build(**options), tokens(70)
    with torch.no_grad():
        got = layer(x)
        want = plain(layer, x, 2.0 if options.get("negative") else 1.0)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-4)


def orthonormal(count):
    """Unit keys (1, 1, count, count) at right angles to each other, and values."""
    made = torch.Generator().manual_seed(0)
    keys = torch.linalg.qr(torch.randn(count, count, generator=made, dtype=torch.float64)).Q
    return keys[None, None], torch.randn(1, 1, count, 5, generator=made, dtype=torch.float64)


def test_recalls_orthonormal_keys_exactly():
    keys, values = orthonormal(16)
    _, state = ops.scan(keys, keys, values, beta=torch.ones(1, 1, 16).double())
    torch.testing.assert_close(keys @ state, values)


def test_a_key_written_again_has_its_new_value_and_no_other_changes():
    keys, values = orthonormal(16)
    again, new = torch.cat((keys, keys[:, :, 3:4]), 2), torch.ones(1, 1, 1, 5).double()
    written = torch.cat((values, new), 2)
    _, state = ops.scan(again, again, written, beta=torch.ones(1, 1, 17).double())
    want = values.clone()
    want[:, :, 3] = 1.0
    torch.testing.assert_close(keys @ state, want)


@pytest.mark.parametrize("beta", [0.3, 1.0, 1.7])
def test_a_step_keeps_all_directions_but_that_of_its_key(beta):
    keys, _ = orthonormal(6)
    start = torch.eye(6, dtype=torch.float64)[None, None]
    key, nothing = keys[:, :, :1], torch.zeros(1, 1, 1, 6).double()
    _, step = ops.scan(key, key, nothing, beta=torch.full((1, 1, 1), beta).double(), state=start)
    want = torch.tensor([1 - beta] + [1.0] * 5).double().sort().values
    torch.testing.assert_close(torch.linalg.eigvalsh(step[0, 0]), want)


def test_products_of_householder_matrices_have_the_wy_form():
    made = torch.Generator().manual_seed(1)
    k = torch.nn.functional.normalize(torch.randn(9, 6, generator=made).double(), dim=-1)
    beta = torch.rand(9, generator=made).double()
    product = torch.eye(6).double()
    for key, b in zip(k, beta, strict=True):
        product = (torch.eye(6) - b * outer(key, key)) @ product
    system = torch.eye(9) + (beta[:, None] * (k @ k.T)).tril(-1)
    w = torch.linalg.inv(system) @ (beta[:, None] * k)
    torch.testing.assert_close(torch.eye(6) - k.T @ w, product)
    start = torch.randn(1, 1, 6, 6, generator=made).double()
    rows = k[None, None]
    _, after = ops.scan(rows, rows, torch.zeros_like(rows), beta=beta[None, None], state=start)
    torch.testing.assert_close(after[0, 0], product @ start[0, 0])


def test_equals_the_delta_rule_of_transformers():
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    made = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 90, 16, generator=made)
    q, k = (torch.nn.functional.normalize(y, dim=-1) for y in (q, k))
    beta = torch.rand(2, 4, 90, generator=made)
    got, state = ops.scan(q, k, v, beta=beta)
    want, last = torch_chunk_gated_delta_rule(
        *(y.transpose(1, 2) for y in (q, k, v)),
        g=torch.zeros(2, 90, 4),
        beta=beta.mT,
        output_final_state=True,
    )
    torch.testing.assert_close(got, want.transpose(1, 2), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 5}, "multiple of heads, got 5 heads"),
        ({"expand_v": 0.3}, "times 0.3 must be a multiple of heads"),
        ({"conv": 0}, "width must be at least 1, got 0"),
    ],
)
def test_refuses_sizes_that_do_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)
