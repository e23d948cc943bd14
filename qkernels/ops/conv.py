"""Integer convolution in one to three dimensions, ordinary and transposed, with prepacked weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qkernels.errors import InvalidArgument, InvalidType, boolean
from qkernels.ops.epilogue import Epilogue, schema_arguments
from qkernels.ops.expect import expect_sizes, expect_tensor
from qkernels.ops.fake import register_fake
from qkernels.ops.layout import empty_channels_last

_ops = torch.ops.qkernels


def _per_dim(op: str, name: str, value: int | Sequence[int], dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else expect_sizes(op, name, value)


def conv_padding(
    padding: str | int | Sequence[int],
    kernel_size: Sequence[int],
    dilation: int | Sequence[int] = 1,
    op: str = "conv_padding",
) -> list[int]:
    """`padding` as [before, after] for each spatial dimension, flat.

    Args:
        padding: 'valid', 'same' (as torch: the odd element goes after), one number, one a spatial dimension, or already
            two a spatial dimension.
        op: what messages begin with.

    Raises:
        InvalidType: an argument is no list where one is needed.
        InvalidArgument: another string.
    """
    kernel_size = expect_sizes(op, "kernel_size", kernel_size)
    dims = len(kernel_size)
    if padding == "valid":
        return [0] * (2 * dims)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel_size, _per_dim(op, "dilation", dilation, dims), strict=True)]
        return [side for t in total for side in (t // 2, t - t // 2)]
    if isinstance(padding, str):
        raise InvalidArgument(f"{op}: padding must be 'same', 'valid' or numbers, got {padding!r}")
    values = _per_dim(op, "padding", padding, dims)
    return values if len(values) == 2 * dims else [side for p in values for side in (p, p)]


def conv_output_size(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
) -> list[int]:
    """The spatial size of the output, by torch's rules. Arguments as in `conv_pack`."""
    op = "conv_output_size"
    pads = conv_padding(padding, kernel_size, dilation, op)
    input_size, dims = expect_sizes(op, "input_size", input_size), len(kernel_size)
    given = {"stride": stride, "dilation": dilation, "output_padding": output_padding}
    strides, dilations, extra = (_per_dim(op, name, value, dims) for name, value in given.items())
    size = []
    for d in range(dims):
        pad, reach = pads[2 * d] + pads[2 * d + 1], dilations[d] * (kernel_size[d] - 1)
        if transposed:
            size.append((input_size[d] - 1) * strides[d] - pad + reach + extra[d] + 1)
        else:
            size.append((input_size[d] + pad - reach - 1) // strides[d] + 1)
    return size


def conv_pack(
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    input_scale: float,
    input_zero_point: int,
    input_dtype: torch.dtype,
    epilogue: Epilogue,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    padding_mode: str = "zeros",
) -> Tensor:
    """Packs a weight, all grids and the epilogue for the active instruction set.

    Args:
        weight: int8, [O, I / groups, *kernel]; transposed: [I, O / groups, *kernel] (torch's layouts).
        weight_scale: float32, 1 element or one an output channel (true output channels, transposed or not).
        weight_zero_point: int32 like `weight_scale`, or None for zero.
        bias: float32 [O] or None.
        input_scale, input_zero_point, input_dtype: the grid of the input; uint8 or int8.
        epilogue: what happens to the int32 accumulator.
        stride, dilation: one number, or one a spatial dimension.
        padding: 'same', 'valid', one number, one or two (before, after) a spatial dimension. Padding is the real number
            zero, or what `padding_mode` says.
        groups, transposed: as in torch.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'; a transposed convolution takes only 'zeros'.

    Returns:
        An opaque uint8 tensor for `conv`. It depends on the machine: do not store it.

    Raises:
        RuntimeError: an argument has the wrong dtype, size or range; the message names it.
    """
    kernel = list(expect_tensor("conv_pack", "weight", weight).shape[2:])
    pads = conv_padding(padding, kernel, dilation, "conv_pack")
    return _ops.conv_pack.default(
        weight,
        weight_scale,
        weight_zero_point,
        bias,
        input_scale,
        input_zero_point,
        input_dtype,
        *schema_arguments("conv_pack", epilogue),
        _per_dim("conv_pack", "stride", stride, len(kernel)),
        pads,
        _per_dim("conv_pack", "dilation", dilation, len(kernel)),
        groups,
        transposed,
        padding_mode,
    )


def pack_on_grid(
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor,
    input_zero_point: Tensor,
    input_dtype: torch.dtype,
    geometry: Sequence[int] = (),
) -> Tensor:
    """`linear_pack` or `conv_pack` for a layer that is trained: a float32 output, and an input grid that is tensors.

    On CUDA the weight is packed on the device, and nothing waits for it: values are not checked there.

    Args:
        weight: int8 [out_features, in_features], or a convolution's as in `conv_pack`.
        weight_scale: float32, 1 element or one an output channel.
        weight_zero_point: int32 of the size of `weight_scale`, or None for zero.
        bias: float32, one an output channel, or None.
        input_scale, input_zero_point: float32 and int32 of one element, on the device of the weight.
        input_dtype: uint8 or int8.
        geometry: `conv_geometry` of a convolution; empty: a linear layer.

    Returns:
        What `linear` or `conv` takes.

    Raises:
        RuntimeError: an argument has the wrong dtype, size or device, or the int32 sums could overflow; the message
            names it.
    """
    grids = weight_scale, weight_zero_point, bias, input_scale, input_zero_point
    return _ops.pack_on_grid.default(weight, *grids, input_dtype, expect_sizes("pack_on_grid", "geometry", geometry))


PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def conv_geometry(
    kernel_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    padding_mode: str = "zeros",
) -> list[int]:
    """What `conv` on CUDA must know of the packed weight without reading it. Arguments as in `conv_pack`."""
    op = "conv_geometry"
    pads, dims = conv_padding(padding, kernel_size, dilation, op), len(kernel_size)
    strides, dilations = _per_dim(op, "stride", stride, dims), _per_dim(op, "dilation", dilation, dims)
    numbers = [*kernel_size, *strides, *pads, *dilations]
    if not all(isinstance(number, int) for number in (*numbers, groups)):
        raise InvalidType(f"conv_geometry: sizes, stride, padding, dilation and groups must be integers, got {numbers}")
    if padding_mode not in PADDING_MODES:
        raise InvalidArgument(f"conv_geometry: padding_mode must be one of {PADDING_MODES}, got {padding_mode!r}")
    return [*numbers, groups, int(boolean("conv_geometry: transposed", transposed)), PADDING_MODES.index(padding_mode)]


def conv(
    input: Tensor,
    packed: Tensor,
    residual: Tensor | None,
    out_channels: int,
    output_size: Sequence[int],
    output_dtype: torch.dtype,
    geometry: Sequence[int] = (),
) -> Tensor:
    """Convolution of integer codes: exact int32 accumulation, then the packed epilogue.

    Args:
        input: uint8 or int8 [N, C, *spatial], of the dtype given to `conv_pack`. An input that is not channels_last is
            copied once.
        packed: the result of `conv_pack` under the active instruction set.
        residual: the second operand of the epilogue's addition, of the shape of the output; None if it has none.
        out_channels: of the packed weight.
        output_size: the spatial size of the output, see `conv_output_size`.
        output_dtype: the dtype of the packed epilogue.
        geometry: `conv_geometry` of what was packed. CUDA needs it; on the CPU the packed bytes hold it.

    Returns:
        [N, O, *output_size] in channels_last memory: the same bits on every instruction set and for every number of
        threads.

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or device, or `packed` belongs to another instruction set.
    """
    output_size, geometry = expect_sizes("conv", "output_size", output_size), expect_sizes("conv", "geometry", geometry)
    return _ops.conv.default(input, packed, residual, out_channels, output_size, output_dtype, geometry)


@register_fake("conv_pack")
def _(weight, *args):
    return weight.new_empty([torch.library.get_ctx().new_dynamic_size()], dtype=torch.uint8)


@register_fake("pack_on_grid")
def _(weight, *args):
    return weight.new_empty([torch.library.get_ctx().new_dynamic_size()], dtype=torch.uint8)


@register_fake("conv")
def _(input, packed, residual, out_channels, output_size, output_dtype, geometry=()):
    return empty_channels_last(input, [input.shape[0], out_channels, *output_size], output_dtype)
