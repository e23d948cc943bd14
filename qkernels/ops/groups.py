"""Grids for groups: runs of some elements along a dimension are the channels of a matrix of groups."""

from collections.abc import Callable

from torch import Tensor

from qkernels.errors import integer


def by_group(
    function: Callable[..., Tensor],
    op: str,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    group_size: int,
    *rest,
) -> Tensor:
    """`function(rows, scale, zero_point, 0, *rest)` with a row of `x` for each group; a view if `axis` is innermost."""
    if axis is None or not -x.dim() <= axis < x.dim():
        raise ValueError(f"{op}: group_size needs an axis in [{-x.dim()}, {x.dim() - 1}], got {axis}")
    axis, group_size = axis % x.dim(), integer(f"{op}: group_size", group_size)
    if group_size < 1 or x.shape[axis] % group_size != 0:
        raise ValueError(
            f"{op}: group_size must divide the {x.shape[axis]} elements of dimension {axis}, got {group_size}"
        )
    shape = (*x.shape[:axis], x.shape[axis] // group_size, *x.shape[axis + 1 :])
    for name, values in (("scale", scale), ("zero_point", zero_point)):
        if values.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {list(shape)} (one a group), got {list(values.shape)}")
    moved = x.movedim(axis, -1)
    grid = [values.movedim(axis, -1).reshape(-1) for values in (scale, zero_point)]
    rows = function(moved.reshape(-1, group_size), *grid, 0, *rest)
    return rows.reshape(moved.shape).movedim(-1, axis)
