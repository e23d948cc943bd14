"""A network as a list of steps on values: what the executor runs. csrc/plan/format.h explains every kind and attribute.

Steps, values, tensors and scalars name each other by index. `Network` collects them; `qkernels.plan.format` writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from qkernels.core.qspec import QParams
from qkernels.errors import Unsupported

MAX_RANK = 6


class StepKind(IntEnum):
    """What a step computes."""

    CONSTANT = 0
    QUANTIZE = 1
    DEQUANTIZE = 2
    LINEAR = 3
    CONV = 4
    ADD = 5
    MUL = 6
    CAT = 7
    LOOKUP = 8
    MAX_POOL = 9
    AVG_POOL = 10
    ADAPTIVE_AVG_POOL = 11
    INTERPOLATE = 12
    PAD = 13
    RESHAPE = 14
    PERMUTE = 15
    SLICE = 16
    EXPAND = 17


class ScalarOp(IntEnum):
    """How an integer follows from the shapes of a call."""

    CONST = 0
    SIZE = 1
    ADD = 2
    SUB = 3
    MUL = 4
    FLOOR_DIV = 5
    MOD = 6
    MIN = 7
    MAX = 8


@dataclass(frozen=True)
class Value:
    """A tensor that flows between steps. `sizes` holds the sizes known for every call, None where they are open."""

    index: int
    name: str
    dtype: torch.dtype
    sizes: tuple[int | None, ...]
    scale: float = 0.0
    zero_point: int = 0

    @property
    def rank(self) -> int:
        return len(self.sizes)


@dataclass(frozen=True)
class Scalar:
    op: ScalarOp
    value: int = 0
    a: int = 0
    b: int = 0
    number: int = 0


@dataclass(frozen=True)
class Step:
    """One step; an attribute is an integer or a float32 number."""

    kind: StepKind
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    attributes: tuple[int | float, ...]


@dataclass(frozen=True)
class Dynamic:
    """An integer that only a call decides, such as the batch size. Arithmetic on it makes further scalars."""

    network: Network
    index: int

    def _with(self, op: ScalarOp, other: Any, swapped: bool = False) -> Dynamic:
        if not isinstance(other, (int, Dynamic)) or isinstance(other, bool):
            return NotImplemented
        a, b = self.index, self.network.scalar(other)
        return self.network.computed(op, b, a) if swapped else self.network.computed(op, a, b)

    def __add__(self, other: Any) -> Dynamic:
        return self._with(ScalarOp.ADD, other)

    def __radd__(self, other: Any) -> Dynamic:
        return self._with(ScalarOp.ADD, other, True)

    def __sub__(self, other: Any) -> Dynamic:
        return self._with(ScalarOp.SUB, other)

    def __rsub__(self, other: Any) -> Dynamic:
        return self._with(ScalarOp.SUB, other, True)

    def __mul__(self, other: Any) -> Dynamic:
        return self._with(ScalarOp.MUL, other)

    def __rmul__(self, other: Any) -> Dynamic:
        return self._with(ScalarOp.MUL, other, True)

    def __floordiv__(self, other: Any) -> Dynamic:
        return self._with(ScalarOp.FLOOR_DIV, other)

    def __rfloordiv__(self, other: Any) -> Dynamic:
        return self._with(ScalarOp.FLOOR_DIV, other, True)

    def __mod__(self, other: Any) -> Dynamic:
        return self._with(ScalarOp.MOD, other)

    def __rmod__(self, other: Any) -> Dynamic:
        return self._with(ScalarOp.MOD, other, True)

    def __neg__(self) -> Dynamic:
        return 0 - self

    def minimum(self, other: Any) -> Dynamic:
        return self._with(ScalarOp.MIN, other)

    def maximum(self, other: Any) -> Dynamic:
        return self._with(ScalarOp.MAX, other)


Size = int | Dynamic


@dataclass(eq=False)
class Network:
    """A network under construction, and then whole."""

    tensors: list[Tensor] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    scalars: list[Scalar] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    _scalar_of: dict[Scalar, int] = field(default_factory=dict)
    _tensor_of: dict[int, int] = field(default_factory=dict)

    def tensor(self, tensor: Tensor | None) -> int:
        """The index of a tensor of the plan; -1 for None."""
        if tensor is None:
            return -1
        if id(tensor) not in self._tensor_of:
            self._tensor_of[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        return self._tensor_of[id(tensor)]

    def scalar(self, size: Size) -> int:
        """The index of the scalar that holds a size.

        Raises:
            Unsupported: it is no integer, but a tensor, perhaps.
        """
        if isinstance(size, Dynamic):
            return size.index
        if not isinstance(size, int) or isinstance(size, bool):
            what = f"the tensor {size.name}" if isinstance(size, Value) else repr(size)
            raise Unsupported(f"{what} as a size or an index, which must be an integer")
        return self._scalar(Scalar(ScalarOp.CONST, number=size))

    def computed(self, op: ScalarOp, a: int, b: int) -> Dynamic:
        return Dynamic(self, self._scalar(Scalar(op, a=a, b=b)))

    def size(self, value: Value, dim: int) -> Size:
        """A size of a value: the number itself if every call has it."""
        known = value.sizes[dim]
        return Dynamic(self, self._scalar(Scalar(ScalarOp.SIZE, value.index, dim))) if known is None else known

    def sizes(self, value: Value) -> tuple[Size, ...]:
        return tuple(self.size(value, dim) for dim in range(value.rank))

    def _scalar(self, scalar: Scalar) -> int:
        if scalar not in self._scalar_of:
            self._scalar_of[scalar] = len(self.scalars)
            self.scalars.append(scalar)
        return self._scalar_of[scalar]

    def value(self, name: str, dtype: torch.dtype, sizes: Sequence[Size | None], grid: QParams | None = None) -> Value:
        if len(sizes) > MAX_RANK:
            raise Unsupported(f"{name} has {len(sizes)} dimensions; a plan takes up to {MAX_RANK}")
        known = tuple(size if isinstance(size, int) and size >= 0 else None for size in sizes)
        numbers = grid.item() if grid is not None and grid.scale.numel() == 1 else (0.0, 0)
        made = Value(len(self.values), name, dtype, known, *numbers)
        self.values.append(made)
        return made

    def input(self, name: str, dtype: torch.dtype, sizes: Sequence[int | None]) -> Value:
        made = self.value(name, dtype, sizes)
        self.inputs.append(made)
        return made

    def step(
        self,
        kind: StepKind,
        name: str,
        inputs: Sequence[Value],
        attributes: Sequence[int | float],
        dtype: torch.dtype,
        sizes: Sequence[Size | None],
        grid: QParams | None = None,
    ) -> Value:
        """Appends a step; returns its output."""
        made = self.value(name, dtype, sizes, grid)
        self.steps.append(Step(kind, name, tuple(v.index for v in inputs), (made.index,), tuple(attributes)))
        return made
