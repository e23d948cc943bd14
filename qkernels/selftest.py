"""Every kernel against the plain-torch reference, on this machine, under every instruction set it has."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import ops, reference
from qkernels.core.convert import convert
from qkernels.core.lowering import Clamp
from qkernels.core.phases import calibrate
from qkernels.core.prepare import prepare
from qkernels.core.qspec import QParams
from qkernels.nn import QAdaptiveAvgPool, QAdd, QAvgPool, QCat, QConv, QLayer, QLinear, QLookup, QMaxPool, QMul
from qkernels.plan import compile
from qkernels.testing import isa_cap, supported_isas

Pairs = Iterator[tuple[Tensor, Tensor]]
_CHECKS: dict[str, Callable[[torch.Generator], Pairs]] = {}


def run() -> int:
    """Prints one line per operation and instruction set; returns 0 if every bit agrees, else 1."""
    start, failures = time.perf_counter(), 0
    for isa in supported_isas():
        with isa_cap(isa):
            for name, check in _CHECKS.items():
                values, wrong = _count(check(torch.Generator().manual_seed(1)))
                failures += wrong > 0
                verdict = "ok" if wrong == 0 else f"{wrong} DIFFER"
                print(f"{name:20s} {isa:11s} {values:>10,} values  {verdict}")
    seconds = time.perf_counter() - start
    print(f"selftest: {'all agree with the reference' if failures == 0 else f'{failures} FAILED'} ({seconds:.1f} s)")
    return 0 if failures == 0 else 1


def _count(pairs: Pairs) -> tuple[int, int]:
    """How many values were compared and how many differ in any bit; a wrong shape or dtype counts as all."""
    values = wrong = 0
    for got, expected in pairs:
        values += expected.numel()
        if got.shape != expected.shape or got.dtype != expected.dtype:
            wrong += expected.numel()
        else:
            same = (got == expected) | ((got != got) & (expected != expected))
            wrong += int((~same).sum())
    return values, wrong


def _check(function: Callable[[torch.Generator], Pairs]) -> Callable[[torch.Generator], Pairs]:
    _CHECKS[function.__name__.removeprefix("_")] = function
    return function


# ---- random operands ----


def _number(g: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=g))


def _codes(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8).view(dtype)


def _grid(g: torch.Generator, dtype: torch.dtype = torch.uint8) -> QParams:
    qmin, qmax = (0, 255) if dtype == torch.uint8 else (-128, 127)
    scale = 0.01 + 0.1 * float(torch.rand((), generator=g))
    return QParams.per_tensor(scale, _number(g, qmin, qmax), qmin, qmax, dtype)


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _both(layer: QLayer, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    return layer(*inputs), layer.reference_forward(*inputs)


_DTYPES = (torch.uint8, torch.int8)


# ---- checks ----


@_check
def _quantize(g: torch.Generator) -> Pairs:
    for dtype in _DTYPES:
        for shape in ((1,), (3, 5), (2, 17, 9, 11), (4, 1000)):
            grid = _grid(g, dtype)
            x = torch.randn(shape, generator=g) * 4
            x.view(-1)[0] = float("nan")
            arguments = (grid.scale, grid.zero_point, None, grid.qmin, grid.qmax, dtype)
            yield ops.quantize(x, *arguments), reference.quantize(x, *arguments)


@_check
def _dequantize(g: torch.Generator) -> Pairs:
    for dtype in _DTYPES:
        for shape in ((1,), (3, 5), (2, 17, 9, 11), (4, 1000)):
            grid = _grid(g, dtype)
            arguments = (_codes(g, *shape, dtype=dtype), grid.scale, grid.zero_point, None, torch.float32)
            yield ops.dequantize(*arguments), reference.dequantize(*arguments)


@_check
def _fake_quant(g: torch.Generator) -> Pairs:
    for shape in ((1,), (3, 5), (2, 17, 9, 11), (4, 1000)):
        grid = _grid(g)
        arguments = (torch.randn(shape, generator=g), grid.scale, grid.zero_point, None, grid.qmin, grid.qmax)
        yield ops.fake_quant(*arguments), reference.fake_quant(*arguments)


@_check
def _fake_quant_backward(g: torch.Generator) -> Pairs:
    for shape in ((1,), (3, 5), (2, 17, 9, 11), (4, 1000)):
        grid = _grid(g)
        grad, x = torch.randn(shape, generator=g), torch.randn(shape, generator=g) * 4
        arguments = (grad, x, grid.scale, grid.zero_point, None, grid.qmin, grid.qmax)
        yield ops.fake_quant_backward(*arguments), reference.fake_quant_backward(*arguments)


@_check
def _fake_quant_mask(g: torch.Generator) -> Pairs:
    for shape, axis in (((1,), None), ((3, 5), 0), ((2, 17, 9, 11), 1), ((4, 1000), 0)):
        x, grad = torch.randn(shape, generator=g) * 4, torch.randn(shape, generator=g)
        channels = 1 if axis is None else shape[axis]
        grid = torch.rand(channels, generator=g) * 0.1 + 0.01, torch.arange(channels, dtype=torch.int32), axis, 0, 255
        y, mask, _, codes = ops.fake_quant_mask(x, *grid, torch.uint8)
        expected, passes, expected_codes = reference.fake_quant_mask(x, *grid, torch.uint8)
        yield y, expected
        yield codes, expected_codes
        yield (
            ops.fake_quant_mask_backward(grad, mask, axis),
            reference.fake_quant_mask_backward(grad, passes, axis),
        )


@_check
def _observe(g: torch.Generator) -> Pairs:
    for shape, axis in (((1,), None), ((3, 5), 0), ((2, 17, 9, 11), 1), ((4, 1000), None)):
        x = torch.randn(shape, generator=g) * 4
        yield from zip(ops.observe_minmax(x, axis), reference.observe_minmax(x, axis), strict=True)
        channels = 1 if axis is None else shape[axis]
        state = [torch.full((channels,), float("inf")), torch.full((channels,), float("-inf"))]
        state += [torch.zeros(channels), torch.zeros(channels, dtype=torch.int32)]
        ours, theirs = [t.clone() for t in state], [t.clone() for t in state]
        grid = None, axis, 0, 255, False, 1e-9, 0.1, "x"
        yield ops.observe_fake_quant(x, *ours, *grid), reference.observe_fake_quant(x, *theirs, *grid)
        yield from zip(ours, theirs, strict=True)
        low, high = torch.aminmax(x)
        yield from zip(_histogram(ops, x, low, high), _histogram(reference, x, low, high), strict=True)


def _histogram(module: Any, x: Tensor, low: Tensor, high: Tensor) -> list[Tensor]:
    state = [torch.tensor([float("inf")]), torch.tensor([float("-inf")]), torch.zeros(64)]
    for factor in (1.0, 1.5):
        module.observe_histogram(x * factor, (low * factor).reshape(1), (high * factor).reshape(1), *state)
    return state


@_check
def _foreach(g: torch.Generator) -> Pairs:
    xs = [torch.randn(shape, generator=g) for shape in ((16, 3, 3, 3), (5, 129), (1, 1), (33, 8, 1, 1))]
    arguments = (xs, [0] * len(xs), -127, 127, True, 1e-9, torch.int8)
    for ours, theirs in zip(
        ops.foreach_observe_fake_quant(*arguments), reference.foreach_observe_fake_quant(*arguments), strict=True
    ):
        yield from zip(ours, theirs, strict=True)


@_check
def _dorefa(g: torch.Generator) -> Pairs:
    """Of a weight the scalar kernel is the measure: torch's tanh has other last bits."""
    scale, zero_point = torch.tensor([1 / 7]), torch.zeros(1, dtype=torch.int32)
    for shape in ((1,), (3, 5), (2, 17, 9, 11), (4, 1000)):
        x, grad, seed = torch.randn(shape, generator=g), torch.randn(shape, generator=g), torch.tensor([7])
        yield ops.dorefa_gradient(grad, seed, 4), reference.dorefa_gradient(grad, seed, 4)
        grid = scale, zero_point, -7, 7
        ours = ops.dorefa_weight(x, *grid), ops.dorefa_weight_backward(grad, x, *grid)
        with isa_cap("scalar"):
            expected = ops.dorefa_weight(x, *grid), ops.dorefa_weight_backward(grad, x, *grid)
        yield from zip(ours, expected, strict=True)


