"""The operations in plain torch: the oracle of the tests, the meaning of the kernels, and the arithmetic of `exact()`.

Slow and simple on purpose. Integer sums are taken in float64 or int64, where they are exact.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.ops.epilogue import Epilogue


def _along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """`values` shaped to broadcast over `x` along `axis`."""
    if axis is None:
        return values.reshape(())
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


def quantize_offset(v: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """RNE(v) clamped to [qmin - zero_point, qmax - zero_point]; NaN becomes the lower end."""
    low, high = (qmin - zero_point).to(torch.float32), (qmax - zero_point).to(torch.float32)
    rounded = torch.where(torch.isnan(v), low, torch.round(v))
    return torch.minimum(torch.maximum(rounded, low), high)


def fake_quant(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int) -> Tensor:
    s, z = _along(scale, x, axis), _along(zero_point, x, axis)
    offset = quantize_offset(x.float() * (1.0 / s), z, qmin, qmax) + 0.0  # + 0.0: no negative zero
    return (offset * s).to(x.dtype)


def fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int
) -> Tensor:
    s, z = _along(scale, x, axis), _along(zero_point, x, axis)
    rounded = torch.round(x.float() * (1.0 / s))
    return torch.where((rounded >= qmin - z) & (rounded <= qmax - z), grad, torch.zeros_like(grad))


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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The output, where the gradient passes as bools (the op packs them in rows of its own choice), and the codes."""
    if axis is None:
        qmin, qmax = clamped_ends(floor, ceiling, scale, zero_point, qmin, qmax)
    grid = scale, zero_point, axis, qmin, qmax
    codes = None if code_dtype is None else quantize(x, *grid, code_dtype)
    return fake_quant(x, *grid), fake_quant_backward(torch.ones_like(x), x, *grid) == 1, codes


