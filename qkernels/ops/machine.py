"""Facts about the build and the machine."""

import platform
from typing import Any

import torch

from qkernels import _C


def active_isa() -> str:
    """The instruction set that the kernels use now: what the machine has, under the cap."""
    return _C.isa_active()


def info() -> dict[str, Any]:
    """What this qkernels is and what it runs on; `python -m qkernels info` prints it.

    kernels: for each operation the kernel that the active instruction set chooses; an operation is absent that it
        has no kernel for (`conv_winograd`: such convolutions run the kernel of `conv`).
    """
    from qkernels import __version__

    admitted = {op: [name for name, fits in names if fits] for op, names in _C.list_kernels().items()}
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "isa_supported": _C.isa_supported(),
        "isa_cap": _C.isa_cap(),
        "isa_active": _C.isa_active(),
        "cuda_built": _C.with_cuda,
        "cuda_archs": _C.cuda_archs,
        "cuda_version": _C.cuda_version,
        "cuda_devices": torch.cuda.device_count() if _C.with_cuda else 0,
        "compiler": _C.compiler,
        "debug": _C.debug,
        "kernels": {op: names[0] for op, names in admitted.items() if names},
    }
