"""A folder that a training writes to and can be taken up from: checkpoint.pt and log.csv."""

from __future__ import annotations

import contextlib
import csv
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

FORMAT = "foveate.training/1"
_HEAD = ("step", "loss", "rate")


class Checkpoint:
    """What a training keeps of itself in `folder`, every `every` steps.

    `config` is whatever decides the training beside the model's weights, as plain data: a folder
    of another one is refused. `tensorboard` writes the same figures for TensorBoard, too. Raises
    ValueError for `every` below 1, ImportError when TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path | str,
        model: nn.Module,
        config: dict[str, Any],
        *,
        every: int = 100,
        tensorboard: bool = False,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.folder, self.model, self.every = Path(folder), model, every
        self.config = json.loads(json.dumps(config))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rows: list[tuple[int, float, float]] = []
        self._writer = _writer(self.folder) if tensorboard else None

    @property
    def path(self) -> Path:
        """The file with weights, optimizer and random numbers."""
        return self.folder / "checkpoint.pt"

    @property
    def log(self) -> Path:
        """The file with the loss of every step."""
        return self.folder / "log.csv"

    @property
    def losses(self) -> list[float]:
        """Losses of the steps so far."""
        return [loss for _, loss, _ in self._rows]

    def resume(self, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> int:
        """Take over what lies in the folder, and return the number of steps that it has done.

        Raises ValueError for a checkpoint of another configuration, and for a damaged one.
        """
        self.config = {**self.config, "fit": json.loads(json.dumps(settings))}
        if not self.path.exists():
            return 0
        try:
            held = torch.load(self.path, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.path} is no checkpoint, or is damaged: {error}") from error
        if not isinstance(held, dict) or held.get("format") != FORMAT:
            raise ValueError(f"{self.path} was not written by a training of foveate")
        for key in sorted({*held["config"], *self.config}):
            had, now = held["config"].get(key), self.config.get(key)
            if had != now:
                raise ValueError(
                    f"{self.path} was made with {key}={had}, now it is {now}: "
                    "choose another folder, or remove it to start again"
                )
        self.model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        torch.random.set_rng_state(held["random"])
        self._rows = [tuple(row) for row in held["rows"]]
        return len(self._rows)

    def note(self, step: int, loss: float, rate: float) -> None:
        """Take down a step."""
        self._rows.append((step, loss, rate))
        if self._writer is not None:
            self._writer.add_scalar("loss", loss, step)
            self._writer.add_scalar("rate", rate, step)

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        """Write everything, each file whole or not at all; OSError when that fails."""
        held = {
            "format": FORMAT,
            "config": self.config,
            "model": self.model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": torch.random.get_rng_state(),
            "rows": self._rows,
        }
        draft = self.path.with_suffix(".part")
        try:
            torch.save(held, draft)
            draft.replace(self.path)
            with draft.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([_HEAD, *self._rows])
            draft.replace(self.log)
        except RuntimeError as error:  # of a full disk, from within torch
            raise OSError(f"cannot write {self.path}: {error}") from error
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
        if self._writer is not None:
            self._writer.flush()


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("a log for TensorBoard needs it: pip install tensorboard") from error
    return SummaryWriter(str(folder))
