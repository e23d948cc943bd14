"""Elementwise operations on 8-bit codes: table lookup (every unary operation), add, mul, cat."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qkernels.ops.expect import expect_list
from qkernels.ops.fake import register_fake
from qkernels.ops.layout import empty_channels_last, is_channels_last

_ops = torch.ops.qkernels


def lookup(q: Tensor, table: Tensor) -> Tensor:
    """`table[byte of q]`, elementwise: every unary operation on codes, and requantization.

    Args:
        q: uint8 or int8 tensor of any shape and layout.
        table: uint8 or int8 [256], indexed by the byte of q (-1 is byte 255); see `qkernels.core.tables`.

    Returns:
        A tensor of the dtype of `table` with the shape and layout of `q`.

    Raises:
        RuntimeError: an argument has the wrong dtype or shape; the message names it.

    Example:
        >>> table = torch.arange(256).flip(0).to(torch.uint8)
        >>> lookup(torch.tensor([0, 1, 255], dtype=torch.uint8), table).tolist()
        [255, 254, 0]
    """
    return _ops.lookup.default(q, table)


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
    """The codes of `real(a) + real(b)` on the grid (`scale`, `zero_point`, [`qmin`, `qmax`]).

    `clamp(RNE((fma(a, sa, -za*sa) + fma(b, sb, -zb*sb)) * (1 / scale)) + zero_point, qmin, qmax)` in float32; a ReLU
    after the addition is `qmin = zero_point`.

    Args:
        a, b: uint8 or int8 (in any mix), of shapes that broadcast.
        a_scale, a_zero_point, b_scale, b_zero_point: the grids of the operands.
        scale, zero_point, qmin, qmax: the grid of the result, inside the range of `dtype`.
        dtype: torch.uint8 or torch.int8.

    Returns:
        A tensor of `dtype`, with the layout of the first operand that has the full shape.

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or range; the message names it.
    """
    return _ops.add.default(a, b, a_scale, a_zero_point, b_scale, b_zero_point, scale, zero_point, qmin, qmax, dtype)


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
    """The codes of `real(a) * real(b)` on the grid (`scale`, `zero_point`, [`qmin`, `qmax`]).

    `clamp(RNE(float((a - za) * (b - zb)) * ((sa * sb) / scale)) + zero_point, qmin, qmax)`. Arguments, result and
    errors as in `add`; a [N, C, 1, 1] gate on a [N, C, H, W] activation needs no copy in either layout.
    """
    return _ops.mul.default(a, b, a_scale, a_zero_point, b_scale, b_zero_point, scale, zero_point, qmin, qmax, dtype)


def cat(tensors: Sequence[Tensor], tables: Tensor, dim: int) -> Tensor:
    """Concatenates codes along `dim`, each input through its own table (a requantization to the common grid).

    Args:
        tensors: uint8 or int8 tensors of equal shape outside of `dim`.
        tables: uint8 or int8 [len(tensors), 256], row k as `lookup` takes it; an identity row is a plain copy.
        dim: the dimension, negative counts from the end.

    Returns:
        A tensor of the dtype of `tables`: channels_last if every input (that is not empty) is, else contiguous.

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or range; the message names it.
    """
    return _ops.cat.default(expect_list("cat", "tensors must be a list of tensors", tensors), tables, dim)


@register_fake("lookup")
def _(q, table):
    return torch.empty_like(q, dtype=table.dtype)


def _empty_broadcast(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    shape = torch.broadcast_shapes(a.shape, b.shape)
    for operand in (a, b):
        if operand.shape == shape:
            return torch.empty_like(operand, dtype=dtype)
    return a.new_empty(shape, dtype=dtype)


@register_fake("add")
def _(a, b, a_scale, a_zero_point, b_scale, b_zero_point, scale, zero_point, qmin, qmax, dtype):
    return _empty_broadcast(a, b, dtype)


@register_fake("mul")
def _(a, b, a_scale, a_zero_point, b_scale, b_zero_point, scale, zero_point, qmin, qmax, dtype):
    return _empty_broadcast(a, b, dtype)


@register_fake("cat")
def _(tensors, tables, dim):
    shape = list(tensors[0].shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    if tensors[0].dim() >= 3 and all(t.numel() == 0 or is_channels_last(t) for t in tensors):
        return empty_channels_last(tensors[0], shape, tables.dtype)
    return tensors[0].new_empty(shape, dtype=tables.dtype)
