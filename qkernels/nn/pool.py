"""Pooling, the mean over the spatial dimensions and nearest interpolation on integers."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels import ops, reference
from qkernels.core.lowering import LoweringUnit, lowers
from qkernels.core.qspec import QParams
from qkernels.core.registry import layer
from qkernels.core.sizes import Size, Sizes
from qkernels.errors import Unsupported
from qkernels.nn.base import QLayer
from qkernels.nn.conv import per_dim
from qkernels.ops.pool import pool_output_size


class _SameGrid(QLayer):
    """A layer whose output codes are input codes."""

    def __init__(self, input: QParams, options: dict[str, Any]) -> None:
        super().__init__([input], None, options)

    @property
    def out_qparams(self) -> QParams:
        return self._grid("input")


@layer("max_pool")
class QMaxPool(_SameGrid):
    """Maximum over windows; padding never wins."""

    channels_last = True

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, ops.max_pool)

    def reference_forward(self, x: Tensor) -> Tensor:
        return self._run(x, reference.max_pool)

    def output_sizes(self, *inputs: Sizes) -> Sizes:
        return _pooled(inputs[0], self.options, self.options["dilation"])

    def _run(self, x: Tensor, max_pool) -> Tensor:
        self._check(x, "input")
        o = self.options
        return max_pool(x, o["kernel_size"], o["stride"], o["padding"], o["dilation"], o["ceil_mode"])


@layer("interpolate")
class QInterpolate(_SameGrid):
    """Nearest-neighbour resizing to `size` or by `scale_factor`."""

    def forward(self, x: Tensor) -> Tensor:
        self._check(x, "input")
        o = self.options
        if self._grids["input"]["dtype"] is torch.uint8:
            return F.interpolate(x, o["size"], o["scale_factor"], o["mode"])
        return F.interpolate(x.view(torch.uint8), o["size"], o["scale_factor"], o["mode"]).view(torch.int8)

    def reference_forward(self, x: Tensor) -> Tensor:
        self._check(x, "input")
        o = self.options
        return F.interpolate(x.to(torch.float64), o["size"], o["scale_factor"], o["mode"]).to(x.dtype)

    def output_sizes(self, *inputs: Sizes) -> Sizes:
        size, factor, (n, c, *spatial) = self.options["size"], self.options["scale_factor"], inputs[0]
        if size is not None:
            return (n, c, *per_dim(size, len(spatial)))
        return (n, c, *(Size(("scaled", own, str(factor), d)) for d, own in enumerate(spatial)))

    def output_memory(self, y: Tensor, *inputs: Tensor) -> Tensor:
        return torch.empty_like(y)  # torch's own function on either side


class _Averaging(QLayer):
    channels_last = True

    def __init__(self, input: QParams, output: QParams, options: dict[str, Any]) -> None:
        super().__init__([input], output, options)

    def _derive(self) -> tuple[Any, ...]:
        output = self._grids["output"]
        return (
            *self._numbers("input"),
            *self._numbers("output"),
            output["qmin"],
            output["qmax"],
            output["dtype"],
        )


@layer("avg_pool")
class QAvgPool(_Averaging):
    """Average over windows."""

    def _window(self) -> tuple[Any, ...]:
        o = self.options
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        return tuple(o[name] for name in names)

    def output_sizes(self, *inputs: Sizes) -> Sizes:
        return _pooled(inputs[0], self.options, [1] * len(self.options["kernel_size"]))

    def forward(self, x: Tensor) -> Tensor:
        self._check(x, "input")
        return ops.avg_pool(x, *self._window(), *self.derived())

    def reference_forward(self, x: Tensor) -> Tensor:
        self._check(x, "input")
        return reference.avg_pool(x, *self._window(), *self._derive())


@layer("adaptive_avg_pool")
class QAdaptiveAvgPool(_Averaging):
    """Average over a grid of `output_size` windows (None: as many as the input has); `flatten` drops the spatial dims.

    The mean over the spatial dimensions is output size 1.
    """

    def forward(self, x: Tensor) -> Tensor:
        self._check(x, "input")
        return self._flattened(ops.adaptive_avg_pool(x, self._size(x), *self.derived()))

    def reference_forward(self, x: Tensor) -> Tensor:
        self._check(x, "input")
        return self._flattened(reference.adaptive_avg_pool(x, self._size(x), *self._derive()))

    def output_sizes(self, *inputs: Sizes) -> Sizes:
        n, c, *spatial = inputs[0]
        sizes = [own if size is None else size for size, own in zip(self.options["output_size"], spatial, strict=True)]
        return (n, c) if self.options["flatten"] else (n, c, *sizes)

    def _size(self, x: Tensor) -> list[int]:
        return [x.shape[2 + d] if size is None else size for d, size in enumerate(self.options["output_size"])]

    def _flattened(self, y: Tensor) -> Tensor:
        return y.flatten(1) if self.options["flatten"] else y


@lowers("max_pool")
def lower_max_pool(unit: LoweringUnit) -> QMaxPool:
    if unit.option("return_indices", False):
        raise Unsupported("max_pool with return_indices has no integer layer")
    options = {**_window(unit), "dilation": per_dim(unit.option("dilation", 1), _dims(unit))}
    return QMaxPool(unit.inputs[0], options)


@lowers("avg_pool")
def lower_avg_pool(unit: LoweringUnit) -> QAvgPool:
    options = {
        **_window(unit),
        "count_include_pad": bool(unit.option("count_include_pad", True)),
        "divisor_override": unit.option("divisor_override"),
    }
    return QAvgPool(unit.inputs[0], unit.output, options)


@lowers("adaptive_avg_pool")
def lower_adaptive_avg_pool(unit: LoweringUnit) -> QAdaptiveAvgPool:
    size = unit.option("output_size")
    size = [size] * _dims(unit) if size is None or isinstance(size, int) else list(size)
    return QAdaptiveAvgPool(unit.inputs[0], unit.output, {"output_size": size, "flatten": False})


@lowers("mean")
def lower_mean(unit: LoweringUnit) -> QAdaptiveAvgPool:
    dims, rank = unit.option("dim"), unit.option("rank", 4)
    dims = [dims] if isinstance(dims, int) else dims
    if not dims or sorted(d % rank for d in dims) != list(range(2, rank)):
        raise Unsupported(f"mean over dims {dims} has no integer layer; there is one for all spatial dims at once")
    options = {"output_size": [1] * (rank - 2), "flatten": not unit.option("keepdim", False)}
    return QAdaptiveAvgPool(unit.inputs[0], unit.output, options)


@lowers("interpolate")
def lower_interpolate(unit: LoweringUnit) -> QInterpolate:
    mode = unit.option("mode", "nearest")
    if mode not in ("nearest", "nearest-exact"):
        raise Unsupported(f"interpolate with mode={mode!r} has no integer layer; there is one for nearest")
    if unit.option("recompute_scale_factor"):
        raise Unsupported("interpolate with recompute_scale_factor has no integer layer; give it the size instead")
    options = {"size": _plain(unit.option("size")), "scale_factor": _plain(unit.option("scale_factor")), "mode": mode}
    return QInterpolate(unit.inputs[0], options)


def _pooled(x: Sizes, options: dict[str, Any], dilation: list[int]) -> Sizes:
    n, c, *spatial = x
    windows = [*zip(options["kernel_size"], options["stride"], options["padding"], dilation, strict=True)]
    pairs = zip(spatial, windows, strict=True)
    if options["ceil_mode"]:
        return (n, c, *(Size(("pool", size, window)) for size, window in pairs))
    return (n, c, *(pool_output_size(size, *window, False) for size, window in pairs))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) else value


def _dims(unit: LoweringUnit) -> int:
    """Spatial dimensions, from the option `rank` (of the tensor), the module's class name (MaxPool2d), else 2."""
    if "rank" in unit.options:
        return unit.options["rank"] - 2
    name = type(unit.module).__name__
    return int(name[-2]) if name.endswith(("1d", "2d", "3d")) else 2


def _window(unit: LoweringUnit) -> dict[str, Any]:
    dims = _dims(unit)
    kernel = per_dim(unit.option("kernel_size"), dims)
    stride = unit.option("stride")
    return {
        "kernel_size": kernel,
        "stride": kernel if stride is None or stride == [] else per_dim(stride, dims),
        "padding": per_dim(unit.option("padding", 0), dims),
        "ceil_mode": bool(unit.option("ceil_mode", False)),
    }
