"""Fake-quantization: quantize and dequantize in one pass."""

import torch
from torch import Tensor

from qkernels.ops.eager import expect_no_graph, is_eager, needs_grad, note_written, refuse_transforms
from qkernels.ops.fake import register_fake
from qkernels.ops.groups import by_group

_ops = torch.ops.qkernels


def fake_quant(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    qmin: int,
    qmax: int,
    keep: str = "input",
    group_size: int | None = None,
    floor: float | None = None,
    ceiling: float | None = None,
) -> Tensor:
    """Rounds `x` to the grid and back: `(clamp(RNE(x / scale) + zero_point, qmin, qmax) - zero_point) * scale`.

    Args:
        x: float32, bfloat16 or float16 tensor of any shape and layout (computed in float32, rounded once).
        scale: float32, positive and normal; 1 element, or one a channel of `axis`.
        zero_point: int32 in [qmin, qmax], same number of elements as `scale`.
        axis: the channel dimension, or None for one grid for the whole tensor.
        qmin, qmax: the ends of the integer grid.
        keep: what the backward needs. "input": `x` itself, from which it recomputes where values were clipped; best if
            something else keeps `x` anyway (a weight). "mask": one bit an element, and not even that if nothing was
            clipped: the backward then returns the incoming gradient itself. The gradients have the same bits.
        group_size: one grid for each run of so many elements along `axis`, instead of one a channel; `scale` and
            `zero_point` then have the shape of `x` with that dimension divided by it. Fast where `axis` is innermost.
        floor, ceiling: a clamp of `x` in front of one grid, each None for none; for `keep="mask"`. It leaves the codes
            between those of its ends; so at an end the gradient passes half a step further.

    Its gradient by `x` is the straight-through estimator (`fake_quant_backward`).

    Returns:
        A tensor of the dtype, shape and layout of `x`, bit-equal to `torch.fake_quantize_per_tensor_affine` on finite
        input. NaN maps to qmin; infinities saturate.

    Raises:
        RuntimeError: an argument has the wrong dtype, size or range; the message names it.
    """
    if keep not in ("input", "mask"):
        raise ValueError(f'fake_quant: keep must be "input" or "mask", got {keep!r}')
    limits = floor, ceiling
    if limits != (None, None) and (keep != "mask" or group_size is not None):
        raise ValueError(
            f'fake_quant: floor and ceiling need keep="mask" and no group_size, got {floor!r}, {ceiling!r}'
        )
    if group_size is not None:
        return by_group(fake_quant, "fake_quant", x, scale, zero_point, axis, group_size, qmin, qmax, keep)
    if (keep == "mask" and needs_grad(x)) or limits != (None, None):
        if is_eager("fake_quant", x):
            return _FakeQuantMask.apply(x, scale, zero_point, axis, qmin, qmax, None, *limits)[0]
        return _ops.fake_quant_mask.default(x, scale, zero_point, axis, qmin, qmax, None, *limits)[0]
    if not is_eager("fake_quant", x):
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
    """`fake_quant` into `out` (dense; dtype, shape and layout of `x`; `x` itself or apart from it); returns `out`."""
    expect_no_graph("fake_quant_out", "out", out)
    _ops.fake_quant_out.default(x, scale, zero_point, axis, qmin, qmax, out)
    note_written(out)
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
    if is_eager("fake_quant_backward", grad, x) and not needs_grad(grad):
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
    expect_no_graph("fake_quant_backward_out", "out", out)
    _ops.fake_quant_backward_out.default(grad, x, scale, zero_point, axis, qmin, qmax, out)
    note_written(out)
    return out


