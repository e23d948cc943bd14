"""The cases of `make gpu-check`: what runs on the GPU, compared with the CPU bit for bit.

`cases_of(part, small)` yields (name, function); the function raises where something is wrong, and may return what is
worth keeping.
"""

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import stand_ins  # noqa: F401  (before qkernels)
import torch

from qkernels import ops
from qkernels.ops.epilogue import OUTPUT_DTYPES, Epilogue, ResidualAdd

Cases = Iterator[tuple[str, Callable[[], Any]]]

# Ops whose packed bytes belong to a device: their cases pack by themselves.
PACKED = ("conv_pack", "conv", "linear_pack", "linear", "linear_rows", "pack_on_grid")
CUDA_OPS = (
    *("quantize", "quantize_out", "dequantize", "dequantize_out", "fake_quant", "fake_quant_out", "quantize_rows"),
    *("fake_quant_backward", "fake_quant_backward_out", "fake_quant_mask", "fake_quant_mask_backward"),
    *("lsq", "lsq_out", "lsq_backward", "lsq_backward_out", "pact", "pact_backward"),
    *("observe", "observe_minmax", "observe_fake_quant_out", "observe_histogram"),
    *("dorefa_weight", "dorefa_weight_backward", "dorefa_gradient", "binary_sign", "binary_sign_backward"),
    *("pack_signs", "binary_weight_pack", "binary_linear", "binary_conv2d"),
    *("foreach_fake_quant", "foreach_fake_quant_backward", "foreach_observe_fake_quant"),
    *("lookup", "add", "mul", "cat", "max_pool", "avg_pool", "adaptive_avg_pool"),
    *PACKED,
)


def cases_of(part: str, small: bool) -> Cases:
    return _PARTS[part](small)


def equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises unless the bits agree; NaN equals NaN."""
    got = got.cpu()
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), f"{got.dtype} {got.shape}"
    differs = got != expected
    if expected.is_floating_point():
        differs &= ~(got.isnan() & expected.isnan())
    if differs.any():
        where = differs.nonzero()[0].tolist()
        raise AssertionError(
            f"{int(differs.sum())} of {expected.numel()} values differ, the first at {where}: "
            f"{got[tuple(where)].item()} instead of {expected[tuple(where)].item()}"
        )


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
        eight_bit = self.dtype in (torch.uint8, torch.int8)
        with_table, with_residual = eight_bit and self.number % 5 < 2, eight_bit and self.number % 7 < 3
        epilogue = Epilogue(
            self.dtype,
            0.003 * k,
            low + 117,
            low + 1,
            low + 255,
            _codes(generator, self.dtype, 256) if with_table else None,
            ResidualAdd(0.02, 3, 0.05, low + 90, low, low + 255) if with_residual else None,
        )
        scales = 0.001 + 0.01 * torch.rand(n, generator=generator)
        points = torch.randint(-20, 21, (n,), dtype=torch.int32, generator=generator) if self.zero_points else None
        bias = torch.randn(n, generator=generator)
        pack = (_codes(generator, torch.int8, n, k), scales, points, bias, 0.02, 11, self.input_dtype)
        stride, offset = _LIES[self.lies](k)
        x = _codes(generator, self.input_dtype, offset + m * stride).as_strided((m, k), (stride, 1), offset)
        return pack, epilogue, x, _codes(generator, torch.uint8, m, n) if with_residual else None


# Distance between rows of k bytes, and offset of the first.
_LIES: dict[str, Callable[[int], tuple[int, int]]] = {
    "aligned": lambda k: (-(-k // 16) * 16, 0),
    "off by one": lambda k: (-(-k // 16) * 16, 1),
    "dense": lambda k: (k, 0),
    "apart": lambda k: (k + 3, 2),
}


def _codes(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, shape, dtype=dtype, generator=generator)


# Aligned layers that reach every tile on a GPU of 132 multiprocessors, with and without a split of K.
TILED_LINEAR = (
    *((4096, 4096, 4096), (1000, 4090, 1030), (512, 4096, 4096), (6272, 256, 4096), (1024, 1024, 2304)),
    *((512, 1024, 1024), (256, 512, 4096), (128, 500, 1000), (64, 64, 4096)),
)
_CODES = (torch.uint8, torch.int8)


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


# in, out, groups, kernel, stride, padding, dilation, transposed, mode, size: as TILED_LINEAR.
TILED_CONV = (
    (256, 512, 1, (3, 3), 1, 1, 1, False, "zeros", (56, 56)),
    (64, 128, 1, (3, 3), 1, 1, 1, False, "zeros", (56, 56)),
    (64, 64, 1, (3, 3), 2, 1, 1, False, "zeros", (111, 111)),
    (512, 128, 1, (3, 3), 2, 1, 1, False, "zeros", (14, 14)),
)


def conv_cases(small: bool):
    """Arguments of conv_pack and of conv, on the CPU: ranks, groups, strides, dilations, padding modes, transposed; two
    images."""
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
        with_residual = number % 3 < 2 and dtype in (torch.uint8, torch.int8)
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
        pack = (_codes(generator, torch.int8, *shape, *kernel), scales, points, bias, 0.02, 11, input_dtype)
        geometry = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "transposed": transposed,
            "padding_mode": mode,
        }
        out = ops.conv_output_size(size, kernel, stride, padding, dilation, transposed)
        residual = _codes(generator, torch.uint8, 2, outer, *out) if with_residual else None
        name = f"conv {layer} {input_dtype} -> {dtype}{', zero points' if zero_points else ''}"
        yield name, pack, geometry, _codes(generator, input_dtype, 2, inner, *size), residual, epilogue, out


def on(device: str, values):
    """`values` with every tensor in it, also of lists, on the device."""

    def move(v):
        return [move(e) for e in v] if isinstance(v, list) else v.to(device) if isinstance(v, torch.Tensor) else v

    return tuple(move(v) for v in values)


def detached(values):
    return tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in values)


def linear_pack_on_gpu(pack, epilogue: Epilogue) -> torch.Tensor:
    table = None if epilogue.table is None else epilogue.table.cuda()
    return ops.linear_pack(*on("cuda", pack), dataclasses.replace(epilogue, table=table))


def compare_linear(case: LinearCase) -> None:
    pack, epilogue, x, residual = case.arguments()
    expected = ops.linear(x, ops.linear_pack(*pack, epilogue), case.n, epilogue.dtype, residual)
    storage = torch.empty(x.untyped_storage().nbytes(), dtype=x.dtype, device="cuda")
    there = storage.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)
    packed = linear_pack_on_gpu(pack, epilogue)
    equal(ops.linear(there, packed, case.n, epilogue.dtype, *on("cuda", (residual,))), expected)


def linear(small: bool) -> Cases:
    for case in linear_cases(small):
        yield case.name, lambda case=case: compare_linear(case)


def wgmma(small: bool) -> Cases:
    """The kernel of sm_90a, which is off by default, and its times."""
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
    for shape in [(128, 4096, 4096), (512, 4096, 4096), (4096, 4096, 4096), (8192, 8192, 8192)]:
        if not small:
            yield f"wgmma {shape}", lambda shape=shape: bench_linear(*shape)


def conv(small: bool) -> Cases:
    def run(pack, geometry, x, residual, epilogue, size):
        channels = pack[0].shape[1] * geometry["groups"] if geometry["transposed"] else pack[0].shape[0]
        expected = ops.conv(x, ops.conv_pack(*pack, epilogue, **geometry), residual, channels, size, epilogue.dtype)
        packed = ops.conv_pack(*on("cuda", pack), epilogue, **geometry)
        known = ops.conv_geometry(pack[0].shape[2:], **geometry)
        equal(ops.conv(*on("cuda", (x, packed, residual)), channels, size, epilogue.dtype, known), expected)

    for name, *arguments in conv_cases(small):
        yield name, lambda arguments=arguments: run(*arguments)


def rows(small: bool) -> Cases:
    """quantize_rows and linear_rows."""
    generator = torch.Generator().manual_seed(4)
    sizes = [(1, 5, 3), (8, 33, 129), (9, 64, 100), (130, 136, 176)] + ([] if small else [(512, 1000, 4096)])
    floats = (torch.float32, torch.bfloat16, torch.float16)

    def run(m, n, k, dtype, codes, zero_points):
        x = (torch.randn(m, k, generator=generator) * 10.0 ** torch.randint(-3, 4, (m, 1), generator=generator)).to(
            dtype
        )
        x[m // 2, 0] = float("nan")
        low, high = torch.iinfo(codes).min, torch.iinfo(codes).max
        quantized = ops.quantize_rows(x, low, high, False, codes)
        on_gpu = ops.quantize_rows(x.cuda(), low, high, False, codes)
        for got, expected in zip(on_gpu, quantized, strict=True):
            equal(got, expected)
        weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
        points = torch.randint(-20, 21, (n,), dtype=torch.int32, generator=generator) if zero_points else None
        sums = weight.sum(1, dtype=torch.int32) - (0 if points is None else k * points)
        scale, bias = torch.rand(n, generator=generator) + 0.1, torch.randn(n, generator=generator)
        pack = (weight, torch.ones(1), points, None, 1.0, 0, codes, Epilogue(torch.int32))
        rest = (scale, sums.to(torch.int32), bias, n, dtype)
        expected = ops.linear_rows(quantized[0], ops.linear_pack(*pack), *quantized[1:], *rest)
        packed = ops.linear_pack(*on("cuda", pack))
        equal(ops.linear_rows(on_gpu[0], packed, *on_gpu[1:], *on("cuda", rest)), expected)

    for case in itertools.product(sizes, floats, (torch.uint8, torch.int8), (False, True)):
        yield f"rows {case}", lambda case=case: run(*case[0], *case[1:])


def floats(small: bool) -> Cases:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1,), (1000,), (3, 5, 7), (2, 16, 9, 9)] + ([] if small else [(64, 256, 56, 57), (1 << 25,)])

    def run(shape, axis, dtype):
        x = (4 * torch.randn(shape, generator=generator)).to(dtype)
        channels = 1 if axis is None else shape[axis]
        grid = (torch.rand(channels, generator=generator) * 0.1 + 0.01, torch.zeros(channels, dtype=torch.int32))
        codes = ops.quantize(x, *grid, axis, -128, 127, torch.int8)
        for op, arguments in (
            (ops.fake_quant, (x, *grid, axis, -128, 127)),
            (ops.quantize, (x, *grid, axis, -128, 127, torch.int8)),
            (ops.dequantize, (codes, *grid, axis, dtype)),
        ):
            equal(op(*on("cuda", arguments)), op(*arguments))

    def huge():
        """More than 2^31 elements: the last of them."""
        size = (1 << 31) + 100
        if torch.cuda.mem_get_info()[0] < 6 * size:
            return "skipped: too little memory"
        x = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
        x[-50:] = torch.linspace(-3, 3, 50)
        grid = torch.tensor([0.1]), torch.zeros(1, dtype=torch.int32)
        arguments = (None, -8, 7, torch.int8)
        equal(ops.quantize(x, *on("cuda", grid), *arguments)[-80:], ops.quantize(x[-80:].cpu(), *grid, *arguments))

    for case in itertools.product(shapes, (None, 0, -1), (torch.float32, torch.bfloat16, torch.float16)):
        yield f"floats {case}", lambda case=case: run(*case)
    if not small:
        yield "more than 2^31 elements", huge


def samples(small: bool) -> Cases:
    """The samples of opcheck, of every op without packed bytes."""
    from opcheck_samples import SAMPLES

    def tensors(result):
        if isinstance(result, torch.Tensor):
            return [result]
        return [t for part in result for t in tensors(part)] if isinstance(result, tuple | list) else []

    def run(op, make):
        call = getattr(torch.ops.qkernels, op).default
        arguments = detached(make())
        moved = on("cuda", arguments)
        # Of the arguments too: some are written.
        expected = [*tensors(call(*arguments)), *tensors(arguments)]
        for got, here in zip([*tensors(call(*moved)), *tensors(moved)], expected, strict=True):
            equal(got, here)

    for op in [name for name in CUDA_OPS if name not in PACKED]:
        for number, make in enumerate(SAMPLES[op]):
            yield f"{op} sample {number}", lambda op=op, make=make: run(op, make)


def model(small: bool) -> Cases:
    """Converted networks on the GPU give the codes that they give on the CPU."""
    import copy

    from torch import nn

    import qkernels

    torch.manual_seed(3)
    network = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.ReLU6(), nn.Conv2d(32, 64, 1), nn.Hardswish()),
        *(nn.ConvTranspose2d(64, 32, 2, 2), nn.ReLU(), nn.Conv2d(32, 48, 3, 1, 1, padding_mode="reflect"), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)),
    ).eval()
    dynamic = nn.Linear(100, 70)

    def run(float_model, recipe, batches):
        prepared = qkernels.prepare(float_model, batches[0], recipe=recipe)
        with qkernels.calibrating(prepared):
            for batch in batches:
                prepared(batch)
        converted = qkernels.convert(prepared)
        moved = copy.deepcopy(converted).to("cuda")
        for batch in batches:
            equal(moved(batch.cuda()), converted(batch).detach())

    def trained(layer, shape):
        """A layer in training: the bits of its integer forward, packed on the device."""
        prepared = qkernels.prepare_qat(nn.Sequential(layer, nn.Tanh()), torch.randn(shape), skip=[nn.Tanh])
        prepared(torch.randn(shape))
        moved, x = copy.deepcopy(prepared).to("cuda"), torch.randn(shape)
        for model in (prepared, moved):
            qkernels.disable_observer(model)
        on_cuda = moved(x.cuda())
        equal(moved.get_submodule("0")(x.cuda()), prepared.get_submodule("0")(x).detach())
        on_cuda.sum().backward()
        assert moved.get_submodule("0").weight.grad.isfinite().all()

    def step(rule, how):
        """A training step of a whole network: every parameter gets a finite gradient."""
        prepared = qkernels.prepare_qat(copy.deepcopy(network).train(), torch.randn(2, 3, 33, 35), rule=rule).to("cuda")
        model = torch.compile(prepared, backend="aot_eager") if how == "compiled" else prepared
        optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
        for _ in range(3):
            x = torch.randn(2, 3, 33, 35).cuda()
            with torch.autocast(x.device.type, torch.bfloat16, enabled=how == "autocast"):
                loss = model(x).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in prepared.parameters())
            assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in prepared.parameters())
            optimizer.step()
        assert loss.isfinite()

    for rule, how in itertools.product(("ste", "lsq"), ("eager", "autocast", "compiled")):
        yield f"training, {rule}, {how}", lambda rule=rule, how=how: step(rule, how)
    for layer, shape in [
        (nn.Linear(70, 33), (5, 70)),
        (nn.Conv2d(16, 24, 3, 2, 1), (2, 16, 9, 9)),
        (nn.Conv2d(32, 32, 3, 1, 1, groups=32), (2, 32, 9, 9)),
        (nn.ConvTranspose2d(16, 16, 3, 2), (2, 16, 5, 5)),
    ]:
        yield f"int8 forward of {layer}", lambda layer=layer, shape=shape: trained(layer, shape)
    yield "int8", lambda: run(network, "int8", [torch.randn(2, 3, 33, 35) for _ in range(4)])
    yield "int8-dynamic", lambda: run(dynamic, "int8-dynamic", [torch.randn(40, 100) for _ in range(2)])


# ---- torch's rules ---------------------------------------------------------------------------------------------------


def opcheck(small: bool) -> Cases:
    from opcheck_samples import SAMPLES

    def packed_linear(case):
        pack, epilogue, x, residual = case.arguments()
        packed = linear_pack_on_gpu(pack, epilogue)
        arguments = (*on("cuda", (x.contiguous(),)), packed, *on("cuda", (residual,)), case.n, epilogue.dtype)
        torch.library.opcheck(torch.ops.qkernels.linear.default, arguments)

    for op in CUDA_OPS:
        if op in ("linear", "conv", "linear_rows"):  # packed bytes belong to a device
            continue
        for number, make in enumerate(SAMPLES[op]):
            call = getattr(torch.ops.qkernels, op).default
            run = lambda call=call, make=make: torch.library.opcheck(call, on("cuda", make())) and None  # noqa: E731
            yield f"{op} sample {number}", run
    for case in itertools.islice(linear_cases(True), 0, 40, 7):
        yield case.name, lambda case=case: packed_linear(case)


def graph(small: bool) -> Cases:
    def capture_and_replay(step, refill):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()  # warm up, as torch asks
        side.synchronize()
        made = torch.cuda.CUDAGraph()
        with torch.cuda.graph(made):
            captured = step()
        for _ in range(3):
            refill()
            made.replay()
            for got, expected in zip(captured, step(), strict=True):
                equal(got, expected.cpu())

    def inference(m, n, k):
        packed, x = some_linear(m, n, k)
        grid = (torch.tensor([0.05], device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda"))
        y = torch.randn(m, n, device="cuda")
        step = lambda: (ops.linear(x, packed, n), ops.fake_quant(y, *grid, None, -128, 127))  # noqa: E731
        capture_and_replay(step, lambda: (x.copy_(torch.randint_like(x, 0, 256)), y.normal_()))

    def training():
        """Nothing of a training step waits for the device."""
        x, grad = torch.randn(64, 300, device="cuda"), torch.randn(64, 300, device="cuda")
        scale, point = torch.full((1,), 0.1, device="cuda"), torch.zeros(1, device="cuda")
        zero = torch.zeros(1, dtype=torch.int32, device="cuda")
        seed = torch.tensor([5], device="cuda")

        def histogram():
            ends = torch.full((1,), -0.5, device="cuda"), torch.full((1,), 0.5, device="cuda")
            state = *ends, torch.ones(64, device="cuda")
            ops.observe_histogram(x, *ops.observe_minmax(x, None)[:2], *state)
            return state

        def step():
            return (
                *histogram(),
                *ops.lsq_backward(grad, x, scale, point, None, -8, 7, 1.0),
                ops.dorefa_weight(x, scale, zero, -8, 7),
                ops.dorefa_weight_backward(grad, x, scale, zero, -8, 7),
                ops.dorefa_gradient(grad, seed, 4),
                *ops.quantize_rows(x, 0, 255, False, torch.uint8),
            )

        capture_and_replay(step, lambda: (x.normal_(), grad.normal_(), seed.add_(1)))

    for shape in [(4, 512, 1024), (16, 256, 8192), (200, 256, 512)]:  # few rows; a split of K; tiles
        yield f"linear {shape}", lambda shape=shape: inference(*shape)
    yield "training", training


def streams(small: bool) -> Cases:
    def run():
        packed, x = some_linear(16, 256, 8192)  # with a split of K: a workspace a call
        expected = ops.linear(x, packed, 256)
        torch.cuda.synchronize()
        several = [torch.cuda.Stream() for _ in range(4)]
        results = []
        for turn in range(40):
            with torch.cuda.stream(several[turn % 4]):
                results.append(ops.linear(x, packed, 256))
        torch.cuda.synchronize()
        assert all(torch.equal(r, expected) for r in results), "streams disturb one another"

    yield "40 calls on 4 streams", run


def errors(small: bool) -> Cases:
    packed, x = some_linear(9, 32, 64)
    good = ops.linear(x, packed, 32)
    unit = torch.ones(1, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")

    def run(words, call):
        message = "no error"
        try:
            call()
        except RuntimeError as error:
            message = str(error)
        assert re.search(words, message), f"expected '{words}' in: {message}"
        torch.cuda.synchronize()
        assert torch.equal(ops.linear(x, packed, 32), good), "an error has left something behind"

    # The last: torch 2.11 does not tell extensions why a call failed.
    memory, huge = "out of memory|API call failed", torch.ones(1, device="cuda").expand(1 << 45)
    calls = [
        ("packed must be on the CPU", lambda: ops.linear(x.cpu(), packed, 32)),
        ("packed must be on cuda:0", lambda: ops.linear(x, packed.cpu(), 32)),
        ("packed must be an unchanged result", lambda: ops.linear(x[:, :60], packed, 32)),
        ("packed must be an unchanged result", lambda: ops.linear(x, packed[:-1], 32)),
        ("input must be uint8", lambda: ops.linear(x.view(torch.int8), packed, 32)),
        ("output_dtype", lambda: ops.linear(x, packed, 32, torch.float32)),
        ("residual must not be given", lambda: ops.linear(x, packed, 32, torch.uint8, good)),
        ("table must be on cuda:0", lambda: ops.lookup(x, torch.zeros(256, dtype=torch.uint8))),
        (memory, lambda: ops.quantize(huge, *unit, None, 0, 255, torch.uint8)),
    ]
    for number, (words, call) in enumerate(calls):
        yield f"{number}: {words}", lambda words=words, call=call: run(words, call)


# ---- times -----------------------------------------------------------------------------------------------------------


def some_linear(m: int, n: int, k: int):
    """(packed, x) on the GPU for a uint8 linear."""
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda")
    packed = ops.linear_pack(
        weight,
        torch.full((n,), 0.01, device="cuda"),
        None,
        None,
        0.02,
        9,
        torch.uint8,
        Epilogue(scale=0.01 * k, zero_point=100),
    )
    return packed, torch.randint(0, 256, (m, k), dtype=torch.uint8, device="cuda")


def seconds(calls: list[Callable[[], object]], blocks: int = 15) -> float:
    """The median time of a call over blocks that go through `calls`, which read different memory: more than the L2."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(blocks):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return sorted(times)[blocks // 2]


