"""Kinetics (2025, paper 325): long generations pay for attention; a budget buys most of it back."""

from foveate.attention.sparse.kinetics import ModelCost, generation_cost
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded, text_ids
from foveate.bench.runs import divergence, run

CLAIM = (
    "attention dominates the cost of long generations, and at one budget the top keys decode "
    "closer to dense attention than a window does"
)

_PROMPT, _STEPS, _BUDGET = 2048, 64, 128
_ANSWER = 32_768


def measure() -> Outcome:
    """Share of attention and saving by formula; KL and top-1 agreement of decoded text tokens."""
    model, _ = loaded()
    ids = text_ids(_PROMPT + _STEPS)
    prompt, then = ids[:, :_PROMPT], ids[:, _PROMPT:]
    dense = run(model, {}, prompt, then).logits
    figures: dict[str, float] = {}
    for name, spec in (
        ("tokens", f"kinetics:budget={_BUDGET}"),
        ("blocks", f"kinetics:budget={_BUDGET},policy=block,block=8"),
        ("window", f"sink_window:sinks=4,window={_BUDGET - 4}"),
    ):
        kl, top1 = divergence(dense, run(model, {"decode": spec}, prompt, then).logits)
        figures |= {f"KL, {name}": kl, f"top-1, {name}": top1}
    config = model.config
    layers, dim = config.num_hidden_layers, config.hidden_size // config.num_attention_heads
    heads = (layers * config.num_attention_heads, layers * config.num_key_value_heads)
    sizes = ModelCost(float(model.num_parameters()), *heads, dim)
    cost = generation_cost(sizes, _PROMPT, _ANSWER)
    parameters = 2 * sizes.parameters * _ANSWER
    figures["share of attention at 32k, by formula"] = 1 - parameters / cost.total
    sparse = generation_cost(sizes, _PROMPT, _ANSWER, budget=_BUDGET, block=8)
    figures["cost over that of blocks, by formula"] = cost.total / sparse.total
    closer = figures["KL, tokens"] < figures["KL, blocks"] < figures["KL, window"]
    return Outcome(figures, closer and figures["share of attention at 32k, by formula"] > 0.5)