def fake_quant_codes(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    code_dtype: torch.dtype,
    floor: float | None = None,
    ceiling: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`fake_quant(keep="mask")` on one grid, and `quantize`, in one pass.

    Args:
        x, scale, zero_point, qmin, qmax, floor, ceiling: as in `fake_quant`.
        code_dtype: torch.uint8 or torch.int8.

    Returns:
        The rounded tensor, with its straight-through gradient, and its codes.
    """
    arguments = x, scale, zero_point, None, qmin, qmax, code_dtype, floor, ceiling
    if not is_eager("fake_quant_codes", x):
        y, _, _, codes = _ops.fake_quant_mask.default(*arguments)
        return y, codes
    return _FakeQuantMask.apply(*arguments)


def fake_quant_mask(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    qmin: int,
    qmax: int,
    code_dtype: torch.dtype | None = None,
    floor: float | None = None,
    ceiling: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fake_quant` and one bit an element that says where the gradient passes.

    Args:
        x, scale, zero_point, axis, qmin, qmax, floor, ceiling: as in `fake_quant`.
        code_dtype: torch.uint8 or torch.int8 to have what `quantize` gives too.

    Returns:
        The rounded tensor; the bits, an opaque uint8 tensor for `fake_quant_mask_backward`; a bool tensor of no
        dimension: whether a bit is 0; and the codes (an empty tensor without `code_dtype`).

    Raises:
        RuntimeError: an argument has the wrong dtype, size or range; the message names it.
    """
    refuse_transforms("fake_quant_mask", x)
    return _ops.fake_quant_mask.default(x, scale, zero_point, axis, qmin, qmax, code_dtype, floor, ceiling)


def fake_quant_mask_backward(grad: Tensor, mask: Tensor, axis: int | None) -> Tensor:
    """The gradient of `fake_quant` from the bits of `fake_quant_mask`: `grad` where they are 1, else 0.

    Args:
        grad: the gradient of the output, in the output's memory layout.
        mask: from `fake_quant_mask` with the same `axis`.

    Raises:
        RuntimeError: an argument has the wrong dtype, size or layout; the message names it.
    """
    refuse_transforms("fake_quant_mask_backward", grad)
    return _ops.fake_quant_mask_backward.default(grad, mask, axis)


@register_fake("fake_quant")
def _(x, scale, zero_point, axis, qmin, qmax):
    return torch.empty_like(x)


@register_fake("fake_quant_out")
def _(x, scale, zero_point, axis, qmin, qmax, out):
    return None


@register_fake("fake_quant_backward")
def _(grad, x, scale, zero_point, axis, qmin, qmax):
    return torch.empty_like(x)


@register_fake("fake_quant_backward_out")
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


class _FakeQuantMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero_point, axis, *rest):
        y, mask, clipped, codes = _ops.fake_quant_mask.default(x, scale, zero_point, axis, *rest)
        ctx.mask, ctx.axis, ctx.like = mask if x.device.type != "cpu" or clipped else None, axis, y.stride()
        ctx.mark_non_differentiable(codes)
        ctx.set_materialize_grads(False)  # zeros for the codes
        return y, codes

    @staticmethod
    def backward(ctx, grad, _):
        if grad is not None and ctx.mask is not None:
            grad = (_MaskBackward.apply if needs_grad(grad) else _masked)(grad, ctx.mask, ctx.axis, ctx.like)
        return grad, *[None] * 8


class _MaskBackward(torch.autograd.Function):
    """Linear in the gradient, so its own derivative."""

    @staticmethod
    def forward(ctx, grad, *kept):
        ctx.kept = kept
        return _masked(grad, *kept)

    @staticmethod
    def backward(ctx, grad):
        return _MaskBackward.apply(grad, *ctx.kept), None, None, None


def _masked(grad: Tensor, mask: Tensor, axis: int | None, like: tuple[int, ...]) -> Tensor:
    return _ops.fake_quant_mask_backward.default(_in_layout(grad, like), mask, axis)


def _in_layout(grad: Tensor, stride: tuple[int, ...]) -> Tensor:
    if grad.stride() == stride:
        return grad
    return torch.empty_strided(grad.shape, stride, dtype=grad.dtype, device=grad.device).copy_(grad)


# Mirrors csrc/fake_quant_mask and csrc/quantize/grid.h: where rows of the mask start.
def _mask_bytes(x: Tensor, axis: int | None) -> int:
    if x.numel() == 0:
        return 0
    if axis is None:
        return (x.numel() + 7) // 8
    stride = torch.empty_like(x).stride(axis)
    channels = x.shape[axis]
    inner = stride if channels > 1 else x.numel()
    row = inner if inner > 1 else channels * (512 // channels if channels <= 256 else 1)
    return x.numel() // row * ((row + 7) // 8) + (x.numel() % row + 7) // 8


@register_fake("fake_quant_mask")
def _(x, scale, zero_point, axis, qmin, qmax, code_dtype=None, floor=None, ceiling=None):
    mask = x.new_empty(_mask_bytes(x, axis), dtype=torch.uint8)
    codes = x.new_empty(0, dtype=torch.uint8) if code_dtype is None else torch.empty_like(x, dtype=code_dtype)
    return torch.empty_like(x), mask, x.new_empty((), dtype=torch.bool), codes


@register_fake("fake_quant_mask_backward")
def _(grad, mask, axis):
    return torch.empty_like(grad)


def _keep_mask(ctx, inputs, output):
    ctx.axis, ctx.like = inputs[3], output[0].stride()
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1])


torch.library.register_autograd(
    "qkernels::fake_quant_mask",
    lambda ctx, grad, *others: (_masked(grad, *ctx.saved_tensors, ctx.axis, ctx.like), *[None] * 8),
    setup_context=_keep_mask,
)
