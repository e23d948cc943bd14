"""Helpers for tests and for users who want to check the promises on their own machine."""

from collections.abc import Iterator
from contextlib import contextmanager

from qkernels import _C
from qkernels.errors import InvalidArgument

ISAS = ("scalar", "avx2", "avxvnni", "avx512vnni", "amx")


@contextmanager
def isa_cap(name: str) -> Iterator[None]:
    """Lets the kernels use at most the instruction set `name` (one of `ISAS`) inside the block.

    The cap only lowers: on a machine without AVX512-VNNI, `isa_cap("avx512vnni")` changes nothing.

    Raises:
        InvalidArgument: there is no such instruction set.
    """
    if name not in ISAS:
        raise InvalidArgument(f"isa_cap: name must be one of {list(ISAS)}, got {name!r}")
    before = _C.isa_cap()
    _C.set_isa_cap(name)
    try:
        yield
    finally:
        _C.set_isa_cap(before)


def supported_isas() -> list[str]:
    """The paths that this machine can run, weakest first."""
    names = []
    for name in ISAS:
        with isa_cap(name):
            if _C.isa_active() == name:
                names.append(name)
    return names
