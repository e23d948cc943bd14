"""Part bench: times, and how they compare with the targets. A target that is missed is a number here, no failure.

Alternatives of one comparison take turns, block by block, so that a change of the GPU's clock meets all alike. A block
goes through memory of more than the L2 cache, and what is short runs as a graph, so that Python's time does not count.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import device
import torch
import torch.nn.functional as F
from cases import Cases
from model_cases import calibrated
from torch import Tensor, nn
from weighted_cases import some_linear

import qkernels
from qkernels import ops
from qkernels.bench.networks import float_network, images
from qkernels.ops.epilogue import Epilogue

Calls = Sequence[Callable[[], Any]]

BEYOND_L2 = 256 << 20
WARM_UP, BLOCKS = 3, 15
POPS = {"mma.sync": 0.9, "wgmma": 1.1}  # what a linear layer of 4096x4096x4096 should reach
OF_COPY = 0.85
TRAINED_BY = ("ste", "lsq")


def target(name: str, measured: float, least: float | None = None, most: float | None = None) -> dict[str, Any]:
    """A number beside what it should be."""
    reached = measured >= least if most is None else measured <= most
    bound = {"target": least, "bound": "least"} if most is None else {"target": most, "bound": "most"}
    return {"name": name, "measured": measured, **bound, "reached": reached}


def times(alternatives: dict[str, Calls], captured: bool) -> dict[str, float]:
    """The median seconds of a call of each alternative; a block runs all its calls."""

    def block(calls: Calls) -> Callable[[], Any]:
        def run() -> None:
            for call in calls:
                call()

        return device.capture(run)[0] if captured else run

    runs = {name: block(calls) for name, calls in alternatives.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(WARM_UP + BLOCKS):
        for name, run in runs.items():
            seconds = device.elapsed(run) / len(alternatives[name])
            if turn >= WARM_UP:
                found[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def copies_beyond_l2(bytes_a_call: int, small: bool = False) -> int:
    return 3 if small else max(3, min(64, BEYOND_L2 // max(bytes_a_call, 1) + 1))


def copying(small: bool) -> tuple[Calls, int]:
    """Copies of memory, and the bytes that each reads and writes."""
    size = 1 << (12 if small else 26)
    buffers = [torch.randn(size, device=device.NAME) for _ in range(4)]
    out = torch.empty_like(buffers[0])
    return [lambda b=b: out.copy_(b) for b in buffers], 8 * size


def random_codes(*shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, shape, device=device.NAME, dtype=dtype)


def bench_linear(m: int, n: int, k: int, small: bool, kernel: str | None = None) -> dict[str, Any]:
    """Against bfloat16 and torch's int8, with targets where the `kernel` is named; up to 16 rows, where reading the
    weight decides, against a copy.
    """
    sets = range(copies_beyond_l2(n * k + m * k, small))
    ours = [some_linear(m, n, k) for _ in sets]
    bf16 = [tuple(torch.randn(s, device=device.NAME, dtype=torch.bfloat16) for s in ((m, k), (n, k))) for _ in sets]
    alternatives: dict[str, Calls] = {
        "seconds": [lambda p=p, x=x: ops.linear(x, p, n) for p, x in ours],
        "bf16_seconds": [lambda a=a, b=b: F.linear(a, b) for a, b in bf16],
    }
    if m > 16:
        ints, scale = [(random_codes(m, k), random_codes(n, k)) for _ in sets], torch.rand(n, device=device.NAME)
        alternatives["int_mm_scaled_seconds"] = [
            lambda a=a, b=b: (torch._int_mm(a, b.t()) * scale).to(torch.bfloat16) for a, b in ints
        ]
    else:
        alternatives["copy_seconds"], bytes_copied = copying(small)
    result: dict[str, Any] = times(alternatives, captured=True)
    seconds, what = result["seconds"], f"linear {m}x{n}x{k}"
    tops = 2 * m * n * k / seconds / 1e12
    found = []
    if m <= 16:
        of_copy = (n * k + m * k + m * n) / seconds / (bytes_copied / result["copy_seconds"])
        found.append(target(f"{what}: of the copy bandwidth", of_copy, least=0.8))
    if kernel is not None:
        found += [
            target(f"{what} by {kernel}: POPS", tops / 1e3, least=POPS[kernel]),
            target(f"{what} by {kernel}: bf16 F.linear / ours", result["bf16_seconds"] / seconds, least=1.5),
            target(
                f"{what} by {kernel}: torch._int_mm + scaling / ours",
                result["int_mm_scaled_seconds"] / seconds,
                least=1.3,
            ),
        ]
    return {**result, "tops": tops, "targets": found}


# ---- convolutions of ResNet50 ----------------------------------------------------------------------------------------

# in, out, kernel, stride, size of the input
RESNET50_LAYERS = (
    *((3, 64, 7, 2, 224), (64, 64, 1, 1, 56), (64, 64, 3, 1, 56), (64, 256, 1, 1, 56), (128, 128, 3, 1, 28)),
    *((256, 512, 1, 2, 56), (256, 256, 3, 1, 14), (1024, 256, 1, 1, 14), (512, 512, 3, 1, 7)),
)


def bench_conv(inner: int, outer: int, kernel: int, stride: int, size: int, small: bool) -> dict[str, Any]:
    """Codes in and out, against cuDNN's float16 in channels_last with the bias."""
    batch, padding = (2 if small else 64), kernel // 2
    geometry = {"stride": stride, "padding": padding}
    out = ops.conv_output_size((size, size), (kernel, kernel), stride, padding)
    sets = range(copies_beyond_l2(batch * (inner * size**2 + outer * out[0] ** 2), small))
    scale, bias = torch.full((outer,), 0.01, device=device.NAME), torch.randn(outer, device=device.NAME)
    weight = random_codes(outer, inner, kernel, kernel)
    epilogue = Epilogue(scale=0.01 * inner * kernel**2, zero_point=100)
    packed = ops.conv_pack(weight, scale, None, bias, 0.02, 9, torch.uint8, epilogue, **geometry)
    known = ops.conv_geometry((kernel, kernel), **geometry)

    def image(dtype: torch.dtype) -> Tensor:
        x = random_codes(batch, inner, size, size, dtype=torch.uint8)
        return x.to(dtype).contiguous(memory_format=torch.channels_last)

    half = weight.to(torch.float16).contiguous(memory_format=torch.channels_last), bias.to(torch.float16)
    ours, theirs = ([image(dtype) for _ in sets] for dtype in (torch.uint8, torch.float16))
    alternatives = {
        "seconds": [lambda x=x: ops.conv(x, packed, None, outer, out, torch.uint8, known) for x in ours],
        "fp16_seconds": [lambda x=x: F.conv2d(x, *half, **geometry) for x in theirs],
    }
    with device.cudnn(benchmark=True):
        result = times(alternatives, captured=True)
    multiplications = batch * outer * out[0] ** 2 * inner * kernel**2
    ratio = result["fp16_seconds"] / result["seconds"]
    return {**result, "fp16_over_ours": ratio, "tops": 2 * multiplications / result["seconds"] / 1e12}


