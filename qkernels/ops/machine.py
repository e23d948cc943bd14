"""Facts about the machine that the packed operands depend on."""

from qkernels import _C


def active_isa() -> str:
    """The instruction set that the kernels use now: what the machine has, under the cap."""
    return _C.isa_active()
