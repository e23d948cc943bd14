"""`make gpu-check`: everything about qkernels that only a GPU can show, in at most 8 minutes.

    python tests/gpu/gpu_check.py [--only PART ...] [--small] [--out FILE]

Needs torch with CUDA and an NVIDIA GPU of compute capability 8.0 or newer; nothing is downloaded. qkernels is built in
place if it has no CUDA kernels yet (nvcc, setuptools). Parts: bits (every CUDA op against the CPU, exactly), model (a
converted network against the CPU), opcheck, graph (capture and replay), streams, errors, sanitizer (compute-sanitizer
on small shapes, where it is installed), bench (writes bench/results/<gpu>.json). Exit status: 0 all passed, 1 something
failed, 2 nothing could be checked.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUDGET_SECONDS = 480
sys.path[:0] = [str(ROOT), str(ROOT / "tests/ops")]


def refuse(reason: str) -> None:
    print(f"gpu-check: nothing was checked: {reason}")
    sys.exit(2)


def require_gpu():
    try:
        import torch
    except ModuleNotFoundError:
        refuse(f"{sys.executable} has no torch")
    if torch.version.cuda is None:
        refuse(f"torch {torch.__version__} is a CPU build")
    if not torch.cuda.is_available():
        refuse("torch.cuda.is_available() is False: no NVIDIA GPU, or no driver")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        refuse(f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, the kernels need 8.0")
    return torch


def has_cuda_kernels() -> bool:
    """Asked in a process of its own: a module that was imported cannot be replaced."""
    probe = "from qkernels import _C; raise SystemExit(not _C.with_cuda)"
    return subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True).returncode == 0


def build(torch) -> None:
    if has_cuda_kernels():
        return
    major, minor = torch.cuda.get_device_capability()
    environment = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", **os.environ}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    print(f"gpu-check: building for {environment['TORCH_CUDA_ARCH_LIST']} ...", flush=True)
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0 or not has_cuda_kernels():
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n")
        refuse("the build failed")
    print(f"gpu-check: built in {time.monotonic() - start:.0f} s")


# ---- the same bits as on the CPU -------------------------------------------------------------------------------------


def linear_cases(small: bool):
    """Arguments of linear_pack and of linear, on the CPU, over outputs, grids, sizes and alignments."""
    import torch

    from qkernels.ops.epilogue import OUTPUT_DTYPES, Epilogue, ResidualAdd

    sizes = [(1, 5, 3), (3, 70, 64), (8, 33, 129), (9, 16, 16), (17, 65, 100), (130, 136, 176)]
    if not small:
        sizes += [
            (2, 4096, 4096),
            (64, 1000, 2048),
            (300, 257, 4100),
            (1000, 512, 4608),
            (4096, 768, 768),
            (33, 64, 65000),
        ]
    generator = torch.Generator().manual_seed(0)
    choices = itertools.product(sizes, OUTPUT_DTYPES, (torch.uint8, torch.int8), (False, True))
    for number, ((m, n, k), dtype, input_dtype, zero_points) in enumerate(choices):

        def codes(kind, *shape):
            info = torch.iinfo(kind)
            return torch.randint(info.min, info.max + 1, shape, dtype=kind, generator=generator)

        low = -128 if dtype is torch.int8 else 0
        eight_bit = dtype in (torch.uint8, torch.int8)
        with_table, with_residual = eight_bit and number % 3 == 0, eight_bit and number % 2 == 0
        epilogue = Epilogue(
            dtype,
            0.003 * k,
            low + 117,
            low + 1,
            low + 255,
            codes(dtype, 256) if with_table else None,
            ResidualAdd(0.02, 3, 0.05, low + 90, low, low + 255) if with_residual else None,
        )
        scales = 0.001 + 0.01 * torch.rand(n, generator=generator)
        points = torch.randint(-20, 21, (n,), dtype=torch.int32, generator=generator) if zero_points else None
        bias = torch.randn(n, generator=generator)
        pack = (codes(torch.int8, n, k), scales, points, bias, 0.02, 11, input_dtype)
        x = codes(input_dtype, m, k + 3)[:, number % 4 :][:, :k]  # rows that start anywhere
        residual = codes(torch.uint8, m, n) if with_residual else None
        yield (
            f"linear {m}x{n}x{k} {input_dtype} -> {dtype}",
            pack,
            epilogue,
            x if number % 5 else x.contiguous(),
            residual,
        )


def conv_cases(small: bool):
    """Arguments of conv_pack and of conv, on the CPU: ranks, groups, strides, dilations, padding modes, transposed."""
    import torch

    from qkernels import ops
    from qkernels.ops.epilogue import Epilogue, ResidualAdd

    generator = torch.Generator().manual_seed(2)

    def codes(dtype, *shape):
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max + 1, shape, dtype=dtype, generator=generator)

    # in, out, groups, kernel, stride, padding, dilation, transposed, mode, size
    layers = [
        (3, 32, 1, (3, 3), 2, 1, 1, False, "zeros", (17, 19)),
        (3, 24, 1, (7, 7), 2, 3, 1, False, "zeros", (30, 30)),
        (32, 32, 32, (3, 3), 1, 1, 1, False, "zeros", (14, 14)),
        (6, 12, 6, (3, 3), 1, 1, 1, False, "reflect", (9, 9)),
        (64, 96, 1, (3, 3), 1, 1, 1, False, "zeros", (14, 14)),
        (64, 96, 1, (1, 1), 1, 0, 1, False, "zeros", (7, 7)),
        (64, 64, 4, (3, 3), 1, 2, 2, False, "circular", (9, 9)),
        (40, 24, 1, (3, 3), 1, 1, 1, False, "replicate", (9, 9)),
        (16, 20, 1, (5,), 2, 2, 1, False, "zeros", (50,)),
        (16, 16, 1, (3, 3, 3), 1, 1, 1, False, "zeros", (5, 6, 7)),
        (32, 16, 2, (4, 4), 2, 1, 1, True, "zeros", (7, 7)),
        (16, 16, 16, (2, 2), 3, 0, 1, True, "zeros", (5, 5)),
    ]
    if not small:
        layers += [
            (256, 256, 1, (3, 3), 1, 1, 1, False, "zeros", (28, 28)),
            (512, 128, 1, (3, 3), 2, 1, 1, False, "zeros", (14, 14)),
        ]
    kinds = itertools.cycle(itertools.product((torch.uint8, torch.float32, torch.int8, torch.bfloat16), (True, False)))
    for layer, zero_points in itertools.product(layers, (False, True)):
        inner, outer, groups, kernel, stride, padding, dilation, transposed, mode, size = layer
        dtype, with_residual = next(kinds)
        low = -128 if dtype == torch.int8 else 0
        with_residual = with_residual and dtype in (torch.uint8, torch.int8)
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
        pack = (codes(torch.int8, *shape, *kernel), scales, points, bias, 0.02, 11, torch.uint8)
        geometry = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "transposed": transposed,
            "padding_mode": mode,
        }
        out = ops.conv_output_size(size, kernel, stride, padding, dilation, transposed)
        residual = codes(torch.uint8, 2, outer, *out) if with_residual else None
        yield f"conv {layer} -> {dtype}", pack, geometry, codes(torch.uint8, 2, inner, *size), residual, epilogue, out


def on(device: str, values):
    """`values` with every tensor in it, also of lists, on the device."""
    import torch

    def move(v):
        return [move(e) for e in v] if isinstance(v, list) else v.to(device) if isinstance(v, torch.Tensor) else v

    return tuple(move(v) for v in values)


def detached(values):
    import torch

    return tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in values)


def check_bits(small: bool) -> str:
    import dataclasses

    import torch

    from qkernels import ops

    count = 0
    for name, pack, epilogue, x, residual in linear_cases(small):
        n = pack[0].shape[0]
        expected = ops.linear(x, ops.linear_pack(*pack, epilogue), n, epilogue.dtype, residual)
        table = None if epilogue.table is None else epilogue.table.cuda()
        packed = ops.linear_pack(*on("cuda", pack), dataclasses.replace(epilogue, table=table))
        storage = torch.empty(x.shape[0], x.stride(0), dtype=x.dtype, device="cuda")  # keeps the stride
        x_cuda = storage[:, : x.shape[1]].copy_(x) if x.dim() == 2 else x.cuda()
        got = ops.linear(x_cuda, packed, n, epilogue.dtype, None if residual is None else residual.cuda())
        if not torch.equal(got.cpu(), expected):
            raise AssertionError(f"{name}: {(got.cpu() != expected).sum()} of {expected.numel()} values differ")
        count += 1
    for name, pack, geometry, x, residual, epilogue, size in conv_cases(small):
        channels = pack[0].shape[1] * geometry["groups"] if geometry["transposed"] else pack[0].shape[0]
        expected = ops.conv(x, ops.conv_pack(*pack, epilogue, **geometry), residual, channels, size, epilogue.dtype)
        packed = ops.conv_pack(*on("cuda", pack), epilogue, **geometry)
        known = ops.conv_geometry(pack[0].shape[2:], **geometry)
        on_gpu = on("cuda", (x, packed, residual))
        got = ops.conv(*on_gpu, channels, size, epilogue.dtype, known)
        if not torch.equal(got.cpu(), expected):
            raise AssertionError(f"{name}: {(got.cpu() != expected).sum()} of {expected.numel()} values differ")
        count += 1
    return f"{count + check_samples() + check_floats(small)} cases equal to the CPU, bit for bit"


def check_samples() -> int:
    """The samples of opcheck, of every op without packed bytes."""
    import torch
    from opcheck_samples import SAMPLES

    def tensors(result):
        if isinstance(result, torch.Tensor):
            return [result]
        return [t for part in result for t in tensors(part)] if isinstance(result, tuple | list) else []

    count = 0
    for op in [name for name in CUDA_OPS if name not in PACKED]:
        run = getattr(torch.ops.qkernels, op).default
        for make in SAMPLES[op]:
            arguments = detached(make())
            moved = on("cuda", arguments)
            # Of the arguments too: some are written.
            expected = [*tensors(run(*arguments)), *tensors(arguments)]
            got = [*tensors(run(*moved)), *tensors(moved)]
            for there, here in zip(got, expected, strict=True):
                if not torch.equal(there.cpu(), here):
                    raise AssertionError(f"{op}: the bits differ for {arguments}")
            count += 1
    return count


def check_floats(small: bool) -> int:
    import torch

    from qkernels import ops

    count = 0
    generator = torch.Generator().manual_seed(1)
    shapes = [(1,), (1000,), (3, 5, 7), (2, 16, 9, 9)] + ([] if small else [(64, 256, 56, 57), (1 << 25,)])
    for shape, axis, dtype in itertools.product(shapes, (None, 0, -1), (torch.float32, torch.bfloat16, torch.float16)):
        x = (4 * torch.randn(shape, generator=generator)).to(dtype)
        channels = 1 if axis is None else shape[axis]
        grid = (torch.rand(channels, generator=generator) * 0.1 + 0.01, torch.zeros(channels, dtype=torch.int32))
        codes = ops.quantize(x, *grid, axis, -128, 127, torch.int8)
        pairs = [
            (ops.fake_quant, (x, *grid, axis, -128, 127)),
            (ops.quantize, (x, *grid, axis, -128, 127, torch.int8)),
            (ops.dequantize, (codes, *grid, axis, dtype)),
        ]
        for run, arguments in pairs:
            if not torch.equal(run(*on("cuda", arguments)).cpu(), run(*arguments)):
                raise AssertionError(f"{run.__name__} {dtype} {shape} axis {axis}: the bits differ")
            count += 1
    return count


def check_model(small: bool) -> str:
    """A converted network on the GPU gives the codes that it gives on the CPU."""
    import copy

    import torch
    from torch import nn

    import qkernels

    torch.manual_seed(3)
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.ReLU6(), nn.Conv2d(32, 64, 1), nn.Hardswish()),
        *(nn.ConvTranspose2d(64, 32, 2, 2), nn.ReLU(), nn.Conv2d(32, 48, 3, 1, 1, padding_mode="reflect"), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)),
    ).eval()
    batches = [torch.randn(2, 3, 33, 35) for _ in range(4)]
    prepared = qkernels.prepare(model, batches[0], recipe="int8")
    with qkernels.calibrating(prepared):
        for batch in batches:
            prepared(batch)
    converted = qkernels.convert(prepared)
    moved = copy.deepcopy(converted).to("cuda")
    for batch in batches:
        expected, got = converted(batch), moved(batch.cuda())
        if not torch.equal(got.cpu(), expected):
            raise AssertionError(f"the outputs differ by up to {(got.cpu() - expected).abs().max()}")
    return f"a network of {len(model)} layers gives the same bits on {len(batches)} batches"


# ---- torch's rules ---------------------------------------------------------------------------------------------------

PACKED = ("conv_pack", "conv", "linear_pack", "linear")
CUDA_OPS = (
    *("quantize", "quantize_out", "dequantize", "dequantize_out", "fake_quant", "fake_quant_out"),
    *("fake_quant_backward", "fake_quant_backward_out", "fake_quant_mask", "fake_quant_mask_backward"),
    *("lsq", "lsq_out", "lsq_backward", "lsq_backward_out", "pact", "pact_backward"),
    *("observe", "observe_minmax", "observe_fake_quant_out"),
    *("foreach_fake_quant", "foreach_fake_quant_backward", "foreach_observe_fake_quant"),
    *("lookup", "add", "mul", "cat", "max_pool", "avg_pool", "adaptive_avg_pool"),
    *PACKED,
)


def check_opcheck(small: bool) -> str:
    import torch
    from opcheck_samples import SAMPLES

    from qkernels import ops

    count = 0
    for op in CUDA_OPS:
        for make in SAMPLES[op]:
            arguments = on("cuda", make())
            if op in ("linear", "conv"):  # packed bytes belong to a device
                continue
            torch.library.opcheck(getattr(torch.ops.qkernels, op).default, arguments)
            count += 1
    for _, pack, epilogue, x, residual in itertools.islice(linear_cases(True), 0, 40, 7):
        packed = ops.linear_pack(*on("cuda", pack), epilogue)
        arguments = (*on("cuda", (x.contiguous(),)), packed, *on("cuda", (residual,)), pack[0].shape[0], epilogue.dtype)
        torch.library.opcheck(torch.ops.qkernels.linear.default, arguments)
        count += 1
    return f"{count} samples"


def some_linear(m: int, n: int, k: int):
    """(packed, x) on the GPU for a uint8 linear."""
    import torch

    from qkernels import ops
    from qkernels.ops.epilogue import Epilogue

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


def check_graph(small: bool) -> str:
    import torch

    from qkernels import ops

    shapes = [(4, 512, 1024), (16, 256, 8192), (200, 256, 512)]  # few rows; a split of K; tiles
    for m, n, k in shapes:
        packed, x = some_linear(m, n, k)
        grid = (torch.tensor([0.05], device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda"))
        y = torch.randn(m, n, device="cuda")

        def run(x=x, packed=packed, y=y, grid=grid, n=n):
            return ops.linear(x, packed, n), ops.fake_quant(y, *grid, None, -128, 127)

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run()  # warm up, as torch asks
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for _ in range(3):
            x.copy_(torch.randint_like(x, 0, 256)), y.normal_()
            graph.replay()
            for got, expected in zip(captured, run(), strict=True):
                assert torch.equal(got, expected), f"a replay for {m}x{n}x{k} differs"
    return f"{len(shapes)} graphs replayed with new data"


def check_streams(small: bool) -> str:
    import torch

    from qkernels import ops

    packed, x = some_linear(16, 256, 8192)  # with a split of K: a workspace a call
    expected = ops.linear(x, packed, 256)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for turn in range(40):
        with torch.cuda.stream(streams[turn % 4]):
            results.append(ops.linear(x, packed, 256))
    torch.cuda.synchronize()
    assert all(torch.equal(r, expected) for r in results), "streams disturb one another"
    return "40 calls on 4 streams"


def check_errors(small: bool) -> str:
    import torch

    from qkernels import ops

    packed, x = some_linear(9, 32, 64)
    good = ops.linear(x, packed, 32)
    wrong: list[tuple[str, Callable[[], object]]] = [
        ("packed must be on the CPU", lambda: ops.linear(x.cpu(), packed, 32)),
        ("packed must be on cuda:0", lambda: ops.linear(x, packed.cpu(), 32)),
        ("packed must be an unchanged result", lambda: ops.linear(x[:, :60], packed, 32)),
        ("packed must be an unchanged result", lambda: ops.linear(x, packed[:-1], 32)),
        ("input must be uint8", lambda: ops.linear(x.view(torch.int8), packed, 32)),
        ("output_dtype", lambda: ops.linear(x, packed, 32, torch.float32)),
        ("residual must not be given", lambda: ops.linear(x, packed, 32, torch.uint8, good)),
    ]
    for words, call in wrong:
        try:
            call()
        except RuntimeError as error:
            if words not in str(error):
                raise AssertionError(f"expected '{words}' in: {error}") from error
        else:
            raise AssertionError(f"no error where '{words}' was due")
    torch.cuda.synchronize()
    assert torch.equal(ops.linear(x, packed, 32), good), "an error has left something behind"
    return f"{len(wrong)} mistakes named; the device is unharmed"


def check_sanitizer(small: bool) -> str:
    folders = [*os.environ.get("PATH", "").split(os.pathsep), os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if tool is None:
        return "skipped: no compute-sanitizer in PATH or CUDA_HOME"
    for kind in ("memcheck", "racecheck", "synccheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, __file__, "--only", "bits", "--small"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
        if done.returncode != 0:
            raise AssertionError(f"{kind}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return "memcheck, racecheck and synccheck found nothing on small shapes"


# ---- times -----------------------------------------------------------------------------------------------------------


def seconds(calls: list[Callable[[], object]], blocks: int = 15) -> float:
    """The median time of a call over blocks that go through `calls`, which read different memory: more than the L2."""
    import torch

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
    import torch

    from qkernels import ops

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


def check_bench(small: bool, out: str | None = None) -> str:
    import torch

    from qkernels import _C, ops
    from qkernels.bench.harness import commit

    size = 1 << 26
    buffers = [torch.randn(size, device="cuda") for _ in range(4)]
    target = torch.empty_like(buffers[0])
    grid = (torch.tensor([0.05], device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda"))
    copy = seconds([lambda b=b: target.copy_(b) for b in buffers])
    fake = seconds([lambda b=b: ops.fake_quant_out(b, *grid, None, -128, 127, target) for b in buffers])
    theirs = seconds([lambda b=b: torch.fake_quantize_per_tensor_affine(b, *grid, -128, 127) for b in buffers])
    buffers.clear()
    shapes = [
        (4096, 4096, 4096),
        (1, 4096, 4096),
        (8, 4096, 12288),
        (16, 4096, 4096),
        (64, 4096, 4096),
        (512, 4096, 4096),
    ]
    shapes += [(128, 1000, 2048), (4096, 12288, 4096), (8192, 8192, 8192)]
    facts = torch.cuda.get_device_properties(0)
    result = {
        "gpu": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "built_for": _C.cuda_archs,
        "copy_bytes_per_second": 8 * size / copy,
        "fake_quant": {"elements": size, "seconds": fake, "torch_seconds": theirs, "of_copy": copy / fake},
        "linear": [bench_linear(*shape) for shape in shapes],
    }
    name = re.sub(r"[^a-z0-9]+", "_", facts.name.lower()).strip("_")
    path = Path(out) if out else ROOT / f"bench/results/{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    first = result["linear"][0]
    return f"{first['tops']:.0f} TOPS at 4096 cubed, {first['bf16_seconds'] / first['seconds']:.2f}x bf16; wrote {path}"


PARTS = {
    "bits": check_bits,
    "model": check_model,
    "opcheck": check_opcheck,
    "graph": check_graph,
    "streams": check_streams,
    "errors": check_errors,
    "bench": check_bench,
    "sanitizer": check_sanitizer,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="small shapes, for compute-sanitizer")
    parser.add_argument("--out", help="where the times go")
    arguments = parser.parse_args()
    start = time.monotonic()
    torch = require_gpu()
    build(torch)
    print(f"gpu-check: {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    failed = 0
    for name in arguments.only:
        if time.monotonic() - start > BUDGET_SECONDS - 60:
            print(f"{name:10} skipped: {BUDGET_SECONDS} seconds are nearly over")
            continue
        began = time.monotonic()
        try:
            said = check_bench(arguments.small, arguments.out) if name == "bench" else PARTS[name](arguments.small)
            verdict = "ok"
        except Exception as error:  # a part that fails must not hide the others
            failed, verdict, said = failed + 1, "FAILED", f"{type(error).__name__}: {error}"
        print(f"{name:10} {verdict} ({time.monotonic() - began:.0f} s) {said}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
