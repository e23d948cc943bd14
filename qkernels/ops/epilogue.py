"""What happens to the int32 accumulator of a linear or convolution before it is stored: a value, not a class name."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from qkernels.errors import InvalidType

OUTPUT_DTYPES = (torch.uint8, torch.int8, torch.int32, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ResidualAdd:
    """Adds a second integer tensor to the requantized output, as `qkernels.ops.add` would: same bits, one pass less.

    `scale`, `zero_point` are the grid of the residual operand; `out_*` the grid of the sum. A ReLU after the addition
    is `out_qmin = out_zero_point`.
    """

    scale: float
    zero_point: int
    out_scale: float
    out_zero_point: int
    out_qmin: int
    out_qmax: int


@dataclass(frozen=True, eq=False)
class Epilogue:
    """Accumulator -> output.

    dtype uint8 / int8: `q = clamp(RNE((acc + bias/(sx*sw)) * ((sx*sw)/scale)) + zero_point, qmin, qmax)`, then
    `q = table[q]` if there is a table, then the residual addition if there is one. A ReLU is `qmin = zero_point`; any
    other activation is a table (256 entries of `dtype`, indexed by the byte of q).
    dtype float32 / bfloat16 / float16: `(acc + bias/(sx*sw)) * (sx*sw)`. dtype int32: the accumulator itself, without
    bias.
    """

    dtype: torch.dtype = torch.uint8
    scale: float = 1.0
    zero_point: int = 0
    qmin: int = 0
    qmax: int = 255
    table: Tensor | None = None
    residual: ResidualAdd | None = None

    def as_list(self) -> list[float]:
        """The flat form of the op schemas: 4 numbers, or 10 with a residual."""
        numbers = [self.scale, self.zero_point, self.qmin, self.qmax]
        if self.residual is not None:
            r = self.residual
            numbers += [r.scale, r.zero_point, r.out_scale, r.out_zero_point, r.out_qmin, r.out_qmax]
        return [float(n) for n in numbers]


def schema_arguments(op: str, epilogue: Any) -> tuple[list[float], torch.dtype, Tensor | None]:
    """An epilogue as the schemas of ops that pack a weight take it."""
    if not isinstance(epilogue, Epilogue):
        raise InvalidType(f"{op}: epilogue must be an Epilogue, got {type(epilogue).__name__}")
    if not isinstance(epilogue.dtype, torch.dtype):
        raise InvalidType(f"{op}: epilogue.dtype must be a torch.dtype, got {epilogue.dtype!r}")
    if not isinstance(epilogue.residual, ResidualAdd | None):
        raise InvalidType(f"{op}: epilogue.residual must be a ResidualAdd, got {type(epilogue.residual).__name__}")
    _expect_numbers(op, "epilogue", epilogue, ("scale", "zero_point", "qmin", "qmax"))
    if epilogue.residual is not None:
        _expect_numbers(op, "epilogue.residual", epilogue.residual, [f.name for f in fields(ResidualAdd)])
    return epilogue.as_list(), epilogue.dtype, epilogue.table


def _expect_numbers(op: str, name: str, owner: Epilogue | ResidualAdd, attributes: Iterable[str]) -> None:
    for attribute in attributes:
        value = getattr(owner, attribute)
        if not isinstance(value, Real) and not (isinstance(value, Tensor) and value.numel() == 1):
            raise InvalidType(f"{op}: {name}.{attribute} must be a number, got {value!r}")
