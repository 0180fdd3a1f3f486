"""Finding, choosing and opening the kernel library."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

ISAS = ("portable", "avx2", "avx512")
"""Instruction sets in the order of the numbers by which a library knows them."""

HOW_TO_GET = (
    "reinstall with a C++17 compiler (g++ or clang++) on the PATH: "
    "pip install --force-reinstall --no-deps foveate"
)


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
        status = getattr(self.library, f"foveate_{name}")(
            ctypes.byref(record), ctypes.c_int64(ctypes.sizeof(record))
        )
        if status == 1:
            raise MemoryError(f"no memory for the scratch space of the {name} kernel")
        if status == 2:
            raise RuntimeError(
                f"the {name} kernel was built from other sources than this Python code: {HOW_TO_GET}"
            )


def kernels() -> Kernels | None:
    """The kernels for this processor, or None (with one warning) where there are none.

    Raises ValueError for an unknown FOVEATE_ISA, RuntimeError for one that cannot run here.
    """
    return _open(os.environ.get("FOVEATE_ISA", ""))


def isa() -> str:
    """Instruction set of the kernels in use: "avx512", "avx2", "portable" or "none"."""
    found = kernels()
    return "none" if found is None else found.isa


@functools.cache
def _open(wanted: str) -> Kernels | None:
    if wanted == "none":
        return None
    if wanted and wanted not in ISAS:
        raise ValueError(
            f"FOVEATE_ISA is {wanted!r}; known: {', '.join(reversed(ISAS))} and none"
        )
    built = {name: path for name in ISAS if (path := _find(name)) is not None}
    if "portable" not in built:
        warnings.warn(f"foveate runs without its CPU kernels; {HOW_TO_GET}", stacklevel=4)
        return None
    # The portable library runs everywhere, so it is the one to ask what else does.
    probe = ctypes.CDLL(str(built["portable"]))
    able = [name for i, name in enumerate(ISAS) if name in built and probe.foveate_cpu_has(i)]
    if wanted and wanted not in able:
        raise RuntimeError(
            f"FOVEATE_ISA={wanted} cannot run here; this processor and build serve "
            f"{', '.join(reversed(able))} and none"
        )
    name = wanted or able[-1]
    library = ctypes.CDLL(str(built[name]))
    _share_threads(library)
    return Kernels(library, name)


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
        library.foveate_use_omp(ctypes.cast(entry, ctypes.c_void_p))
        return
