"""What every mechanism of kind "cache" owes, checked inside a small random model."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from typing import Any

import torch
from torch import Tensor

from foveate.bench.audit import Check, Fault, Unfit, close, survives_copying
from foveate.cache.base import CachePolicy
from foveate.hf.attach import attach
from foveate.registry import create

PROMPT, STEPS = 64, 12


@cache
def model() -> Any:
    """A random Llama of two layers, four query heads on two kv heads of 16, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # wide enough that attention is far from uniform
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def tokens(length: int, seed: int = 0) -> Tensor:
    """Random tokens (1, length) without the special ones."""
    return torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows (1, n) as one left-padded batch, and its mask."""
    width = max(row.shape[1] for row in rows)
    ids = [torch.nn.functional.pad(r, (width - r.shape[1], 0)) for r in rows]
    mask = [torch.nn.functional.pad(torch.ones_like(r), (width - r.shape[1], 0)) for r in rows]
    return torch.cat(ids), torch.cat(mask)


def small(cls: Any) -> CachePolicy:
    """The policy with options at which it drops or rounds something of `PROMPT` tokens."""
    made: CachePolicy = create(cls.card.name, **cls.card.small)
    return made


@torch.no_grad()
def fed(
    policy: Any,
    ids: Tensor,
    mask: Tensor | None = None,
    store: Any = None,
    cut: int = 0,
    swap: Tensor | None = None,
) -> Tensor:
    """Logits (B, steps, vocabulary) of a prompt's end and of the tokens fed one by one after it.

    The last `STEPS` tokens are fed one by one; the prompt at once, or cut in two before its last
    `cut` tokens. With `swap` the rows change places, in the cache and in what follows, after the
    first half of the steps.
    """
    from transformers import DynamicCache

    store = DynamicCache() if store is None else store
    mask = torch.ones_like(ids) if mask is None else mask
    at, outs = (mask.cumsum(1) - 1).clamp_min(0), []
    start = ids.shape[1] - STEPS
    ends = [*([start - cut] if cut else []), *range(start, ids.shape[1] + 1)]
    with attach(model(), cache=policy):
        for lo, hi in itertools.pairwise([0, *ends]):
            if swap is not None and lo == (start + ids.shape[1]) // 2:
                store.reorder_cache(swap)
                ids, mask, at = ids[swap], mask[swap], at[swap]
            given = {"attention_mask": mask[:, :hi], "position_ids": at[:, lo:hi]}
            outs.append(model()(ids[:, lo:hi], past_key_values=store, **given).logits[:, -1:])
    return torch.cat(outs[-STEPS - 1 :], 1)


def generated(policy: Any, ids: Tensor, mask: Tensor | None = None, beams: int = 1) -> Tensor:
    """New tokens (B, STEPS) of greedy or beam search."""
    mask = torch.ones_like(ids) if mask is None else mask
    count = {"max_new_tokens": STEPS, "min_new_tokens": STEPS}
    with attach(model(), cache=policy):
        out: Tensor = model().generate(
            ids, attention_mask=mask, do_sample=False, num_beams=beams, **count
        )
    return out[:, ids.shape[1] :]


def acts(cls: Any) -> None:
    """At small options the policy does something."""
    ids = tokens(PROMPT + STEPS)
    gap = float((fed(small(cls), ids) - fed(None, ids))[:, 1:].abs().max())
    if gap < 1e-3:
        raise Fault(f"the options for the audit leave nothing out (gap {gap:.1e})")


def full_budget(cls: Any) -> None:
    """With an all-covering budget the logits are those of the plain cache."""
    if not cls.card.full:
        raise Unfit("has no setting without loss")
    policy = create(cls.card.name, **{**cls.card.small, **cls.card.full})
    ids = tokens(PROMPT + STEPS)
    close(fed(policy, ids), fed(None, ids))
    if not torch.equal(generated(policy, ids), generated(None, ids)):
        raise Fault("generates other tokens than the plain cache")


def prompt_untouched(cls: Any) -> None:
    """The prompt itself attends to everything: its own logits are those of the plain model."""
    ids = tokens(PROMPT + STEPS)
    close(fed(small(cls), ids)[:, :1], fed(None, ids)[:, :1])


def bytes_held(cls: Any) -> None:
    """After every step the storages hold the bytes that the policy claims, within 2 %."""
    _holds_its_claim(small(cls))


def _holds_its_claim(policy: CachePolicy) -> None:
    from transformers import DynamicCache

    store, ids = DynamicCache(), tokens(PROMPT + STEPS)
    config = model().config
    sizes = {"kv_heads": config.num_key_value_heads, "dim": config.head_dim, "itemsize": 4}
    with attach(model(), cache=policy), torch.no_grad():
        for seen in range(PROMPT, ids.shape[1]):
            model()(ids[:, store.get_seq_length() : seen], past_key_values=store)
            for layer in store.layers:
                kept = getattr(layer, "kept", None)
                exact = kept["k"].shape[2] if kept else 0
                claim = policy.claimed_bytes(seen, PROMPT, exact=exact, **sizes)
                held = layer.nbytes() - _shared(layer)
                if abs(held / claim - 1) > 0.02:
                    raise Fault(f"holds {held} bytes after {seen} tokens, claims {claim:.0f}")


def _shared(layer: Any) -> int:
    """Bytes of positions, which one layer holds for all."""
    positions = getattr(layer, "positions", None)
    return 0 if positions is None else positions.nbytes


def reset_is_fresh(cls: Any) -> None:
    """A cache that was used and reset serves like a new one."""
    from transformers import DynamicCache

    store, ids = DynamicCache(), tokens(PROMPT + STEPS)
    fed(small(cls), tokens(PROMPT + 3, 1), store=store)
    store.reset()
    if store.get_seq_length():
        raise Fault(f"{store.get_seq_length()} tokens are left after reset")
    close(fed(small(cls), ids, store=store), fed(small(cls), ids), 0.0)


def reorder(cls: Any) -> None:
    """Swapping the rows of the cache and of what follows swaps the logits."""
    ids, mask = left_padded([tokens(PROMPT + STEPS, 1), tokens(PROMPT - 9, 2)])
    swap, half = torch.tensor([1, 0]), STEPS // 2
    plain, swapped = fed(small(cls), ids, mask), fed(small(cls), ids, mask, swap=swap)
    close(swapped[:, : half + 1], plain[:, : half + 1])
    close(swapped[:, half + 1 :], plain[swap, half + 1 :])


def _rows_alone(policy: Any, beams: int = 1) -> None:
    rows = [tokens(PROMPT, 1), tokens(PROMPT - 23, 2), tokens(5, 3)]
    together = generated(policy, *left_padded(rows), beams=beams)
    alone = torch.cat([generated(policy, row, beams=beams) for row in rows])
    if not torch.equal(together, alone):
        raise Fault("a row of a left-padded batch gives other tokens than the row alone")


def left_padding(cls: Any) -> None:
    """Greedy tokens of a left-padded row are those of the row alone."""
    _rows_alone(small(cls))


def beam_search(cls: Any) -> None:
    """The same with three beams."""
    _rows_alone(small(cls), 3)


def layer_plan(cls: Any) -> None:
    """The same when only one of the layers has the policy, the first or the last."""
    for plan in ([small(cls), None], [None, small(cls)]):
        _rows_alone(plan)


def shared_budget(cls: Any) -> None:
    """Heads that share a budget hold the bytes of one, and are proof against padding and beams."""
    if "floor" not in cls.__dataclass_fields__:
        raise Unfit("all kv heads keep equally many tokens")
    policy: Any = create(cls.card.name, **{**cls.card.small, "floor": 0.25})
    _holds_its_claim(policy)
    _rows_alone(policy)
    _rows_alone(policy, 3)
    _chunks_alone(policy)
    ids = tokens(PROMPT + STEPS)
    if float((fed(policy, ids) - fed(small(cls), ids))[:, 1:].abs().max()) < 1e-3:
        raise Fault("sharing changes nothing")


def buffered(cls: Any) -> None:
    """With a buffer for decoded tokens it holds what it claims, and is proof against padding."""
    if "buffer" not in cls.__dataclass_fields__:
        raise Unfit("has no buffer for decoded tokens")
    policy: Any = create(cls.card.name, **{**cls.card.small, "buffer": 5})
    _holds_its_claim(policy)
    _rows_alone(policy)


def rewind(cls: Any) -> None:
    """Going back no tokens is allowed; going back some is refused with the reason."""
    from transformers import DynamicCache

    store = DynamicCache()
    fed(small(cls), tokens(PROMPT + STEPS), store=store)
    store.crop(0)
    if store.get_seq_length() != PROMPT + STEPS:
        raise Fault("going back by no tokens loses some")
    try:
        store.crop(-1)
    except ValueError as refusal:
        if "cannot give back" not in str(refusal):
            raise Fault(f"going back is refused without the reason: {refusal}") from refusal
    else:
        raise Fault("going back is not refused")


def copies(cls: Any) -> None:
    """A cache and its deep copy go on apart."""
    from transformers import DynamicCache

    policy, ends = small(cls), [tokens(STEPS, seed) for seed in (1, 2)]

    def begun() -> Any:
        store = DynamicCache()
        fed(policy, tokens(PROMPT + STEPS), store=store)
        return store

    store = begun()
    together = _continued(policy, [store, copy.deepcopy(store)], ends)
    for out, end in zip(together, ends, strict=True):
        close(out, _continued(policy, [begun()], [end])[0])


def _continued(policy: CachePolicy, stores: list[Any], ends: list[Tensor]) -> list[Tensor]:
    """Logits of what follows in each cache; a token is fed to all before the next."""
    outs: list[list[Tensor]] = [[] for _ in stores]
    with attach(model(), cache=policy), torch.no_grad():
        for step in range(STEPS):
            for store, end, out in zip(stores, ends, outs, strict=True):
                given = end[:, step : step + 1]
                out.append(model()(given, past_key_values=store).logits)
    return [torch.cat(out, 1) for out in outs]


def chunked_prompt(cls: Any) -> None:
    """A left-padded row whose prompt comes in two calls gives the logits of the row alone."""
    _chunks_alone(small(cls))


def _chunks_alone(policy: CachePolicy) -> None:
    rows = [tokens(PROMPT + STEPS, 1), tokens(PROMPT + STEPS - 23, 2)]
    together = fed(policy, *left_padded(rows), cut=30)
    alone = torch.cat([fed(policy, row, cut=30) for row in rows])
    close(together, alone)


def chunks(cls: Any) -> None:
    """A second chunk after the prompt runs, and sees what single steps see."""
    from transformers import DynamicCache

    policy, store, ids = small(cls), DynamicCache(), tokens(PROMPT + STEPS)
    with attach(model(), cache=policy), torch.no_grad():
        model()(ids[:, :PROMPT], past_key_values=store)
        chunk = model()(ids[:, PROMPT:], past_key_values=store).logits
    close(chunk[:, :1], fed(policy, ids)[:, 1:2])
    if not torch.isfinite(chunk).all():
        raise Fault("a later chunk gives NaN or infinity")


PROPERTIES: dict[str, Check] = {
    "acts": acts,
    "full budget = dense": full_budget,
    "prompt untouched": prompt_untouched,
    "bytes held = claimed": bytes_held,
    "reset = fresh": reset_is_fresh,
    "reorder": reorder,
    "left padding": left_padding,
    "beam search": beam_search,
    "layer plan": layer_plan,
    "chunks": chunks,
    "chunked prompt": chunked_prompt,
    "shared budget": shared_budget,
    "buffer": buffered,
    "rewind": rewind,
    "copies": copies,
    "configuration": survives_copying,
}
