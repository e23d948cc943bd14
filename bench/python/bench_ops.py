"""Times linear, convolution and the tail of a network against torch's quantized engines and ONNX Runtime.

    python bench/python/bench_ops.py gemm --json bench/results/gemm.json
    python bench/python/bench_ops.py conv --threads 2 --engines qkernels,torch_onednn
    python bench/python/bench_ops.py conv --isa avx2
    python bench/python/bench_ops.py tail
    python bench/python/bench_ops.py dynamic --filter bert

Operands stay int8 and in each engine's own format and layout; weights are prepacked; outputs are requantized to uint8
with per-channel scales and a bias. `tail` is a global average pool and a linear layer, two calls here and in torch, one
session in ONNX Runtime. `dynamic` takes and returns float32, quantized on arrival: by rows here, as a whole in torch
(per-channel weights in both).
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import BENCH, ISA_CAPS, Worker, isa_environment, measure, output_file, read_shapes, serve, write_json

ENGINES = ("qkernels", "torch_fbgemm", "torch_x86", "torch_onednn", "ort")


# ------------------------------------------------------------------------------------------------- operands
def normal_weight(shape: list[int]):
    """Normal, the largest of a channel 127: some kernels' time depends on how many are large."""
    import torch

    generator = torch.Generator().manual_seed(0)
    floats = torch.randn(shape, generator=generator)
    largest = floats.abs().flatten(1).amax(1).view(-1, *[1] * (len(shape) - 1))
    weight = (floats / largest * 127).round().to(torch.int8)
    scale = torch.rand(shape[0], generator=generator) * 0.01 + 0.001
    bias = torch.randn(shape[0], generator=generator)
    return weight, scale, bias


def conv_sizes(sizes: list[int]) -> dict[str, int]:
    names = ("n", "c", "h", "w", "o", "kh", "kw", "stride", "pad", "dilation", "groups")
    return dict(zip(names, sizes, strict=True))


# ------------------------------------------------------------------------------------------------- qkernels
def qkernels_gemm(m: int, k: int, n: int) -> Callable[[], object]:
    import torch

    from qkernels import ops

    weight, scale, bias = normal_weight([n, k])
    x = torch.randint(0, 256, (m, k), dtype=torch.uint8)
    epilogue = ops.Epilogue(dtype=torch.uint8, scale=0.7, zero_point=11)
    packed = ops.linear_pack(weight, scale, None, bias, 0.02, 7, torch.uint8, epilogue)
    return lambda: ops.linear(x, packed, n, torch.uint8)


def qkernels_dynamic(m: int, k: int, n: int) -> Callable[[], object]:
    import torch

    from qkernels import ops

    weight, scale, bias = normal_weight([n, k])
    x, sums = torch.randn(m, k), weight.sum(1, dtype=torch.int32)
    epilogue = ops.Epilogue(dtype=torch.int32)
    packed = ops.linear_pack(weight, torch.ones(1), None, None, 1.0, 0, torch.uint8, epilogue)

    def run():
        codes, row_scale, zero_point = ops.quantize_rows(x, 0, 255, False, torch.uint8)
        return ops.linear_rows(codes, packed, row_scale, zero_point, scale, sums, bias, n)

    return run


