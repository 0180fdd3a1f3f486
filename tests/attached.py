"""What every decoding mechanism and cache policy must hold inside a model."""

import torch
from transformers import DynamicCache

import foveate


def prompt(length, seed=0):
    """Random tokens (1, length) without the special ones."""
    return torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(seed))


def left_padded(*rows):
    """Rows (1, n) as one left-padded batch and its mask."""
    width = max(row.shape[1] for row in rows)
    fill = [torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows]
    mask = [
        torch.nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows
    ]
    return torch.cat(fill), torch.cat(mask)


def generate(model, ids, mask=None, new=10, beams=1, **slots):
    """The new tokens (B, new) of greedy or beam search."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    with foveate.attach(model, **slots):
        out = model.generate(ids, attention_mask=mask, num_beams=beams, **options)
    return out[:, ids.shape[1] :]


@torch.no_grad()
def step_logits(model, ids, start, store=None, mask=None, **slots):
    """Logits (B, steps, vocabulary) of tokens fed one by one after a prompt of `start`."""
    store = DynamicCache() if store is None else store
    mask = torch.ones_like(ids) if mask is None else mask
    position = (mask.cumsum(1) - 1).clamp_min(0)
    out = []
    with foveate.attach(model, **slots):
        for lo, hi in [(0, start), *((i, i + 1) for i in range(start, ids.shape[1]))]:
            given = {"attention_mask": mask[:, :hi], "position_ids": position[:, lo:hi]}
            logits = model(ids[:, lo:hi], past_key_values=store, **given).logits
            out.append(logits[:, -1:])
    return torch.cat(out, 1)


def check_equals_plain(model, **slots):
    """The same logits as the plain model's, to 1e-5."""
    ids = prompt(40)
    got = step_logits(model, ids, 28, **slots)
    torch.testing.assert_close(got, step_logits(model, ids, 28), rtol=1e-5, atol=1e-5)


def check_differs_from_plain(model, **slots):
    """Other logits than the plain model's: the mechanism acts at all."""
    ids = prompt(40)
    got = step_logits(model, ids, 28, **slots)
    assert float((got - step_logits(model, ids, 28))[:, 1:].abs().max()) > 1e-3


def check_padded_row_equals_row_alone(model, beams=1, **slots):
    """Rows of a left-padded batch give the tokens of the same rows alone."""
    rows = [prompt(30, 1), prompt(19, 2), prompt(5, 3)]
    ids, mask = left_padded(*rows)
    together = generate(model, ids, mask, beams=beams, **slots)
    alone = torch.cat([generate(model, row, beams=beams, **slots) for row in rows])
    assert torch.equal(together, alone)


def check_reset_equals_fresh(model, **slots):
    """A cache that was used and reset serves like a new one."""
    ids, cache = prompt(36, 4), DynamicCache()
    step_logits(model, prompt(30, 5), 20, cache, **slots)
    cache.reset()
    assert cache.get_seq_length() == 0
    again = step_logits(model, ids, 24, cache, **slots)
    assert torch.equal(again, step_logits(model, ids, 24, **slots))


def check_reorder_commutes(model, **slots):
    """Swapping the rows of a cache and of what follows swaps the logits."""
    ids, mask = left_padded(prompt(36, 6), prompt(27, 7))
    logits = step_logits(model, ids, 24, mask=mask, **slots)
    cache = DynamicCache()
    step_logits(model, ids[:, :30], 24, cache, mask[:, :30], **slots)
    swap = torch.tensor([1, 0])
    cache.reorder_cache(swap)
    position = (mask.cumsum(1) - 1).clamp_min(0)
    out = []
    with foveate.attach(model, **slots), torch.no_grad():
        for i in range(30, 36):
            given = {
                "attention_mask": mask[swap, : i + 1],
                "position_ids": position[swap, i : i + 1],
            }
            out.append(model(ids[swap, i : i + 1], past_key_values=cache, **given).logits)
    torch.testing.assert_close(torch.cat(out, 1)[swap], logits[:, -6:], rtol=1e-5, atol=1e-5)


def check_bytes(model, policy, prompt_length):
    """After every step each layer holds the bytes that the policy claims, within 2 %."""
    config, cache = model.config, DynamicCache()
    sizes = {"kv_heads": config.num_key_value_heads, "dim": config.head_dim, "itemsize": 4}
    ids = prompt(prompt_length + 10, 8)
    with foveate.attach(model, cache=policy), torch.no_grad():
        for hi in range(prompt_length, ids.shape[1]):
            model(ids[:, cache.get_seq_length() : hi], past_key_values=cache)
            for layer in cache.layers:
                exact = getattr(layer, "kept", {}).get("k", torch.empty(0, 0, 0)).shape[2]
                shared = getattr(layer, "positions", None)  # one layer holds them for all
                held = layer.nbytes() - (0 if shared is None else shared.nbytes)
                claim = policy.claimed_bytes(hi, prompt_length, exact=exact, **sizes)
                assert abs(held / claim - 1) <= 0.02
