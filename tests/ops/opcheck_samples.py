"""Arguments with which torch.library.opcheck runs each op: name -> functions that make one tuple of arguments each.

tests/architecture/test_op_table.py runs them and fails for an op of the schema without a sample.
"""

from collections.abc import Callable

import torch

SAMPLES: dict[str, list[Callable[[], tuple]]] = {}


def grid(channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((channels,), 0.05), torch.zeros(channels, dtype=torch.int32)


# ---- fake_quant ----

SAMPLES["fake_quant"] = [
    lambda: (torch.randn(3, 5), *grid(), None, -128, 127),
    lambda: (torch.randn(2, 4, 3), *grid(4), 1, 0, 255),
    lambda: (torch.randn(0), *grid(), None, 0, 255),
]
SAMPLES["fake_quant_out"] = [
    lambda: (torch.randn(3, 5), *grid(), None, -128, 127, torch.empty(3, 5)),
]

SAMPLES["fake_quant"] += [
    lambda: (torch.randn(3, 5, requires_grad=True), *grid(), None, -7, 8),
    lambda: (torch.randn(2, 4, 3, requires_grad=True), *grid(4), 1, -7, 8),
]
SAMPLES["fake_quant_backward"] = [
    lambda: (torch.randn(3, 5), torch.randn(3, 5), *grid(), None, -7, 8),
    lambda: (torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 4, 3), *grid(4), 1, -7, 8),
]
SAMPLES["fake_quant_backward_out"] = [
    lambda: (torch.randn(3, 5), torch.randn(3, 5), *grid(), None, -7, 8, torch.empty(3, 5)),
]

# ---- lsq ----


def learned_grid(channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((channels,), 0.05, requires_grad=True), torch.full((channels,), 0.7, requires_grad=True)


SAMPLES["lsq"] = [
    lambda: (torch.randn(3, 5, requires_grad=True), *learned_grid(), None, -7, 8, 0.1),
    lambda: (torch.randn(2, 4, 3, requires_grad=True), *learned_grid(4), 1, -7, 8, 1.0),
    lambda: (torch.randn(0, 4), *learned_grid(4), -1, -7, 8, 1.0),
]
SAMPLES["lsq_backward"] = [
    lambda: (torch.randn(0, 4), torch.randn(0, 4), *(t.detach() for t in learned_grid(4)), 1, -7, 8, 0.1),
    lambda: (torch.randn(3, 5), torch.randn(3, 5), *(t.detach() for t in learned_grid()), None, -7, 8, 0.1),
]
SAMPLES["lsq_backward_out"] = [
    lambda: (
        torch.randn(3, 5), torch.randn(3, 5), *(t.detach() for t in learned_grid(5)), 1, -7, 8, 0.1, torch.empty(3, 5)
    ),
]  # fmt: skip

# ---- quantize, dequantize ----


def codes(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8).view(dtype)


SAMPLES["quantize"] = [
    lambda: (torch.randn(3, 5), *grid(), None, -128, 127, torch.int8),
    lambda: (torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last), *grid(4), 1, 0, 255, torch.uint8),
    lambda: (torch.randn(4, 6, dtype=torch.bfloat16)[:, ::2], *grid(), None, 0, 255, torch.uint8),
]
SAMPLES["quantize_out"] = [
    lambda: (torch.randn(3, 5), *grid(), None, 0, 255, torch.empty(3, 5, dtype=torch.uint8)),
]
SAMPLES["dequantize"] = [
    lambda: (codes(3, 5), *grid(), None, torch.float32),
    lambda: (codes(2, 4, 3, dtype=torch.int8), *grid(4), 1, torch.float16),
    lambda: (codes(2, 4).int(), torch.rand(4) + 0.1, torch.zeros(4, dtype=torch.int32), 1, torch.float32),
]
SAMPLES["dequantize_out"] = [
    lambda: (codes(3, 5), *grid(), None, torch.empty(3, 5)),
]

