"""Fake-quantization: quantize and dequantize in one pass."""

import torch
from torch import Tensor

from qkernels.ops.eager import is_eager, needs_grad

_ops = torch.ops.qkernels


def fake_quant(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int) -> Tensor:
    """Rounds `x` to the grid and back: `(clamp(RNE(x / scale) + zero_point, qmin, qmax) - zero_point) * scale`.

    Args:
        x: float32, bfloat16 or float16 tensor of any shape and layout (computed in float32, rounded once).
        scale: float32, positive and normal; 1 element, or one a channel of `axis`.
        zero_point: int32 in [qmin, qmax], same number of elements as `scale`.
        axis: the channel dimension, or None for one grid for the whole tensor.
        qmin, qmax: the ends of the integer grid.

    Its gradient by `x` is the straight-through estimator, recomputed from `x` (`fake_quant_backward`).

    Returns:
        A tensor of the dtype, shape and layout of `x`, bit-equal to `torch.fake_quantize_per_tensor_affine` on finite
        input. NaN maps to qmin; infinities saturate.

    Raises:
        RuntimeError: an argument has the wrong dtype, size or range; the message names it.
    """
    if not is_eager(x):
        return _ops.fake_quant.default(x, scale, zero_point, axis, qmin, qmax)
    if needs_grad(x):
        return _FakeQuant.apply(x, scale, zero_point, axis, qmin, qmax)
    return fake_quant_out(x, scale, zero_point, axis, qmin, qmax, torch.empty_like(x))


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


def fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int
) -> Tensor:
    """The gradient of `fake_quant` by `x` (straight-through estimator): `grad` where nothing was clipped, else 0.

    It passes where `RNE(x / scale) + zero_point` lies in [qmin, qmax] before any clamp, as in torch; never for NaN.

    Args:
        grad: the gradient of the output; dtype and shape of `x`.
        x, scale, zero_point, axis, qmin, qmax: the arguments of the forward; no mask need be kept.

    Returns:
        A tensor of the dtype, shape and layout of `x`, with the bits of `grad` where it passes.

    Raises:
        RuntimeError: an argument has the wrong dtype, size or range; the message names it.
    """
    if is_eager(x) and not needs_grad(grad):
        return fake_quant_backward_out(grad, x, scale, zero_point, axis, qmin, qmax, torch.empty_like(x))
    return _ops.fake_quant_backward.default(grad, x, scale, zero_point, axis, qmin, qmax)


def fake_quant_backward_out(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    qmin: int,
    qmax: int,
    out: Tensor,
) -> Tensor:
    """`fake_quant_backward` into `out` (dense; dtype, shape and layout of `x`; may be `grad`); returns `out`."""
    _ops.fake_quant_backward_out.default(grad, x, scale, zero_point, axis, qmin, qmax, out)
    return out


@torch.library.register_fake("qkernels::fake_quant")
def _(x, scale, zero_point, axis, qmin, qmax):
    return torch.empty_like(x)


@torch.library.register_fake("qkernels::fake_quant_out")
def _(x, scale, zero_point, axis, qmin, qmax, out):
    return None


@torch.library.register_fake("qkernels::fake_quant_backward")
def _(grad, x, scale, zero_point, axis, qmin, qmax):
    return torch.empty_like(x)


@torch.library.register_fake("qkernels::fake_quant_backward_out")
def _(grad, x, scale, zero_point, axis, qmin, qmax, out):
    return None


class _FakeQuant(torch.autograd.Function):
    """What register_autograd below does, at half its cost for a small tensor."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, axis, qmin, qmax):
        ctx.save_for_backward(x, scale, zero_point)
        ctx.grid = axis, qmin, qmax
        return fake_quant_out(x, scale, zero_point, axis, qmin, qmax, torch.empty_like(x))

    @staticmethod
    def backward(ctx, grad):
        return fake_quant_backward(grad, *ctx.saved_tensors, *ctx.grid), None, None, None, None, None


def _keep_forward(ctx, inputs, output):
    x, scale, zero_point, *ctx.grid = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _keep_backward(ctx, inputs, output):
    _keep_forward(ctx, inputs[1:], output)


def _straight_through(ctx, grad):
    return _ops.fake_quant_backward.default(grad, *ctx.saved_tensors, *ctx.grid)


torch.library.register_autograd(
    "qkernels::fake_quant",
    lambda ctx, grad: (_straight_through(ctx, grad), None, None, None, None, None),
    setup_context=_keep_forward,
)
# Linear in grad, piecewise constant in the rest.
torch.library.register_autograd(
    "qkernels::fake_quant_backward",
    lambda ctx, grad: (_straight_through(ctx, grad), None, None, None, None, None, None),
    setup_context=_keep_backward,
)
