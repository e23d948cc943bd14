"""The table from a fused unit of the float network to its integer layer: core owns it, `qkernels.nn` fills it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from qkernels.core.qspec import QParams


@dataclass(frozen=True)
class Clamp:
    """A fused activation that only narrows the range: relu is `Clamp(0.0)`, relu6 `Clamp(0.0, 6.0)`."""

    low: float = -float("inf")
    high: float = float("inf")


@dataclass(frozen=True, eq=False)
class LoweringUnit:
    """One fused unit, ready to become one integer layer.

    kind: what it computes: linear, conv, add, mul, cat, max_pool, avg_pool, adaptive_avg_pool, mean, interpolate,
        requantize, or a unary function by its torch.nn.functional name (relu, relu6, hardtanh, clamp, hardswish,
        hardsigmoid, sigmoid, tanh, silu, gelu, elu, leaky_relu, ...).
    module: the float module, if the unit was one; its attributes are the options (stride, kernel_size, ...).
    options: the options of a functional call by their torch name; they win over the attributes of `module`.
    weight, bias: float32, batch normalization folded in. A transposed convolution keeps torch's weight layout.
    weight_qparams: the grid of the weight, its axis in the layout of `weight`. A transposed convolution has one scale
        an output channel: with groups, `axis` 1 of group g goes with the g-th block of the scales.
    clamp: the fused range-narrowing activation.
    inputs: the grids of the integer inputs, in call order.
    output: the grid of the output, or None for a float32 output (linear and conv only).
    """

    kind: str
    inputs: tuple["QParams", ...]
    output: "QParams | None"
    module: nn.Module | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: Tensor | None = None
    bias: Tensor | None = None
    weight_qparams: "QParams | None" = None
    clamp: Clamp | None = None

    def option(self, name: str, default: Any = None) -> Any:
        """An option of the call or an attribute of the module."""
        if name in self.options:
            return self.options[name]
        return getattr(self.module, name, default)


Lowering = Callable[[LoweringUnit], nn.Module]
_LOWERINGS: dict[str, Lowering] = {}


def lowers(*kinds: str) -> Callable[[Lowering], Lowering]:
    """Registers the decorated function as the lowering of `kinds`.

    The function raises NotImplementedError, saying what is missing, for a unit that has no integer layer; the unit
    then stays float.
    """

    def register(function: Lowering) -> Lowering:
        for kind in kinds:
            if kind in _LOWERINGS:
                raise ValueError(f"lowers: {kind!r} already has a lowering, {_LOWERINGS[kind].__qualname__}")
            _LOWERINGS[kind] = function
        return function

    return register


def lowerable_kinds() -> frozenset[str]:
    return frozenset(_LOWERINGS)


def lower(unit: LoweringUnit) -> nn.Module:
    """The integer layer of `unit`."""
    if unit.kind not in _LOWERINGS:
        raise NotImplementedError(f"no integer layer for {unit.kind!r}; there is one for {sorted(_LOWERINGS)}")
    return _LOWERINGS[unit.kind](unit)
