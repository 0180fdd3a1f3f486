"""Random calls of every kernel, held to the reference: `native_fuzz.py FOLDER SECONDS`.

FOLDER holds the libraries to use. Run with libraries built with -DFOVEATE_SANITIZE=ON, any read or
write outside of a tensor, and any undefined behaviour, ends the process.
"""

import json
import math
import os
import random
import sys
import time
from collections import Counter

import torch

from foveate import native, ops
from foveate.native.loader import Kernels
from ops_tools import TOLERANCE

DIMS = [8, 16, 24, 40, 64, 72, 128, 256]
HEADS = [(1, 1), (2, 2), (2, 1), (3, 1), (6, 2), (9, 3), (9, 1)]
LENGTHS = [1, 2, 3, 7, 16, 31, 64, 65, 100, 129, 200]


class Case:
    """Sizes, types and strides of one call, all drawn from a seed."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.with_nan = True
        self.tolerance = 0.0
        torch.manual_seed(seed)
        self.batch = self.rng.choice([1, 1, 2, 3])
        self.heads, self.kv_heads = self.rng.choice(HEADS)
        self.dtype = self.rng.choice([torch.float32, torch.float32, torch.bfloat16])
        self.k_len = self.rng.choice(LENGTHS)
        self.q_len = min(self.rng.choice([1, *LENGTHS]), self.k_len)

    def chance(self, part):
        return self.rng.random() < part

    def tensor(self, heads, length, dim):
        """A random (B, H, L, D) whose memory ends where its last value does, or in one of many."""
        shape = self.batch, heads, length, dim
        layout = self.rng.choice(["plain", "rows of all heads", "part", "one head for all"])
        if layout == "rows of all heads":
            x = torch.randn(shape[0], length, heads, dim).to(self.dtype).transpose(1, 2)
        elif layout == "part":
            x = torch.randn(shape[0], heads + 1, length + 2, dim + 3).to(self.dtype)
            x = x[:, 1:, 2:, 3:]
        elif layout == "one head for all":
            x = torch.randn(1, 1, length, dim).to(self.dtype).expand(shape)
        else:
            x = torch.randn(shape).to(self.dtype)
        return x

    def qkv(self):
        dim, v_dim = (self.rng.choice(DIMS) for _ in range(2))
        q = self.tensor(self.heads, self.q_len, dim)
        return (
            q,
            self.tensor(self.kv_heads, self.k_len, dim),
            self.tensor(self.kv_heads, self.k_len, v_dim),
        )

    def options(self):
        scale = self.rng.choice([None, None, 0.0, -0.05])
        return {"scale": scale, "softcap": self.rng.choice([None, None, 2.0])}

    def mask(self):
        """Options `mask` and `causal`."""
        length, rng = self.k_len, self.rng
        ids = torch.randint(3, (self.batch, length)).sort(-1).values
        some = [
            None,
            ops.window(rng.randint(1, length)),
            ops.sinks(rng.randint(1, 4)) | ops.window(rng.randint(1, length)),
            ops.documents(ids),
            ops.padding(torch.rand(self.batch, length) < rng.random()),
            ops.strided(rng.randint(1, 5)),
            ~ops.window(rng.randint(1, length)),
        ]
        return {"mask": rng.choice(some), "causal": self.chance(0.6)}


def attend(case):
    inputs, options = case.qkv(), {**case.options(), **case.mask()}
    if case.chance(0.2):
        options["q_pos"] = torch.randint(case.k_len + 3, (case.q_len,)).sort().values
    return lambda: ops.attend(*inputs, **options, return_lse=True), inputs


def block_sparse(case):
    inputs, options = case.qkv(), {**case.options(), **case.mask()}
    block = case.rng.choice([1, 3, 16, 64, 100]), case.rng.choice([1, 5, 16, 64, 128])
    lengths = case.q_len, case.k_len
    first = (case.k_len - case.q_len) // block[0]
    rows, columns = -(-case.k_len // block[0]) - first, -(-case.k_len // block[1])
    heads = case.rng.choice([1, case.kv_heads, case.heads])
    if block[1] >= 16 and case.chance(0.3):
        rows_together = case.rng.choice([n for n in (1, 2, 4, 16, 32) if block[0] % n == 0])
        options["skip"] = (case.rng.random(), rows_together)
        case.with_nan = False  # what a rule that compares logits makes of a NaN is left open
    chosen = torch.rand(case.rng.choice([1, case.batch]), heads, rows, columns)
    layout = ops.from_map(chosen < case.rng.choice([0.0, 0.2, 0.7, 1.0]), block, lengths)
    return lambda: ops.block_sparse(*inputs, layout, **options, return_lse=True), inputs


def gather(case):
    inputs, options = case.qkv(), case.options()
    width = case.rng.choice([1, 1, 4, 16, 50])
    blocks = -(-case.k_len // width)
    lists = case.rng.choice([1, case.batch]), case.rng.choice([1, case.kv_heads, case.heads])
    lists += (case.rng.choice([1, case.q_len]),)
    idx = torch.rand(*lists, blocks).argsort(-1)[..., : case.rng.randint(0, blocks)]
    if case.chance(0.3):
        idx = torch.randint(blocks, idx.shape)  # with repeats
    valid = torch.rand(idx.shape) < case.rng.random() if case.chance(0.5) else None
    options |= {"width": width, "return_lse": True}
    return lambda: ops.gather(*inputs, idx, valid, **options), inputs


def scan(case):
    rng, heads, length = case.rng, case.kv_heads, case.rng.choice([1, 2, 7, 33, 70, 129])
    case.q_len = case.k_len = length
    case.batch = rng.choice([1, 1, 2])
    q, k, v = case.qkv()
    per_token = case.batch, heads, length
    side = rng.choice(["key", "value"])
    channels = k.shape[3] if side == "key" else v.shape[3]
    decays = [None, torch.rand(heads), torch.rand(per_token), torch.rand(*per_token, channels)]
    decay = rng.choice(decays)
    options = {"decay": None if decay is None else -decay * rng.choice([0.1, 3.0, 300.0])}
    if decay is not None and decay.dim() == 4:
        options["side"] = side
    if options.get("side") != "value" and case.chance(0.5):
        # Keys of length 1: longer ones let the delta rule's state grow without bound.
        k = k / k.norm(dim=-1, keepdim=True)
        options["beta"] = 2 * torch.rand(per_token)
    if case.chance(0.5):
        options["state"] = torch.randn(case.batch, heads, k.shape[3], v.shape[3])
    if case.chance(0.5):
        options["valid"] = torch.rand(case.batch, length) < rng.random()
        case.with_nan = False  # the reference's zeros do not hide a NaN in the state
    return lambda: ops.scan(q, k, v, **options), (q, k, v)


def quantized_groups(length, dim):
    """Groups of (tokens, channels) that fit so many tokens and channels."""
    some = [(1, dim), (1, 32), (1, 8), (16, 1), (32, 1)]
    return [(t, c) for t, c in some if length % t == 0 and dim % c == 0]


def attend_quantized(case):
    rng = case.rng
    case.tolerance = 1e-3  # the kernel rounds queries and weights to 16 bits
    case.with_nan = False  # `merge`, through which the reference goes, takes an lse of NaN for -inf
    case.k_len = rng.choice([1, 7, 16, 48, 64, 100, 192, 256])
    case.q_len = min(rng.choice([1, 1, 2, 5, 16]), case.k_len)
    q, *kv = case.qkv()
    bits = [rng.choice([2, 4, 8]) for _ in kv]
    groups = [rng.choice(quantized_groups(case.k_len, x.shape[3])) for x in kv]
    packed = [ops.quantize(x, n, group=g) for x, n, g in zip(kv, bits, groups, strict=True)]
    options = case.options() | {"k_bits": bits[0], "v_bits": bits[1], "causal": case.chance(0.5)}
    if case.chance(0.5):
        count = rng.choice([1, 5, 16, 64, 130])
        options["exact"] = [case.tensor(case.kv_heads, count, x.shape[3]) for x in kv]
    return lambda: ops.attend_quantized(q, *packed, **options, return_lse=True), (q,)


def tree_search(case):
    rng = case.rng
    case.with_nan = False  # which of several NaN is the largest is left open
    q, k, _ = case.qkv()
    q, k = q.flatten(0, 1), k[0]
    n = q.shape[0]
    lane, end = torch.randint(case.kv_heads, (n,)), torch.randint(-1, case.k_len + 1, (n,))
    pos = None
    if case.chance(0.5):
        pos = torch.randint(case.k_len, (n, case.q_len))
        pos[:, -1] = end - 1  # a block that no query sees would tie with every other such block
    options = {
        "slots": rng.randint(1, 9),
        "start": rng.randint(0, 5),
        "width": rng.choice([1, 2, 7]),
    }
    options["representative"] = rng.choice(["center", "first", "last"])

    def call():
        found, real = ops.tree_search(q, k, lane, end, pos=pos, **options)
        return found.masked_fill(~real, -1).sort(-1).values.float(), real.sum(-1).float()

    return call, (q, k)


CASES = [attend, block_sparse, gather, scan, attend_quantized, tree_search]
CALLS = Counter()  # of the kernels, by name


def compare(call, inputs, case):
    """Hold a call that a kernel serves to the reference, as drawn and then with a NaN in it."""
    before = CALLS.total()
    native_call(call)
    if CALLS.total() == before:
        return
    hold_to_reference(call, case.tolerance)
    if case.with_nan:
        part = case.rng.choice(inputs[:2])
        part[(*(case.rng.randrange(n) for n in part.shape),)] = math.nan
        hold_to_reference(call, case.tolerance)
    for x in inputs:
        x[(*(case.rng.randrange(n) for n in x.shape),)] = case.rng.choice([math.inf, -math.inf])
    native_call(call)


def native_call(call):
    with ops.backend("native"):
        return call()


def hold_to_reference(call, tolerance):
    results = native_call(call)
    with ops.backend("reference"):
        wanted = call()
    for got, want in zip(results, wanted, strict=True):
        size = max(1.0, float(want.nan_to_num(0, 0, 0).abs().amax()))
        tol = max(TOLERANCE[got.dtype], tolerance)
        torch.testing.assert_close(got, want, atol=tol * size, rtol=tol, equal_nan=True)


def count_calls():
    plain = Kernels.call

    def counted(self, name, record):
        CALLS[name] += 1
        plain(self, name, record)

    Kernels.call = counted


def main(folder, seconds):
    native.__path__ = [folder]
    count_calls()
    isas = native.runnable()
    end = time.monotonic() + seconds
    seed = 0
    while time.monotonic() < end:
        case = Case(seed)
        os.environ["FOVEATE_ISA"] = isas[seed % len(isas)]
        torch.set_num_threads(1 + seed // len(isas) % 3)
        make = case.rng.choice(CASES)
        try:
            compare(*make(case), case)
        except Exception as error:
            isa = os.environ["FOVEATE_ISA"]
            raise RuntimeError(f"{make.__name__}, seed {seed}, {isa}: see above") from error
        seed += 1
    sys.stdout.write(json.dumps({"seeds": seed, "calls": CALLS}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
