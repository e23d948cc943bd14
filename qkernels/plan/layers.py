"""Converted layers as steps: one function a kind of layer, found by the name that `qkernels.core.registry` knows."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qkernels.core.qspec import QParams
from qkernels.errors import Unsupported
from qkernels.ops.conv import conv_output_size
from qkernels.ops.epilogue import Epilogue
from qkernels.ops.pool import pool_output_size
from qkernels.plan.steps import Network, StepKind, Value

Cells = list[int | float]
LayerLowering = Callable[[Network, nn.Module, str, Sequence[Any]], Value]
_LAYERS: dict[str, LayerLowering] = {}
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def lower_layer(network: Network, layer: nn.Module, name: str, inputs: Sequence[Any]) -> Value:
    """Appends the step of a converted layer.

    Raises:
        Unsupported: there is no step for this kind of layer.
    """
    if layer.kind not in _LAYERS:
        raise Unsupported(f"the layer kind {layer.kind!r} has no step")
    return _LAYERS[layer.kind](network, layer, name, inputs)


def _lowers(kind: str) -> Callable[[LayerLowering], LayerLowering]:
    def register(function: LayerLowering) -> LayerLowering:
        _LAYERS[kind] = function
        return function

    return register


def _operand(scale: float, zero_point: int) -> Cells:
    return [float(scale), int(zero_point)]


def _grid(scale: float, zero_point: int, qmin: int, qmax: int) -> Cells:
    return [float(scale), int(zero_point), int(qmin), int(qmax)]


# ---- the borders


@_lowers("quantize")
def _quantize(network: Network, layer: nn.Module, name: str, inputs: Sequence[Value]) -> Value:
    (x,) = inputs
    grid = layer.out_qparams
    attributes = [*_border(network, grid), grid.qmin, grid.qmax]
    return network.step(StepKind.QUANTIZE, name, inputs, attributes, grid.dtype, x.sizes, grid)


@_lowers("dequantize")
def _dequantize(network: Network, layer: nn.Module, name: str, inputs: Sequence[Value]) -> Value:
    (q,) = inputs
    attributes = _border(network, layer.in_qparams[0])
    return network.step(StepKind.DEQUANTIZE, name, inputs, attributes, torch.float32, q.sizes)


def _border(network: Network, grid: QParams) -> Cells:
    axis = -1 if grid.axis is None or grid.scale.numel() == 1 else grid.axis
    return [axis, network.tensor(grid.scale), network.tensor(grid.zero_point)]


# ---- linear and convolution


def _weights(network: Network, layer: nn.Module) -> Cells:
    weight, scale, zero_point, bias, input_scale, input_zero_point, _, _ = layer._canonical()
    return [*map(network.tensor, (weight, scale, zero_point, bias)), *_operand(input_scale, input_zero_point)]


def _epilogue(network: Network, epilogue: Epilogue) -> Cells:
    e, residual = epilogue, epilogue.residual
    cells = [*_grid(e.scale, e.zero_point, e.qmin, e.qmax), network.tensor(e.table), int(residual is not None)]
    if residual is not None:
        r = residual
        cells += _operand(r.scale, r.zero_point)
        cells += _grid(r.out_scale, r.out_zero_point, r.out_qmin, r.out_qmax)
    return cells


@_lowers("linear")
def _linear(network: Network, layer: nn.Module, name: str, inputs: Sequence[Value]) -> Value:
    epilogue = layer._canonical()[-1]
    attributes = [*_weights(network, layer), *_epilogue(network, epilogue)]
    sizes = (*inputs[0].sizes[:-1], layer.weight.shape[0])
    return network.step(StepKind.LINEAR, name, inputs, attributes, epilogue.dtype, sizes, layer.out_qparams)


@_lowers("conv")
def _conv(network: Network, layer: nn.Module, name: str, inputs: Sequence[Value]) -> Value:
    epilogue, o, weight = layer._canonical()[-1], layer.options, layer.weight
    geometry = [
        len(o["stride"]),
        *o["stride"],
        *(side for pair in o["padding"] for side in pair),
        *o["dilation"],
        *o["output_padding"],
        o["groups"],
        int(o["transposed"]),
        _PADDING_MODES.index(o["padding_mode"]),
    ]
    attributes = [*_weights(network, layer), *_epilogue(network, epilogue), *geometry]
    channels = weight.shape[1] * o["groups"] if o["transposed"] else weight.shape[0]
    sizes = (inputs[0].sizes[0], channels, *_conv_size(inputs[0], layer))
    return network.step(StepKind.CONV, name, inputs, attributes, epilogue.dtype, sizes, layer.out_qparams)


def _conv_size(x: Value, layer: nn.Module) -> Sequence[int | None]:
    if None in x.sizes[2:]:
        return [None] * (x.rank - 2)
    stride, padding, dilation, _, transposed, _ = layer._geometry()
    kernel = layer.weight.shape[2:]
    return conv_output_size(x.sizes[2:], kernel, stride, padding, dilation, transposed, layer.options["output_padding"])


# ---- elementwise


def _binary(kind: StepKind) -> LayerLowering:
    def lower(network: Network, layer: nn.Module, name: str, inputs: Sequence[Value]) -> Value:
        *operands, qmin, qmax, dtype = layer._derive()
        sa, za, sb, zb, scale, zero_point = operands
        attributes = [*_operand(sa, za), *_operand(sb, zb), *_grid(scale, zero_point, qmin, qmax)]
        sizes = _broadcast(*(v.sizes for v in inputs))
        return network.step(kind, name, inputs, attributes, dtype, sizes, layer.out_qparams)

    return lower


_LAYERS["add"] = _binary(StepKind.ADD)
_LAYERS["mul"] = _binary(StepKind.MUL)


def _broadcast(a: tuple[int | None, ...], b: tuple[int | None, ...]) -> tuple[int | None, ...]:
    rank = max(len(a), len(b))
    pairs = zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True)
    return tuple(x if y == 1 else y if x == 1 or x is None else x for x, y in pairs)


@_lowers("cat")
def _cat(network: Network, layer: nn.Module, name: str, inputs: Sequence[Any]) -> Value:
    values, tables = list(inputs[0]), layer._derive()
    dim = layer.options["dim"] % values[0].rank
    along = [v.sizes[dim] for v in values]
    sizes = list(values[0].sizes)
    sizes[dim] = None if None in along else sum(along)
    attributes = [dim, network.tensor(tables)]
    return network.step(StepKind.CAT, name, values, attributes, tables.dtype, sizes, layer.out_qparams)


@_lowers("lookup")
def _lookup(network: Network, layer: nn.Module, name: str, inputs: Sequence[Value]) -> Value:
    attributes = [network.tensor(layer.table)]
    return network.step(
        StepKind.LOOKUP, name, inputs, attributes, layer.table.dtype, inputs[0].sizes, layer.out_qparams
    )


# ---- pools


@_lowers("max_pool")
def _max_pool(network: Network, layer: nn.Module, name: str, inputs: Sequence[Value]) -> Value:
    o, (x,) = layer.options, inputs
    d = len(o["kernel_size"])
    stride = o["stride"] or o["kernel_size"]
    windows = (o["kernel_size"], stride, o["padding"], o["dilation"])
    attributes = [d, *(n for numbers in windows for n in numbers), int(o["ceil_mode"])]
    sizes = (*x.sizes[:2], *_pool_size(x, *windows, o["ceil_mode"]))
    return network.step(StepKind.MAX_POOL, name, inputs, attributes, x.dtype, sizes, layer.out_qparams)


def _pool_size(x: Value, *windows: Any) -> list[int | None]:
    *lists, ceil_mode = windows
    return [
        None if size is None else pool_output_size(size, *window, ceil_mode)
        for size, *window in zip(x.sizes[2:], *lists, strict=True)
    ]


@_lowers("avg_pool")
def _avg_pool(network: Network, layer: nn.Module, name: str, inputs: Sequence[Value]) -> Value:
    o, (x,) = layer.options, inputs
    d = len(o["kernel_size"])
    stride = o["stride"] or o["kernel_size"]
    windows = (o["kernel_size"], stride, o["padding"])
    flags = [int(o["ceil_mode"]), int(o["count_include_pad"]), o["divisor_override"] or 0]
    attributes = [d, *(n for numbers in windows for n in numbers), *flags, *_averaging(layer)]
    sizes = (*x.sizes[:2], *_pool_size(x, *windows, [1] * d, o["ceil_mode"]))
    return network.step(StepKind.AVG_POOL, name, inputs, attributes, layer.out_qparams.dtype, sizes, layer.out_qparams)


@_lowers("adaptive_avg_pool")
def _adaptive_avg_pool(network: Network, layer: nn.Module, name: str, inputs: Sequence[Value]) -> Value:
    (x,), targets, grid = inputs, layer.options["output_size"], layer.out_qparams
    scalars = [-1 if size is None else network.scalar(size) for size in targets]
    attributes = [len(targets), *scalars, *_averaging(layer)]
    spatial = [known if size is None else size for size, known in zip(targets, x.sizes[2:], strict=True)]
    sizes = (*x.sizes[:2], *spatial)
    pooled = network.step(StepKind.ADAPTIVE_AVG_POOL, name, inputs, attributes, grid.dtype, sizes, grid)
    if not layer.options["flatten"]:
        return pooled
    kept = [network.size(pooled, 0), network.size(pooled, 1) * math.prod(spatial)]
    flat = [2, *map(network.scalar, kept)]
    return network.step(StepKind.RESHAPE, f"{name}.flatten", [pooled], flat, grid.dtype, kept, grid)


def _averaging(layer: nn.Module) -> Cells:
    input_scale, input_zero_point, *grid, _ = layer._derive()
    return [*_operand(input_scale, input_zero_point), *_grid(*grid)]


@_lowers("interpolate")
def _interpolate(network: Network, layer: nn.Module, name: str, inputs: Sequence[Value]) -> Value:
    o, (x,) = layer.options, inputs
    return nearest(network, name, x, o["size"], o["scale_factor"], o["mode"], layer.out_qparams)


def nearest(
    network: Network, name: str, x: Value, size: Any, scale_factor: Any, mode: str, grid: QParams | None = None
) -> Value:
    """Nearest-neighbour resizing of codes to `size` or by `scale_factor`: one number, or one a spatial dimension."""
    d = x.rank - 2

    def per_dim(value: Any) -> list:
        return list(value) if isinstance(value, (tuple, list)) else [value] * d

    attributes: Cells = [d, int(mode == "nearest-exact"), int(size is not None)]
    if size is not None:
        spatial = per_dim(size)
        attributes += map(network.scalar, spatial)
    else:
        factors = [float(f) for f in per_dim(scale_factor)]
        attributes += factors
        spatial = [
            None if known is None else math.floor(known * f) for known, f in zip(x.sizes[2:], factors, strict=True)
        ]
    sizes = (*x.sizes[:2], *spatial)
    return network.step(StepKind.INTERPOLATE, name, [x], attributes, x.dtype, sizes, grid)