# ---- lookup, add, mul, cat ----

OUT_GRID = (0.04, 3, 0, 255, torch.uint8)
SAMPLES["lookup"] = [
    lambda: (codes(3, 5), codes(256)),
    lambda: (codes(2, 3, 4, 5).permute(0, 3, 1, 2), codes(256, dtype=torch.int8)),
]
SAMPLES["add"] = SAMPLES["mul"] = [
    lambda: (codes(3, 5), codes(3, 5, dtype=torch.int8), 0.02, 7, 0.03, -5, *OUT_GRID),
    lambda: (codes(2, 4, 5, 3).permute(0, 3, 1, 2), codes(2, 3, 1, 1), 0.02, 7, 0.03, 5, *OUT_GRID),
    lambda: (codes(3, 1), codes(1, 4), 0.02, 7, 0.03, 5, *OUT_GRID),
]
SAMPLES["cat"] = [
    lambda: ([codes(2, 3), codes(2, 4)], codes(2, 256), 1),
    lambda: ([codes(2, 5, 5, 3).permute(0, 3, 1, 2), codes(2, 5, 5, 6).permute(0, 3, 1, 2)], codes(2, 256), 1),
]

# ---- pools ----

SAMPLES["max_pool"] = [
    lambda: (codes(2, 3, 9), [3], [2], [1], [1], True),
    lambda: (codes(2, 3, 9, 8), [3, 2], [2, 1], [1, 0], [1, 2], False),
]
SAMPLES["avg_pool"] = [
    lambda: (codes(2, 3, 9, 8), [3, 2], [], [1, 0], True, False, None, 0.02, 7, *OUT_GRID),
    lambda: (codes(1, 2, 4, 4, 4), [2, 2, 2], [2, 2, 2], [0, 0, 0], False, True, 3, 0.02, 7, *OUT_GRID),
]
SAMPLES["adaptive_avg_pool"] = [
    lambda: (codes(2, 3, 9, 8), [1, 1], 0.02, 7, *OUT_GRID),
    lambda: (codes(2, 3, 9, 8), [4, 3], 0.02, 7, *OUT_GRID),
]

# ---- linear ----


def weights(n: int, k: int) -> tuple:
    """The arguments of linear_pack up to the input's dtype."""
    return (codes(n, k, dtype=torch.int8), torch.full((n,), 0.02), None, torch.ones(n), 0.05, 3, torch.uint8)


def packed_linear(n: int, k: int, epilogue: list[float], dtype: torch.dtype) -> torch.Tensor:
    return torch.ops.qkernels.linear_pack(*weights(n, k), epilogue, dtype, None)


RESIDUAL = [0.5, 7, 0, 255, 0.4, 5, 0.6, 2, 2, 255]
SAMPLES["linear_pack"] = [
    lambda: (*weights(5, 7), [0.5, 7, 0, 255], torch.uint8, codes(256)),
    lambda: (*weights(70, 33), [1, 0, 0, 255], torch.float32, None),
]
SAMPLES["linear"] = [
    lambda: (codes(3, 7), packed_linear(5, 7, [0.5, 7, 0, 255], torch.uint8), None, 5, torch.uint8),
    lambda: (codes(2, 3, 14)[..., ::2], packed_linear(5, 7, RESIDUAL, torch.uint8), codes(2, 3, 5), 5, torch.uint8),
    lambda: (codes(7), packed_linear(5, 7, [1, 0, 0, 255], torch.float32), None, 5, torch.float32),
]

SAMPLES["quantize_rows"] = [
    lambda: (torch.randn(3, 7), 0, 255, False, torch.uint8),
    lambda: (torch.randn(2, 3, 14, dtype=torch.bfloat16)[..., :7], -127, 127, True, torch.int8),
    lambda: (torch.randn(5, dtype=torch.float16), -128, 127, False, torch.int8),
]


