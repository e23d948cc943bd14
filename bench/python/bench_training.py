"""Rounding in training: what it keeps for the backward, what one call for all weights would save, and torch's times.

    python bench/python/bench_training.py [--json FILE] [--part memory weights torch]

memory: bytes an element that are still allocated after a forward of 4 Mi float32 elements, the output apart. The input
is an intermediate result that nothing else holds, so 4 bytes mean that it is kept. "wide" data are clipped in part,
"narrow" data nowhere. Peers are torch's own ops.
weights: the weights of MobileNetV2 and of the MNIST network, fresh grids with codes, forward and backward: one call a
weight, as trained models do, and one call for all. CPU time, the shortest of many.
torch: what torch has for the same, at 4 and 200 MiB; memory is reused on our side, as the pool of an allocator would.
"limit" is the time of torch against that of the bytes that must move, each way at the speed of torch's own copy: no
kernel can be further ahead while its input and output lie where they lie.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import harness
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import qkernels
from qkernels import ops
from qkernels.bench.networks import float_network

ELEMENTS = 4 << 20
Call = Callable[[Tensor], Tensor]


def rounding() -> dict[str, Call]:
    """Each on a grid of [-1.28, 1.27]."""
    scale, zero_point = torch.tensor([0.01]), torch.tensor([0], dtype=torch.int32)
    learned, offset = scale.clone().requires_grad_(), torch.zeros(1)
    grid, ends = (scale, zero_point, None), (-128, 127)
    theirs = nn.Parameter(torch.tensor([0.01])), nn.Parameter(torch.zeros(1))
    return {
        "ste, mask (activations)": lambda x: ops.fake_quant(x, *grid, *ends, keep="mask"),
        "ste, input (weights)": lambda x: ops.fake_quant(x, *grid, *ends),
        "lsq": lambda x: ops.lsq(x, learned, offset, None, *ends, 1.0),
        "pact": lambda x: ops.pact(x, learned, zero_point, None, *ends),
        "sign": lambda x: ops.binary_sign(x),
        "torch fake_quantize": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.01, 0, *ends),
        "torch learnable": lambda x: torch._fake_quantize_learnable_per_tensor_affine(x, *theirs, *ends, 1.0),
    }


def kept_bytes(call: Call, spread: float) -> float:
    base = torch.rand(ELEMENTS).sub_(0.5).mul_(2 * spread).requires_grad_()
    call(base * 1.0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        y = call(base * 1.0)
    return (sum(event.self_cpu_memory_usage for event in found.events()) - y.numel() * 4) / ELEMENTS


def memory() -> dict[str, dict[str, float]]:
    return {name: {"wide": kept_bytes(call, 2.0), "narrow": kept_bytes(call, 1.0)} for name, call in rounding().items()}


def shortest(call: Callable[[], None], repeats: int = 60) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def all_weights(sizes: list[tuple[int, ...]]) -> dict[str, float]:
    weights = [torch.randn(size, requires_grad=True) for size in sizes]
    grads = [torch.randn(size) for size in sizes]
    rule = -127, 127, True, qkernels.core.qspec.MIN_SCALE, torch.int8

    def one_by_one() -> None:
        for weight, grad in zip(weights, grads, strict=True):
            ops.foreach_observe_fake_quant([weight], [0], *rule)[0][0].backward(grad)

    def at_once() -> None:
        torch.autograd.backward(ops.foreach_observe_fake_quant(weights, [0] * len(weights), *rule)[0], grads)

    result = {"weights": len(sizes), "elements": sum(w.numel() for w in weights)}
    return result | {"one_by_one_us": 1e6 * shortest(one_by_one), "at_once_us": 1e6 * shortest(at_once)}


def weight_sizes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(m.weight.shape) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def weights() -> dict[str, dict[str, float]]:
    mnist = [(20, 1, 5, 5), (50, 20, 5, 5), (500, 800), (10, 500)]
    return {"mnist": all_weights(mnist), "mobilenet_v2": all_weights(weight_sizes(float_network("mobilenet_v2")))}


def against_torch(megabytes: int) -> dict[str, tuple[Callable[[], object], Callable[[], object], float]]:
    """Ours, torch's, and the copies of the tensor that the bytes to be moved amount to."""
    x, grad = (torch.randn(megabytes << 10, 256) for _ in range(2))
    y, by_x, leaf = torch.empty_like(x), torch.empty_like(x), x.clone().requires_grad_()
    scale, zero_point, learned = torch.tensor([0.02]), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    wide, grid, ends = torch.tensor([0.1]), (scale, zero_point, None), (-128, 127)
    theirs = leaf, scale.clone().requires_grad_(), learned.clone().requires_grad_()
    low, high = torch.full((1,), float("inf")), torch.full((1,), -float("inf"))
    ours_state, their_state = ((low.clone(), high.clone(), torch.ones(1), zero_point.clone()) for _ in range(2))
    on, rule = torch.ones(1, dtype=torch.int64), (*ends, False, 2.0**-50, 0.01, "x")

    def straight_through() -> None:
        ops.fake_quant_out(x, *grid, *ends, y)
        ops.fake_quant_backward_out(grad, x, *grid, *ends, by_x)

    def unclipped() -> None:
        torch.autograd.grad(ops.fake_quant(leaf, wide, zero_point, None, *ends, keep="mask"), leaf, grad)

    def learned_step() -> None:
        ops.fake_quant_out(x, *grid, *ends, y)
        ops.lsq_backward_out(grad, x, scale, learned, None, *ends, 1.0, by_x)

    def torch_step(step: float) -> Callable[[], object]:
        return lambda: torch.autograd.grad(torch.fake_quantize_per_tensor_affine(leaf, step, 0, *ends), leaf, grad)

    learnable = torch._fake_quantize_learnable_per_tensor_affine
    fused = torch.fused_moving_avg_obs_fake_quant
    return {
        "fake_quant forward": (
            lambda: ops.fake_quant_out(x, *grid, *ends, y),
            lambda: torch.fake_quantize_per_tensor_affine(x, 0.02, 0, *ends),
            1.0,
        ),
        "fake_quant forward + backward": (straight_through, torch_step(0.02), 2.5),
        "the same, nothing clipped, mask": (unclipped, torch_step(0.1), 1.0),
        "lsq forward + backward": (
            learned_step,
            lambda: torch.autograd.grad(learnable(*theirs, *ends, 1.0), theirs, grad),
            2.5,
        ),
        "observer forward": (
            lambda: ops.observe_fake_quant_out(x, *ours_state, None, None, *rule, y),
            lambda: fused(x, on, on, *their_state, 0.01, *ends, 0, False, False),
            1.5,
        ),
    }


def peers() -> dict[str, dict[str, float]]:
    rows = {}
    for megabytes, repeats in ((4, 60), (200, 6)):
        copy = shortest(partial(torch.empty(megabytes << 18).copy_, torch.randn(megabytes << 18)), repeats)
        for name, (ours, theirs, copies) in against_torch(megabytes).items():
            one, other = shortest(ours, repeats), shortest(theirs, repeats)
            rows[f"{name}, {megabytes} MiB"] = {
                "us": 1e6 * one,
                "torch_us": 1e6 * other,
                "copies": one / copy,
                "times_as_fast": other / one,
                "limit": other / (copies * copy),
            }
    return rows


PARTS = {"memory": memory, "weights": weights, "torch": peers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=harness.output_file)
    parser.add_argument("--part", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    payload = {"machine": harness.machine(), "commit": harness.commit(), "torch": torch.__version__}
    for part in options.part:
        payload[part] = PARTS[part]()
        for name, row in payload[part].items():
            print(f"{part}: {name:<40}", "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    if options.json:
        harness.write_json(options.json, payload)


if __name__ == "__main__":
    main()
