"""Fully connected layer whose input is quantized when it arrives."""

from typing import Any

import torch
from torch import Tensor, nn

from qkernels import ops, reference
from qkernels.core.lowering import LoweringUnit, lowers
from qkernels.core.qspec import QParams, QSpec
from qkernels.core.registry import layer
from qkernels.errors import InvalidType, Unsupported
from qkernels.nn.base import QLayer
from qkernels.nn.weighted import OnLastDimension, quantized_weight
from qkernels.ops.epilogue import OUTPUT_DTYPES, Epilogue

_FLOATS = [dtype for dtype in OUTPUT_DTYPES if dtype.is_floating_point]
_CODES = {"uint8": torch.uint8, "int8": torch.int8}


@layer("dynamic_linear")
class QDynamicLinear(OnLastDimension, QLayer):
    """`x @ weight.T + bias` on 8-bit codes, each row of x on its own grid: floats in, floats of the same dtype out."""

    def __init__(self, weight: Tensor, grid: QParams, bias: Tensor | None, activation: QSpec) -> None:
        dtype = str(activation.dtype).removeprefix("torch.")
        ends = {"qmin": activation.qmin, "qmax": activation.qmax, "symmetric": activation.symmetric}
        super().__init__([], None, {"dtype": dtype, **ends})
        self.register_buffer("weight", weight.contiguous().clone())
        self._add_grid("weight", grid)
        self.register_buffer("bias", None if bias is None else bias.detach().to(torch.float32).clone())

    def _check(self, x: Tensor, role: str) -> None:
        if x.dtype not in _FLOATS:
            raise InvalidType(f"{self._where()}: {role} must be a float tensor, got {x.dtype} {list(x.shape)}")

    def _row_grid(self) -> tuple[int, int, bool, torch.dtype]:
        o = self.options
        return o["qmin"], o["qmax"], o["symmetric"], _CODES[o["dtype"]]

    def _zero_point(self) -> Tensor | None:
        zero_point = self._buffers["weight_zero_point"]
        return zero_point if bool(zero_point.any()) else None

    def _derive(self) -> tuple[Any, ...]:
        weight, zero_point = self._buffers["weight"], self._zero_point()
        sums = weight.sum(1, dtype=torch.int32)
        if zero_point is not None:
            sums = sums - weight.shape[1] * zero_point
        one = torch.ones(1, dtype=torch.float32, device=weight.device)
        dtype = _CODES[self.options["dtype"]]
        packed = ops.linear_pack(weight, one, zero_point, None, 1.0, 0, dtype, Epilogue(torch.int32))
        scale = self._buffers["weight_scale"].expand(len(weight)).contiguous()
        return packed, scale, sums.to(torch.int32), self._buffers["bias"], len(weight)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x, "input")
        packed, weight_scale, sums, bias, out_features = self.derived()
        codes, scale, zero_point = ops.quantize_rows(x, *self._row_grid())
        return ops.linear_rows(codes, packed, scale, zero_point, weight_scale, sums, bias, out_features, x.dtype)

    def reference_forward(self, x: Tensor) -> Tensor:
        self._check(x, "input")
        codes, scale, zero_point = reference.quantize_rows(x, *self._row_grid())
        b = self._buffers
        weight = b["weight"], b["weight_scale"], self._zero_point(), b["bias"]
        return reference.linear_rows(codes, scale, zero_point, *weight, x.dtype)

    def __prepare_scriptable__(self) -> nn.Module:
        raise Unsupported(
            f"{self._where()}: torch.jit.script does not take layers that quantize their input when it arrives; "
            "use torch.compile or torch.export"
        )

    def extra_repr(self) -> str:
        out_features, in_features = self._buffers["weight"].shape
        return f"{in_features}, {out_features}, bias={self._buffers['bias'] is not None}, {super().extra_repr()}"


@lowers("dynamic_linear")
def lower_dynamic_linear(unit: LoweringUnit) -> QDynamicLinear:
    codes = quantized_weight(unit.weight, unit.weight_qparams)
    return QDynamicLinear(codes, unit.weight_qparams, unit.bias, unit.options["activation"])
