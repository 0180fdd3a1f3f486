import pytest
import torch

import foveate
from foveate import ops
from foveate.attention.base import Call
from sparse_checks import causal_keep, check_common, qkv, softmax_over


def plain_keep(lq, lk, sinks, window):
    """Pairs the pattern shows, without causality."""
    keep = torch.zeros(lq, lk, dtype=torch.bool)
    for row in range(lq):
        for key in range(lk):
            keep[row, key] = key < sinks or abs(row + lk - lq - key) < window
    return keep


@pytest.mark.parametrize(("lq", "lk"), [(90, 90), (37, 90), (1, 90)])
@pytest.mark.parametrize("sinks", [0, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_every_query_sees_sinks_and_window(lq, lk, sinks, causal):
    q, k, v = qkv(lk, lq)
    keep = plain_keep(lq, lk, sinks, 12)
    keep = keep & causal_keep(lq, lk) if causal else keep
    out = foveate.create("sink_window", sinks=sinks, window=12, block=16)(q, k, v, causal=causal)
    torch.testing.assert_close(out, softmax_over(q, k, v, keep), atol=1e-5, rtol=1e-4)


def test_full_window_equals_dense():
    q, k, v = qkv(90)
    out = foveate.create("sink_window", window=90)(q, k, v)
    torch.testing.assert_close(out, ops.attend(q, k, v, causal=True), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 33, 64])
def test_decode_equals_prefill_row(length):
    mechanism = foveate.create("sink_window", sinks=3, window=9, block=16)
    q, k, v = qkv(64)
    step = mechanism(q[:, :, length - 1 : length], k[:, :, :length], v[:, :, :length])
    want = mechanism(q, k, v)[:, :, length - 1 : length]
    torch.testing.assert_close(step, want, atol=1e-5, rtol=1e-4)


def test_another_mask_is_joined():
    q, k, v = qkv(90)
    documents = torch.arange(90) // 40
    keep = plain_keep(90, 90, 5, 12) & causal_keep(90, 90) & (documents[:, None] == documents)
    mechanism = foveate.create("sink_window", sinks=5, window=12, block=16)
    out = mechanism(q, k, v, mask=ops.documents(documents))
    torch.testing.assert_close(out, softmax_over(q, k, v, keep), atol=1e-5, rtol=1e-4)


def test_common_claims():
    check_common(foveate.create("sink_window", sinks=4, window=12), *qkv(90, batch=2))


def test_records_what_it_reads():
    records = []
    q, k, v = qkv(256)
    mechanism = foveate.create("sink_window", sinks=8, window=32, block=16)
    mechanism(q, k, v, call=Call(record=records.append))
    assert 0 < records[0].density < 0.5
    assert 0 < records[0].retained_mass < 1


@pytest.mark.parametrize("option", [{"window": 0}, {"sinks": -1}, {"block": 0}])
def test_refuses_bad_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        foveate.create("sink_window", **option)