def _linear_rows_args(*shape: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple:
    rows, n, k = shape[:-1], 5, shape[-1]
    weight = codes(n, k, dtype=torch.int8)
    packed = torch.ops.qkernels.linear_pack(
        weight, torch.ones(1), None, None, 1.0, 0, torch.uint8, [1, 0, 0, 255], torch.int32, None
    )
    grids = torch.rand(rows) + 0.1, torch.randint(0, 256, rows, dtype=torch.int32)
    sums = weight.sum(1, dtype=torch.int32)
    return (codes(*shape), packed, *grids, torch.full((n,), 0.02), sums, torch.ones(n) if bias else None, n, dtype)


SAMPLES["linear_rows"] = [
    lambda: _linear_rows_args(3, 7),
    lambda: _linear_rows_args(2, 3, 7, dtype=torch.float16, bias=False),
    lambda: _linear_rows_args(7, dtype=torch.bfloat16),
]


# ---- conv ----


def _conv_pack_args(weight_shape: tuple[int, ...], groups: int, transposed: bool, output: torch.dtype) -> tuple:
    dims = len(weight_shape) - 2
    channels = weight_shape[1] * groups if transposed else weight_shape[0]
    weight = torch.randint(-128, 128, weight_shape, dtype=torch.int8)
    scale, bias = torch.full((channels,), 0.01), torch.randn(channels)
    epilogue = [0.3, 10.0, 0.0, 127.0]
    geometry = ([1] * dims, [1] * (2 * dims), [1] * dims, groups, transposed, "zeros")
    return (weight, scale, None, bias, 0.05, 3, torch.uint8, epilogue, output, None, *geometry)


def _conv_args(weight_shape: tuple[int, ...], groups: int, transposed: bool, output: torch.dtype) -> tuple:
    packed = torch.ops.qkernels.conv_pack(*_conv_pack_args(weight_shape, groups, transposed, output))
    channels = weight_shape[1] * groups
    dims = len(weight_shape) - 2
    x = torch.randint(0, 256, (2, weight_shape[0] if transposed else channels, *[5] * dims), dtype=torch.uint8)
    return x, packed, None, channels if transposed else weight_shape[0], [5] * dims, output


_CONVS = [
    ((6, 4, 3, 3), 1, False, torch.uint8),
    ((8, 1, 3), 8, False, torch.float32),
    ((4, 3, 3, 3, 3), 1, True, torch.int8),
]
SAMPLES["conv_pack"] = [lambda c=c: _conv_pack_args(*c) for c in _CONVS]
SAMPLES["conv"] = [lambda c=c: _conv_args(*c) for c in _CONVS]


def _on_grid_args(weight_shape: tuple[int, ...], groups: int, transposed: bool, zero_points: bool) -> tuple:
    weight, scale, _, bias = _conv_pack_args(weight_shape, groups, transposed, torch.float32)[:4]
    dims = len(weight_shape) - 2
    geometry = [*weight_shape[2:], *[1] * dims, *[1] * (2 * dims), *[1] * dims, groups, int(transposed), 0]
    point = torch.full_like(scale, 5, dtype=torch.int32) if zero_points else None
    grid = torch.tensor([0.05]), torch.tensor([3], dtype=torch.int32)
    return weight, scale, point, bias, *grid, torch.uint8, geometry if dims else []


SAMPLES["pack_on_grid"] = [
    lambda: _on_grid_args((5, 7), 1, False, True),
    *(lambda c=c, z=z: _on_grid_args(*c[:3], z) for z, c in enumerate(_CONVS)),
]

# ---- observe ----


def _observer_state(channels: int, seen: bool) -> tuple:
    low, high = torch.full((channels,), -1.0), torch.full((channels,), 1.5)
    if not seen:
        low, high = torch.full((channels,), float("inf")), torch.full((channels,), float("-inf"))
    return low, high, torch.zeros(channels), torch.zeros(channels, dtype=torch.int32)


SAMPLES["observe_minmax"] = [
    lambda: (torch.randn(3, 5), None),
    lambda: (torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last), 1),
    lambda: (torch.randn(0, 4), -1),
]
SAMPLES["observe"] = [
    lambda: (torch.randn(3, 5), *_observer_state(1, False), None, None, 0, 255, False, 1e-12, None, "x"),
    lambda: (torch.randn(3, 5), *_observer_state(3, True), torch.zeros(2, dtype=torch.int64), 0, -127, 127, True, 1e-12,
             0.1, "x"),
    lambda: (torch.randn(3, 5), *_observer_state(1, True), None, None, 0, 255, False, 1e-12, 0.1, "x", 0.0, 6.0),
]  # fmt: skip
SAMPLES["observe_fake_quant_out"] = [
    lambda: (torch.randn(3, 5), *_observer_state(3, True), None, 0, -127, 127, True, 1e-12, 0.1, "x",
             torch.empty(3, 5)),
]  # fmt: skip

