import multiprocessing
import threading

import pytest
import torch

import foveate
from attached import check_equals_plain, check_padded_row_equals_row_alone
from foveate import ops
from foveate.attention.decode._offload import Offloaded, Shard, serve, traffic

Q_HEADS, KV_HEADS, DIM = 4, 2, 8


def tensors(n, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(1, h, n, DIM) for h in (Q_HEADS, KV_HEADS, KV_HEADS)]


@pytest.mark.parametrize("split", ["head", "sequence"])
@pytest.mark.parametrize("workers", [1, 2, 3, 60])
def test_every_split_equals_dense(split, workers):
    q, k, v = tensors(50)
    out = foveate.create("lamina", workers=workers, split=split)(q[:, :, -1:], k, v)
    torch.testing.assert_close(out, ops.attend(q[:, :, -1:], k, v), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("split", ["head", "sequence"])
def test_a_mask_by_head_is_honoured(split):
    q, k, v = tensors(50)
    visible = torch.rand(1, Q_HEADS, 1, 50) < 0.5
    mechanism = foveate.create("lamina", workers=2, split=split)
    out = mechanism(q[:, :, -1:], k, v, mask=ops.dense(visible))
    want = ops.attend(q[:, :, -1:], k, v, mask=ops.dense(visible))
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("query_first", [True, False])
def test_what_comes_first_does_not_matter_and_the_new_token_counts_once(query_first):
    q, k, v = tensors(34)
    shard = Shard(k[:, :, :30], v[:, :, :30])
    for t in range(30, 34):
        steps = [
            lambda t=t: shard.ask(q[:, :, t : t + 1]),
            lambda t=t: shard.extend(k[:, :, t : t + 1], v[:, :, t : t + 1]),
        ]
        for step in steps if query_first else reversed(steps):
            step()
        want = ops.attend(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], return_lse=True)
        for got, expected in zip(shard.result(), want, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_work_begins_with_the_query():
    q, k, v = tensors(30)
    shard = Shard(k, v)
    shard.ask(q[:, :, -1:])
    torch.testing.assert_close(shard.parts[0][0], ops.attend(q[:, :, -1:], k, v))


def test_a_result_without_a_query_is_refused():
    _, k, v = tensors(30)
    with pytest.raises(RuntimeError, match="before a query came"):
        Shard(k, v).result()


def decoded_away(split, worker):
    """Steps with the cache at two workers; the numbers that travelled, and how they ended."""
    q, k, v = tensors(36)
    if split == "head":
        shares = [(k[:, h : h + 1, :30], v[:, h : h + 1, :30]) for h in range(2)]
    else:
        shares = [(k[:, :, lo : lo + 15], v[:, :, lo : lo + 15]) for lo in (0, 15)]
    ends, workers = [], []
    for keys, values in shares:
        ours, theirs = multiprocessing.Pipe()
        held = (keys.contiguous().numpy(), values.contiguous().numpy())
        args = (theirs, *held, None, split == "sequence")
        workers.append(worker(target=serve, args=args, daemon=True))
        ends.append(ours)
    for each in workers:
        each.start()
    away = Offloaded(ends, split)
    try:
        for t in range(30, 36):
            now = slice(t, t + 1)
            away.ask(q[:, :, now])
            away.extend(k[:, :, now], v[:, :, now])
            want = ops.attend(q[:, :, now], k[:, :, : t + 1], v[:, :, : t + 1])
            torch.testing.assert_close(away.result(), want, atol=1e-6, rtol=1e-5)
    finally:
        for end, each in zip(ends, workers, strict=True):
            end.send(None)
            each.join(30)
    return (away.sent, away.received), workers


@pytest.mark.parametrize("split", ["head", "sequence"])
def test_two_workers_decode_as_one_and_send_what_the_formula_says(split):
    travelled, _ = decoded_away(split, threading.Thread)
    there, back = traffic(Q_HEADS, KV_HEADS, DIM, workers=2, split=split)
    assert travelled == (6 * there, 6 * back)


def test_two_processes_decode_as_one():
    _, processes = decoded_away("sequence", multiprocessing.get_context("spawn").Process)
    assert [process.exitcode for process in processes] == [0, 0]


def test_the_formula_of_the_traffic():
    assert traffic(32, 8, 128) == ((32 + 16) * 128, 32 * 128)
    assert traffic(32, 8, 128, workers=4) == traffic(32, 8, 128)
    assert traffic(32, 8, 128, workers=4, split="sequence") == ((128 + 16) * 128, 128 * 129)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be at least 1"),
        ({"split": "layer"}, "split must be one of head, sequence, got 'layer'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        foveate.create("lamina", **options)
    with pytest.raises(ValueError, match=message):
        traffic(1, 1, 8, **options)


@pytest.mark.parametrize("split", ["head", "sequence"])
def test_inside_a_model_it_equals_the_plain_one(tiny_llama, split):
    spec = f"lamina:workers=2,split={split}"
    check_equals_plain(tiny_llama, decode=spec)
    check_padded_row_equals_row_alone(tiny_llama, 3, decode=spec)
