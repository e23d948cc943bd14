"""Learned grids: fake-quantization whose scale (LSQ) and zero point (LSQ+) have gradients."""

import torch
from torch import Tensor

from qkernels.ops.eager import (
    expect_no_graph,
    is_eager,
    needs_grad,
    note_written,
    once_differentiable,
    refuse_transforms,
)
from qkernels.ops.fake import register_fake
from qkernels.ops.groups import by_group

_ops = torch.ops.qkernels


def lsq(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    qmin: int,
    qmax: int,
    grad_factor: float,
    group_size: int | None = None,
) -> Tensor:
    """`fake_quant` on a learned grid: differentiable by `x`, `scale` and `zero_point`.

    The zero point is a float that is rounded (RNE) and clamped to [qmin, qmax], the same way in the forward and in the
    backward. For LSQ (symmetric) keep it 0 and do not train it.

    Args:
        x: float32, bfloat16 or float16 tensor of any shape and layout (computed in float32, rounded once).
        scale: float32, positive and normal; 1 element, or one a channel of `axis`.
        zero_point: float32, finite; same number of elements as `scale`.
        axis: the channel dimension, or None for one grid for the whole tensor.
        qmin, qmax: the ends of the integer grid.
        grad_factor: multiplies the gradients of `scale` and `zero_point`; LSQ takes 1 / sqrt(N * qmax), N the number
            of elements that share a scale.
        group_size: one grid for each run of so many elements along `axis`, as in `fake_quant`.

    Returns:
        What `fake_quant` gives with the rounded zero point.

    Raises:
        RuntimeError: an argument has the wrong dtype, size or range; the message names it.
    """
    if group_size is not None:
        return by_group(lsq, "lsq", x, scale, zero_point, axis, group_size, qmin, qmax, grad_factor)
    if not is_eager("lsq", x, scale, zero_point):
        return _ops.lsq.default(x, scale, zero_point, axis, qmin, qmax, grad_factor)
    if needs_grad(x, scale, zero_point):
        return _Lsq.apply(x, scale, zero_point, axis, qmin, qmax, grad_factor)
    return lsq_out(x, scale, zero_point, axis, qmin, qmax, torch.empty_like(x))


def lsq_out(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int, out: Tensor
) -> Tensor:
    """The forward of `lsq` into `out` (dense; dtype, shape and layout of `x`; may be `x`); returns `out`."""
    expect_no_graph("lsq_out", "out", out)
    _ops.lsq_out.default(x, scale, zero_point, axis, qmin, qmax, out)
    note_written(out)
    return out


def lsq_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    qmin: int,
    qmax: int,
    grad_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients of `lsq` in one pass over `grad` and `x`.

    With `v = x / scale` and `r = RNE(v)`: where `r` needs no clamp, x gets `grad` and the scale `grad * (r - v)`;
    elsewhere x gets 0, the scale `grad * clamp(r)` and the zero point `-grad * scale`. The sums have the same bits for
    any number of threads and every instruction set.

    Args:
        grad: the gradient of the output; dtype and shape of `x`.
        x, scale, zero_point, axis, qmin, qmax, grad_factor: the arguments of the forward.

    Returns:
        The gradients of `x` (its dtype, shape and layout), `scale` and `zero_point` (float32, their shapes).

    Raises:
        RuntimeError: an argument has the wrong dtype, size or range; the message names it.
    """
    refuse_transforms("lsq_backward", grad, x, scale, zero_point)
    return _ops.lsq_backward.default(grad, x, scale, zero_point, axis, qmin, qmax, grad_factor)


def lsq_backward_out(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    qmin: int,
    qmax: int,
    grad_factor: float,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lsq_backward` with the gradient of `x` in `out` (dense; dtype, shape and layout of `x`; may be `grad`)."""
    expect_no_graph("lsq_backward_out", "out", out)
    sums = _ops.lsq_backward_out.default(grad, x, scale, zero_point, axis, qmin, qmax, grad_factor, out)
    note_written(out)
    return out, *sums


def _empty_sum(like):
    return torch.empty(like.shape, dtype=torch.float32, device=like.device)


@register_fake("lsq")
def _(x, scale, zero_point, axis, qmin, qmax, grad_factor):
    return torch.empty_like(x)


@register_fake("lsq_backward")
def _(grad, x, scale, zero_point, axis, qmin, qmax, grad_factor):
    return torch.empty_like(x), _empty_sum(scale), _empty_sum(zero_point)


@register_fake("lsq_backward_out")
def _(grad, x, scale, zero_point, axis, qmin, qmax, grad_factor, out):
    return _empty_sum(scale), _empty_sum(zero_point)


class _Lsq(torch.autograd.Function):
    """What register_autograd below does, at half its cost for a small tensor."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, axis, qmin, qmax, grad_factor):
        ctx.save_for_backward(x, scale, zero_point)
        ctx.grid = axis, qmin, qmax, grad_factor
        return lsq_out(x, scale, zero_point, axis, qmin, qmax, torch.empty_like(x))

    @staticmethod
    def backward(ctx, grad):
        return _gradients(ctx, grad, *ctx.saved_tensors)


@once_differentiable("lsq")
def _gradients(ctx, *tensors):
    return *_ops.lsq_backward.default(*tensors, *ctx.grid), None, None, None, None


@register_fake("lsq_out")
def _(x, scale, zero_point, axis, qmin, qmax, out):
    return None


def _keep(ctx, inputs, output):
    x, scale, zero_point, *ctx.grid = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _backward(ctx, grad):
    grads = _ops.lsq_backward.default(grad, *ctx.saved_tensors, *ctx.grid)
    return *grads, None, None, None, None


torch.library.register_autograd("qkernels::lsq", _backward, setup_context=_keep)
