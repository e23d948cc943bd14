"""Fully connected layer on integers."""

from typing import Any

from torch import Tensor, nn

from qkernels import ops, reference
from qkernels.core.lowering import LoweringUnit, lowers
from qkernels.core.registry import layer
from qkernels.errors import InvalidArgument
from qkernels.nn.weighted import OnLastDimension, WeightedLayer, quantized_weight
from qkernels.ops.script import ScriptedLinear


@layer("linear")
class QLinear(OnLastDimension, WeightedLayer):
    """`x @ weight.T + bias` over the last dimension, with the weight [out_features, in_features]."""

    def _derive(self) -> tuple[Any, ...]:
        weight = self._buffers["weight"]
        dtype = self._epilogue().dtype
        return ops.linear_pack(*self._canonical()), weight.shape[0], dtype

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check(x, "input")
        self._check_residual(residual)
        packed, out_features, dtype = self.derived()
        try:
            return ops.linear(x, packed, out_features, dtype, residual)
        except RuntimeError as error:  # looked into only now: a check would be a part of the time of every call
            width = self._buffers["weight"].shape[1]
            if x.dim() > 0 and x.shape[-1] == width:
                raise
            raise InvalidArgument(f"{self._where()}: input must be [..., {width}], got {list(x.shape)}") from error

    def __prepare_scriptable__(self) -> nn.Module:
        return ScriptedLinear(*self._canonical())

    def reference_forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check(x, "input")
        self._check_residual(residual)
        *arguments, _, epilogue = self._canonical()
        return reference.linear(x, *arguments, epilogue, residual)

    def extra_repr(self) -> str:
        out_features, in_features = self._buffers["weight"].shape
        return f"{in_features}, {out_features}, bias={self._buffers['bias'] is not None}, {super().extra_repr()}"


@lowers("linear")
def lower_linear(unit: LoweringUnit) -> QLinear:
    codes = quantized_weight(unit.weight, unit.weight_qparams)
    return QLinear(unit.inputs[0], codes, unit.weight_qparams, unit.bias, unit.output, unit.clamp)
