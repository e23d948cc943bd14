"""Embedding from a table of codes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels import ops, reference
from qkernels.core.lowering import LoweringUnit, lowers
from qkernels.core.qspec import QParams
from qkernels.core.registry import layer
from qkernels.core.sizes import Sizes
from qkernels.errors import InvalidType
from qkernels.nn.base import QLayer
from qkernels.nn.weighted import quantized_weight


@layer("embedding")
class QEmbedding(QLayer):
    """Looks up rows of int8 codes; float32 out: `(code - zero_point) * scale`, one grid a row or one for the table."""

    def __init__(self, weight: Tensor, grid: QParams) -> None:
        super().__init__([], None)
        self.register_buffer("weight", weight.contiguous().clone())
        self._add_grid("weight", grid)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, ops.dequantize)

    def reference_forward(self, x: Tensor) -> Tensor:
        return self._run(x, reference.dequantize)

    def _run(self, x: Tensor, dequantize) -> Tensor:
        if x.dtype not in (torch.int64, torch.int32):
            raise InvalidType(f"{self._where()}: input must be int64 or int32 indices, got {x.dtype} {list(x.shape)}")
        codes, axis = F.embedding(x, self.weight), self._grids["weight"]["axis"]
        if x.numel() == 0:
            return codes.to(torch.float32)
        scale, zero_point = self.weight_scale, self.weight_zero_point
        if axis is not None:
            scale, zero_point = scale[x].flatten(), zero_point[x].flatten()
        return dequantize(codes.reshape(-1, codes.shape[-1]), scale, zero_point, axis, torch.float32).view(codes.shape)

    def output_sizes(self, *inputs: Sizes) -> Sizes:
        return (*inputs[0], self.weight.shape[1])

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}, {self._describe('weight')}"


@lowers("embedding")
def lower_embedding(unit: LoweringUnit) -> QEmbedding:
    return QEmbedding(quantized_weight(unit.weight, unit.weight_qparams), unit.weight_qparams)
