"""Batch normalization in training, together with the grid behind it: statistics, one pass forward, two backward."""

from typing import NamedTuple

import torch
from torch import Tensor

from qkernels.ops.eager import note_written, once_differentiable, refuse_transforms
from qkernels.ops.expect import expect_tensor
from qkernels.ops.fake import register_fake

_ops = torch.ops.qkernels


class BatchStatistics(NamedTuple):
    """What `batch_norm_statistics` gives, one value a channel; `extremes` are those of the normalized tensor."""

    mean: Tensor
    inv_std: Tensor
    factor: Tensor
    shift: Tensor
    extremes: Tensor


def batch_norm_statistics(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> BatchStatistics:
    """The statistics of a batch in one pass, and the normalization as `x * factor + shift`; moves the running ones.

    Args:
        x: float32 [N, C, ...] in channels_last memory, at least 2 values a channel.
        weight, bias: float32 [C], or None for 1 and 0.
        running_mean, running_var: float32 [C]; `running += momentum * (batch - running)`, the variance unbiased.
        momentum, eps: as in torch's batch norm.

    Returns:
        mean; 1 / sqrt(var + eps) with the biased variance; factor = inv_std * weight; shift = bias - mean * factor; and
        the smallest and the largest value of `fma(x, factor, shift)`, both NaN if `x` holds one. The same bits on every
        instruction set and for every number of threads.

    Raises:
        RuntimeError: an argument has the wrong dtype, size, layout or range; the message names it.
    """
    arguments = x, weight, bias, running_mean, running_var, momentum, eps
    statistics = BatchStatistics(*_ops.batch_norm_statistics.default(*arguments))
    note_written(running_mean, running_var)
    return statistics


def norm_fake_quant(
    x: Tensor,
    factor: Tensor,
    shift: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    floor: float | None = None,
    ceiling: float | None = None,
    code_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`fake_quant` of `clamp(fma(x, factor, shift), floor, ceiling)` on one grid, and the codes, in one pass.

    Args:
        x: float32 [N, C, ...] in channels_last memory, at least 2 values a channel.
        factor, shift: float32 [C].
        scale, zero_point, qmin, qmax: the grid, one element each; a float32 zero point is learned, and is rounded.
        floor, ceiling: a clamp before rounding, each None for none.
        code_dtype: torch.uint8 or torch.int8 to have the codes too.

    Returns:
        The rounded tensor, and its codes (an empty tensor without `code_dtype`). No gradients: `batch_norm_fake_quant`.

    Raises:
        RuntimeError: an argument has the wrong dtype, size, layout or range; the message names it.
    """
    grid = scale, zero_point, qmin, qmax
    return _ops.norm_fake_quant.default(x, factor, shift, *grid, floor, ceiling, code_dtype)


def norm_fake_quant_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    factor: Tensor,
    shift: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    floor: float | None = None,
    ceiling: float | None = None,
    grad_factor: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of batch normalization and `norm_fake_quant` behind it, through the statistics of the batch.

    Args:
        grad: the gradient of the rounded tensor; of any layout, channels_last is not copied.
        x, scale, zero_point, qmin, qmax, floor, ceiling: the arguments of the forward.
        mean, inv_std, factor, shift: from `batch_norm_statistics`.
        grad_factor: None: straight-through; the clamp leaves fewer codes, as in `fake_quant`. Else the gradients of
            `lsq` with this factor; a clamp passes gradients strictly inside.

    Returns:
        The gradients of x, of the weight and bias of the norm, and of scale and zero point (empty without
        `grad_factor`). The same bits on every instruction set and for every number of threads.

    Raises:
        RuntimeError: an argument has the wrong dtype, size, layout or range; the message names it.
    """
    grid = scale, zero_point, qmin, qmax
    return _ops.norm_fake_quant_backward.default(
        grad, x, mean, inv_std, factor, shift, *grid, floor, ceiling, grad_factor
    )


def batch_norm_fake_quant(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: BatchStatistics,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    floor: float | None = None,
    ceiling: float | None = None,
    code_dtype: torch.dtype | None = None,
    grad_factor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`norm_fake_quant` with gradients, by the input and parameters of the norm, and of a learned grid by that.

    Args:
        x, weight, bias, statistics: the arguments and the result of `batch_norm_statistics`.
        scale, zero_point, qmin, qmax, floor, ceiling, code_dtype: as in `norm_fake_quant`.
        grad_factor: for a learned grid, as in `norm_fake_quant_backward`.

    Returns:
        The rounded tensor and its codes.
    """
    refuse_transforms("batch_norm_fake_quant", *(t for t in (x, weight, bias, scale, zero_point) if t is not None))
    for name, value in (("scale", scale), ("zero_point", zero_point)):
        expect_tensor("batch_norm_fake_quant", name, value)
    rest = statistics, qmin, qmax, floor, ceiling, code_dtype, grad_factor
    return _BatchNormFakeQuant.apply(x, weight, bias, scale, zero_point, *rest)


class _BatchNormFakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, zero_point, statistics, *rest):
        *limits, code_dtype, grad_factor = rest
        mean, inv_std, factor, shift, _ = statistics
        y, codes = _ops.norm_fake_quant.default(x, factor, shift, scale, zero_point, *limits, code_dtype)
        grid = scale.clone(), zero_point.clone()  # an observer may move it before the backward
        ctx.save_for_backward(x, mean, inv_std, factor, shift, *grid)
        ctx.rest = *limits, grad_factor
        ctx.mark_non_differentiable(codes)
        ctx.set_materialize_grads(False)  # zeros for the codes
        return y, codes

    @staticmethod
    def backward(ctx, grad, _):
        return (None,) * 12 if grad is None else _gradients(ctx, grad, *ctx.saved_tensors)


@once_differentiable("batch_norm_fake_quant")
def _gradients(ctx, *tensors):
    by_x, by_weight, by_bias, by_scale, by_zero_point = _ops.norm_fake_quant_backward.default(*tensors, *ctx.rest)
    scale, zero_point = tensors[-2:]
    needed, learned = ctx.needs_input_grad, ctx.rest[-1] is not None
    return (
        by_x if needed[0] else None,
        by_weight if needed[1] else None,
        by_bias if needed[2] else None,
        by_scale.reshape(scale.shape) if learned and needed[3] else None,
        by_zero_point.reshape(zero_point.shape) if learned and needed[4] else None,
        *[None] * 7,
    )


@register_fake("batch_norm_statistics")
def _(x, weight, bias, running_mean, running_var, momentum, eps):
    return *(torch.empty_like(running_mean) for _ in range(4)), x.new_empty(2)


@register_fake("norm_fake_quant")
def _(x, factor, shift, scale, zero_point, qmin, qmax, floor, ceiling, code_dtype):
    codes = x.new_empty(0, dtype=torch.uint8) if code_dtype is None else torch.empty_like(x, dtype=code_dtype)
    return torch.empty_like(x), codes


@register_fake("norm_fake_quant_backward")
def _(grad, x, mean, inv_std, factor, shift, scale, zero_point, qmin, qmax, floor, ceiling, grad_factor):
    of_grid = x.new_empty(0 if grad_factor is None else 1)
    return torch.empty_like(x), *(torch.empty_like(mean) for _ in range(2)), of_grid, torch.empty_like(of_grid)