@_check
def _lsq_backward(g: torch.Generator) -> Pairs:
    """On multiples of a quarter step, where the reference's float64 sums and the kernel's are both exact."""
    for shape, axis in (((1,), None), ((3, 5), 0), ((2, 17, 9, 11), 1), ((4, 1000), 0), ((4, 1000), 1)):
        grad, x = (torch.randint(-64, 65, shape, generator=g) / scale for scale in (8, 64))
        channels = 1 if axis is None else shape[axis]
        zero_point = torch.randint(-8, 8, (channels,), generator=g) + 0.25
        arguments = (grad, x, torch.full((channels,), 1 / 16), zero_point, axis, -8, 7, 0.5)
        yield from zip(ops.lsq_backward(*arguments), reference.lsq_backward(*arguments), strict=True)


def _weight(g: torch.Generator, *shape: int, axis: int = 0) -> tuple[Tensor, QParams]:
    scale = 0.001 + 0.01 * torch.rand(shape[axis], generator=g)
    grid = QParams(scale, torch.zeros(shape[axis]), axis, -128, 127, torch.int8)
    return _codes(g, *shape, dtype=torch.int8), grid


@_check
def _linear(g: torch.Generator) -> Pairs:
    for i, (m, n, k) in enumerate(((1, 1, 1), (1, 1000, 320), (5, 17, 3), (33, 65, 129), (100, 96, 64), (7, 130, 515))):
        dtype = _DTYPES[i % 2]
        weight, weight_grid = _weight(g, n, k)
        bias = None if i == 2 else torch.randn(n, generator=g)
        x = _codes(g, m, k, dtype=dtype)
        for output in (_grid(g), _grid(g, torch.int8), None):
            clamp = Clamp(0.0, 6.0) if output is not None and i % 2 else None
            yield _both(QLinear(_grid(g, dtype), weight, weight_grid, bias, output, clamp), x)