def qkernels_conv(sizes: list[int]) -> Callable[[], object]:
    import torch

    from qkernels import ops

    s = conv_sizes(sizes)
    weight, scale, bias = normal_weight([s["o"], s["c"] // s["groups"], s["kh"], s["kw"]])
    x = torch.randint(0, 256, (s["n"], s["c"], s["h"], s["w"]), dtype=torch.uint8)
    x = x.contiguous(memory_format=torch.channels_last)
    epilogue = ops.Epilogue(dtype=torch.uint8, scale=0.7, zero_point=11)
    stride, padding, dilation = [s["stride"]] * 2, [s["pad"]] * 4, [s["dilation"]] * 2
    packed = ops.conv_pack(
        weight,
        scale,
        None,
        bias,
        0.02,
        7,
        torch.uint8,
        epilogue,
        stride,
        padding,
        dilation,
        s["groups"],
        False,
        "zeros",
    )
    out = [
        (size + 2 * s["pad"] - s["dilation"] * (kernel - 1) - 1) // s["stride"] + 1
        for size, kernel in ((s["h"], s["kh"]), (s["w"], s["kw"]))
    ]
    return lambda: ops.conv(x, packed, None, s["o"], out, torch.uint8)


def qkernels_tail(n: int, c: int, h: int, w: int, o: int) -> Callable[[], object]:
    import torch

    from qkernels import ops

    weight, scale, bias = normal_weight([o, c])
    x = torch.randint(0, 256, (n, c, h, w), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    epilogue = ops.Epilogue(dtype=torch.uint8, scale=0.7, zero_point=11)
    packed = ops.linear_pack(weight, scale, None, bias, 0.02, 7, torch.uint8, epilogue)
    grids = 0.02, 7, 0.02, 7, 0, 255

    def run():
        return ops.linear(ops.adaptive_avg_pool(x, [1, 1], *grids, torch.uint8).flatten(1), packed, o, torch.uint8)

    return run


# ------------------------------------------------------------------------------------------------- torch
def torch_quantized_weight(shape: list[int]):
    import torch

    weight, scale, bias = normal_weight(shape)
    zero_points = torch.zeros(shape[0], dtype=torch.int64)
    return torch._make_per_channel_quantized_tensor(weight, scale.double(), zero_points, 0), bias


def torch_gemm(engine: str, m: int, k: int, n: int) -> Callable[[], object]:
    import torch

    torch.backends.quantized.engine = engine
    weight, bias = torch_quantized_weight([n, k])
    x = torch._make_per_tensor_quantized_tensor(torch.randint(0, 256, (m, k), dtype=torch.uint8), 0.02, 7)
    packed = torch.ops.quantized.linear_prepack(weight, bias)
    return lambda: torch.ops.quantized.linear(x, packed, 0.7, 11)


def torch_dynamic(engine: str, m: int, k: int, n: int) -> Callable[[], object]:
    import torch

    torch.backends.quantized.engine = engine
    packed = torch.ops.quantized.linear_prepack(*torch_quantized_weight([n, k]))
    x = torch.randn(m, k)
    return lambda: torch.ops.quantized.linear_dynamic(x, packed, False)


def torch_conv(engine: str, sizes: list[int]) -> Callable[[], object]:
    import torch

    torch.backends.quantized.engine = engine
    s = conv_sizes(sizes)
    weight, bias = torch_quantized_weight([s["o"], s["c"] // s["groups"], s["kh"], s["kw"]])
    codes = torch.randint(0, 256, (s["n"], s["c"], s["h"], s["w"]), dtype=torch.uint8)
    x = torch._make_per_tensor_quantized_tensor(codes, 0.02, 7).contiguous(memory_format=torch.channels_last)
    two = lambda v: [v, v]  # noqa: E731
    packed = torch.ops.quantized.conv2d_prepack(
        weight, bias, two(s["stride"]), two(s["pad"]), two(s["dilation"]), s["groups"]
    )
    return lambda: torch.ops.quantized.conv2d(x, packed, 0.7, 11)


def torch_tail(engine: str, n: int, c: int, h: int, w: int, o: int) -> Callable[[], object]:
    import torch

    torch.backends.quantized.engine = engine
    codes = torch.randint(0, 256, (n, c, h, w), dtype=torch.uint8)
    x = torch._make_per_tensor_quantized_tensor(codes, 0.02, 7).contiguous(memory_format=torch.channels_last)
    packed = torch.ops.quantized.linear_prepack(*torch_quantized_weight([o, c]))
    pool = torch.nn.functional.adaptive_avg_pool2d
    return lambda: torch.ops.quantized.linear(pool(x, 1).flatten(1), packed, 0.7, 11)


# ------------------------------------------------------------------------------------------------- ONNX Runtime
def ort_session(
    op: str, weight, scale, bias, x_shape: list[int], attributes: dict, threads: int, pooled: bool = False
) -> Callable[[], object]:
    """One operation, behind a global average pool of an NHWC input if `pooled`."""
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    def constant(name, value):
        return numpy_helper.from_array(value, name)

    f32, u8 = np.float32, np.uint8
    bias_int = np.round(bias.numpy() / (0.02 * scale.numpy())).astype(np.int32)
    constants = [
        constant("sx", f32(0.02).reshape(())),
        constant("zx", u8(7).reshape(())),
        constant("w", weight.numpy()),
        constant("sw", scale.numpy()),
        constant("zw", np.zeros(len(scale), np.int8)),
        constant("so", f32(0.7).reshape(())),
        constant("zo", u8(11).reshape(())),
    ]
    inputs = ["x", "sx", "zx", "w", "sw", "zw", "so", "zo"]
    if op == "QLinearConv":
        constants.append(constant("b", bias_int))
        inputs.append("b")
    nodes = []
    if pooled:
        inputs[0] = "flat"
        pool = ["x", "sx", "zx", "sx", "zx"]
        nodes = [
            helper.make_node("QLinearGlobalAveragePool", pool, ["mean"], domain="com.microsoft", channels_last=1),
            helper.make_node("Flatten", ["mean"], ["flat"]),
        ]
    nodes.append(helper.make_node(op, inputs, ["y"], **attributes))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, x_shape)],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, None)],
        constants,
    )
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    x = ort.OrtValue.ortvalue_from_numpy(np.random.randint(0, 256, x_shape).astype(np.uint8))
    binding.bind_ortvalue_input("x", x)
    binding.bind_output("y", "cpu")
    return lambda: session.run_with_iobinding(binding)


