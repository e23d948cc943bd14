"""Float tensors to 8-bit codes and back."""

import torch
from torch import Tensor

from qkernels.ops.eager import expect_no_graph, note_written
from qkernels.ops.fake import register_fake

_ops = torch.ops.qkernels


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int, dtype: torch.dtype
) -> Tensor:
    """The codes of `x` on a grid: `clamp(RNE(x * (1 / scale)) + zero_point, qmin, qmax)`.

    The codes are those that `fake_quant` implies. NaN maps to qmin; infinities saturate.

    Args:
        x: float32, bfloat16 or float16 tensor of any shape and layout (computed in float32).
        scale: float32, positive and normal; 1 element, or one a channel of `axis`.
        zero_point: int32 in [qmin, qmax], same number of elements as `scale`.
        axis: the channel dimension, or None for one grid for the whole tensor.
        qmin, qmax: the ends of the grid, inside the range of `dtype`.
        dtype: torch.uint8 or torch.int8.

    Returns:
        A tensor of `dtype` with the shape and layout of `x` (as `torch.empty_like` gives).

    Raises:
        RuntimeError: an argument has the wrong dtype, size or range; the message names it.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 0.26, 9.0])
        >>> quantize(x, torch.tensor([0.5]), torch.tensor([3], dtype=torch.int32), None, 0, 15, torch.uint8).tolist()
        [1, 3, 4, 15]
    """
    return _ops.quantize.default(x, scale, zero_point, axis, qmin, qmax, dtype)


def quantize_out(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int, out: Tensor
) -> Tensor:
    """`quantize` into `out` (uint8 or int8, dense, shape and layout of `x`); returns `out`."""
    _ops.quantize_out.default(x, scale, zero_point, axis, qmin, qmax, out)
    note_written(out)
    return out


def dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The real values of codes: `(q - zero_point) * scale`, in float32, rounded once to `dtype`.

    Args:
        q: uint8, int8 or int32 tensor of any shape and layout; int32 as `linear` and `conv` give it.
        scale: float32, positive and normal; 1 element, or one a channel of `axis`.
        zero_point: int32 inside the range of `q`'s dtype (0 for int32), same number of elements as `scale`.
        axis: the channel dimension, or None for one grid for the whole tensor.
        dtype: torch.float32, torch.bfloat16 or torch.float16.

    Returns:
        A tensor of `dtype` with the shape and layout of `q`.

    Raises:
        RuntimeError: an argument has the wrong dtype, size or range; the message names it.
    """
    return _ops.dequantize.default(q, scale, zero_point, axis, dtype)


def dequantize_out(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, out: Tensor) -> Tensor:
    """`dequantize` into `out` (float32, bfloat16 or float16, dense, shape and layout of `q`); returns `out`."""
    expect_no_graph("dequantize_out", "out", out)
    _ops.dequantize_out.default(q, scale, zero_point, axis, out)
    note_written(out)
    return out


@register_fake("quantize")
def _(x, scale, zero_point, axis, qmin, qmax, dtype):
    return torch.empty_like(x, dtype=dtype)


@register_fake("quantize_out")
def _(x, scale, zero_point, axis, qmin, qmax, out):
    return None


@register_fake("dequantize")
def _(q, scale, zero_point, axis, dtype):
    return torch.empty_like(q, dtype=dtype)


@register_fake("dequantize_out")
def _(q, scale, zero_point, axis, out):
    return None
