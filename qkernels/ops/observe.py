"""Observers in one op: extremes, moving average, grid and fake-quantization, with nothing of it in Python."""

import torch
from torch import Tensor

from qkernels.ops.eager import expect_no_graph, is_eager, needs_grad, note_written
from qkernels.ops.expect import expect_tensor
from qkernels.ops.fake import register_fake
from qkernels.ops.fake_quant import fake_quant, fake_quant_backward

_ops = torch.ops.qkernels


def observe_minmax(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest and the largest finite value of `x`, per tensor or per channel, and how many are not finite.

    Args:
        x: float32, bfloat16 or float16 tensor of any shape and layout.
        axis: the channel dimension, or None for the whole tensor.

    Returns:
        `low` and `high`, float32 with one element or one a channel (+inf and -inf for a channel without finite
        values), and an int64 tensor: the number of NaN, the number of infinities.

    Raises:
        RuntimeError: an argument has the wrong dtype or range; the message names it.
    """
    return _ops.observe_minmax.default(x, axis)


def observe(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    non_finite: Tensor | None,
    axis: int | None,
    qmin: int,
    qmax: int,
    symmetric: bool,
    min_scale: float,
    momentum: float | None,
    source: str,
    floor: float | None = None,
    ceiling: float | None = None,
) -> None:
    """Takes notice of `x`: updates `low` and `high` in place, and `scale` and `zero_point` to the grid for them.

    The same bits as `MinMax` or `MovingAverageMinMax` of `qkernels.core.observers` with `choose_qparams`.

    Args:
        x: float32, bfloat16 or float16 tensor of any shape and layout; an empty one changes nothing.
        low, high: float32 state with one element, or one a channel; +inf and -inf before the first batch.
        scale, zero_point: float32 and int32 of the same size; overwritten.
        non_finite: None: NaN or infinities in `x` are an error and change nothing. Else an int64 tensor of two counts
            (NaN, infinities) that are increased; the finite values are then observed.
        axis: the channel dimension, or None for one grid for the whole tensor.
        qmin, qmax: the ends of the integer grid.
        symmetric: the zero point is the middle of the grid.
        min_scale: no grid is finer than this.
        momentum: None: the extremes of all batches. Else `low += momentum * (batch_low - low)` after the first.
        source: what `x` is, for messages ("the output of conv1").
        floor, ceiling: observes `x` limited to [floor, ceiling], as what follows (a ReLU) will limit it.

    Raises:
        RuntimeError: an argument has the wrong dtype, size or range, or `x` is not finite; the message names it.
    """
    grid = axis, qmin, qmax, symmetric, min_scale, momentum, source
    _ops.observe.default(x, low, high, scale, zero_point, non_finite, *grid, floor, ceiling)
    note_written(low, high, scale, zero_point, non_finite)


def observe_fake_quant(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    non_finite: Tensor | None,
    axis: int | None,
    qmin: int,
    qmax: int,
    symmetric: bool,
    min_scale: float,
    momentum: float | None,
    source: str,
    observing: bool = True,
    quantizing: bool = True,
) -> Tensor:
    """`observe`, then `fake_quant` on the new grid, in at most two passes over `x` (one where its rows fit the cache).

    The gradient by `x` is that of `fake_quant` (straight-through). If nothing of the batch was clipped, which the
    extremes tell, nothing is kept for the backward and it returns the incoming gradient itself.

    Args:
        x, low, high, scale, zero_point, non_finite, axis, qmin, qmax, symmetric, min_scale, momentum, source: as in
            `observe`.
        observing: False leaves the state and the grid alone.
        quantizing: False returns `x` itself.

    Returns:
        `x` on the grid: a tensor of its dtype, shape and layout.

    Raises:
        RuntimeError: as `observe` and `fake_quant`.
    """
    state = low, high, scale, zero_point, non_finite
    grid = axis, qmin, qmax, symmetric, min_scale, momentum, source
    if not observing:
        return fake_quant(x, scale, zero_point, axis, qmin, qmax) if quantizing else x
    if not quantizing:
        observe(expect_tensor("observe_fake_quant", "x", x).detach(), *state, *grid)
        return x
    if not is_eager("observe_fake_quant", x):
        observe(expect_tensor("observe_fake_quant", "x", x).detach(), *state, *grid)
        return fake_quant(x, scale.clone(), zero_point.clone(), axis, qmin, qmax)
    if needs_grad(x):
        return _ObserveFakeQuant.apply(x, *state, *grid)
    out = torch.empty_like(x)
    _ops.observe_fake_quant_out.default(x, *state, *grid, out)
    note_written(*state)
    return out


def observe_fake_quant_out(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    non_finite: Tensor | None,
    axis: int | None,
    qmin: int,
    qmax: int,
    symmetric: bool,
    min_scale: float,
    momentum: float | None,
    source: str,
    out: Tensor,
) -> Tensor:
    """`observe_fake_quant` into `out` (dense; dtype, shape and layout of `x`, apart from `x`), without a gradient.

    Returns:
        A bool tensor of no dimension: whether a value of `x` was clipped.
    """
    grid = axis, qmin, qmax, symmetric, min_scale, momentum, source
    expect_no_graph("observe_fake_quant_out", "out", out)
    clipped = _ops.observe_fake_quant_out.default(x, low, high, scale, zero_point, non_finite, *grid, out)
    note_written(low, high, scale, zero_point, non_finite, out)
    return clipped


def observe_histogram(
    x: Tensor, batch_low: Tensor, batch_high: Tensor, low: Tensor, high: Tensor, histogram: Tensor
) -> None:
    """Counts the values of `x` into `histogram`, whose range [low, high] first grows to hold [batch_low, batch_high].

    A bin of the old range is cut into 16 pieces whose mass goes to the bin of the new range that their middle lies in,
    as `torch.ao.quantization.HistogramObserver` does it; new values are counted as by `torch.histc`. Nothing waits for
    a GPU.

    Args:
        x: float32, bfloat16 or float16 tensor of any shape and layout. Values outside of the range, and NaN, are left
            out.
        batch_low, batch_high: float32 with one element: the extremes of `x`, or of it and other tensors. If they are
            not finite, or low is above high, nothing changes.
        low, high: float32 state with one element; +inf and -inf before the first batch. Updated in place.
        histogram: float32 state [bins], updated in place.

    Raises:
        RuntimeError: an argument has the wrong dtype or size; the message names it.
    """
    _ops.observe_histogram.default(x, batch_low, batch_high, low, high, histogram)
    note_written(low, high, histogram)


class _ObserveFakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, low, high, scale, zero_point, non_finite, *grid):
        out = torch.empty_like(x)
        ctx.grid = grid[:3]
        clipped = _ops.observe_fake_quant_out.default(x, low, high, scale, zero_point, non_finite, *grid, out)
        note_written(low, high, scale, zero_point, non_finite)
        if x.device.type != "cpu" or clipped:  # asking a GPU would wait for it
            # Copies: the next batch moves the grid.
            ctx.save_for_backward(x, scale.clone(), zero_point.clone())
        return out

    @staticmethod
    def backward(ctx, grad):
        kept = ctx.saved_tensors
        return (fake_quant_backward(grad, *kept, *ctx.grid) if kept else grad), *[None] * 12


@register_fake("observe_minmax")
def _(x, axis):
    channels = 1 if axis is None else x.shape[axis]
    low = torch.empty(channels, dtype=torch.float32, device=x.device)
    return low, torch.empty_like(low), torch.empty(2, dtype=torch.int64, device=x.device)


@register_fake("observe")
def _(x, low, high, scale, zero_point, non_finite, *grid):
    return None


@register_fake("observe_histogram")
def _(x, batch_low, batch_high, low, high, histogram):
    return None


@register_fake("observe_fake_quant_out")
def _(x, low, high, scale, zero_point, non_finite, axis, qmin, qmax, symmetric, min_scale, momentum, source, out):
    return torch.empty((), dtype=torch.bool, device=x.device)
