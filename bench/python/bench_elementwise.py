"""Elementwise ops against a copy that moves the same bytes: median time ratios, one thread, memory reused.

    python bench/python/bench_elementwise.py [--json FILE] [--sizes 4 200] [--only TEXT] [--repeats 15]

A ratio of 1 is memory speed; "best" is the ratio of the shortest times, for busy machines. The peer is torch's own
copy_ of uint8 tensors with (bytes read + bytes written) / 2 elements; both are timed in turns in one process, so that a
busy machine slows both.
"""

import argparse
import contextlib
import ctypes
import statistics
import time

import harness
import torch

import qkernels
from qkernels import ops


def seconds(call, inner: int) -> float:
    start = time.perf_counter()
    for _ in range(inner):
        call()
    return (time.perf_counter() - start) / inner


def ratio(call, moved_bytes: int, repeats: int) -> dict:
    source = torch.randint(0, 256, (moved_bytes // 2,), dtype=torch.uint8)
    target = torch.empty_like(source)

    def copy():
        target.copy_(source)

    call(), copy()
    inner = max(1, int(2e-3 / max(seconds(copy, 1), 1e-7)))
    pairs = [(seconds(call, inner), seconds(copy, inner)) for _ in range(repeats)]
    ours, peer = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {
        "us": ours * 1e6,
        "copy_us": peer * 1e6,
        "ratio": statistics.median(a / b for a, b in pairs),
        "best_ratio": min(a for a, _ in pairs) / min(b for _, b in pairs),
        "gb_per_s": moved_bytes / ours / 1e9,
    }


@contextlib.contextmanager
def freed_memory_kept():
    """glibc keeps what is freed meanwhile: an op that allocates gets the pages of the call before."""
    libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4
    libc.mallopt(trim_threshold, -1), libc.mallopt(mmap_max, 0)
    yield
    libc.mallopt(trim_threshold, 128 << 10), libc.mallopt(mmap_max, 65536)


def grid_cases(dtype: torch.dtype, n: int):
    grid = torch.tensor([0.05]), torch.tensor([3], dtype=torch.int32), None
    x = (torch.randn(n // dtype.itemsize // 256, 256) * 2).to(dtype)
    y, q = torch.empty_like(x), torch.empty_like(x, dtype=torch.int8)
    name, one_byte = str(dtype).removeprefix("torch."), x.numel() * (dtype.itemsize + 1)
    yield f"quantize {name}", lambda: ops.quantize_out(x, *grid, -128, 127, q), one_byte
    yield f"dequantize {name}", lambda: ops.dequantize_out(q, *grid, y), one_byte
    yield f"fake_quant {name}", lambda: ops.fake_quant_out(x, *grid, -128, 127, y), 2 * n


def channel_cases(n: int):
    x = torch.randn(n // 1024, 256) * 2
    y, q = torch.empty_like(x), torch.empty_like(x, dtype=torch.int8)
    grid = torch.rand(256) * 0.1 + 0.01, torch.randint(-9, 9, (256,), dtype=torch.int32)
    yield "quantize channels innermost", lambda: ops.quantize_out(x, *grid, 1, -128, 127, q), x.numel() * 5
    yield "dequantize channels innermost", lambda: ops.dequantize_out(q, *grid, 1, y), x.numel() * 5
    yield "fake_quant channels innermost", lambda: ops.fake_quant_out(x, *grid, 1, -128, 127, y), 2 * n
    rows, out = x.view(256, -1), q.view(256, -1)
    yield "quantize channels outermost", lambda: ops.quantize_out(rows, *grid, 0, -128, 127, out), x.numel() * 5


def code_cases(n: int):
    """These ops have no out= form: for large tensors the time is that of fresh pages."""
    a, b = (torch.randint(0, 256, (1, 64, 64, n // 4096), dtype=torch.uint8).permute(0, 3, 1, 2) for _ in range(2))
    gate = b[:, :, :1, :1].contiguous()
    sum_grid = (0.02, 3, 0.03, 5, 0.04, 7, 0, 255, torch.uint8)
    table = torch.randperm(256).to(torch.uint8)
    yield "lookup (allocates)", lambda: ops.lookup(a, table), 2 * n
    yield "add (allocates)", lambda: ops.add(a, b, *sum_grid), 3 * n
    yield "mul gate (allocates)", lambda: ops.mul(a, gate, *sum_grid), 2 * n
    yield "max_pool 3x3/2 (allocates)", lambda: ops.max_pool(a, [3, 3], [2, 2], [1, 1], [1, 1]), n * 5 // 4
    yield "global mean", lambda: ops.adaptive_avg_pool(a, [1, 1], *sum_grid[2:]), n


def training_cases(n: int):
    """Forward and backward of a grid. A ratio is per copy of the fp32 tensor: 20 bytes an element are 2.5 copies."""
    x, grad = torch.randn(n // 1024, 256) * 2, torch.randn(n // 1024, 256)
    y, grad_x = torch.empty_like(x), torch.empty_like(x)
    scale, zero_point, zeros = torch.tensor([0.05]), torch.tensor([0], dtype=torch.int32), torch.zeros(1)
    ends = -128, 127

    def fake_quant(axis=None, scale=scale, zero_point=zero_point):
        ops.fake_quant_out(x, scale, zero_point, axis, *ends, y)
        ops.fake_quant_backward_out(grad, x, scale, zero_point, axis, *ends, grad_x)

    def lsq(axis=None, scale=scale, zero_point=zero_point, learned=zeros):
        ops.fake_quant_out(x, scale, zero_point, axis, *ends, y)
        ops.lsq_backward_out(grad, x, scale, learned, axis, *ends, 1.0, grad_x)

    def with_mask():
        _, mask, clipped, _ = ops.fake_quant_mask(x, scale, zero_point, None, *ends)
        return ops.fake_quant_mask_backward(grad, mask, None) if clipped else grad

    yield "fake_quant mask fwd+bwd (alloc.)", with_mask, 2 * n
    with freed_memory_kept():
        yield "fake_quant mask fwd+bwd", with_mask, 2 * n

    columns = 1, torch.rand(256) * 0.1 + 0.01, torch.zeros(256, dtype=torch.int32)
    yield "fake_quant fwd+bwd", fake_quant, 2 * n
    yield "fake_quant fwd+bwd ch. innermost", lambda: fake_quant(*columns), 2 * n
    yield "lsq fwd+bwd", lsq, 2 * n
    yield "lsq fwd+bwd ch. innermost", lambda: lsq(*columns, torch.zeros(256)), 2 * n

    torchs = torch.fake_quantize_per_tensor_affine
    yield "fake_quant forward, torch", lambda: torchs(x, 0.05, 0, *ends), 2 * n

    leaf, leaf_scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    leaf_zero = zeros.clone().requires_grad_()
    everything = leaf, leaf_scale, leaf_zero

    def autograd(forward, inputs):
        return lambda: torch.autograd.grad(forward(), inputs, grad)

    yield (
        "fake_quant autograd (allocates)",
        autograd(lambda: ops.fake_quant(leaf, scale, zero_point, None, *ends), leaf),
        2 * n,
    )
    yield (
        "fake_quant autograd, torch",
        autograd(lambda: torch.fake_quantize_per_tensor_affine(leaf, 0.05, 0, *ends), leaf),
        2 * n,
    )
    yield (
        "lsq autograd (allocates)",
        autograd(lambda: ops.lsq(leaf, leaf_scale, leaf_zero, None, *ends, 1.0), everything),
        2 * n,
    )
    yield (
        "lsq autograd, torch",
        autograd(
            lambda: torch._fake_quantize_learnable_per_tensor_affine(leaf, leaf_scale, leaf_zero, *ends, 1.0),
            everything,
        ),
        2 * n,
    )


def observer_cases(n: int):
    """Extremes, moving average, grid and fake-quantization. A ratio is per copy of the fp32 tensor."""
    x = torch.randn(n // 4096, 1024) * 2
    y, inf, ends = torch.empty_like(x), float("inf"), (-128, 127)

    def state(channels: int):
        low, high = torch.full((channels,), inf), torch.full((channels,), -inf)
        return low, high, torch.ones(channels), torch.zeros(channels, dtype=torch.int32)

    for name, axis, channels in (("tensor", None, 1), ("channel", 0, x.shape[0])):
        ours, theirs, on = state(channels), state(channels), torch.ones(1, dtype=torch.int64)
        rule = *ends, False, 2.0**-50, 0.01, "x"
        per_channel = axis is not None
        yield (
            f"observer per {name}",
            lambda ours=ours, axis=axis, rule=rule: ops.observe_fake_quant_out(x, *ours, None, axis, *rule, y),
            2 * n,
        )
        yield (
            f"observer per {name} (allocates)",
            lambda ours=ours, axis=axis, rule=rule: ops.observe_fake_quant(x, *ours, None, axis, *rule),
            2 * n,
        )
        if not per_channel or n <= 32 << 20:  # torch takes seconds for the channels of a large tensor
            args = 0.01, *ends, 0, per_channel, False
            yield (
                f"observer per {name}, torch",
                lambda on=on, theirs=theirs, args=args: torch.fused_moving_avg_obs_fake_quant(
                    x, on, on, *theirs, *args
                ),
                2 * n,
            )
        yield f"extremes per {name}", lambda axis=axis: ops.observe_minmax(x, axis), n


def rule_cases(n: int):
    x, grad = torch.randn(n // 1024, 256), torch.randn(n // 1024, 256)
    scale, zero_point, seed = torch.tensor([1 / 7]), torch.tensor([0], dtype=torch.int32), torch.tensor([1])
    weight = x, scale, zero_point, -7, 7
    yield "pact bwd (allocates)", lambda: ops.pact_backward(grad, x, scale, zero_point, None, -7, 7), 3 * n
    yield "dorefa weight fwd (allocates)", lambda: ops.dorefa_weight(*weight), 2 * n
    yield "dorefa weight bwd (allocates)", lambda: ops.dorefa_weight_backward(grad, *weight), 3 * n
    yield "dorefa gradient (allocates)", lambda: ops.dorefa_gradient(grad, seed, 4), 2 * n
    yield "sign fwd (allocates)", lambda: ops.binary_sign(x), 2 * n
    yield "sign bwd (allocates)", lambda: ops.binary_sign_backward(grad, x), 3 * n


def weight_cases(n: int):
    """A model of many weights in one call; a ratio is per copy of all of them."""
    total, kept = 0, []
    while total < n:
        kept.append(torch.randn(64 << len(kept) % 4, 288 << len(kept) % 3))
        total += kept[-1].numel() * 4
    axes, rule = [0] * len(kept), (-127, 127, True, 2.0**-50)
    yield f"foreach {len(kept)} weights (alloc.)", lambda: ops.foreach_observe_fake_quant(kept, axes, *rule), 2 * total
    yield (
        f"foreach {len(kept)} and codes (alloc.)",
        lambda: ops.foreach_observe_fake_quant(kept, axes, *rule, torch.int8),
        2 * total,
    )


def cases(megabytes: int):
    """(name, call, bytes moved); `megabytes` is the size of the larger tensor."""
    n = megabytes << 20
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield from grid_cases(dtype, n)
    yield from channel_cases(n)
    yield from training_cases(n)
    yield from observer_cases(n)
    yield from rule_cases(n)
    if megabytes <= 32:
        yield from weight_cases(n)
    yield from code_cases(n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=harness.output_file, help="also write the results to this file")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 200], help="MiB of the larger tensor")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    print(
        f"{'op':32s} {'MiB':>5s} {'us':>10s} {'GB/s':>7s} {'x copy':>7s} {'best':>6s}   isa {qkernels._C.isa_active()}"
    )
    for megabytes in options.sizes:
        for name, call, moved in cases(megabytes):
            if options.only not in name:
                continue
            result = {"op": name, "mib": megabytes, **ratio(call, moved, options.repeats)}
            results.append(result)
            print(
                f"{name:32s} {megabytes:5d} {result['us']:10.1f} {result['gb_per_s']:7.1f} "
                f"{result['ratio']:7.2f} {result['best_ratio']:6.2f}"
            )
    if options.json:
        facts = {"isa": qkernels._C.isa_active(), "torch": torch.__version__}
        harness.write_json(options.json, facts | {"results": results})


if __name__ == "__main__":
    main()
