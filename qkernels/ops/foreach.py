"""Many tensors in one call: all weights of a model on their grids, with one dispatch and one fork of the threads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qkernels.errors import InvalidArgument, integer
from qkernels.ops.eager import is_eager, needs_grad, refuse_transforms
from qkernels.ops.expect import expect_list, expect_tensor
from qkernels.ops.fake import register_fake

_ops = torch.ops.qkernels


def foreach_fake_quant(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    axes: Sequence[int | None],
    qmin: int,
    qmax: int,
) -> list[Tensor]:
    """`fake_quant` of each tensor of `xs` on its own grid; straight-through gradients.

    Args:
        xs: float32, bfloat16 or float16 tensors, dense, with the channels of the grid outermost in memory (a weight
            with its output channels first, contiguous or channels_last) or per tensor.
        scales, zero_points: the grid of each, as `fake_quant` takes it.
        axes: the channel dimension of each, or None.
        qmin, qmax: the ends of the integer grid, for all.

    Returns:
        A tensor for each of `xs`, with its dtype, shape and layout.

    Raises:
        RuntimeError: an argument has the wrong dtype, size, layout or range; the message names it.
    """
    op = "foreach_fake_quant"
    xs, scales, zero_points = _tensors(op, xs=xs, scales=scales, zero_points=zero_points)
    axes = _axes(op, xs, axes)
    if not xs:  # the dispatcher finds no device in an empty list
        return []
    if is_eager(op, *xs) and needs_grad(*xs):
        return list(_ForeachFakeQuant.apply(len(xs), axes, qmin, qmax, *xs, *scales, *zero_points))
    return _ops.foreach_fake_quant.default(xs, scales, zero_points, axes, qmin, qmax)


def foreach_fake_quant_backward(
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    axes: Sequence[int | None],
    qmin: int,
    qmax: int,
) -> list[Tensor]:
    """`fake_quant_backward` of each tensor: the gradients of `foreach_fake_quant` by `xs`.

    Args:
        grads: the gradients of the outputs; each has the dtype and shape of its x.
        xs, scales, zero_points, axes, qmin, qmax: the arguments of the forward.

    Raises:
        RuntimeError: an argument has the wrong dtype, size, layout or range; the message names it.
    """
    op = "foreach_fake_quant_backward"
    lists = _tensors(op, grads=grads, xs=xs, scales=scales, zero_points=zero_points)
    refuse_transforms(op, *lists[0])
    return _ops.foreach_fake_quant_backward.default(*lists, _axes(op, lists[1], axes), qmin, qmax)


def foreach_observe_fake_quant(
    xs: Sequence[Tensor],
    axes: Sequence[int | None],
    qmin: int,
    qmax: int,
    symmetric: bool,
    min_scale: float,
    code_dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Chooses the grid of each tensor from its own extremes and rounds the tensor to it, row by row in the cache.

    The bits of `observe_fake_quant` with a fresh state. The gradients by `xs` are straight-through; those of tensors
    in which nothing was clipped (always, for a symmetric grid with qmin = -qmax) are the incoming gradients themselves.

    Args:
        xs, axes, qmin, qmax: as in `foreach_fake_quant`.
        symmetric, min_scale: the kind of grid, as in `observe`.
        code_dtype: torch.int8 or torch.uint8 to have the integer codes too (what `linear_pack` and `conv_pack` take).

    Returns:
        The rounded tensors, the codes (an empty list without `code_dtype`), the scales and the zero points.

    Raises:
        RuntimeError: an argument has the wrong dtype, size, layout or range, or is not finite; the message names it.
    """
    op = "foreach_observe_fake_quant"
    (xs,) = _tensors(op, xs=xs)
    axes = _axes(op, xs, axes)
    if not xs:
        return [], [], [], []
    grid = qmin, qmax, symmetric, min_scale, code_dtype
    if not (is_eager(op, *xs) and needs_grad(*xs)):
        return _ops.foreach_observe_fake_quant.default(xs, axes, *grid)[:4]
    n = len(xs)
    flat = _ForeachObserveFakeQuant.apply(n, axes, *grid, *xs)
    codes = n if code_dtype is not None else 0
    return list(flat[:n]), list(flat[n : n + codes]), list(flat[n + codes : 2 * n + codes]), list(flat[2 * n + codes :])


def _tensors(op: str, **lists: Sequence[Tensor]) -> list[list[Tensor]]:
    found = [expect_list(op, f"{name} must be a list of tensors", value) for name, value in lists.items()]
    for name, tensors in zip(lists, found, strict=True):
        for tensor in tensors:
            expect_tensor(op, f"each of {name}", tensor)
    return found


def _axes(op: str, xs: list[Tensor], axes: Sequence[int | None]) -> list[int]:
    """As the ops take them: -1 for None, others counted from the front."""
    axes = expect_list(op, "axes must be a list of dimensions or None", axes)
    if len(axes) != len(xs):
        raise InvalidArgument(f"{op}: axes must have one entry for each of xs, got {len(axes)} for {len(xs)}")
    counted = [None if axis is None else integer(f"{op}: each of axes", axis) for axis in axes]
    return [
        -1 if axis is None else axis + x.dim() if -x.dim() <= axis < 0 else axis
        for x, axis in zip(xs, counted, strict=True)
    ]