def copies_beyond_l2(bytes_a_call: int) -> int:
    return max(3, min(64, (256 << 20) // max(bytes_a_call, 1) + 1))


def bench_linear(m: int, n: int, k: int) -> dict:
    sets = range(copies_beyond_l2(n * k + m * k))
    ours = [some_linear(m, n, k) for _ in sets]
    result = {"m": m, "n": n, "k": k, "seconds": seconds([lambda p=p, x=x: ops.linear(x, p, n) for p, x in ours])}
    bf16 = [
        (torch.randn(m, k, device="cuda", dtype=torch.bfloat16), torch.randn(n, k, device="cuda", dtype=torch.bfloat16))
        for _ in sets
    ]
    result["bf16_seconds"] = seconds([lambda a=a, b=b: torch.nn.functional.linear(a, b) for a, b in bf16])
    if m > 16:
        ints = [
            tuple(torch.randint(-128, 128, s, device="cuda", dtype=torch.int8) for s in ((m, k), (n, k))) for _ in sets
        ]
        scale = torch.rand(n, device="cuda")
        result["int_mm_scaled_seconds"] = seconds(
            [lambda a=a, b=b: (torch._int_mm(a, b.t()) * scale).to(torch.bfloat16) for a, b in ints]
        )
    result["tops"] = 2 * m * n * k / result["seconds"] / 1e12
    result["weight_bytes_per_second"] = n * k / result["seconds"]
    return result


def bench_fake_quant() -> dict[str, float]:
    size = 1 << 26
    buffers = [torch.randn(size, device="cuda") for _ in range(4)]
    target = torch.empty_like(buffers[0])
    grid = (torch.tensor([0.05], device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda"))
    copy = seconds([lambda b=b: target.copy_(b) for b in buffers])
    fake = seconds([lambda b=b: ops.fake_quant_out(b, *grid, None, -128, 127, target) for b in buffers])
    theirs = seconds([lambda b=b: torch.fake_quantize_per_tensor_affine(b, *grid, -128, 127) for b in buffers])
    rate = 8 * size / copy
    return {"copy_bytes_per_second": rate, "seconds": fake, "torch_seconds": theirs, "of_copy": copy / fake}


def bench(small: bool) -> Cases:
    yield "fake_quant", bench_fake_quant
    shapes = [(4096, 4096, 4096), (1, 4096, 4096), (8, 4096, 12288), (16, 4096, 4096), (64, 4096, 4096)]
    shapes += [(512, 4096, 4096), (128, 1000, 2048), (4096, 12288, 4096), (8192, 8192, 8192)]
    for shape in shapes:
        yield f"linear {shape}", lambda shape=shape: bench_linear(*shape)


_PARTS: dict[str, Callable[[bool], Cases]] = {
    **{"linear": linear, "wgmma": wgmma, "conv": conv, "rows": rows, "floats": floats, "ops": samples, "model": model},
    **{"opcheck": opcheck, "graph": graph, "streams": streams, "errors": errors, "bench": bench},
}
