"""The borders of the integer part of a network: float -> codes and codes -> float."""

import torch
from torch import Tensor

from qkernels import ops, reference
from qkernels.core.blocks import from_rows, to_rows
from qkernels.core.qspec import QParams
from qkernels.core.registry import layer
from qkernels.errors import InvalidType
from qkernels.nn.base import QLayer, described
from qkernels.ops.epilogue import OUTPUT_DTYPES

_FLOATS = frozenset(dtype for dtype in OUTPUT_DTYPES if dtype.is_floating_point)


@layer("quantize")
class Quantize(QLayer):
    """Float tensor -> integer codes on the grid `output`."""

    def __init__(self, output: QParams):
        super().__init__([], output)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, ops.quantize)

    def reference_forward(self, x: Tensor) -> Tensor:
        return self._run(x, reference.quantize)

    def _check(self, x: Tensor, role: str) -> None:
        if not isinstance(x, Tensor) or x.dtype not in _FLOATS:
            expected = "a float tensor (float32, bfloat16 or float16)"
            raise InvalidType(f"{self._where()}: {role} must be {expected}, got {described(x)}")

    def _run(self, x: Tensor, quantize) -> Tensor:
        self._check(x, "input")
        meta = self._grids["output"]
        scale, zero_point = self._buffers["output_scale"], self._buffers["output_zero_point"]
        return quantize(x, scale, zero_point, meta["axis"], meta["qmin"], meta["qmax"], meta["dtype"])


@layer("fake_quantize")
class FakeQuantize(QLayer):
    """Float tensor -> the numbers of the grid `output`, for which there are no integer layers."""

    def __init__(self, output: QParams):
        super().__init__([], output)

    def forward(self, x: Tensor) -> Tensor:
        return self._grid("output").fake_quantize(x)

    def reference_forward(self, x: Tensor) -> Tensor:
        grid = self._grid("output")
        rows = x if grid.block is None else to_rows(x, grid.block)
        y = reference.fake_quant(rows, grid.scale, grid.zero_point, grid.axis, grid.qmin, grid.qmax)
        return y if grid.block is None else from_rows(y, x.shape, grid.block)


@layer("dequantize")
class Dequantize(QLayer):
    """Integer codes on the grid `input` -> float32."""

    def __init__(self, input: QParams):
        super().__init__([input], None)

    def forward(self, q: Tensor) -> Tensor:
        return self._run(q, ops.dequantize)

    def reference_forward(self, q: Tensor) -> Tensor:
        return self._run(q, reference.dequantize)

    def _run(self, q: Tensor, dequantize) -> Tensor:
        self._check(q, "input")
        scale, zero_point = self._buffers["input_scale"], self._buffers["input_zero_point"]
        return dequantize(q, scale, zero_point, self._grids["input"]["axis"], torch.float32)
