"""The arithmetic of other training rules: PACT and DoReFa."""

import torch
from torch import Tensor

from qkernels.errors import InvalidArgument, integer
from qkernels.ops.eager import is_eager, needs_grad, once_differentiable, refuse_transforms
from qkernels.ops.expect import expect_tensor
from qkernels.ops.fake import register_fake
from qkernels.ops.fake_quant import fake_quant_out

_ops = torch.ops.qkernels


def pact(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int) -> Tensor:
    """`fake_quant` whose scale learns where to clip (PACT): differentiable by `x` and `scale`.

    The rounding is seen as the identity. With `v = x / scale`, `x` gets the gradient where
    `qmin <= v + zero_point <= qmax`; elsewhere the scale gets it, times the end of the grid that `x` was clipped to
    (in units of the scale). The clipping level of a grid is `scale * (qmax - zero_point)`.

    Args:
        x, scale, zero_point, axis, qmin, qmax: as in `fake_quant`.

    Returns:
        What `fake_quant` returns.

    Raises:
        RuntimeError: an argument has the wrong dtype, size or range; the message names it.
    """
    if not is_eager("pact", x, scale):
        return _ops.pact.default(x, scale, zero_point, axis, qmin, qmax)
    if needs_grad(x, scale):
        return _Pact.apply(x, scale, zero_point, axis, qmin, qmax)
    return fake_quant_out(x, scale, zero_point, axis, qmin, qmax, torch.empty_like(x))


def pact_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """The gradients of `pact` by `x` and `scale` in one pass; the sum is as deterministic as that of `lsq_backward`.

    Args:
        grad: the gradient of the output; dtype and shape of `x`.
        x, scale, zero_point, axis, qmin, qmax: the arguments of the forward.

    Raises:
        RuntimeError: an argument has the wrong dtype, size or range; the message names it.
    """
    refuse_transforms("pact_backward", grad, x, scale)
    return _ops.pact_backward.default(grad, x, scale, zero_point, axis, qmin, qmax)


def dorefa_weight(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """DoReFa's weights: `fake_quant(tanh(x) / max |tanh(x)|)`, one grid for the tensor.

    The gradient is that of the formula with the rounding as the identity, the maximum's part included. tanh has the
    same bits on every path (at most 1.3 units in the last place off).

    Args:
        x: float32, bfloat16 or float16 tensor of any shape and layout; finite.
        scale, zero_point: the grid of values in [-1, 1], one element each; DoReFa takes `1 / qmax` and 0.
        qmin, qmax: the ends of the integer grid.

    Returns:
        A tensor of the dtype, shape and layout of `x`.

    Raises:
        RuntimeError: an argument has the wrong dtype, size or range, or `x` is not finite; the message names it.
    """
    refuse_transforms("dorefa_weight", x)
    return _ops.dorefa_weight.default(x, scale, zero_point, qmin, qmax)


def dorefa_weight_backward(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """The gradient of `dorefa_weight` by `x`, with tanh computed again.

    Args:
        grad: the gradient of the output; dtype and shape of `x`.
        x, scale, zero_point, qmin, qmax: the arguments of the forward.

    Raises:
        RuntimeError: an argument has the wrong dtype, size or range; the message names it.
    """
    refuse_transforms("dorefa_weight_backward", grad, x)
    return _ops.dorefa_weight_backward.default(grad, x, scale, zero_point, qmin, qmax)


def dorefa_gradient(grad: Tensor, seed: Tensor, bits: int) -> Tensor:
    """DoReFa's gradients: each sample is rounded stochastically to `2**bits` values in [-max |g|, max |g|].

    Unbiased except at the two ends. The noise of an element is computed from the seed, its sample and its place in the
    sample's memory, so threads and instruction sets do not change it.

    Args:
        grad: float32, bfloat16 or float16; dimension 0 counts the samples.
        seed: an int64 tensor of one element.
        bits: from 1 to 16.

    Returns:
        A tensor of the dtype, shape and layout of `grad`. A sample that is not finite becomes NaN, so that a loss
        scaler notices it; one that is all zero stays zero.

    Raises:
        RuntimeError: an argument has the wrong dtype, size or range; the message names it.
    """
    refuse_transforms("dorefa_gradient", grad)
    return _ops.dorefa_gradient.default(grad, seed, bits)


def round_gradient(x: Tensor, bits: int, seed: Tensor | None = None) -> Tensor:
    """The identity whose gradient goes through `dorefa_gradient`.

    Without a seed, one from torch's generator for the device of `x`: a CUDA graph draws another at each replay.

    Raises:
        InvalidType, InvalidArgument: `x` is not a tensor, or `bits` is no integer from 1 to 16.
    """
    bits = integer("round_gradient: bits", bits)
    if not 1 <= bits <= 16:
        raise InvalidArgument(f"round_gradient: bits must be in [1, 16], got {bits}")
    refuse_transforms("round_gradient", expect_tensor("round_gradient", "x", x))
    if seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device)
    return _RoundGradient.apply(x, seed, bits)


class _RoundGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seed, bits):
        ctx.save_for_backward(seed)
        ctx.bits = bits
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _ops.dorefa_gradient.default(grad, *ctx.saved_tensors, ctx.bits), None, None


class _Pact(torch.autograd.Function):
    """What register_autograd below does, at half its cost for a small tensor."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, *grid):
        ctx.save_for_backward(x, scale, zero_point)
        ctx.grid = grid
        return fake_quant_out(x, scale, zero_point, *grid, torch.empty_like(x))

    @staticmethod
    def backward(ctx, grad):
        return _pact_gradients(ctx, grad, *ctx.saved_tensors)


@once_differentiable("pact")
def _pact_gradients(ctx, *tensors):
    return *_ops.pact_backward.default(*tensors, *ctx.grid), None, None, None, None


@register_fake("pact")
def _(x, scale, zero_point, axis, qmin, qmax):
    return torch.empty_like(x)


@register_fake("pact_backward")
def _(grad, x, scale, zero_point, axis, qmin, qmax):
    return torch.empty_like(x), torch.empty(scale.shape, dtype=torch.float32, device=scale.device)


@register_fake("dorefa_weight")
def _(x, scale, zero_point, qmin, qmax):
    return torch.empty_like(x)


@register_fake("dorefa_weight_backward")
def _(grad, x, scale, zero_point, qmin, qmax):
    return torch.empty_like(x)


@register_fake("dorefa_gradient")
def _(grad, seed, bits):
    return torch.empty_like(grad)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.grid = inputs[3:]


torch.library.register_autograd(
    "qkernels::pact",
    lambda ctx, grad: (*_ops.pact_backward.default(grad, *ctx.saved_tensors, *ctx.grid), *[None] * 4),
    setup_context=_keep,
)
torch.library.register_autograd(
    "qkernels::dorefa_weight",
    lambda ctx, grad: (_ops.dorefa_weight_backward.default(grad, *ctx.saved_tensors, *ctx.grid), *[None] * 4),
    setup_context=_keep,
)
