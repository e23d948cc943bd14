"""Linear and convolution inside TorchScript: what a converted layer becomes under `torch.jit.script`."""

import torch
from torch import Tensor, nn

from qkernels.ops.conv import conv_geometry
from qkernels.ops.epilogue import Epilogue


class Packed(nn.Module):
    """The packed weight: made at the first call, and never part of a file, because it depends on the machine."""

    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.value = torch.empty(0, dtype=torch.uint8, device="cpu")

    def forward(self) -> Tensor:
        return self.value

    @torch.jit.export
    def __getstate__(self) -> bool:
        return self.training

    @torch.jit.export
    def __setstate__(self, training: bool) -> None:
        self.training = training
        self.value = torch.empty(0, dtype=torch.uint8, device="cpu")


class _Weighted(nn.Module):
    """The canonical arguments of `linear_pack` and `conv_pack`, held as TorchScript wants them."""

    weight_zero_point: Tensor | None
    bias: Tensor | None
    table: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        weight_zero_point: Tensor | None,
        bias: Tensor | None,
        input_scale: float,
        input_zero_point: int,
        input_dtype: torch.dtype,
        epilogue: Epilogue,
    ) -> None:
        super().__init__()
        tensors = (weight, weight_scale, weight_zero_point, bias, epilogue.table)
        for name, tensor in zip(("weight", "weight_scale", "weight_zero_point", "bias", "table"), tensors, strict=True):
            self.register_buffer(name, tensor)
        self.input_scale, self.input_zero_point, self.input_dtype = input_scale, input_zero_point, input_dtype
        self.epilogue, self.output_dtype = epilogue.as_list(), epilogue.dtype
        self.packed = Packed()


class ScriptedLinear(_Weighted):
    """`linear` that packs its weight once."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.packed.value.numel() == 0:
            self.packed.value = torch.ops.qkernels.linear_pack(
                self.weight,
                self.weight_scale,
                self.weight_zero_point,
                self.bias,
                self.input_scale,
                self.input_zero_point,
                self.input_dtype,
                self.epilogue,
                self.output_dtype,
                self.table,
            )
        return torch.ops.qkernels.linear(x, self.packed.value, residual, self.weight.size(0), self.output_dtype)


class ScriptedConv(_Weighted):
    """`conv` that packs its weight once. `output_size` maps the input to the spatial size of the output."""

    def __init__(
        self,
        canonical: tuple,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        transposed: bool,
        padding_mode: str,
        output_size: nn.Module,
    ) -> None:
        super().__init__(*canonical)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.transposed, self.padding_mode, self.output_size = transposed, padding_mode, output_size
        self.channels = self.weight.shape[1] * groups if transposed else self.weight.shape[0]
        self.geometry = conv_geometry(
            self.weight.shape[2:], stride, padding, dilation, groups, transposed, padding_mode
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.packed.value.numel() == 0:
            self.packed.value = torch.ops.qkernels.conv_pack(
                self.weight,
                self.weight_scale,
                self.weight_zero_point,
                self.bias,
                self.input_scale,
                self.input_zero_point,
                self.input_dtype,
                self.epilogue,
                self.output_dtype,
                self.table,
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
                self.transposed,
                self.padding_mode,
            )
        size = self.output_size(x)
        packed, channels = self.packed.value, self.channels
        return torch.ops.qkernels.conv(x, packed, residual, channels, size, self.output_dtype, self.geometry)