class _ForeachFakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, n, axes, qmin, qmax, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.grid = axes, qmin, qmax
        return tuple(
            _ops.foreach_fake_quant.default(
                list(tensors[:n]), list(tensors[n : 2 * n]), list(tensors[2 * n :]), *ctx.grid
            )
        )

    @staticmethod
    def backward(ctx, *grads):
        n, kept = len(grads), ctx.saved_tensors
        lists = list(kept[:n]), list(kept[n : 2 * n]), list(kept[2 * n :])
        return None, None, None, None, *_given_or_zero(grads, lists, ctx.grid), *[None] * (2 * n)


class _ForeachObserveFakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, n, axes, qmin, qmax, symmetric, min_scale, code_dtype, *xs):
        ys, codes, scales, zero_points, clipped = _ops.foreach_observe_fake_quant.default(
            list(xs), axes, qmin, qmax, symmetric, min_scale, code_dtype
        )
        ctx.mark_non_differentiable(*codes, *scales, *zero_points)
        ctx.set_materialize_grads(False)
        ctx.count = n
        # Asking a GPU would wait for it.
        ctx.clipped = (
            list(range(n)) if clipped.device.type != "cpu" else [i for i, c in enumerate(clipped.tolist()) if c]
        )
        ctx.save_for_backward(*[t[i] for t in (xs, scales, zero_points) for i in ctx.clipped])
        ctx.grid = [axes[i] for i in ctx.clipped], qmin, qmax
        return *ys, *codes, *scales, *zero_points

    @staticmethod
    def backward(ctx, *grads):
        grads, n, kept = list(grads[: ctx.count]), len(ctx.clipped), ctx.saved_tensors
        lists = list(kept[:n]), list(kept[n : 2 * n]), list(kept[2 * n :])
        for i, grad in zip(ctx.clipped, _given_or_zero([grads[i] for i in ctx.clipped], lists, ctx.grid), strict=True):
            grads[i] = grad
        return *[None] * 7, *grads


def _given_or_zero(grads, lists, grid) -> list[Tensor | None]:
    """The gradients by xs; None where there is no gradient of the output."""
    axes, qmin, qmax = grid
    there = [i for i, grad in enumerate(grads) if grad is not None]
    part = [[grads[i] for i in there], *([values[i] for i in there] for values in lists)]
    result: list[Tensor | None] = [None] * len(grads)
    if there:
        ours = _ops.foreach_fake_quant_backward.default(*part, [axes[i] for i in there], qmin, qmax)
        for i, grad in zip(there, ours, strict=True):
            result[i] = grad
    return result


@register_fake("foreach_fake_quant")
def _(xs, scales, zero_points, axes, qmin, qmax):
    return [torch.empty_like(x) for x in xs]


@register_fake("foreach_fake_quant_backward")
def _(grads, xs, scales, zero_points, axes, qmin, qmax):
    return [torch.empty_like(x) for x in xs]


@register_fake("foreach_observe_fake_quant")
def _(xs, axes, qmin, qmax, symmetric, min_scale, code_dtype):
    channels = [1 if axis == -1 else x.shape[axis] for x, axis in zip(xs, axes, strict=True)]
    scales = [x.new_empty(c, dtype=torch.float32) for x, c in zip(xs, channels, strict=True)]
    zero_points = [x.new_empty(c, dtype=torch.int32) for x, c in zip(xs, channels, strict=True)]
    codes = [torch.empty_like(x, dtype=code_dtype) for x in xs] if code_dtype is not None else []
    device = xs[0].device if xs else "cpu"
    clipped = torch.empty(len(xs), dtype=torch.bool, device=device)
    return [torch.empty_like(x) for x in xs], codes, scales, zero_points, clipped


def _keep(ctx, inputs, output):
    xs, scales, zero_points, *ctx.grid = inputs
    ctx.save_for_backward(*xs, *scales, *zero_points)


def _keep_observed(ctx, inputs, output):
    xs, axes, qmin, qmax, *_ = inputs
    ctx.grid = axes, qmin, qmax
    ctx.save_for_backward(*xs, *output[2], *output[3])


def _straight_through(ctx, grads):
    kept, n = ctx.saved_tensors, len(grads)
    return _given_or_zero(grads, (kept[:n], kept[n : 2 * n], kept[2 * n :]), ctx.grid)


def _none_each(values):
    return [None] * len(values)


torch.library.register_autograd(
    "qkernels::foreach_fake_quant",
    lambda ctx, grads: (_straight_through(ctx, grads), _none_each(grads), _none_each(grads), None, None, None),
    setup_context=_keep,
)
torch.library.register_autograd(
    "qkernels::foreach_observe_fake_quant",
    lambda ctx, grads, *others: (_straight_through(ctx, grads), *[None] * 6),
    setup_context=_keep_observed,
)
