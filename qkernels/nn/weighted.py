"""What linear and convolution share: an int8 weight, a bias, and the epilogue that follows the accumulator."""

from typing import Any

import torch
from torch import Tensor

from qkernels import ops, reference
from qkernels.core.lowering import Clamp
from qkernels.core.qspec import QParams
from qkernels.core.sizes import Sizes
from qkernels.errors import InvalidArgument, InvalidType, Unsupported
from qkernels.nn.base import QLayer
from qkernels.ops.epilogue import Epilogue, ResidualAdd


def clamp_option(clamp: Clamp | None) -> list[float | None] | None:
    """A clamp as a JSON value: an infinite end is None."""
    if clamp is None:
        return None
    return [None if clamp.low == -float("inf") else clamp.low, None if clamp.high == float("inf") else clamp.high]


def clamp_codes(grid: QParams, option: list[float | None] | None) -> tuple[int, int]:
    """The codes of `grid` that a clamp leaves. Rounding is monotone: clamping codes equals clamping the numbers."""
    if option is None:
        return grid.qmin, grid.qmax
    low = -float("inf") if option[0] is None else option[0]
    high = float("inf") if option[1] is None else option[1]
    ends = torch.tensor([low, high], dtype=torch.float32, device="cpu")
    codes = reference.quantize(ends, grid.scale.cpu(), grid.zero_point.cpu(), None, grid.qmin, grid.qmax, grid.dtype)
    return int(codes[0]), int(codes[1])


class OnLastDimension(QLayer):
    """What replaces the last dimension: the weight is [out_features, in_features]."""

    def output_sizes(self, *inputs: Sizes) -> Sizes:
        return (*inputs[0][:-1], self._buffers["weight"].shape[0])

    def input_sizes(self) -> dict[int, int]:
        return {-1: self._buffers["weight"].shape[1]}

    def output_memory(self, y: Tensor, *inputs: Tensor) -> Tensor:
        return y.new_empty(y.shape)


class WeightedLayer(QLayer):
    """accumulate -> requantize to `output` -> clamp; or, when fused with what follows:
    accumulate -> requantize to `requantized` -> clamp -> table or residual addition -> `output`.
    """

    def __init__(
        self,
        input: QParams,
        weight: Tensor,
        weight_qparams: QParams,
        bias: Tensor | None,
        output: QParams | None,
        clamp: Clamp | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__([input], output, {**(options or {}), "clamp": clamp_option(clamp)})
        if output is None and clamp is not None:
            raise Unsupported("a fused activation needs an integer output; leave the activation outside")
        self.register_buffer("weight", weight.detach().contiguous().clone())
        self._add_grid("weight", weight_qparams)
        self.register_buffer("bias", None if bias is None else bias.detach().to(torch.float32).clone())

    def with_table(self, table: Tensor, output: QParams) -> "WeightedLayer":
        """This layer followed by a lookup: the same codes, one pass over memory less."""
        if not table.dtype == output.dtype == self.out_qparams.dtype:
            raise InvalidArgument(f"{self._where()}: a fused table must keep the dtype {self.out_qparams.dtype}")
        fused = self._fused(output)
        fused.register_buffer("table", table.clone())
        return fused

    def with_residual(self, residual: QParams, output: QParams, clamp: list[float | None] | None) -> "WeightedLayer":
        """This layer followed by `QAdd` with a second operand: the same codes, one pass over memory less."""
        fused = self._fused(output)
        fused._add_grid("residual", residual)
        fused._input_roles = ["input", "residual"]
        fused.options["sum_clamp"] = clamp
        return fused

    def can_fuse(self) -> bool:
        """Whether nothing follows the requantization yet."""
        return "output" in self._grids and "requantized" not in self._grids

    def _fused(self, output: QParams) -> "WeightedLayer":
        if not self.can_fuse():
            raise InvalidArgument(f"{self._where()}: something is fused already, or the output is float")
        fused = QLayer.from_config(self.get_config())
        fused.load_state_dict(self.state_dict())
        fused._add_grid("requantized", self.out_qparams)
        fused._add_grid("output", output)
        return fused

    def _epilogue(self) -> Epilogue:
        if "output" not in self._grids:
            return Epilogue(dtype=torch.float32)
        grid = self._grid("requantized" if "requantized" in self._grids else "output")
        scale, zero_point = grid.item()
        qmin, qmax = clamp_codes(grid, self.options["clamp"])
        residual = None
        if "residual" in self._grids:
            out = self._grid("output")
            low, high = clamp_codes(out, self.options["sum_clamp"])
            residual = ResidualAdd(*self._grid("residual").item(), *out.item(), low, high)
        dtype = self._grids["output"]["dtype"]
        return Epilogue(dtype, scale, zero_point, qmin, qmax, self._buffers.get("table"), residual)

    def _canonical(self) -> tuple[Any, ...]:
        """(weight, weight_scale, weight_zero_point, bias, input_scale, input_zero_point, input_dtype, epilogue)"""
        b = self._buffers
        zero_point = b["weight_zero_point"] if bool(b["weight_zero_point"].any()) else None
        return (
            b["weight"],
            b["weight_scale"],
            zero_point,
            b["bias"],
            *self._numbers("input"),
            self._grids["input"]["dtype"],
            self._epilogue(),
        )

    def _check_residual(self, residual: Tensor | None) -> None:
        if residual is not None and "residual" in self._grids:
            self._check(residual, "residual")
        elif (residual is None) is ("residual" in self._grids):
            expected = "a residual" if residual is None else "no residual"
            raise InvalidType(f"{self._where()}: expected {expected} operand, as converted")


def quantized_weight(weight: Tensor, grid: QParams) -> Tensor:
    """The int8 codes of a weight whose output channels come first."""
    axis = None if grid.scale.numel() == 1 else 0
    arguments = (grid.scale, grid.zero_point, axis, grid.qmin, grid.qmax, grid.dtype)
    return ops.quantize(weight.detach().to(torch.float32), *arguments)
