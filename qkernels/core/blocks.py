"""Blocks of a tensor that share a grid: the tensor as a matrix with a row for each block, and back.

A block is given by its size along each dimension; -1 is the whole dimension, and 0 at the end stands for all further
dimensions, whole. Blocks are counted in row-major order.
"""

from collections.abc import Sequence

from torch import Tensor

from qkernels.errors import InvalidArgument


def sizes(shape: Sequence[int], block: Sequence[int], source: str = "a tensor") -> list[int]:
    """The size of a block along each dimension of a tensor of `shape`.

    Raises:
        InvalidArgument: the tensor has another number of dimensions, or cannot be divided into such blocks.
    """
    said = list(block)
    if said[-1:] == [0]:
        said[-1:] = [-1] * (len(shape) + 1 - len(said))
    found = [max(n, 1) if size == -1 else size for n, size in zip(shape, said, strict=False)]
    if len(said) != len(shape) or any(n % size for n, size in zip(shape, found, strict=True)):
        raise InvalidArgument(f"{source} of shape {list(shape)} has no blocks of size {list(block)}")
    return found


def counts(shape: Sequence[int], block: Sequence[int], source: str = "a tensor") -> tuple[int, ...]:
    """How many blocks there are along each dimension."""
    return tuple(n // size for n, size in zip(shape, sizes(shape, block, source), strict=True))


def to_rows(x: Tensor, block: Sequence[int], source: str = "a tensor") -> Tensor:
    """A row for each block."""
    step = sizes(x.shape, block, source)
    split = [n for size, whole in zip(step, x.shape, strict=True) for n in (whole // size, size)]
    order = [*range(0, 2 * x.dim(), 2), *range(1, 2 * x.dim(), 2)]
    rows = 1
    for n in split[::2]:
        rows *= n
    return x.reshape(split).permute(order).reshape(rows, -1)


def from_rows(rows: Tensor, shape: Sequence[int], block: Sequence[int]) -> Tensor:
    """The tensor of `shape` whose blocks are the rows."""
    step = sizes(shape, block)
    rank = len(shape)
    split = [n // size for n, size in zip(shape, step, strict=True)] + step
    order = [i for pair in zip(range(rank), range(rank, 2 * rank), strict=True) for i in pair]
    return rows.reshape(split).permute(order).reshape(tuple(shape))