@_check
def _linear_rows(g: torch.Generator) -> Pairs:
    """A grid a row of the input, chosen from its values."""
    for m, n, k in ((1, 1, 1), (5, 17, 3), (33, 65, 129), (1, 300, 100)):
        weight, grid = _weight(g, n, k)
        x, bias = torch.randn(m, k, generator=g), torch.randn(n, generator=g)
        rows = ops.quantize_rows(x, 0, 255, False, torch.uint8)
        yield from zip(rows, reference.quantize_rows(x, 0, 255, False, torch.uint8), strict=True)
        packed = ops.linear_pack(weight, torch.ones(1), None, None, 1.0, 0, torch.uint8, ops.Epilogue(torch.int32))
        sums = weight.sum(1, dtype=torch.int32)
        yield (
            ops.linear_rows(rows[0], packed, *rows[1:], grid.scale, sums, bias, n),
            reference.linear_rows(*rows, weight, grid.scale, None, bias, torch.float32),
        )


@_check
def _binary(g: torch.Generator) -> Pairs:
    for channels, out, size in ((3, 5, 7), (64, 33, 9), (130, 64, 6)):
        x, weight = (torch.randn(shape, generator=g) for shape in ((2, channels, size, size), (out, channels, 3, 3)))
        scale, bias = torch.rand(out, generator=g), torch.randn(out, generator=g)
        signs, weight_signs = ops.binary_sign(x), ops.binary_sign(weight)
        yield signs, reference.binary_sign(x)
        window = (1, 1), (1, 1), (1, 1)
        packed = ops.pack_signs(x, 1), ops.binary_weight_pack(weight)
        yield (
            ops.binary_conv2d(*packed, scale, bias, channels, (3, 3), *window),
            reference.binary_conv2d(signs, weight_signs, scale, bias, *window),
        )
        rows = signs.flatten(2).mT[:, 0]
        yield (
            ops.binary_linear(
                ops.pack_signs(rows, -1), ops.binary_weight_pack(weight[..., 0, 0]), scale, bias, channels
            ),
            reference.binary_linear(rows, weight_signs[..., 0, 0], scale, bias),
        )


