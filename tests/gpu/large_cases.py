"""Part large: operations on tensors of many blocks of threads, whose results are joined, against the CPU."""

import functools
from collections.abc import Callable
from typing import Any

import device
import torch
from cases import Cases
from op_cases import compare
from torch import Tensor
from weighted_cases import codes

Call = tuple[Callable[..., Any], Callable[[], tuple]]  # an op, and what makes its arguments on the CPU


def large_calls(small: bool) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(6)
    rows, columns = (33, 97) if small else (1025, 3001)
    shape = (2, 20, 9, 7) if small else (16, 100, 56, 55)
    ops = torch.ops.qkernels

    def floats(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def image() -> Tensor:
        return floats(*shape).contiguous(memory_format=torch.channels_last)

    def code_image(dtype: torch.dtype = torch.uint8) -> Tensor:
        return codes(generator, dtype, *shape).contiguous(memory_format=torch.channels_last)

    def learned(size: int = 1) -> tuple[Tensor, Tensor]:
        return torch.rand(size, generator=generator) * 0.1 + 0.05, floats(size)

    def grid(size: int = 1) -> tuple[Tensor, Tensor]:
        return learned(size)[0], torch.zeros(size, dtype=torch.int32)

    def state(size: int = 1) -> tuple[Tensor, ...]:
        """Of an observer that has seen nothing."""
        empty = torch.full((size,), torch.inf), torch.full((size,), -torch.inf), torch.zeros(size)
        return *empty, torch.zeros(size, dtype=torch.int32)

    def weights() -> list[Tensor]:
        return [floats(64, size) for size in (9, 70, 576 if small else 40000)]

    def channels() -> tuple[Tensor, ...]:
        """What a batch normalization has of its channels: mean, inverse deviation, factor, shift."""
        return tuple(torch.rand(shape[1], generator=generator) + 0.1 for _ in range(4))

    both = lambda: (floats(rows, columns), floats(rows, columns))  # noqa: E731
    signed, out_grid = (-8, 7), (0.04, 3, 0, 255, torch.uint8)
    ends, observing = (-127, 127), (-127, 127, True, 1e-12, 0.1, "x")
    bins = lambda: (torch.full((1,), torch.inf), torch.full((1,), -torch.inf), torch.zeros(2048))  # noqa: E731
    found: dict[str, Call] = {
        "lsq_backward": (ops.lsq_backward, lambda: (*both(), *learned(), None, *signed, 0.3)),
        "lsq_backward of rows": (ops.lsq_backward, lambda: (*both(), *learned(rows), 0, *signed, 0.3)),
        "lsq_backward of columns": (ops.lsq_backward, lambda: (*both(), *learned(columns), 1, *signed, 0.3)),
        "pact_backward": (ops.pact_backward, lambda: (*both(), *grid(), None, *signed)),
        "pact_backward of columns": (ops.pact_backward, lambda: (*both(), *grid(columns), 1, *signed)),
        "fake_quant_backward": (ops.fake_quant_backward, lambda: (*both(), *grid(rows), 0, *signed)),
        "fake_quant_mask": (ops.fake_quant_mask, lambda: (floats(rows, columns), *grid(), None, *signed, torch.int8)),
        "dorefa_weight": (ops.dorefa_weight, lambda: (floats(rows, columns), *grid(), -7, 7)),
        "dorefa_weight_backward": (ops.dorefa_weight_backward, lambda: (*both(), *grid(), -7, 7)),
        "dorefa_gradient": (ops.dorefa_gradient, lambda: (floats(rows, columns), torch.tensor([7]), 4)),
        "binary_sign_backward": (ops.binary_sign_backward, lambda: (*both(), True)),
        "observe_minmax": (ops.observe_minmax, lambda: (floats(rows, columns), None)),
        "observe_minmax of rows": (ops.observe_minmax, lambda: (floats(rows, columns), 0)),
        "observe_minmax of channels": (ops.observe_minmax, lambda: (image(), 1)),
        "observe": (ops.observe, lambda: (floats(rows, columns), *state(), None, None, *observing, 0.0, 2.0)),
        "observe_fake_quant_out": (
            ops.observe_fake_quant_out,
            lambda: (floats(rows, columns), *state(rows), None, 0, *observing, torch.empty(rows, columns)),
        ),
        "observe_histogram": (
            ops.observe_histogram,
            lambda: (floats(rows, columns), torch.tensor([-6.0]), torch.tensor([6.0]), *bins()),
        ),
        "foreach_fake_quant_backward": (
            ops.foreach_fake_quant_backward,
            lambda: (weights(), weights(), [grid(64)[0]] * 3, [grid(64)[1]] * 3, [0] * 3, *signed),
        ),
        "foreach_observe_fake_quant": (
            ops.foreach_observe_fake_quant,
            lambda: (weights(), [0, -1, 0], *ends, True, 1e-12, torch.int8),
        ),
        "quantize_rows": (ops.quantize_rows, lambda: (floats(rows, columns), 0, 255, False, torch.uint8)),
        "batch_norm_statistics": (
            ops.batch_norm_statistics,
            lambda: (image(), *channels()[:2], torch.zeros(shape[1]), torch.ones(shape[1]), 0.1, 1e-5),
        ),
        "norm_fake_quant": (
            ops.norm_fake_quant,
            lambda: (image(), *channels()[2:], *grid(), *ends, 0.0, 6.0, torch.int8),
        ),
        "norm_fake_quant_backward": (
            ops.norm_fake_quant_backward,
            lambda: (image(), image(), *channels(), *learned(), *ends, 0.0, None, 0.3),
        ),
        "lookup": (ops.lookup, lambda: (code_image(), codes(generator, torch.int8, 256))),
        "add": (ops.add, lambda: (code_image(), code_image(torch.int8), 0.02, 7, 0.03, -5, *out_grid)),
        "mul": (ops.mul, lambda: (code_image(), code_image()[..., :1, :1], 0.02, 7, 0.03, 5, *out_grid)),
        "cat": (ops.cat, lambda: ([code_image(), code_image()], codes(generator, torch.uint8, 2, 256), 1)),
        "max_pool": (ops.max_pool, lambda: (code_image(), [3, 3], [2, 2], [1, 1], [1, 1], False)),
        "avg_pool": (
            ops.avg_pool,
            lambda: (code_image(), [3, 3], [2, 2], [1, 1], True, False, None, 0.02, 7, *out_grid),
        ),
        "adaptive_avg_pool": (ops.adaptive_avg_pool, lambda: (code_image(), [7, 5], 0.02, 7, *out_grid)),
    }  # fmt: skip
    return {name: (op.default, make) for name, (op, make) in found.items()}


def large(small: bool) -> Cases:
    for name, (call, make) in large_calls(small).items():
        yield f"large {name}", functools.partial(compare, call, make)


def on_device(call: Callable[..., Any], make: Callable[[], tuple]) -> Callable[[], list[Tensor]]:
    """A call on the device that may be repeated: what the op writes to is new each time."""
    arguments = device.on(make())
    writes = [a.alias_info is not None and a.alias_info.is_write for a in call._schema.arguments]

    def run() -> list[Tensor]:
        given = list(arguments)
        written = [i for i, value in enumerate(given) if writes[i] and value is not None]
        for i in written:
            given[i] = given[i].clone()
        return [*device.tensors(call(*given)), *(given[i] for i in written)]

    return run