SAMPLES["observe_histogram"] = [
    lambda: (torch.randn(3, 5), torch.tensor([-4.0]), torch.tensor([4.0]), torch.tensor([float("inf")]),
             torch.tensor([float("-inf")]), torch.zeros(16)),
    lambda: (torch.randn(300, 50).half(), torch.tensor([-4.5]), torch.tensor([5.0]), torch.tensor([-1.0]),
             torch.tensor([3.0]), torch.arange(100.0)),
    lambda: (torch.randn(40), torch.tensor([float("inf")]), torch.tensor([float("-inf")]), torch.tensor([-1.0]),
             torch.tensor([3.0]), torch.arange(100.0)),
    lambda: (torch.randn(0), torch.tensor([-4.0]), torch.tensor([4.0]), torch.tensor([-1.0]),
             torch.tensor([3.0]), torch.arange(100.0)),
]  # fmt: skip

# ---- foreach ----


def _weights(requires_grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(4, 6, requires_grad=requires_grad), torch.randn(3, 2, 3, 3, requires_grad=requires_grad)]


def _grids() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [grid(4)[0], grid()[0]], [grid(4)[1], grid()[1]]


SAMPLES["foreach_fake_quant"] = [
    lambda: (_weights(), *_grids(), [0, -1], -8, 7),
    lambda: (_weights(requires_grad=True), *_grids(), [0, -1], -8, 7),
]
SAMPLES["foreach_fake_quant_backward"] = [
    lambda: (_weights(), _weights(), *_grids(), [0, -1], -8, 7),
]
SAMPLES["foreach_observe_fake_quant"] = [
    lambda: (_weights(), [0, -1], -127, 127, True, 1e-12, None),
    lambda: (_weights(requires_grad=True), [0, 0], -128, 127, False, 1e-12, torch.int8),
]

# ---- masks ----

SAMPLES["fake_quant_mask"] = [
    lambda: (torch.randn(3, 5, requires_grad=True), *grid(), None, -7, 8, torch.int8),
    lambda: (torch.randn(3, 5, requires_grad=True), *grid(), None, -7, 8),
    lambda: (torch.randn(3, 5, requires_grad=True), *grid(), None, -7, 8, torch.int8, 0.0, 0.5),
    lambda: (torch.randn(2, 4, 3), *grid(4), 1, -7, 8),
    lambda: (torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last), *grid(4), 1, -7, 8),
]
SAMPLES["fake_quant_mask_backward"] = [
    lambda: (torch.randn(3, 5), torch.randint(0, 256, (2,), dtype=torch.uint8), None),
    lambda: (torch.randn(3, 5), torch.randint(0, 256, (3,), dtype=torch.uint8), 0),
]
SAMPLES["lsq_out"] = [
    lambda: (torch.randn(3, 5), *(t.detach() for t in learned_grid()), None, -7, 8, torch.empty(3, 5)),
]