def _conv_layer(
    g: torch.Generator, channels: int, out: int, kernel: tuple[int, ...], groups: int, **options: object
) -> QConv:
    dims = len(kernel)
    transposed = bool(options.get("transposed", False))
    shape = (channels, out // groups, *kernel) if transposed else (out, channels // groups, *kernel)
    scale = 0.001 + 0.01 * torch.rand(out, generator=g)
    grid = QParams(scale, torch.zeros(out), 0, -128, 127, torch.int8)
    defaults = {
        "stride": [1] * dims,
        "padding": [[k // 2, k // 2] for k in kernel],
        "dilation": [1] * dims,
        "groups": groups,
        "transposed": transposed,
        "output_padding": [0] * dims,
        "padding_mode": "zeros",
    }
    weight = _codes(g, *shape, dtype=torch.int8)
    bias = torch.randn(out, generator=g)
    return QConv(_grid(g), weight, grid, bias, _grid(g), Clamp(0.0), {**defaults, **options})


@_check
def _conv(g: torch.Generator) -> Pairs:
    cases = (
        (3, 32, (3, 3), 1, {"stride": [2, 2]}),
        (64, 64, (3, 3), 1, {}),
        (64, 130, (1, 1), 1, {}),
        (17, 19, (3, 5), 1, {"dilation": [2, 1], "padding": [[1, 3], [0, 2]]}),
        (32, 48, (3, 3), 4, {"stride": [2, 1]}),
        (8, 8, (7,), 1, {"padding_mode": "reflect"}),
        (6, 9, (2, 3, 2), 3, {}),
        (16, 24, (3, 3), 1, {"transposed": True, "stride": [2, 2], "output_padding": [1, 1]}),
    )
    for channels, out, kernel, groups, options in cases:
        spatial = [_number(g, 7, 15) for _ in kernel]
        x = _codes(g, 2, channels, *spatial)
        layer = _conv_layer(g, channels, out, kernel, groups, **options)
        yield _both(layer, _channels_last(x))
        yield _both(layer, x)


@_check
def _winograd(g: torch.Generator) -> Pairs:
    """Large enough for tiles of 4x4 outputs on every instruction set that has them; some hang over the edge."""
    for channels, out, size in ((64, 64, (16, 12)), (33, 40, (24, 23))):
        x = _codes(g, 2, channels, *size)
        yield _both(_conv_layer(g, channels, out, (3, 3), 1), _channels_last(x))


@_check
def _depthwise(g: torch.Generator) -> Pairs:
    for channels, multiplier, stride in ((32, 1, 1), (144, 1, 2), (17, 1, 1), (8, 3, 1)):
        x = _codes(g, 2, channels, 15, 13)
        layer = _conv_layer(g, channels, channels * multiplier, (3, 3), channels, stride=[stride, stride])
        yield _both(layer, _channels_last(x))


@_check
def _add_mul(g: torch.Generator) -> Pairs:
    for cls in (QAdd, QMul):
        for a, b in ((_DTYPES[0],) * 2, (_DTYPES[1],) * 2, _DTYPES):
            for shape in ((1,), (2, 33, 7, 5), (3, 1001)):
                layer = cls(_grid(g, a), _grid(g, b), _grid(g), {"clamp": [0.0, None]})
                yield _both(layer, _codes(g, *shape, dtype=a), _codes(g, *shape, dtype=b))


@_check
def _lookup(g: torch.Generator) -> Pairs:
    for function in ("hardswish", "sigmoid", "gelu", "requantize"):
        for dtype in _DTYPES:
            yield _both(QLookup(_grid(g, dtype), _grid(g), function), _codes(g, 2, 33, 7, 5, dtype=dtype))


@_check
def _cat(g: torch.Generator) -> Pairs:
    layer = QCat([_grid(g), _grid(g), _grid(g)], _grid(g), 1)
    yield _both(layer, [_channels_last(_codes(g, 2, c, 7, 5)) for c in (3, 64, 17)])


@_check
def _pool(g: torch.Generator) -> Pairs:
    for dtype in _DTYPES:
        for channels in (1, 17, 64, 130):
            x = _channels_last(_codes(g, 2, channels, 14, 11, dtype=dtype))
            window = {"kernel_size": [3, 2], "stride": [2, 1], "padding": [1, 0], "ceil_mode": True}
            yield _both(QMaxPool(_grid(g, dtype), {**window, "dilation": [1, 2]}), x)
            for counted in (True, False):
                options = {**window, "count_include_pad": counted, "divisor_override": None}
                yield _both(QAvgPool(_grid(g, dtype), _grid(g), options), x)
            for size in ([1, 1], [5, 7]):
                options = {"output_size": size, "flatten": False}
                yield _both(QAdaptiveAvgPool(_grid(g, dtype), _grid(g), options), x)


@_check
def _plan(g: torch.Generator) -> Pairs:
    """Quantizing an image, the first layer of a network and a depthwise one in one call, against the modules."""
    for channels in (3, 4):
        network = nn.Sequential(nn.Conv2d(channels, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16))
        for p in network.parameters():
            p.data = torch.randn(p.shape, generator=g) * 0.2
        x = torch.randn(2, channels, 21, 18, generator=g)
        converted = convert(calibrate(prepare(network.eval(), x), [x]))
        with torch.no_grad():
            yield compile(converted, x)(x), converted(x)
