"""Pooling of 8-bit codes over the spatial dimensions of [N, C, *spatial], in channels-last memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qkernels.ops.expect import expect_sizes
from qkernels.ops.fake import register_fake
from qkernels.ops.layout import empty_channels_last

_ops = torch.ops.qkernels


def max_pool(
    q: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool = False,
) -> Tensor:
    """The largest code of each window: `torch.nn.functional.max_pool{1,2,3}d` on integers. The grid stays the same.

    Padding never wins, whatever the zero point is; a window of nothing else gives the lowest code of the dtype.

    Args:
        q: uint8 or int8 [N, C, *spatial] with 1, 2 or 3 spatial dimensions. An input that is not channels_last is
            copied once.
        kernel_size, stride, padding, dilation: one integer a spatial dimension; an empty stride means `kernel_size`.
        ceil_mode: rounds the output size up, as torch does.

    Returns:
        A channels_last tensor of the dtype of `q`.

    Raises:
        RuntimeError: an argument has the wrong dtype, size or range; the message names it.
    """
    sizes = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    return _ops.max_pool.default(q, *[expect_sizes("max_pool", *size) for size in sizes.items()], ceil_mode)


def avg_pool(
    q: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    q_scale: float,
    q_zero_point: int,
    scale: float,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    """The mean of each window, requantized: `torch.nn.functional.avg_pool{1,2,3}d` on the real values.

    `clamp(RNE(float(sum(q - q_zero_point)) * ((q_scale / scale) / float(count))) + zero_point, qmin, qmax)`; the sum
    is exact, padding counts as the real number zero.

    Args:
        q: uint8 or int8 [N, C, *spatial] with 1, 2 or 3 spatial dimensions. An input that is not channels_last is
            copied once.
        kernel_size, stride, padding: one integer a spatial dimension; an empty stride means `kernel_size`.
        ceil_mode, count_include_pad, divisor_override: as in torch.
        q_scale, q_zero_point: the grid of `q`.
        scale, zero_point, qmin, qmax: the grid of the result, inside the range of `dtype`.
        dtype: torch.uint8 or torch.int8.

    Returns:
        A channels_last tensor of `dtype`.

    Raises:
        RuntimeError: an argument has the wrong dtype, size or range; the message names it.
    """
    return _ops.avg_pool.default(
        q,
        expect_sizes("avg_pool", "kernel_size", kernel_size),
        expect_sizes("avg_pool", "stride", stride),
        expect_sizes("avg_pool", "padding", padding),
        ceil_mode,
        count_include_pad,
        divisor_override,
        q_scale,
        q_zero_point,
        scale,
        zero_point,
        qmin,
        qmax,
        dtype,
    )


def adaptive_avg_pool(
    q: Tensor,
    output_size: Sequence[int],
    q_scale: float,
    q_zero_point: int,
    scale: float,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    """`avg_pool` over torch's adaptive windows; `output_size` all 1 is the mean over the spatial dimensions.

    Args:
        q: uint8 or int8 [N, C, *spatial] with 1, 2 or 3 spatial dimensions.
        output_size: one integer a spatial dimension.
        q_scale, q_zero_point: the grid of `q`.
        scale, zero_point, qmin, qmax: the grid of the result, inside the range of `dtype`.
        dtype: torch.uint8 or torch.int8.

    Returns:
        A channels_last tensor of `dtype`.

    Raises:
        RuntimeError: an argument has the wrong dtype, size or range; the message names it.
    """
    output_size = expect_sizes("adaptive_avg_pool", "output_size", output_size)
    return _ops.adaptive_avg_pool.default(q, output_size, q_scale, q_zero_point, scale, zero_point, qmin, qmax, dtype)


def pool_output_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """torch's rule for one spatial dimension; a window must start inside of the input or of its front padding."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out


def _pooled_shape(q, kernel_size, stride, padding, dilation, ceil_mode):
    windows = zip(q.shape[2:], kernel_size, stride or kernel_size, padding, dilation, strict=True)
    return [*q.shape[:2], *(pool_output_size(*window, ceil_mode) for window in windows)]


@register_fake("max_pool")
def _(q, kernel_size, stride, padding, dilation, ceil_mode):
    return empty_channels_last(q, _pooled_shape(q, kernel_size, stride, padding, dilation, ceil_mode), q.dtype)


@register_fake("avg_pool")
def _(
    q,
    kernel_size,
    stride,
    padding,
    ceil_mode,
    count_include_pad,
    divisor_override,
    q_scale,
    q_zero_point,
    scale,
    zero_point,
    qmin,
    qmax,
    dtype,
):
    shape = _pooled_shape(q, kernel_size, stride, padding, [1] * len(kernel_size), ceil_mode)
    return empty_channels_last(q, shape, dtype)


@register_fake("adaptive_avg_pool")
def _(q, output_size, q_scale, q_zero_point, scale, zero_point, qmin, qmax, dtype):
    return empty_channels_last(q, [*q.shape[:2], *output_size], dtype)