# ---- pact, dorefa ----

SAMPLES["pact"] = [
    lambda: (torch.randn(3, 5, requires_grad=True), grid()[0].requires_grad_(), grid()[1], None, -7, 8),
    lambda: (torch.randn(2, 4, 3, requires_grad=True), grid(4)[0].requires_grad_(), grid(4)[1], 1, -7, 8),
]
SAMPLES["pact_backward"] = [
    lambda: (torch.randn(2, 4, 3), torch.randn(2, 4, 3), *grid(4), 1, -7, 8),
    lambda: (torch.randn(2, 4, 0), torch.randn(2, 4, 0), *grid(4), 1, -7, 8),
]
SAMPLES["dorefa_weight"] = [
    lambda: (torch.randn(3, 5, requires_grad=True), *grid(), -7, 7),
    lambda: (torch.randn(4, 6)[:, ::2], *grid(), -7, 7),
]
SAMPLES["dorefa_weight_backward"] = [
    lambda: (torch.randn(3, 5), torch.randn(3, 5), *grid(), -7, 7),
]
SAMPLES["dorefa_gradient"] = [
    lambda: (torch.randn(3, 5), torch.tensor([7]), 4),
    lambda: (torch.randn(3, 5).t(), torch.tensor([7]), 4),
]

# ---- binary ----


def _packed_signs(*shape: int) -> torch.Tensor:
    return torch.ops.qkernels.pack_signs(torch.randn(shape), 1)


def _packed_binary_weight(*shape: int) -> torch.Tensor:
    return torch.ops.qkernels.binary_weight_pack(torch.randn(shape))


SAMPLES["binary_sign"] = [
    lambda: (torch.randn(3, 5, requires_grad=True), False),
    lambda: (torch.randn(3, 5, requires_grad=True), True),
]
SAMPLES["binary_sign_backward"] = [lambda: (torch.randn(3, 5), torch.randn(3, 5), True)]
SAMPLES["pack_signs"] = [lambda: (torch.randn(2, 70, 3, 4), 1), lambda: (torch.randn(3, 5), -1)]
SAMPLES["binary_weight_pack"] = [lambda: (torch.randn(33, 70, 3, 2),), lambda: (torch.randn(5, 64),)]
SAMPLES["binary_linear"] = [
    lambda: (_packed_signs(4, 70), _packed_binary_weight(33, 70), torch.rand(33), torch.rand(33), 70),
]
SAMPLES["binary_conv2d"] = [
    lambda: (_packed_signs(2, 70, 5, 6), _packed_binary_weight(33, 70, 3, 3), torch.rand(33), None, 70, [3, 3], [2, 1],
             [1, 0], [1, 1]),
]  # fmt: skip

# ---- batch norm ----


def _image(requires_grad: bool = False) -> torch.Tensor:
    return torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last).requires_grad_(requires_grad)


SAMPLES["batch_norm_statistics"] = [
    lambda: (_image(), torch.rand(4), torch.rand(4), torch.zeros(4), torch.ones(4), 0.1, 1e-5),
    lambda: (torch.randn(6, 4), None, None, torch.zeros(4), torch.ones(4), 0.1, 1e-5),
]
SAMPLES["norm_fake_quant"] = [
    lambda: (_image(), torch.rand(4), torch.rand(4), *grid(), -128, 127, None, None, torch.int8),
    lambda: (torch.randn(6, 4), torch.rand(4), torch.rand(4), *grid(), -128, 127, 0.0, 6.0, None),
]
SAMPLES["norm_fake_quant_backward"] = [
    lambda: (_image(), _image(), *(torch.rand(4) for _ in range(4)), *grid(), -128, 127, 0.0, None, None),
    lambda: (
        _image(),
        _image(),
        *(torch.rand(4) for _ in range(4)),
        *(t.detach() for t in learned_grid()),
        -128,
        127,
        0.0,
        6.0,
        0.5,
    ),
]
