"""Convolution and transposed convolution in one to three dimensions on integers."""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qkernels import ops, reference
from qkernels.core.lowering import LoweringUnit, lowers
from qkernels.core.registry import layer
from qkernels.core.sizes import Sizes
from qkernels.errors import InvalidArgument
from qkernels.nn.weighted import WeightedLayer, quantized_weight
from qkernels.ops.conv import conv_geometry, conv_output_size, conv_padding
from qkernels.ops.script import ScriptedConv


@layer("conv")
class QConv(WeightedLayer):
    """conv1d/2d/3d and their transposes; the weight in torch's layout.

    Options, lists of one entry a spatial dimension: stride, padding ([before, after] pairs), dilation, output_padding;
    groups; transposed; padding_mode.
    """

    channels_last = True

    usual: ClassVar[dict[str, Any]] = {
        "stride": 1,
        "padding": [0, 0],
        "dilation": 1,
        "output_padding": 0,
        "groups": 1,
        "padding_mode": "zeros",
    }

    def _geometry(self) -> tuple[Any, ...]:
        o = self.options
        padding = [side for pair in o["padding"] for side in pair]
        return o["stride"], padding, o["dilation"], o["groups"], o["transposed"], o["padding_mode"]

    def _channels(self) -> tuple[int, int]:
        """Of input and output."""
        first, second = self._buffers["weight"].shape[:2]
        second *= self.options["groups"]
        return (first, second) if self.options["transposed"] else (second, first)

    def _derive(self) -> tuple[Any, ...]:
        channels = self._channels()[1]
        packed = ops.conv_pack(*self._canonical(), *self._geometry())
        kernel = self._buffers["weight"].shape[2:]
        geometry = conv_geometry(kernel, *self._geometry()) if packed.is_cuda else ()
        return packed, channels, self._epilogue().dtype, geometry, {}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check(x, "input")
        self._check_residual(residual)
        packed, channels, dtype, geometry, sizes = self.derived()
        image = x.shape[1:]
        size = sizes.get(image)
        if size is None:
            size = self._output_size(x)
            if not torch.jit.is_tracing():  # where sizes are tensors
                sizes[image] = size
        return ops.conv(x, packed, residual, channels, size, dtype, geometry)

    def __prepare_scriptable__(self) -> nn.Module:
        kernel, geometry, o = self._buffers["weight"].shape[2:], self._geometry(), self.options

        def output_size(x: Tensor) -> list[int]:
            sizes = [x.size(2 + d) for d in range(len(kernel))]
            return conv_output_size(sizes, kernel, *geometry[:3], o["transposed"], o["output_padding"])

        return ScriptedConv(self._canonical(), *geometry, self._torchscript(output_size))

    def reference_forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check(x, "input")
        self._check_residual(residual)
        return reference.conv(x, *self._canonical(), *self._geometry(), self._output_size(x), residual)

    def output_sizes(self, *inputs: Sizes) -> Sizes:
        n, _, *spatial = inputs[0]
        return (n, self._channels()[1], *self._spatial(spatial))

    def input_sizes(self) -> dict[int, int]:
        return {1: self._channels()[0]}

    def _spatial(self, sizes: Sequence[int]) -> list[int]:
        o, kernel = self.options, self._buffers["weight"].shape[2:]
        return conv_output_size(sizes, kernel, *self._geometry()[:3], o["transposed"], o["output_padding"])

    def _output_size(self, x: Tensor) -> list[int]:
        """The spatial size of the output."""
        channels, kernel = self._channels()[0], self._buffers["weight"].shape[2:]
        if x.dim() != len(kernel) + 2 or x.shape[1] != channels:
            expected = f"[N, {channels}, {len(kernel)} spatial dims]"
            raise InvalidArgument(f"{self._where()}: input must be {expected}, got {list(x.shape)}")
        size = self._spatial(x.shape[2:])
        if min(size) < 1:
            raise InvalidArgument(f"{self._where()}: input {list(x.shape)} is smaller than the kernel {list(kernel)}")
        return size

    def with_padding(self, amounts: Any, value: Any) -> "QConv | None":
        """This layer after `F.pad(x, amounts, value=value)`; None if it cannot take that over."""
        o, dims = self.options, len(self.options["stride"])
        numbers = isinstance(amounts, Sequence) and all(isinstance(a, int) and a >= 0 for a in amounts)
        if not numbers or len(amounts) > 2 * dims or o["transposed"] or o["padding_mode"] != "zeros":
            return None
        if value != self._numbers("input")[1]:
            return None
        merged = copy.deepcopy(self)
        pairs = [list(amounts[i : i + 2]) for i in range(0, len(amounts), 2)]  # the last dimension first
        for pair, (before, after) in zip(reversed(merged.options["padding"]), pairs, strict=False):
            pair[:] = [pair[0] + before, pair[1] + after]
        return merged

    def extra_repr(self) -> str:
        weight = self._buffers["weight"].shape
        inner, outer = weight[1] * self.options["groups"], weight[0]
        channels = f"{outer}, {inner}" if self.options["transposed"] else f"{inner}, {outer}"
        bias = "" if self._buffers["bias"] is not None else ", bias=False"
        return f"{channels}, kernel_size={list(weight[2:])}{bias}, {super().extra_repr()}"


def per_dim(value: int | Sequence[int], dims: int) -> list[int]:
    """One entry a spatial dimension, as torch expands a single number."""
    values = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (values * dims if len(values) == 1 else values)]


@lowers("conv")
def lower_conv(unit: LoweringUnit) -> QConv:
    kernel = unit.weight.shape[2:]
    dims = len(kernel)
    transposed = bool(unit.option("transposed", False))
    dilation = per_dim(unit.option("dilation", 1), dims)
    padding = conv_padding(unit.option("padding", 0), kernel, dilation)
    options = {
        "stride": per_dim(unit.option("stride", 1), dims),
        "padding": [[before, after] for before, after in zip(padding[::2], padding[1::2], strict=True)],
        "dilation": dilation,
        "groups": int(unit.option("groups", 1)),
        "transposed": transposed,
        "output_padding": per_dim(unit.option("output_padding", 0) if transposed else 0, dims),
        "padding_mode": unit.option("padding_mode", "zeros"),
    }
    grid = unit.weight_qparams
    if transposed:
        rows = outputs_first(unit.weight, options["groups"])
        codes = outputs_first(quantized_weight(rows, grid), options["groups"])
    else:
        codes = quantized_weight(unit.weight, grid)
    return QConv(unit.inputs[0], codes, grid, unit.bias, unit.output, unit.clamp, options)


def outputs_first(weight: Tensor, groups: int) -> Tensor:
    """A transposed convolution's weight [in, out / groups, ...] as [out, in / groups, ...]; its own inverse."""
    blocks = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return blocks.transpose(1, 2).flatten(0, 1)
