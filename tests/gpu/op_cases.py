"""Parts floats, ops, errors and opcheck: every operation by itself."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import device
import torch
from cases import Cases
from device import all_equal, equal, tensors
from weighted_cases import some_linear, weighted_calls

from qkernels import ops

# Ops whose packed bytes belong to a device: their cases pack by themselves.
PACKED = ("conv_pack", "conv", "linear_pack", "linear", "linear_rows", "pack_on_grid")
CUDA_OPS = (
    *("quantize", "quantize_out", "dequantize", "dequantize_out", "fake_quant", "fake_quant_out", "quantize_rows"),
    *("fake_quant_backward", "fake_quant_backward_out", "fake_quant_mask", "fake_quant_mask_backward"),
    *("lsq", "lsq_out", "lsq_backward", "lsq_backward_out", "pact", "pact_backward"),
    *("observe", "observe_minmax", "observe_fake_quant_out", "observe_histogram"),
    *("dorefa_weight", "dorefa_weight_backward", "dorefa_gradient", "binary_sign", "binary_sign_backward"),
    *("batch_norm_statistics", "norm_fake_quant", "norm_fake_quant_backward"),
    *("pack_signs", "binary_weight_pack", "binary_linear", "binary_conv2d"),
    *("foreach_fake_quant", "foreach_fake_quant_backward", "foreach_observe_fake_quant"),
    *("lookup", "add", "mul", "cat", "max_pool", "avg_pool", "adaptive_avg_pool"),
    *PACKED,
)


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
            equal(op(*device.on(arguments)), op(*arguments))

    def huge():
        """More than 2^31 elements: the last of them."""
        size = (1 << 31) + 100
        if torch.cuda.mem_get_info()[0] < 6 * size:
            return "skipped: too little memory"
        x = torch.zeros(size, dtype=torch.bfloat16, device=device.NAME)
        x[-50:] = torch.linspace(-3, 3, 50)
        grid = torch.tensor([0.1]), torch.zeros(1, dtype=torch.int32)
        arguments = (None, -8, 7, torch.int8)
        expected = ops.quantize(x[-80:].cpu(), *grid, *arguments)
        equal(ops.quantize(x, *device.on(grid), *arguments)[-80:], expected)

    for case in itertools.product(shapes, (None, 0, -1), (torch.float32, torch.bfloat16, torch.float16)):
        yield f"floats {case}", lambda case=case: run(*case)
    if not small:
        yield "more than 2^31 elements", huge


def detached(value: Any) -> Any:
    """`value` without gradients, also of lists and tuples."""
    if isinstance(value, list | tuple):
        return type(value)(detached(v) for v in value)
    return value.detach() if isinstance(value, torch.Tensor) else value


def compare(call: Callable[..., Any], make: Callable[[], tuple]) -> None:
    """Raises unless an op gives the same bits on both devices, in its results and in what it writes to."""
    arguments = detached(make())
    moved = device.on(arguments)
    expected = [*tensors(call(*arguments)), *tensors(arguments)]
    all_equal([*tensors(call(*moved)), *tensors(moved)], expected)


def samples(small: bool) -> Cases:
    """The samples of opcheck, of every op without packed bytes."""
    from opcheck_samples import SAMPLES

    for op in [name for name in CUDA_OPS if name not in PACKED]:
        call = getattr(torch.ops.qkernels, op).default
        for number, make in enumerate(SAMPLES[op]):
            yield f"{op} sample {number}", lambda call=call, make=make: compare(call, make)


def opcheck(small: bool) -> Cases:
    """What torch asks of an operation: schema, gradients, shape rule, and tracing."""
    from opcheck_samples import SAMPLES

    def run(call, arguments: tuple) -> None:
        torch.library.opcheck(call, arguments)

    for op in CUDA_OPS:
        if op in ("linear", "conv", "linear_rows"):  # below, with bytes that are packed for the device
            continue
        call = getattr(torch.ops.qkernels, op).default
        for number, make in enumerate(SAMPLES[op]):
            yield f"{op} sample {number}", lambda call=call, make=make: run(call, device.on(make()))
    for name, call, make in weighted_calls():
        yield name, lambda call=call, make=make: run(call, make())


def errors(small: bool) -> Cases:
    packed, x = some_linear(9, 32, 64)
    good = ops.linear(x, packed, 32)
    unit = device.on((torch.ones(1), torch.zeros(1, dtype=torch.int32)))

    def run(words, call):
        message = "no error"
        try:
            call()
        except RuntimeError as error:
            message = str(error)
        assert re.search(words, message), f"expected '{words}' in: {message}"
        device.synchronize()
        assert torch.equal(ops.linear(x, packed, 32), good), "an error has left something behind"

    memory, huge = "^quantize: out of memory for a torch.uint8", torch.ones(1, device=device.NAME).expand(1 << 45)
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
