"""Plans in files: which mechanism every layer and kv head of one model uses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from foveate.hf.plan import attention_plan
from foveate.registry import create

SCHEMA = "foveate.plan/1"

Layer = str | Sequence[str]
"""What a layer runs: one mechanism, or one for every kv head."""


@dataclass(frozen=True)
class Plan:
    """Prefill mechanisms by layer, for a model of one shape, and what was measured with them.

    model holds name, layers, heads, kv_heads and head_dim; prefill has an entry per layer, a
    mechanism's spec or a list with one for every kv head; measured is for the reader.
    """

    model: Mapping[str, Any]
    prefill: Sequence[Layer]
    measured: Mapping[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """The plan as a file holds it, a line for every layer."""
        head = {"schema": SCHEMA, **asdict(self)}
        layers = ",\n".join(f"  {json.dumps(entry)}" for entry in head.pop("prefill"))
        start = json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}")
        return f'{start},\n "prefill": [\n{layers}\n ]\n}}\n'

    def mechanisms(self) -> list[Any]:
        """Every distinct mechanism of the plan."""
        specs = (x if isinstance(x, str) else tuple(x) for x in self.prefill)
        flat = dict.fromkeys(s for x in specs for s in ((x,) if isinstance(x, str) else x))
        return [create(spec) for spec in flat]

    def fit(self, model: Any, where: str) -> None:
        """Raise ValueError when the plan was made for a model of another shape."""
        have = shape_of(model)
        for key, value in have.items():
            if key != "name" and self.model.get(key) != value:
                raise ValueError(
                    f"{where} was made for {self.model.get('name')} with {key} "
                    f"{self.model.get(key)}, this model has {value}: make a plan for it with "
                    "foveate tune"
                )


def shape_of(model: Any) -> dict[str, Any]:
    """What a plan must know of a model."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return {
        "name": getattr(config, "_name_or_path", "") or type(model).__name__,
        "layers": config.num_hidden_layers,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }


def load_plan(path: str | Path) -> Plan:
    """Read a plan; ValueError when the file is missing, corrupt or of an unknown version."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"plan: cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"plan: {path} is not valid JSON ({error})") from error
    version = data.get("schema") if isinstance(data, dict) else None
    if version != SCHEMA:
        raise ValueError(f"plan: {path} has schema {version!r}, this version reads {SCHEMA!r}")
    try:
        plan = Plan(data["model"], data["prefill"], data.get("measured", {}))
        attention_plan("prefill", plan.prefill, int(plan.model["layers"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"plan: {path} cannot be used ({error})") from error
    wrong = [x for x in plan.prefill if not isinstance(x, str) and len(x) != plan.model["kv_heads"]]
    if wrong:
        raise ValueError(
            f"plan: {path} has a layer with {len(wrong[0])} entries for "
            f"{plan.model['kv_heads']} kv heads"
        )
    return plan
