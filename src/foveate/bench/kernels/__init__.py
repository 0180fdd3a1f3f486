"""The kernels against their rivals and against the limits of the machine, in interleaved rounds."""

from foveate.bench.kernels.benches import BENCHES
from foveate.bench.kernels.run import KernelRun, Settings

__all__ = ["BENCHES", "KernelRun", "Settings"]
