"""Linear layers on activations that are quantized when they arrive, row by row ("dynamic", "per token")."""

import torch
from torch import Tensor

from qkernels.ops.expect import expect_tensor
from qkernels.ops.fake import register_fake

_ops = torch.ops.qkernels


def quantize_rows(
    x: Tensor, qmin: int, qmax: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Puts every row of `x` onto a grid of its own, which covers the row's extremes and zero.

    Nothing is known of the data beforehand. The grid is the one that an observer would choose for the row alone, its
    scale at least 2^-60. A row that holds NaN or infinities gets the scale NaN; the other rows do not notice. No
    gradient passes.

    Args:
        x: float32, bfloat16 or float16 [..., K] (computed in float32). Rows at one stride are read where they lie.
        qmin, qmax: the ends of the grids, inside the range of `dtype`.
        symmetric: the zero point is the middle of the codes.
        dtype: torch.uint8 or torch.int8.

    Returns:
        The codes (contiguous, the shape of `x`), the scales (float32 [...]) and the zero points (int32 [...]).

    Raises:
        RuntimeError: an argument has the wrong dtype or range; the message names it.

    Example:
        >>> q, scale, zero_point = quantize_rows(torch.tensor([[0.0, 1.0], [-2.0, 4.0]]), 0, 3, False, torch.uint8)
        >>> q.tolist(), scale.tolist(), zero_point.tolist()
        ([[0, 3], [0, 3]], [0.3333333432674408, 2.0], [0, 1])
    """
    return _ops.quantize_rows.default(expect_tensor("quantize_rows", "x", x).detach(), qmin, qmax, symmetric, dtype)


def linear_rows(
    input: Tensor,
    packed: Tensor,
    row_scale: Tensor,
    row_zero_point: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`float(sum over k of (q[r, k] - z[r]) * (w[n, k] - zw[n])) * (row_scale[r] * weight_scale[n]) + bias[n]`.

    Args:
        input: uint8 or int8 [..., in_features], as packed: the codes that `quantize_rows` gives.
        packed: the result of `linear_pack` for the input scale 1, the input zero point 0 and an int32 output.
        row_scale, row_zero_point: float32 and int32, one an input row.
        weight_scale: float32 [out_features].
        weight_sum: int32 [out_features], the sums over k of `w[n, k] - zw[n]`.
        bias: float32 [out_features] or None.
        out_features: as packed.
        dtype: torch.float32, torch.bfloat16 or torch.float16 (computed in float32, rounded once).

    Returns:
        A contiguous tensor [..., out_features] of `dtype`: the same bits on every instruction set and for any number of
        threads.

    Raises:
        RuntimeError: `packed` is damaged or was made for something else, or an argument has the wrong dtype or shape,
            or in_features is so large that the int32 sums could overflow (65,793; with weight zero points 33,025).
    """
    op = "linear_rows"
    row_scale = expect_tensor(op, "row_scale", row_scale).detach()
    weight_scale = expect_tensor(op, "weight_scale", weight_scale).detach()
    bias = None if bias is None else expect_tensor(op, "bias", bias).detach()
    scales = row_scale, row_zero_point, weight_scale, weight_sum
    return _ops.linear_rows.default(input, packed, *scales, bias, out_features, dtype)


@register_fake("quantize_rows")
def _(x, qmin, qmax, symmetric, dtype):
    rows = x.shape[:-1]
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.int32),
    )


@register_fake("linear_rows")
def _(input, packed, row_scale, row_zero_point, weight_scale, weight_sum, bias, out_features, output_dtype):
    return input.new_empty((*input.shape[:-1], out_features), dtype=output_dtype)