def clamped_ends(
    floor: float | None, ceiling: float | None, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> tuple[int, int]:
    """The ends of the codes that a clamp leaves."""
    ends = torch.tensor(_ends(floor, ceiling), device=scale.device)
    low, high = quantize(ends, scale, zero_point, None, qmin, qmax, torch.int32).tolist()
    return low, high


def fake_quant_mask_backward(grad: Tensor, passes: Tensor, axis: int | None) -> Tensor:
    return torch.where(passes, grad, torch.zeros_like(grad))


def lsq_zero_point(zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    return torch.round(zero_point).clamp(qmin, qmax).to(torch.int32)


def lsq(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int, grad_factor: float
) -> Tensor:
    return fake_quant(x, scale, lsq_zero_point(zero_point, qmin, qmax), axis, qmin, qmax)


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
    """The terms in float32 as the kernel has them, their sums in float64."""
    rounded_zero_point = lsq_zero_point(zero_point, qmin, qmax)
    s, z = _along(scale, x, axis), _along(rounded_zero_point, x, axis)
    v = x.float() * (1.0 / s)
    rounded = torch.round(v)
    inside = (rounded >= qmin - z) & (rounded <= qmax - z)
    g, zero = grad.float(), torch.zeros(())
    scale_terms = g * torch.where(inside, rounded - v, quantize_offset(v, z, qmin, qmax))
    zero_terms = torch.where(inside, zero, -g).double() * s.double()
    others = [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]

    def total(terms: Tensor, like: Tensor) -> Tensor:
        summed = terms.double().sum(dim=others) if others else terms.double()
        return (summed * grad_factor).float().reshape(like.shape)

    grad_x = fake_quant_backward(grad, x, scale, rounded_zero_point, axis, qmin, qmax)
    return grad_x, total(scale_terms, scale), total(zero_terms, zero_point)


# -- other training rules ----------------------------------------------------------------------------------------------


def pact(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int) -> Tensor:
    return fake_quant(x, scale, zero_point, axis, qmin, qmax)


def pact_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """The terms in float32 as the kernel has them, their sum in float64."""
    s, z = _along(scale, x, axis), _along(zero_point, x, axis)
    v, low, high = x.float() * (1.0 / s), (qmin - z).float(), (qmax - z).float()
    inside = (v >= low) & (v <= high)
    clamped = torch.where(torch.isnan(v), low, torch.minimum(torch.maximum(v, low), high))
    terms = (grad.float() * torch.where(inside, torch.zeros(()), clamped)).double()
    others = [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]
    total = (terms.sum(dim=others) if others else terms).float().reshape(scale.shape)
    return torch.where(inside, grad, torch.zeros_like(grad)), total


def dorefa_weight(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """With torch's tanh, whose last bit may differ from the op's: a value near a tie may go the other way."""
    t = torch.tanh(x.double())
    u = (t / t.abs().amax().clamp(min=1e-12)).float() if x.numel() else x.float()
    return fake_quant(u, scale, zero_point, None, qmin, qmax).to(x.dtype)


def dorefa_weight_backward(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """In float64; the mask in float32."""
    if x.numel() == 0:
        return torch.empty_like(x)
    t, g = torch.tanh(x.double()), grad.double()
    largest = t.abs().amax().clamp(min=1e-12)
    u = t / largest
    g = torch.where(
        fake_quant_backward(torch.ones_like(u).float(), u.float(), scale, zero_point, None, qmin, qmax) == 1, g, 0.0
    )
    top = x.abs() == x.abs().amax()
    through = (g * u).sum() / largest / top.sum() * torch.sign(x.double())
    return ((g / largest - torch.where(top, through, 0.0)) * (1 - t * t)).to(x.dtype)


def _mix_bits(h: Tensor) -> Tensor:
    """On uint32 values in int64; products are taken modulo 2^32 in halves that fit."""

    def times(h: Tensor, factor: int) -> Tensor:
        return (h * (factor & 0xFFFF) + ((h * (factor >> 16)) & 0xFFFF) * 65536) & 0xFFFFFFFF

    h = h ^ (h >> 16)
    h = times(h, 0x85EBCA6B)
    h = h ^ (h >> 13)
    h = times(h, 0xC2B2AE35)
    return h ^ (h >> 16)


def dorefa_gradient(grad: Tensor, seed: Tensor, bits: int) -> Tensor:
    """Of a tensor whose memory is contiguous; other layouts number the elements of a row as they lie."""
    if grad.numel() == 0:
        return torch.empty_like(grad)
    rows = grad.float().reshape(grad.shape[0] if grad.dim() else 1, -1)
    seed_low, seed_high = int(seed) & 0xFFFFFFFF, int(seed) >> 32 & 0xFFFFFFFF
    inner = _mix_bits(_mix_bits((torch.arange(rows.shape[0]) + seed_high) & 0xFFFFFFFF) ^ seed_low)[:, None]
    outer = _mix_bits((inner + 0x9E3779B9) & 0xFFFFFFFF)
    h = _mix_bits((_mix_bits(torch.arange(rows.shape[1]) ^ inner) + outer) & 0xFFFFFFFF)
    noise = (h >> 8).float() * 2.0**-24 - 0.5
    steps = float(2**bits - 1)
    twice = 2.0 * rows.abs().amax(dim=1, keepdim=True)
    codes = torch.round((rows * (1.0 / twice) + 0.5) * steps + noise).clamp(0, steps)
    out = (codes / steps - 0.5) * twice
    out = torch.where(torch.isfinite(1.0 / twice), out, torch.zeros(()))
    out = torch.where(torch.isfinite(twice), out, torch.full((), float("nan")))
    return out.reshape(grad.shape).to(grad.dtype)


# -- observers ---------------------------------------------------------------------------------------------------------


def observe_minmax(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.float().reshape(1, -1) if axis is None else x.float().movedim(axis, 0).unsqueeze(-1).flatten(1)
    rows = torch.cat([rows, torch.full((len(rows), 1), float("nan"))], dim=1)  # so that no row is empty
    inf, finite = float("inf"), torch.isfinite(rows)
    low = torch.where(finite, rows, inf).amin(dim=1) + 0.0  # no negative zero
    high = torch.where(finite, rows, -inf).amax(dim=1) + 0.0
    return low, high, torch.stack([torch.isnan(x).sum(), torch.isinf(x).sum()])


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
    """As the observers and `choose_qparams` of qkernels.core do it; channels with no finite value stay."""
    if x.numel() == 0:
        return
    batch_low, batch_high, counts = observe_minmax(x, axis)
    if floor is not None or ceiling is not None:
        seen = batch_low <= batch_high
        batch_low = torch.where(seen, batch_low.clamp(floor, ceiling) + 0.0, batch_low)
        batch_high = torch.where(seen, batch_high.clamp(floor, ceiling) + 0.0, batch_high)
    if non_finite is None:
        assert counts.sum() == 0, source
    else:
        non_finite += counts
    first, empty = ~(low <= high), ~(batch_low <= batch_high)
    if momentum is None:
        new_low, new_high = torch.minimum(low, batch_low), torch.maximum(high, batch_high)
    else:
        new_low, new_high = low + momentum * (batch_low - low), high + momentum * (batch_high - high)
    low.copy_(torch.where(empty, low, torch.where(first, batch_low, new_low)))
    high.copy_(torch.where(empty, high, torch.where(first, batch_high, new_high)))
    seen_low = torch.where(low <= high, low, 0.0).clamp(max=0.0)
    seen_high = torch.where(low <= high, high, 0.0).clamp(min=0.0)
    steps = qmax - qmin
    s = torch.maximum(-seen_low, seen_high) / (steps / 2) if symmetric else (seen_high - seen_low) / float(steps)
    scale.copy_(torch.where(s > 0, s.clamp(min_scale, 2.0**50), torch.ones_like(s)))
    if symmetric:
        zero_point.fill_((qmin + qmax + 1) // 2)
    else:
        zero_point.copy_((qmin - torch.round(seen_low / scale)).clamp(qmin, qmax).to(torch.int32))


def observe_histogram(
    x: Tensor, batch_low: Tensor, batch_high: Tensor, low: Tensor, high: Tensor, histogram: Tensor
) -> None:
    if not bool((batch_low <= batch_high) & torch.isfinite(batch_low) & torch.isfinite(batch_high)):
        return
    first, bins = not bool(low <= high), histogram.numel()
    new_low, new_high = (batch_low, batch_high) if first else (low.minimum(batch_low), high.maximum(batch_high))
    ends = {"min": new_low.item(), "max": new_high.item()}
    x = x.float().reshape(-1)
    counts = torch.histc(x[(x >= new_low) & (x <= new_high)], bins, **ends)
    if first:
        moved = torch.zeros(bins)
    elif torch.equal(new_low, low) and torch.equal(new_high, high):
        moved = histogram
    elif torch.equal(low, high):
        moved = torch.histc(low, bins, **ends) * histogram.sum()
    else:
        step, width = (high - low) / (16 * bins), (new_high - new_low) / bins
        middles = low + step * torch.arange(16 * bins) + 0.5 * step
        edges = new_low + width * torch.arange(1, bins)
        target = torch.bucketize(middles, edges, right=True)
        moved = torch.bincount(target, weights=(histogram / 16).repeat_interleave(16), minlength=bins)
    histogram.copy_(counts + moved)
    low.copy_(new_low)
    high.copy_(new_high)


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
    *rest,
) -> Tensor:
    observe(x, low, high, scale, zero_point, non_finite, axis, qmin, qmax, *rest)
    return fake_quant(x, scale, zero_point, axis, qmin, qmax)


# -- many tensors ------------------------------------------------------------------------------------------------------


def foreach_fake_quant(xs, scales, zero_points, axes, qmin: int, qmax: int) -> list[Tensor]:
    each = zip(xs, scales, zero_points, axes, strict=True)
    return [fake_quant(x, scale, zero_point, axis, qmin, qmax) for x, scale, zero_point, axis in each]


def foreach_fake_quant_backward(grads, xs, scales, zero_points, axes, qmin: int, qmax: int) -> list[Tensor]:
    each = zip(grads, xs, scales, zero_points, axes, strict=True)
    return [fake_quant_backward(*tensors, axis, qmin, qmax) for *tensors, axis in each]


def foreach_observe_fake_quant(
    xs, axes, qmin: int, qmax: int, symmetric: bool, min_scale: float, code_dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    ys, codes, scales, zero_points = [], [], [], []
    for x, axis in zip(xs, axes, strict=True):
        channels = 1 if axis is None else x.shape[axis]
        low, high = torch.full((channels,), float("inf")), torch.full((channels,), float("-inf"))
        # The grid of zeros, which a tensor without elements keeps.
        middle = (qmin + qmax + 1) // 2
        scale = torch.ones(channels)
        zero_point = torch.full((channels,), middle if symmetric else qmin, dtype=torch.int32)
        grid = axis, qmin, qmax
        observe(x, low, high, scale, zero_point, None, *grid, symmetric, min_scale, None, "x")
        ys.append(fake_quant(x, scale, zero_point, *grid))
        if code_dtype is not None:
            codes.append(quantize(x, scale, zero_point, *grid, code_dtype))
        scales.append(scale)
        zero_points.append(zero_point)
    return ys, codes, scales, zero_points


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int, dtype: torch.dtype
) -> Tensor:
    s, z = _along(scale, x, axis), _along(zero_point, x, axis)
    return (quantize_offset(x.float() * (1.0 / s), z, qmin, qmax).to(torch.int32) + z).to(dtype)


def dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    s, z = _along(scale, q, axis), _along(zero_point, q, axis)
    return ((q.to(torch.int32) - z).float() * s).to(dtype)


# -- elementwise on codes ----------------------------------------------------------------------------------------------


def _on_grid(v: Tensor, zero_point: int, qmin: int, qmax: int, dtype: torch.dtype) -> Tensor:
    """clamp(RNE(v) + zero_point, qmin, qmax) of float32 values in units of the output scale."""
    z = torch.tensor(zero_point)
    return (quantize_offset(v, z, qmin, qmax).to(torch.int32) + zero_point).to(dtype)


def _f32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def lookup(q: Tensor, table: Tensor) -> Tensor:
    return table[q.view(torch.uint8).long()]


def _dequantize_fma(q: Tensor, scale: float, zero_point: int) -> Tensor:
    """fma(q, scale, -zero_point * scale) in float32."""
    s = _f32(scale)
    offset = torch.tensor(-zero_point, dtype=torch.float32) * s
    # On the grid of the bits of s, product and sum need fewer than 53 bits: float64 is exact, so .float() rounds once.
    return (q.double() * s.double() + offset.double()).float()


def add(
    a: Tensor,
    b: Tensor,
    a_scale: float,
    a_zero_point: int,
    b_scale: float,
    b_zero_point: int,
    scale: float,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    total = _dequantize_fma(a, a_scale, a_zero_point) + _dequantize_fma(b, b_scale, b_zero_point)
    return _on_grid(total * (1.0 / _f32(scale)), zero_point, qmin, qmax, dtype)


def mul(
    a: Tensor,
    b: Tensor,
    a_scale: float,
    a_zero_point: int,
    b_scale: float,
    b_zero_point: int,
    scale: float,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    product = (a.to(torch.int32) - a_zero_point) * (b.to(torch.int32) - b_zero_point)
    multiplier = (_f32(a_scale) * _f32(b_scale)) / _f32(scale)
    return _on_grid(product.float() * multiplier, zero_point, qmin, qmax, dtype)


def cat(tensors: Sequence[Tensor], tables: Tensor, dim: int) -> Tensor:
    return torch.cat([lookup(t, table) for t, table in zip(tensors, tables, strict=True)], dim)


# -- pooling -----------------------------------------------------------------------------------------------------------

_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOLS = {2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE_AVG_POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def max_pool(
    q: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool = False,
) -> Tensor:
    pool = _MAX_POOLS[q.dim() - 2]
    args = [list(v) for v in (kernel_size, stride or kernel_size, padding, dilation)]
    # A window of padding alone is -inf.
    return pool(q.float(), *args, ceil_mode=ceil_mode).clamp(min=torch.iinfo(q.dtype).min).to(q.dtype)


def _window_sums(x: Tensor, kernel, stride, padding, ceil_mode) -> Tensor:
    if x.dim() == 3:  # avg_pool1d has no divisor_override
        x = x.unsqueeze(2)
        kernel, stride, padding = [1, *kernel], [1, *stride], [0, *padding]
        return _window_sums(x, kernel, stride, padding, ceil_mode).squeeze(2)
    return _AVG_POOLS[x.dim() - 2](x, kernel, stride, padding, ceil_mode, True, 1).round()


def _mean(sums: Tensor, inside: Tensor, divisor: Tensor, q_scale, q_zero_point, scale, *grid) -> Tensor:
    """Exact sums of codes over windows with `inside` elements -> codes of sum / divisor."""
    centered = (sums - inside * q_zero_point).float()
    return _on_grid(centered * ((_f32(q_scale) / _f32(scale)) / divisor.float()), *grid)


def avg_pool(
    q: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    q_scale: float,
    q_zero_point: int,
    scale: float,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    windows = (list(kernel_size), list(stride or kernel_size), list(padding), ceil_mode)
    ones = torch.ones(1, 1, *q.shape[2:], dtype=torch.float64)
    sums, inside = _window_sums(q.double(), *windows), _window_sums(ones, *windows)
    divisor = inside
    if divisor_override is not None:
        divisor = torch.full_like(inside, divisor_override)
    elif count_include_pad:
        pool = {1: F.avg_pool1d, **_AVG_POOLS}[q.dim() - 2]
        divisor = (inside / pool(ones, *windows, count_include_pad=True)).round()
    return _mean(sums, inside, divisor, q_scale, q_zero_point, scale, zero_point, qmin, qmax, dtype)


def adaptive_avg_pool(
    q: Tensor,
    output_size: Sequence[int],
    q_scale: float,
    q_zero_point: int,
    scale: float,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    inside = torch.ones(1, 1, *output_size, dtype=torch.float64)
    for d, (size, out) in enumerate(zip(q.shape[2:], output_size, strict=True), start=2):
        lengths = [-(-(i + 1) * size // out) - i * size // out for i in range(out)]
        shape = [1] * q.dim()
        shape[d] = out
        inside = inside * torch.tensor(lengths, dtype=torch.float64).reshape(shape)
    sums = (_ADAPTIVE_AVG_POOLS[q.dim() - 2](q.double(), list(output_size)) * inside).round()
    return _mean(sums, inside, inside, q_scale, q_zero_point, scale, zero_point, qmin, qmax, dtype)


# -- linear ------------------------------------------------------------------------------------------------------------


def apply_epilogue(
    sums: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: float,
    epilogue: Epilogue,
    residual: Tensor | None,
    axis: int,
) -> Tensor:
    """Exact sums (float64 or int64, output channels along `axis`) -> the output that `epilogue` describes."""
    if epilogue.dtype == torch.int32:
        return sums.to(torch.int32)
    scale = _f32(input_scale) * weight_scale.expand(sums.shape[axis])
    shifted = sums.float() + 0.0  # the kernels add integers: no negative zero
    if bias is not None:
        shifted = shifted + _along(bias / scale, sums, axis)
    if epilogue.dtype.is_floating_point:
        return (shifted * _along(scale, sums, axis)).to(epilogue.dtype)
    v = shifted * _along(scale / _f32(epilogue.scale), sums, axis)
    q = _on_grid(v, epilogue.zero_point, epilogue.qmin, epilogue.qmax, epilogue.dtype)
    if epilogue.table is not None:
        q = lookup(q, epilogue.table)
    if epilogue.residual is not None:
        r = epilogue.residual
        grids = (epilogue.scale, epilogue.zero_point, r.scale, r.zero_point, r.out_scale, r.out_zero_point)
        q = add(q, residual, *grids, r.out_qmin, r.out_qmax, epilogue.dtype)
    return q


def linear(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    input_scale: float,
    input_zero_point: int,
    epilogue: Epilogue,
    residual: Tensor | None = None,
) -> Tensor:
    zero_points = torch.zeros(1) if weight_zero_point is None else weight_zero_point
    sums = (input.double() - input_zero_point) @ (weight.double() - zero_points.double().reshape(-1, 1)).T
    return apply_epilogue(sums, weight_scale, bias, input_scale, epilogue, residual, sums.dim() - 1)


def quantize_rows(
    x: Tensor, qmin: int, qmax: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.cat([x.float(), torch.zeros(*x.shape[:-1], 1, dtype=torch.float32)], dim=-1)  # zero is on every grid
    low, high = rows.amin(dim=-1) + 0.0, rows.amax(dim=-1) + 0.0
    scale = torch.maximum(-low, high) / ((qmax - qmin) * 0.5) if symmetric else (high - low) / (qmax - qmin)
    scale = torch.where(scale > 0, scale.clamp(2.0**-60, 2.0**50), torch.ones_like(scale))
    scale = torch.where(torch.isfinite(rows).all(dim=-1), scale, float("nan"))
    if symmetric:
        zero_point = torch.full_like(scale, (qmin + qmax + 1) // 2)
    else:
        zero_point = (qmin - torch.round(low / scale)).nan_to_num(qmin).clamp(qmin, qmax)
    offset = quantize_offset(x.float() * (1.0 / scale).unsqueeze(-1), zero_point.unsqueeze(-1), qmin, qmax)
    return (offset + zero_point.unsqueeze(-1)).to(dtype), scale, zero_point.to(torch.int32)


def linear_rows(
    input: Tensor,
    row_scale: Tensor,
    row_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    zero_points = torch.zeros(1) if weight_zero_point is None else weight_zero_point
    centered = input.double() - row_zero_point.unsqueeze(-1)
    sums = centered @ (weight.double() - zero_points.double().reshape(-1, 1)).T
    value = sums.float() * (row_scale.unsqueeze(-1) * weight_scale.expand(len(weight)))
    return (value + (torch.zeros(1, dtype=torch.float32) if bias is None else bias)).to(dtype)


# -- convolution -------------------------------------------------------------------------------------------------------

_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED_CONVS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _pad_spatial(x: Tensor, padding: Sequence[int], mode: str) -> Tensor:
    """torch's padding, [before, after] for each spatial dimension; torch takes the last dimension first."""
    pairs = [list(padding[i : i + 2]) for i in range(0, len(padding), 2)]
    if mode == "zeros":
        return F.pad(x, [side for pair in reversed(pairs) for side in pair])
    return F.pad(x, [side for pair in reversed(pairs) for side in pair], mode=mode)


def _transposed_sums(x: Tensor, w: Tensor, stride, padding, dilation, groups: int, output_size) -> Tensor:
    """Scatters without padding, then cuts (or extends with zeros) to the output: exact in float64."""
    full = _TRANSPOSED_CONVS[x.dim() - 2](x, w, None, stride, 0, 0, groups, dilation)
    for d, out in enumerate(output_size):
        low = padding[2 * d]
        missing = low + out - full.shape[2 + d]
        if missing > 0:
            full = torch.cat(
                [full, full.new_zeros([missing if i == 2 + d else n for i, n in enumerate(full.shape)])], 2 + d
            )
        full = full.narrow(2 + d, low, out)
    return full


def conv(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    input_scale: float,
    input_zero_point: int,
    input_dtype: torch.dtype,
    epilogue: Epilogue,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    padding_mode: str,
    output_size: Sequence[int],
    residual: Tensor | None = None,
) -> Tensor:
    """What `ops.conv_pack` and `ops.conv` compute; padding: [before, after] for each spatial dimension, flat."""
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    x = input.double() - input_zero_point
    w = weight.double()
    if weight_zero_point is not None:
        zero = weight_zero_point.double().expand(channels)
        if transposed:  # [I, O / groups, ...]: output channel = group * O / groups + column
            zero = zero.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).flatten(0, 1)
            w = w - zero.reshape(*zero.shape, *[1] * (w.dim() - 2))
        else:
            w = w - zero.reshape(-1, *[1] * (w.dim() - 1))
    stride, dilation = list(stride), list(dilation)
    if transposed:
        acc = _transposed_sums(x, w, stride, padding, dilation, groups, output_size)
    else:
        acc = _CONVS[x.dim() - 2](_pad_spatial(x, padding, padding_mode), w, None, stride, 0, dilation, groups)
    return apply_epilogue(acc, weight_scale, bias, input_scale, epilogue, residual, 1)


# -- binary networks ---------------------------------------------------------------------------------------------------


def binary_sign(x: Tensor, is_weight: bool = False) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def binary_sign_backward(grad: Tensor, x: Tensor, is_weight: bool = False) -> Tensor:
    passes = x.abs() <= 1
    if is_weight:
        passes |= x.float() * grad.float() > 0
    return torch.where(passes, grad, torch.zeros_like(grad))


def pack_signs(x: Tensor, axis: int) -> Tensor:
    bits = (x.movedim(axis, -1) >= 0).long()
    bits = F.pad(bits, (0, -bits.shape[-1] % 64)).unflatten(-1, (-1, 64))
    return (bits << torch.arange(64)).sum(dim=-1)


def binary_weight(weight: Tensor) -> Tensor:
    return binary_sign(weight)


def binary_linear(input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Of signs that are not packed."""
    product = ((input.double() @ weight.double().T).float() + 0.0) * scale
    return product if bias is None else product + bias


def binary_conv2d(
    input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, stride, padding, dilation
) -> Tensor:
    """Of signs that are not packed."""
    sums = F.conv2d(input.double(), weight.double(), None, stride, padding, dilation).float() + 0.0
    product = sums * scale.reshape(-1, 1, 1)
    return product if bias is None else product + bias.reshape(-1, 1, 1)


# ---- batch norm and the grid behind it ----


def batch_norm_statistics(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    columns = x.movedim(1, -1).reshape(-1, x.shape[1]).double()
    var, mean = torch.var_mean(columns, 0, correction=0)
    unbiased = var * (columns.shape[0] / (columns.shape[0] - 1))
    running_mean += (momentum * (mean - running_mean.double())).float()
    running_var += (momentum * (unbiased - running_var.double())).float()
    inv_std = (1.0 / torch.sqrt(var + eps)).float()
    factor = inv_std if weight is None else inv_std * weight
    shift = ((0.0 if bias is None else bias.double()) - mean * factor.double()).float()
    extremes = torch.stack(torch.aminmax(_affine(x, factor, shift)))
    return mean.float(), inv_std, factor, shift, extremes


def _affine(x: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    """fma(x, factor, shift): the product is exact in float64."""
    return (x.double() * _along(factor, x, 1).double() + _along(shift, x, 1).double()).float()


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
) -> tuple[Tensor, Tensor | None]:
    u = _affine(x, factor, shift).clamp(*_ends(floor, ceiling))
    grid = scale, lsq_zero_point(zero_point, qmin, qmax), None, qmin, qmax
    return fake_quant(u, *grid), None if code_dtype is None else quantize(u, *grid, code_dtype)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """In float64 but for where the gradient passes and the terms of the grid's sums."""
    t, by_grid = _affine(x, factor, shift), (None, None)
    if grad_factor is None:
        codes = clamped_ends(floor, ceiling, scale, lsq_zero_point(zero_point, qmin, qmax), qmin, qmax)
        g = fake_quant_backward(grad, t, scale, zero_point, None, *codes).double()
    else:
        low, high = _ends(floor, ceiling)
        grid = scale, zero_point, None, qmin, qmax
        through, *by_grid = lsq_backward(grad, t.clamp(low, high), *grid, grad_factor)
        g = torch.where((t > low) & (t < high), through, torch.zeros_like(through)).double()
    others = [d for d in range(x.dim()) if d != 1]
    centered = x.double() - _along(mean, x, 1).double()
    by_bias, product = g.sum(others), (g * centered).sum(others)
    by_weight = product * inv_std.double()
    rows = x.numel() // x.shape[1]
    slope = _along(inv_std.double() * by_weight / rows, x, 1)
    by_x = _along(factor, x, 1).double() * (g - _along(by_bias / rows, x, 1) - centered * slope)
    return by_x.float(), by_weight.float(), by_bias.float(), *by_grid


def _ends(floor: float | None, ceiling: float | None) -> tuple[float, float]:
    return -float("inf") if floor is None else floor, float("inf") if ceiling is None else ceiling
