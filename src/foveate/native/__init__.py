"""CPU kernels in C++ behind a plain C ABI, and what calls them.

The libraries are built with the package: one for each instruction set, chosen when first used.
`FOVEATE_ISA` (avx512, avx2, portable, none) overrides the choice; "none" switches them off.
"""

from foveate.native.loader import HOW_TO_GET, Kernels, built, isa, kernels, runnable

__all__ = ["HOW_TO_GET", "Kernels", "built", "isa", "kernels", "runnable"]
