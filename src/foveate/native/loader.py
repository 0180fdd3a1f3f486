"""Finding, choosing and opening the kernel library."""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ISAS = ("portable", "avx2", "avx512")
"""Instruction sets in the order of the numbers by which a library knows them."""

HOW_TO_GET = (
    "install foveate again with a C++17 compiler (g++ or clang++) on the PATH: pip install "
    "--force-reinstall --no-deps --no-cache-dir foveate (in a checkout: pip install -e .)"
)

_opened: dict[str, Kernels | None] = {}  # by the value of FOVEATE_ISA
_opening = threading.Lock()


class Record(ctypes.Structure):
    """Arguments of one kernel; every subclass mirrors a struct of the C++ side."""


class TensorArg(ctypes.Structure):
    """Address and strides (batch, head, row) of a tensor (B, H, L, D) whose last stride is 1."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("row", ctypes.c_int64),
    )

    @classmethod
    def of(cls, x: torch.Tensor) -> TensorArg:
        """The argument for a 4-D tensor; the tensor must outlive the call."""
        return cls(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


@dataclass(frozen=True)
class Kernels:
    """An opened library and the instruction set it was compiled for."""

    library: ctypes.CDLL
    isa: str

    def call(self, name: str, record: Record) -> None:
        """Run a kernel on its arguments, without the GIL; raises what its status says."""
        kernel = _entry(self.library, name)
        status = kernel(ctypes.byref(record), ctypes.c_int64(ctypes.sizeof(record)))
        if status == 1:
            raise MemoryError(f"no memory for the scratch space of the {name} kernel")
        if status != 0:
            raise _stale(name)


def kernels() -> Kernels | None:
    """The kernels for this processor, or None (with one warning) where there are none.

    Raises ValueError for an unknown FOVEATE_ISA, RuntimeError for one that cannot run here or for
    libraries that do not belong to this Python code.
    """
    wanted = os.environ.get("FOVEATE_ISA", "")
    if wanted not in _opened:
        with _opening:
            if wanted not in _opened:  # another thread may have been first
                _opened[wanted] = _open(wanted)
    return _opened[wanted]


def isa() -> str:
    """Instruction set of the kernels in use: "avx512", "avx2", "portable" or "none"."""
    found = kernels()
    return "none" if found is None else found.isa


def built() -> tuple[str, ...]:
    """Instruction sets for which this installation holds a library."""
    return tuple(name for name in ISAS if _find(name) is not None)


def runnable() -> tuple[str, ...]:
    """Those of `built()` that this processor and its system can run, the fastest last.

    Raises OSError when the system cannot open the library, RuntimeError for a library of other
    sources.
    """
    portable = _find("portable")
    if portable is None:
        return ()
    # The portable library runs everywhere, so it is the one to ask what else does.
    cpu_has = _entry(ctypes.CDLL(str(portable)), "cpu_has")
    return tuple(name for name in built() if cpu_has(ISAS.index(name)))


def _open(wanted: str) -> Kernels | None:
    if wanted == "none":
        return None
    if wanted and wanted not in ISAS:
        raise ValueError(f"FOVEATE_ISA is {wanted!r}; known: {', '.join(reversed(ISAS))} and none")
    try:
        able = runnable()
        if wanted and wanted not in able:
            raise _cannot_run(wanted, able)
        if not able:
            _warn("none are in this installation")
            return None
        name = wanted or able[-1]
        library = ctypes.CDLL(str(_find(name)))
    except OSError as error:
        _warn(str(error))
        return None
    _share_threads(library)
    return Kernels(library, name)


def _cannot_run(wanted: str, able: tuple[str, ...]) -> RuntimeError:
    message = f"FOVEATE_ISA={wanted} cannot run here; what can: {', '.join([*able[::-1], 'none'])}"
    if wanted not in built():
        message += f". For kernels, {HOW_TO_GET}"
    return RuntimeError(message)


def _warn(reason: str) -> None:
    message = f"foveate runs without its CPU kernels ({reason}), so more slowly: {HOW_TO_GET}"
    warnings.warn(message, stacklevel=4)


def _entry(library: ctypes.CDLL, name: str) -> Any:
    try:
        return getattr(library, f"foveate_{name}")
    except AttributeError:
        raise _stale(name) from None


def _stale(name: str) -> RuntimeError:
    return RuntimeError(
        f"the CPU kernels come from other sources than this Python code ({name} does not fit): "
        f"{HOW_TO_GET}"
    )


def _find(name: str) -> Path | None:
    """The library of one instruction set, in any folder that is part of this package."""
    import foveate.native

    candidates = (Path(folder) / f"kernels_{name}.so" for folder in foveate.native.__path__)
    return next((path for path in candidates if path.is_file()), None)


def _share_threads(library: ctypes.CDLL) -> None:
    """Let the kernels run on the threads of PyTorch's own OpenMP runtime.

    Two pools in one process would spin against each other. Where PyTorch has no such runtime, the
    kernels start threads of their own.
    """
    folder = Path(torch.__file__).parent / "lib"
    for path in (*folder.glob("libtorch_cpu.*"), *folder.glob("lib*omp*")):
        try:
            entry = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        _entry(library, "use_omp")(ctypes.cast(entry, ctypes.c_void_p))
        return
