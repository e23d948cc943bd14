"""The operations in plain torch: the oracle of the tests, the meaning of the kernels, and the arithmetic of `exact()`.

Slow and simple on purpose. Integer sums are taken in float64 or int64, where they are exact.
"""

import torch
from torch import Tensor


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
    return quantize_offset(x * (1.0 / s), z, qmin, qmax) * s