def ort_gemm(m: int, k: int, n: int, threads: int) -> Callable[[], object]:
    weight, scale, bias = normal_weight([n, k])
    return ort_session("QLinearMatMul", weight.t().contiguous(), scale, bias, [m, k], {}, threads)


def ort_conv(sizes: list[int], threads: int) -> Callable[[], object]:
    s = conv_sizes(sizes)
    weight, scale, bias = normal_weight([s["o"], s["c"] // s["groups"], s["kh"], s["kw"]])
    attributes = {
        "kernel_shape": [s["kh"], s["kw"]],
        "strides": [s["stride"]] * 2,
        "pads": [s["pad"]] * 4,
        "dilations": [s["dilation"]] * 2,
        "group": s["groups"],
    }
    return ort_session("QLinearConv", weight, scale, bias, [s["n"], s["c"], s["h"], s["w"]], attributes, threads)


def ort_tail(n: int, c: int, h: int, w: int, o: int, threads: int) -> Callable[[], object]:
    weight, scale, bias = normal_weight([o, c])
    return ort_session("QLinearMatMul", weight.t().contiguous(), scale, bias, [n, h, w, c], {}, threads, pooled=True)


# ------------------------------------------------------------------------------------------------- driver
def build_case(engine: str, threads: int, message: dict) -> Callable[[], object]:
    kind, sizes = message["kind"], message["sizes"]
    if kind == "conv":
        sizes = [sizes]
    if engine == "qkernels":
        cases = {"gemm": qkernels_gemm, "conv": qkernels_conv, "tail": qkernels_tail, "dynamic": qkernels_dynamic}
        return cases[kind](*sizes)
    if engine == "ort":
        cases = {"gemm": ort_gemm, "conv": ort_conv, "tail": ort_tail}
        if kind not in cases:
            raise ValueError("ONNX Runtime has no single operation for it")
        return cases[kind](*sizes, threads)
    cases = {"gemm": torch_gemm, "conv": torch_conv, "tail": torch_tail, "dynamic": torch_dynamic}
    return cases[kind](engine.removeprefix("torch_"), *sizes)


def macs(kind: str, sizes: list[int]) -> int:
    if kind == "tail":
        n, c, _, _, o = sizes
        return n * c * o
    if kind != "conv":
        m, k, n = sizes
        return m * k * n
    s = conv_sizes(sizes)
    h, w = (
        (size + 2 * s["pad"] - s["dilation"] * (kernel - 1) - 1) // s["stride"] + 1
        for size, kernel in ((s["h"], s["kh"]), (s["w"], s["kw"]))
    )
    return s["n"] * s["o"] * h * w * (s["c"] // s["groups"]) * s["kh"] * s["kw"]


def peak_gmacs(worker: Worker, rounds: int) -> float:
    """The rate of a large matrix product that stays in the cache, under the worker's instruction set and threads."""
    sizes = [512, 1024, 1024]
    row = measure([worker], {"kind": "gemm", "sizes": sizes}, rounds)
    return macs("gemm", sizes) / row["qkernels"]["min_us"] / 1e3


def run_worker(engine: str, threads: int) -> None:
    if engine != "ort":
        import torch

        torch.set_num_threads(threads)
    if engine == "qkernels":
        import qkernels  # noqa: F401
    serve(lambda message: build_case(engine, threads, message))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=("gemm", "conv", "tail", "dynamic"))
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--filter", default="", help="only shapes whose name contains this")
    parser.add_argument(
        "--isa",
        default="",
        choices=["", *ISA_CAPS],
        help="limit every engine to this instruction set (ONNX Runtime, which cannot be limited, is left out)",
    )
    parser.add_argument("--json", type=output_file)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        run_worker(args.worker, args.threads)
        return

    engines = [engine for engine in args.engines.split(",") if not (args.isa and engine == "ort")]
    env = isa_environment(args.isa)
    workers = [Worker([os.path.abspath(__file__)], engine, args.threads, env) for engine in engines]
    shapes = read_shapes(BENCH / "shapes" / f"{'gemm' if args.kind == 'dynamic' else args.kind}.txt")
    results, slower = {}, []
    measure(workers, {"kind": "gemm", "sizes": [64, 64, 64]}, 1)  # all have started before one is timed alone
    peak = peak_gmacs(workers[engines.index("qkernels")], args.rounds) if "qkernels" in engines else float("nan")
    print(
        f"{'shape':34s}"
        + "".join(f"{engine:>14s}" for engine in engines)
        + f"{'vs best peer':>14s}{'GMAC/s':>9s}  of peak"
    )
    for name, sizes in shapes.items():
        if args.filter not in name:
            continue
        row = measure(workers, {"kind": args.kind, "sizes": sizes}, args.rounds)
        ours = row.get("qkernels", {}).get("median_us")
        peers = [r["median_us"] for engine, r in row.items() if engine != "qkernels" and "median_us" in r]
        ratio = ours / min(peers) if ours and peers else float("nan")
        gmacs = macs(args.kind, sizes) / ours / 1e3 if ours else float("nan")
        results[name] = {
            "sizes": sizes,
            "engines": row,
            "time_vs_best_peer": ratio,
            "gmacs": gmacs,
            "of_peak": gmacs / peak,
        }
        if ratio > 1:
            slower.append(name)
        cells = "".join(f"{row[e]['median_us']:14.1f}" if "median_us" in row[e] else f"{'-':>14s}" for e in engines)
        print(f"{name:34s}{cells}{ratio:14.2f}{gmacs:9.0f}{gmacs / peak:9.2f}", flush=True)
    for worker in workers:
        worker.close()
    print(f"{len(results)} shapes, slower than the best peer on {len(slower)}: {', '.join(slower) or 'none'}")
    if args.json:
        payload = {
            "kind": args.kind,
            "threads": args.threads,
            "rounds": args.rounds,
            "isa": args.isa,
            "environment": env,
            "peak_gmacs": peak,
            "results": results,
        }
        write_json(args.json, payload)


if __name__ == "__main__":
    main()
