"""Files of tensors, written whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write tensors and words about them as safetensors; OSError when that fails."""
    draft = path.with_name(f"{path.name}.part")
    try:
        save_file({k: x.detach().contiguous() for k, x in tensors.items()}, draft, dict(about))
        draft.replace(path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a safetensors file and the words about them; ValueError when it is none."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            # The file itself cannot be iterated.
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file, or is damaged: {error}") from error
    return tensors, about
