"""Parts linear, conv, rows and wgmma: the operations with packed weights, and layers of them for other parts."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import device
import torch
from cases import Cases
from device import all_equal, equal
from torch import Tensor

from qkernels import ops
from qkernels.ops.epilogue import OUTPUT_DTYPES, Epilogue, ResidualAdd

_CODES = (torch.uint8, torch.int8)


def codes(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, shape, dtype=dtype, generator=generator)


def epilogue_there(epilogue: Epilogue) -> Epilogue:
    return dataclasses.replace(epilogue, table=device.on(epilogue.table))


# ---- linear ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LinearCase:
    """A linear layer, and where the rows of its input lie. Its numbers are made when they are asked for."""

    number: int
    m: int
    n: int
    k: int
    dtype: torch.dtype
    input_dtype: torch.dtype
    zero_points: bool
    lies: str  # of _LIES

    @property
    def name(self) -> str:
        points = ", zero points" if self.zero_points else ""
        return f"linear {self.m}x{self.n}x{self.k} {self.input_dtype} -> {self.dtype}, {self.lies}{points}"

    def arguments(self):
        """(arguments of linear_pack, epilogue, input, residual), on the CPU."""
        generator = torch.Generator().manual_seed(self.number)
        m, n, k = self.m, self.n, self.k
        low = -128 if self.dtype is torch.int8 else 0
        eight_bit = self.dtype in _CODES
        with_table, with_residual = eight_bit and self.number % 5 < 2, eight_bit and self.number % 7 < 3
        epilogue = Epilogue(
            self.dtype,
            0.003 * k,
            low + 117,
            low + 1,
            low + 255,
            codes(generator, self.dtype, 256) if with_table else None,
            ResidualAdd(0.02, 3, 0.05, low + 90, low, low + 255) if with_residual else None,
        )
        scales = 0.001 + 0.01 * torch.rand(n, generator=generator)
        points = torch.randint(-20, 21, (n,), dtype=torch.int32, generator=generator) if self.zero_points else None
        bias = torch.randn(n, generator=generator)
        pack = (codes(generator, torch.int8, n, k), scales, points, bias, 0.02, 11, self.input_dtype)
        stride, offset = _LIES[self.lies](k)
        x = codes(generator, self.input_dtype, offset + m * stride).as_strided((m, k), (stride, 1), offset)
        return pack, epilogue, x, codes(generator, torch.uint8, m, n) if with_residual else None


# Distance between rows of k bytes, and offset of the first.
_LIES: dict[str, Callable[[int], tuple[int, int]]] = {
    "aligned": lambda k: (-(-k // 16) * 16, 0),
    "off by one": lambda k: (-(-k // 16) * 16, 1),
    "dense": lambda k: (k, 0),
    "apart": lambda k: (k + 3, 2),
}

# Aligned layers that reach every tile on a GPU of 132 multiprocessors, with and without a split of K.
TILED_LINEAR = (
    *((4096, 4096, 4096), (1000, 4090, 1030), (512, 4096, 4096), (6272, 256, 4096), (1024, 1024, 2304)),
    *((512, 1024, 1024), (256, 512, 4096), (128, 500, 1000), (64, 64, 4096)),
)


def linear_cases(small: bool) -> Iterator[LinearCase]:
    """Every output and input type at sizes of every kernel: aligned, and with and without zero points anywhere."""
    numbers = itertools.count()
    anywhere = [(1, 5, 3), (3, 70, 64), (8, 33, 129), (9, 16, 16), (17, 65, 100), (130, 136, 176)]
    if not small:
        anywhere += [(2, 4096, 4096), (64, 1000, 2048), (300, 257, 4100), (1000, 512, 4608), (33, 64, 33000)]
    lies = itertools.cycle(("apart", "off by one", "apart", "dense", "aligned"))
    for size, dtype, input_dtype, zero_points in itertools.product(anywhere, OUTPUT_DTYPES, _CODES, (False, True)):
        yield LinearCase(next(numbers), *size, dtype, input_dtype, zero_points, next(lies))
    tiled = [(9, 24, 16), (17, 66, 100), (130, 130, 170)] if small else TILED_LINEAR
    for size, dtype, input_dtype in itertools.product(tiled, OUTPUT_DTYPES, _CODES):
        yield LinearCase(next(numbers), *size, dtype, input_dtype, False, "aligned")


def wgmma_cases(small: bool) -> Iterator[LinearCase]:
    """Every output and input type around the edges of boxes and tiles, and where blocks have several tiles."""
    edges = (
        ((65,), (1, 130), (15, 144)) if small else ((65, 127, 128, 129, 300), (1, 100, 128, 130), (15, 128, 144, 1100))
    )
    sizes = [*itertools.product(*edges), *([] if small else [(4096, 4096, 4096), (1000, 4090, 1030)])]
    for number, (size, dtype, input_dtype) in enumerate(itertools.product(sizes, OUTPUT_DTYPES, _CODES)):
        yield LinearCase(number, *size, dtype, input_dtype, False, "aligned")


def linear_arguments(case: LinearCase) -> tuple:
    """Those of ops.linear, on the device, the rows of the input where the case says."""
    pack, epilogue, x, residual = case.arguments()
    storage = torch.empty(x.untyped_storage().nbytes(), dtype=x.dtype, device=device.NAME)
    there = storage.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)
    packed = ops.linear_pack(*device.on(pack), epilogue_there(epilogue))
    return there, packed, case.n, epilogue.dtype, device.on(residual)


def compare_linear(case: LinearCase) -> None:
    pack, epilogue, x, residual = case.arguments()
    expected = ops.linear(x, ops.linear_pack(*pack, epilogue), case.n, epilogue.dtype, residual)
    equal(ops.linear(*linear_arguments(case)), expected)


def linear(small: bool) -> Cases:
    for case in linear_cases(small):
        yield case.name, lambda case=case: compare_linear(case)


def some_linear(m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """(packed, input) on the device for a uint8 linear."""
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device.NAME)
    scale = torch.full((n,), 0.01, device=device.NAME)
    packed = ops.linear_pack(weight, scale, None, None, 0.02, 9, torch.uint8, Epilogue(scale=0.01 * k, zero_point=100))
    return packed, torch.randint(0, 256, (m, k), dtype=torch.uint8, device=device.NAME)


def wgmma(small: bool) -> Cases:
    """The kernel of sm_90a, which is off by default, and its times."""
    from bench_cases import bench_linear

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return
    os.environ["QKERNELS_WGMMA"] = "1"  # read at the first launch of the process

    def it_runs():
        packed, x = some_linear(128, 128, 128)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            ops.linear(x, packed, 128)
            torch.cuda.synchronize()
        kernels = [event.key for event in profile.key_averages() if "kernel" in event.key]
        if not kernels:
            return "skipped: the profiler sees no kernels"
        assert any("wgmma_kernel" in name for name in kernels), kernels

    yield "wgmma is what runs", it_runs
    for case in wgmma_cases(small):
        yield f"wgmma {case.name}", lambda case=case: compare_linear(case)
    if not small:
        yield "wgmma 4096x4096x4096", lambda: bench_linear(4096, 4096, 4096, False, "wgmma")
        for size in [(128, 4096, 4096), (512, 4096, 4096), (8192, 8192, 8192)]:
            yield f"wgmma {'x'.join(map(str, size))}", lambda size=size: bench_linear(*size, False)


# ---- conv ------------------------------------------------------------------------------------------------------------

# in, out, groups, kernel, stride, padding, dilation, transposed, mode, size: as TILED_LINEAR.
TILED_CONV = (
    (256, 512, 1, (3, 3), 1, 1, 1, False, "zeros", (56, 56)),
    (64, 128, 1, (3, 3), 1, 1, 1, False, "zeros", (56, 56)),
    (64, 64, 1, (3, 3), 2, 1, 1, False, "zeros", (111, 111)),
    (512, 128, 1, (3, 3), 2, 1, 1, False, "zeros", (14, 14)),
)


@dataclasses.dataclass(frozen=True)
class ConvCase:
    """A convolution, its numbers on the CPU."""

    name: str
    pack: tuple  # arguments of conv_pack up to the epilogue
    geometry: dict[str, Any]
    x: Tensor
    residual: Tensor | None
    epilogue: Epilogue
    size: list[int]

    @property
    def channels(self) -> int:
        """Of the output."""
        shape = self.pack[0].shape
        return shape[1] * self.geometry["groups"] if self.geometry["transposed"] else shape[0]


def conv_cases(small: bool) -> Iterator[ConvCase]:
    """Ranks, groups, strides, dilations, padding modes, transposed; two images."""
    generator = torch.Generator().manual_seed(2)
    layers = [
        (3, 32, 1, (3, 3), 2, 1, 1, False, "zeros", (17, 19)),
        (3, 24, 1, (7, 7), 2, 3, 1, False, "zeros", (30, 30)),
        (32, 32, 32, (3, 3), 1, 1, 1, False, "zeros", (14, 14)),
        (6, 12, 6, (3, 3), 1, 1, 1, False, "reflect", (9, 9)),
        (64, 96, 1, (3, 3), 1, 1, 1, False, "zeros", (14, 14)),
        (64, 96, 1, (1, 1), 1, 0, 1, False, "zeros", (7, 7)),
        (64, 64, 4, (3, 3), 1, 2, 2, False, "circular", (9, 9)),
        (32, 64, 8, (3, 3), 2, 1, 1, False, "zeros", (9, 9)),
        (40, 24, 1, (3, 3), 1, 1, 1, False, "replicate", (9, 9)),
        (16, 20, 1, (5,), 2, 2, 1, False, "zeros", (50,)),
        (16, 16, 1, (3, 3, 3), 1, 1, 1, False, "zeros", (5, 6, 7)),
        (32, 16, 2, (4, 4), 2, 1, 1, True, "zeros", (7, 7)),
        (16, 16, 16, (2, 2), 3, 0, 1, True, "zeros", (5, 5)),
    ]
    kinds = itertools.cycle(itertools.product(OUTPUT_DTYPES, _CODES))
    choices = [(layer, points, *next(kinds)) for layer, points in itertools.product(layers, (False, True))]
    if not small:
        choices += itertools.product(TILED_CONV, (False,), OUTPUT_DTYPES, _CODES)
    for number, (layer, zero_points, dtype, input_dtype) in enumerate(choices):
        inner, outer, groups, kernel, stride, padding, dilation, transposed, mode, size = layer
        low = -128 if dtype == torch.int8 else 0
        with_residual = number % 3 < 2 and dtype in _CODES
        epilogue = Epilogue(
            dtype,
            0.003 * (inner // groups) * 9,
            low + 117,
            low + 1,
            low + 255,
            None,
            ResidualAdd(0.02, 3, 0.05, low + 90, low, low + 255) if with_residual else None,
        )
        shape = (inner, outer // groups) if transposed else (outer, inner // groups)
        scales = 0.001 + 0.01 * torch.rand(outer, generator=generator)
        points = torch.randint(-20, 21, (outer,), dtype=torch.int32, generator=generator) if zero_points else None
        bias = torch.randn(outer, generator=generator)
        pack = (codes(generator, torch.int8, *shape, *kernel), scales, points, bias, 0.02, 11, input_dtype)
        geometry = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "transposed": transposed,
            "padding_mode": mode,
        }
        out = ops.conv_output_size(size, kernel, stride, padding, dilation, transposed)
        residual = codes(generator, torch.uint8, 2, outer, *out) if with_residual else None
        name = f"conv {layer} {input_dtype} -> {dtype}{', zero points' if zero_points else ''}"
        yield ConvCase(name, pack, geometry, codes(generator, input_dtype, 2, inner, *size), residual, epilogue, out)


def conv_arguments(case: ConvCase) -> tuple:
    """Those of ops.conv, on the device."""
    packed = ops.conv_pack(*device.on(case.pack), case.epilogue, **case.geometry)
    known = ops.conv_geometry(case.pack[0].shape[2:], **case.geometry)
    x, residual = device.on((case.x, case.residual))
    return x, packed, residual, case.channels, case.size, case.epilogue.dtype, known


def conv(small: bool) -> Cases:
    def run(case: ConvCase) -> None:
        packed = ops.conv_pack(*case.pack, case.epilogue, **case.geometry)
        expected = ops.conv(case.x, packed, case.residual, case.channels, case.size, case.epilogue.dtype)
        equal(ops.conv(*conv_arguments(case)), expected)

    for case in conv_cases(small):
        yield case.name, lambda case=case: run(case)


# ---- rows ------------------------------------------------------------------------------------------------------------


def rows_arguments(m: int, n: int, k: int, dtype: torch.dtype, kind: torch.dtype, zero_points: bool) -> tuple:
    """(arguments of quantize_rows, of linear_pack, and of linear_rows behind the quantized rows), on the CPU."""
    generator = torch.Generator().manual_seed(m * n + k)
    x = torch.randn(m, k, generator=generator) * 10.0 ** torch.randint(-3, 4, (m, 1), generator=generator)
    weight = codes(generator, torch.int8, n, k)
    points = torch.randint(-20, 21, (n,), dtype=torch.int32, generator=generator) if zero_points else None
    sums = weight.sum(1, dtype=torch.int32) - (0 if points is None else k * points)
    scale, bias = torch.rand(n, generator=generator) + 0.1, torch.randn(n, generator=generator)
    pack = (weight, torch.ones(1), points, None, 1.0, 0, kind, Epilogue(torch.int32))
    quantize = (x.to(dtype), torch.iinfo(kind).min, torch.iinfo(kind).max, False, kind)
    return quantize, pack, (scale, sums.to(torch.int32), bias, n, dtype)


def rows(small: bool) -> Cases:
    """quantize_rows and linear_rows."""
    sizes = [(1, 5, 3), (8, 33, 129), (9, 64, 100), (130, 136, 176)] + ([] if small else [(512, 1000, 4096)])

    def run(*case) -> None:
        quantize, pack, rest = rows_arguments(*case)
        quantize[0][case[0] // 2, 0] = float("nan")
        here, there = ops.quantize_rows(*quantize), ops.quantize_rows(*device.on(quantize))
        all_equal(there, here)
        expected = ops.linear_rows(here[0], ops.linear_pack(*pack), *here[1:], *rest)
        packed = ops.linear_pack(*device.on(pack))
        equal(ops.linear_rows(there[0], packed, *there[1:], *device.on(rest)), expected)

    floats = (torch.float32, torch.bfloat16, torch.float16)
    for size, *kind in itertools.product(sizes, floats, _CODES, (False, True)):
        yield f"rows {size} {kind}", lambda size=size, kind=kind: run(*size, *kind)


# ---- for other parts -------------------------------------------------------------------------------------------------


def weighted_calls() -> Iterator[tuple[str, Callable[..., Any], Callable[[], tuple]]]:
    """Small calls of every op that takes packed bytes: the name, the op, and what makes its arguments on the device."""
    call = torch.ops.qkernels

    def of_linear(case: LinearCase) -> tuple:
        x, packed, n, dtype, residual = linear_arguments(case)
        return x.contiguous(), packed, residual, n, dtype

    def of_rows(*case) -> tuple:
        quantize, pack, (scale, sums, bias, n, dtype) = device.on(rows_arguments(*case))
        q, row_scale, row_point = ops.quantize_rows(*quantize)
        return q, ops.linear_pack(*pack), row_scale, row_point, scale, sums, bias, n, dtype

    for case in itertools.islice(linear_cases(True), 0, 40, 7):
        yield case.name, call.linear.default, lambda case=case: of_linear(case)
    for case in conv_cases(True):
        yield case.name, call.conv.default, lambda case=case: conv_arguments(case)
    for case in [
        (9, 64, 100, torch.float32, torch.uint8, False),
        (8, 33, 129, torch.bfloat16, torch.int8, True),
        (130, 136, 176, torch.float16, torch.uint8, False),
    ]:
        yield f"linear_rows {case}", call.linear_rows.default, lambda case=case: of_rows(*case)
