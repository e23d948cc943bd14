"""The memory layouts that ops return, for their shape rules."""

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_channels_last(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized [N, C, *spatial] tensor stored as N, *spatial, C."""
    n, c, *spatial = shape
    return like.new_empty([n, *spatial, c], dtype=dtype).movedim(-1, 1)


def is_channels_last(t: Tensor) -> bool:
    """True if the elements of [N, C, *spatial] lie in the order N, *spatial, C."""
    return t.dim() >= 3 and t.movedim(1, -1).is_contiguous()