# ---- rounding --------------------------------------------------------------------------------------------------------


def bench_fake_quant(small: bool) -> dict[str, Any]:
    copies, moved = copying(small)
    buffers = [torch.randn(moved // 8, device=device.NAME) for _ in range(4)]
    out = torch.empty_like(buffers[0])
    grid = device.on((torch.tensor([0.05]), torch.zeros(1, dtype=torch.int32)))
    ends = -128, 127
    ours = [lambda b=b: ops.fake_quant_out(b, *grid, None, *ends, out) for b in buffers]
    theirs = [lambda b=b: torch.fake_quantize_per_tensor_affine(b, *grid, *ends) for b in buffers]
    result = times({"copy_seconds": copies, "seconds": ours}, captured=True)
    result |= times({"eager_seconds": ours, "torch_seconds": theirs}, captured=False)
    of_copy = result["copy_seconds"] / result["seconds"]
    found = [target("fake_quant: of the copy bandwidth", of_copy, least=OF_COPY)]
    return {**result, "copy_bytes_per_second": moved / result["copy_seconds"], "targets": found}


def bench_lsq(small: bool) -> dict[str, Any]:
    """A learned grid: the passes alone against a copy, forward and backward together against torch's operation."""
    copies, moved = copying(small)
    buffers = [torch.randn(moved // 8, device=device.NAME) for _ in range(4)]
    grad, out = torch.randn_like(buffers[0]), torch.empty_like(buffers[0])
    scale, point = torch.full((1,), 0.05, device=device.NAME), torch.zeros(1, device=device.NAME)
    ends = -128, 127

    def both(op: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Calls:
        learned = [t.clone().requires_grad_() for t in (scale, point)]
        inputs = [b.clone().requires_grad_() for b in buffers]
        return [lambda x=x: torch.autograd.grad(op(x, *learned), (x, *learned), grad) for x in inputs]

    theirs = torch._fake_quantize_learnable_per_tensor_affine
    passes = {
        "copy_seconds": copies,
        "forward_seconds": [lambda b=b: ops.lsq_out(b, scale, point, None, *ends, out) for b in buffers],
        "backward_seconds": [
            lambda b=b: ops.lsq_backward_out(grad, b, scale, point, None, *ends, 1.0, out) for b in buffers
        ],
    }
    together = {
        "both_seconds": both(lambda x, s, z: ops.lsq(x, s, z, None, *ends, 1.0)),
        "torch_both_seconds": both(lambda x, s, z: theirs(x, s, z, *ends, 1.0)),
    }
    result = times(passes, captured=True) | times(together, captured=False)
    copied = moved / result["copy_seconds"]
    backward = 1.5 * moved / result["backward_seconds"]  # reads two tensors and writes one
    found = [
        target("LSQ backward: of the copy bandwidth", backward / copied, least=OF_COPY),
        target(
            "LSQ forward and backward: torch's learnable op / ours",
            result["torch_both_seconds"] / result["both_seconds"],
            least=2.0,
        ),
    ]
    of_copy = {"forward_of_copy": result["copy_seconds"] / result["forward_seconds"]}
    return {**result, **of_copy, "copy_bytes_per_second": copied, "targets": found}


# ---- networks --------------------------------------------------------------------------------------------------------


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


def bench_inference(name: str, batch: int, size: int) -> dict[str, Any]:
    """int8 against float16, each in channels_last, called layer by layer and as a graph."""
    x = images(batch, size).to(device.NAME).contiguous(memory_format=torch.channels_last)
    integer = calibrated(float_network(name), [images(min(batch, 8), size)]).to(device.NAME)
    half, x_half = channels_last(float_network(name).half().to(device.NAME)), x.half()
    with device.cudnn(benchmark=True), torch.inference_mode():
        alternatives: dict[str, Calls] = {"seconds": [lambda: integer(x)], "fp16_seconds": [lambda: half(x_half)]}
        result: dict[str, Any] = times(alternatives, captured=False)
        result |= {f"graph_{key}": value for key, value in times(alternatives, captured=True).items()}
    ratio = result["fp16_seconds"] / result["seconds"]
    found = [target(f"{name} int8, batch {batch}: channels_last fp16 eager / ours", ratio, least=1.5)]
    in_graphs = result["graph_fp16_seconds"] / result["graph_seconds"]
    return {**result, "graph_ratio": in_graphs, "images_per_second": batch / result["seconds"], "targets": found}


def bench_training(name: str, batch: int, size: int) -> dict[str, Any]:
    """A training step under autocast with bfloat16, quantized by two rules, against the float step."""
    x = images(batch, size).to(device.NAME).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 1000, (batch,), device=device.NAME)
    network = channels_last(float_network(name).train())
    qat = {rule: qkernels.prepare_qat(network, images(2, size), rule=rule) for rule in TRAINED_BY}

    def step_of(model: nn.Module) -> Callable[[], None]:
        model.to(device.NAME)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(device.NAME, torch.bfloat16):
                loss = F.cross_entropy(model(x).float(), y)
            loss.backward()
            optimizer.step()

        return step

    alternatives = {"float_seconds": [step_of(network)]}
    alternatives |= {f"{rule}_seconds": [step_of(model)] for rule, model in qat.items()}
    with device.cudnn(benchmark=True):
        result: dict[str, Any] = times(alternatives, captured=False)
    kind = f"QAT step / float step, {name}, bf16 autocast, batch {batch}"
    ratios = {rule: result[f"{rule}_seconds"] / result["float_seconds"] for rule in TRAINED_BY}
    found = [target(f"{kind}, {rule}", ratio, most=1.15) for rule, ratio in ratios.items()]
    return {**result, "targets": found}


def bench(small: bool) -> Cases:
    yield "fake_quant", functools.partial(bench_fake_quant, small)
    yield "lsq", functools.partial(bench_lsq, small)
    sizes = [(1, 4096, 4096), (8, 4096, 12288), (16, 4096, 4096), (64, 4096, 4096), (512, 4096, 4096)]
    sizes += [(128, 1000, 2048), (4096, 12288, 4096), (8192, 8192, 8192)]
    named = (64, 64, 64) if small else (4096, 4096, 4096)
    yield f"linear {'x'.join(map(str, named))}", functools.partial(bench_linear, *named, small, "mma.sync")
    for shape in [(8, 64, 128)] if small else sizes:
        yield f"linear {'x'.join(map(str, shape))}", functools.partial(bench_linear, *shape, small)
    for layer in RESNET50_LAYERS[7:] if small else RESNET50_LAYERS:
        inner, outer, kernel, stride, size = layer
        name = f"conv {inner}->{outer}, {kernel}x{kernel}, stride {stride}, {size}x{size}"
        yield name, functools.partial(bench_conv, *layer, small)
    name, batch, size = ("resnet18", 2, 32) if small else ("resnet50", 64, 224)
    yield f"inference {name}", functools.partial(bench_inference, name, batch, size)
    batch, size = (2, 32) if small else (128, 224)
    yield "training resnet18", functools.partial(bench_training, "resnet18", batch, size)
