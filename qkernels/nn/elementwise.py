"""Elementwise layers on integers: addition, multiplication, concatenation, and every unary function as a table."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import ops, reference
from qkernels.core import tables
from qkernels.core.lowering import LoweringUnit, lowers
from qkernels.core.qspec import QParams
from qkernels.core.registry import layer
from qkernels.core.sizes import Sizes, broadcast
from qkernels.errors import InvalidArgument, Unsupported
from qkernels.nn.base import QLayer
from qkernels.nn.weighted import clamp_codes, clamp_option
from qkernels.ops.layout import empty_channels_last, is_channels_last


class _Binary(QLayer):
    def __init__(self, a: QParams, b: QParams, output: QParams, options: dict[str, Any] | None = None) -> None:
        super().__init__([a, b], output, {"clamp": None, **(options or {})})

    def _derive(self) -> tuple[Any, ...]:
        output = self._grid("output")
        return (
            *self._numbers("input0"),
            *self._numbers("input1"),
            *output.item(),
            *clamp_codes(output, self.options["clamp"]),
            output.dtype,
        )

    def output_sizes(self, *inputs: Sizes) -> Sizes:
        return broadcast(*inputs)

    def _check_both(self, a: Tensor, b: Tensor) -> None:
        self._check(a, "input0")
        self._check(b, "input1")


@layer("add")
class QAdd(_Binary):
    """`a + b`, then the fused clamp."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        self._check_both(a, b)
        return ops.add(a, b, *self.derived())

    def reference_forward(self, a: Tensor, b: Tensor) -> Tensor:
        self._check_both(a, b)
        return reference.add(a, b, *self._derive())


@layer("mul")
class QMul(_Binary):
    """`a * b`, then the fused clamp."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        self._check_both(a, b)
        return ops.mul(a, b, *self.derived())

    def reference_forward(self, a: Tensor, b: Tensor) -> Tensor:
        self._check_both(a, b)
        return reference.mul(a, b, *self._derive())


@layer("cat")
class QCat(QLayer):
    """Concatenation along `dim`; each operand is first moved to the grid of the output."""

    def __init__(self, inputs: Sequence[QParams], output: QParams, dim: int) -> None:
        super().__init__(inputs, output, {"dim": dim})

    def _derive(self) -> Tensor:
        output = self._grid("output")
        return torch.stack([tables.requantize_table(grid, output) for grid in self.in_qparams])

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        self._check_all(tensors)
        return ops.cat(list(tensors), self.derived(), self.options["dim"])

    def reference_forward(self, tensors: Sequence[Tensor]) -> Tensor:
        self._check_all(tensors)
        return reference.cat(list(tensors), self._derive(), self.options["dim"])

    def output_sizes(self, *inputs: Sequence[Sizes]) -> Sizes:
        sizes, dim = list(inputs[0][0]), self.options["dim"]
        sizes[dim] = sum(x[dim] for x in inputs[0])
        return tuple(sizes)

    def output_memory(self, y: Tensor, *inputs: Sequence[Tensor]) -> Tensor:
        filled = (x for x in inputs[0] if x.numel() > 0)
        together = y.dim() > 2 and all(map(is_channels_last, filled))
        return empty_channels_last(y, y.shape, y.dtype) if together else y.new_empty(y.shape)

    def __prepare_scriptable__(self) -> nn.Module:
        count, tables, dim = len(self._input_roles), self.derived(), self.options["dim"]

        def run(tensors: list[Tensor]) -> Tensor:
            return ops.cat([tensors[i] for i in range(count)], tables, dim)

        return self._torchscript(run)

    def _check_all(self, tensors: Sequence[Tensor]) -> None:
        if len(tensors) != len(self._input_roles):
            raise InvalidArgument(f"{self._where()}: expected {len(self._input_roles)} tensors, got {len(tensors)}")
        for tensor, role in zip(tensors, self._input_roles, strict=True):
            self._check(tensor, role)


@layer("lookup")
class QLookup(QLayer):
    """A unary function as a table: any activation, or a move to another grid.

    The table is a buffer, not derived: it was rounded once, on the machine that converted.
    """

    def __init__(self, input: QParams, output: QParams, function: str, options: dict[str, Any] | None = None) -> None:
        super().__init__([input], output, {"function": function, **(options or {})})
        self.register_buffer("table", tables.unary_table(function, options or {}, input, output))

    def forward(self, x: Tensor) -> Tensor:
        self._check(x, "input")
        return ops.lookup(x, self._buffers["table"])

    def reference_forward(self, x: Tensor) -> Tensor:
        self._check(x, "input")
        return reference.lookup(x, self._buffers["table"])


@lowers("add")
def lower_add(unit: LoweringUnit) -> QAdd:
    if unit.option("alpha", 1) != 1:
        raise Unsupported("add with alpha != 1 has no integer layer; write it as a + alpha * b")
    return QAdd(*_two_inputs(unit), unit.output, {"clamp": clamp_option(unit.clamp)})


@lowers("mul")
def lower_mul(unit: LoweringUnit) -> QMul:
    return QMul(*_two_inputs(unit), unit.output, {"clamp": clamp_option(unit.clamp)})


def _two_inputs(unit: LoweringUnit) -> tuple[QParams, QParams]:
    if len(unit.inputs) == 1:  # x + x, x * x
        return unit.inputs[0], unit.inputs[0]
    if len(unit.inputs) != 2:
        raise Unsupported(f"{unit.kind} of {len(unit.inputs)} tensors has no integer layer")
    return unit.inputs[0], unit.inputs[1]


@lowers("cat")
def lower_cat(unit: LoweringUnit) -> QCat:
    return QCat(unit.inputs, unit.output, unit.option("dim", 0))


@lowers(*tables.UNARY)
def lower_unary(unit: LoweringUnit) -> QLookup:
    _, names = tables.UNARY[unit.kind]
    options = {name: unit.option(name) for name in names if unit.option(name) is not None}
    return QLookup(unit.inputs[0], unit.output, unit.kind, options)
