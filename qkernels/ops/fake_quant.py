"""Fake-quantization: quantize and dequantize in one pass."""

import torch
from torch import Tensor

_ops = torch.ops.qkernels


def fake_quant(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int) -> Tensor:
    """Rounds `x` to the grid and back: `(clamp(RNE(x / scale) + zero_point, qmin, qmax) - zero_point) * scale`.

    Args:
        x: float32, bfloat16 or float16 tensor of any shape and layout (computed in float32, rounded once).
        scale: float32, positive and normal; 1 element, or one a channel of `axis`.
        zero_point: int32 in [qmin, qmax], same number of elements as `scale`.
        axis: the channel dimension, or None for one grid for the whole tensor.
        qmin, qmax: the ends of the integer grid.

    Returns:
        A tensor of the dtype, shape and layout of `x`, bit-equal to `torch.fake_quantize_per_tensor_affine` on finite
        input. NaN maps to qmin; infinities saturate.

    Raises:
        RuntimeError: an argument has the wrong dtype, size or range; the message names it.
    """
    return _ops.fake_quant.default(x, scale, zero_point, axis, qmin, qmax)


def fake_quant_out(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    qmin: int,
    qmax: int,
    out: Tensor,
) -> Tensor:
    """`fake_quant` into `out` (dense; dtype, shape and layout of `x`); returns `out`."""
    _ops.fake_quant_out.default(x, scale, zero_point, axis, qmin, qmax, out)
    return out


@torch.library.register_fake("qkernels::fake_quant")
def _(x, scale, zero_point, axis, qmin, qmax):
    return torch.empty_like(x)


@torch.library.register_fake("qkernels::fake_quant_out")
def _(x, scale, zero_point, axis, qmin, qmax, out):
    return None
