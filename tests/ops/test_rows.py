"""Activations quantized row by row when they arrive, and linear on them: against the reference, torch's observers and
torch's own dynamically quantized linear, on every instruction set and for any number of threads."""

import pytest
import torch

from qkernels import ops, reference
from qkernels.ops.epilogue import Epilogue

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
GRIDS = [(0, 255, False, torch.uint8), (-127, 127, True, torch.int8), (-128, 127, False, torch.int8),
         (0, 255, True, torch.uint8), (3, 17, False, torch.uint8)]  # fmt: skip


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal, where NaN equals NaN."""
    return got.dtype == expected.dtype and torch.equal(got.nan_to_num(12345.0), expected.nan_to_num(12345.0))


def strange_rows(rows: int, depth: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows of all magnitudes; some hold NaN or infinities, are constant, or of one sign."""
    g = generator(seed)
    x = torch.randn(rows, depth, generator=g) * torch.tensor(10.0) ** torch.randint(-3, 4, (rows, 1), generator=g)
    x[1::7] = 0.0
    x[2::7] = x[2::7].abs()
    x[3::7] = -x[3::7].abs()
    if depth > 0:
        x[4::14, -1] = float("nan")
        x[11::14, 0] = float("inf")
        x[5::14, depth // 2] = -float("inf")
    return x.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("grid", GRIDS)
def test_quantize_rows_equals_the_reference(dtype, grid, isa):
    for depth in (0, 1, 2, 7, 8, 15, 16, 17, 33, 64, 67, 100, 300):
        x = strange_rows(29, depth, dtype, depth)
        for got, expected in zip(ops.quantize_rows(x, *grid), reference.quantize_rows(x, *grid), strict=True):
            assert same(got, expected), depth


def test_each_row_is_what_an_observer_and_quantize_give_for_it_alone(isa):
    x = strange_rows(28, 50, torch.float32, 1)
    x = x[torch.isfinite(x).all(1)]
    q, scale, zero_point = ops.quantize_rows(x, 0, 255, False, torch.uint8)
    for row in range(len(x)):
        s, z = torch.ones(1), torch.zeros(1, dtype=torch.int32)
        low, high = torch.full((1,), float("inf")), torch.full((1,), -float("inf"))
        ops.observe(x[row], low, high, s, z, None, None, 0, 255, False, 2.0**-60, None, "x")
        assert (s, z) == (scale[row], zero_point[row])
        assert torch.equal(q[row], ops.quantize(x[row], s, z, None, 0, 255, torch.uint8))


def test_rows_of_any_shape_and_stride():
    x = torch.randn(4, 5, 64, generator=generator(0))
    expected = ops.quantize_rows(x.reshape(20, 64).contiguous(), 0, 255, False, torch.uint8)
    for view in (x, x.transpose(0, 1).contiguous().transpose(0, 1), torch.cat([x, x], -1)[..., :64]):
        for got, flat in zip(ops.quantize_rows(view, 0, 255, False, torch.uint8), expected, strict=True):
            assert torch.equal(got.flatten(), flat.flatten())
    q, scale, zero_point = ops.quantize_rows(x[0, 0], 0, 255, False, torch.uint8)
    assert (q.shape, scale.shape, zero_point.shape) == ((64,), (), ())


class Layer:
    """A random layer and rows for it."""

    def __init__(self, m: int, n: int, k: int, dtype: torch.dtype, seed: int, zero_points: bool = False, bias=True):
        g = generator(seed)
        low = 0 if dtype == torch.uint8 else -128
        self.x = torch.randint(low, low + 256, (m, k), generator=g).to(dtype)
        self.row_scale = torch.rand(m, generator=g) + 0.01
        self.row_zero_point = torch.randint(low, low + 256, (m,), generator=g, dtype=torch.int32)
        self.weight = torch.randint(-128, 128, (n, k), generator=g).to(torch.int8)
        self.weight_scale = torch.rand(n, generator=g) * 0.1 + 0.001
        self.zero_point = torch.randint(-50, 50, (n,), generator=g, dtype=torch.int32) if zero_points else None
        self.bias = torch.randn(n, generator=g) if bias else None

    def run(self, out: torch.dtype, m: int | None = None) -> torch.Tensor:
        sums = self.weight.sum(1, dtype=torch.int32)
        if self.zero_point is not None:
            sums = sums - self.zero_point * self.weight.shape[1]
        packed = ops.linear_pack(
            self.weight, torch.ones(1), self.zero_point, None, 1.0, 0, self.x.dtype, Epilogue(torch.int32)
        )
        rows = self.x[:m], packed, self.row_scale[:m], self.row_zero_point[:m]
        return ops.linear_rows(*rows, self.weight_scale, sums.to(torch.int32), self.bias, len(self.weight), out)

    def expected(self, out: torch.dtype) -> torch.Tensor:
        weight = self.weight, self.weight_scale, self.zero_point, self.bias
        return reference.linear_rows(self.x, self.row_scale, self.row_zero_point, *weight, out)


@pytest.mark.parametrize("out", FLOATS)
def test_linear_rows_equals_the_reference(out, isa):
    for i, (m, n, k) in enumerate([(0, 5, 3), (3, 0, 7), (1, 1, 1), (5, 17, 0), (7, 63, 20), (1, 300, 100),
                                   (97, 65, 64), (200, 130, 33), (4, 1000, 70), (95, 16, 128)]):  # fmt: skip
        for dtype in (torch.uint8, torch.int8):
            layer = Layer(m, n, k, dtype, i, zero_points=i % 2 == 1, bias=i % 3 != 0)
            assert torch.equal(layer.run(out), layer.expected(out)), (m, n, k, dtype)


def test_a_row_does_not_depend_on_the_others(isa):
    layer = Layer(210, 70, 40, torch.uint8, 0)
    whole = layer.run(torch.float32)
    for m in (1, 5, 96, 97, 192):
        assert torch.equal(layer.run(torch.float32, m), whole[:m])


def test_threads_change_no_bit():
    layer, x = Layer(300, 600, 96, torch.int8, 0), strange_rows(300, 700, torch.float32, 0)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append((layer.run(torch.float32), *ops.quantize_rows(x, 0, 255, False, torch.uint8)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(same(a, b) for a, b in zip(other, found[0], strict=True))


def test_one_row_agrees_with_the_dynamically_quantized_linear_of_torch():
    """torch takes one grid for the whole input: for one row the two are the same up to float rounding."""
    g = generator(3)
    float_layer = torch.nn.Linear(64, 48)
    with torch.no_grad():
        float_layer.weight.copy_(torch.randn(48, 64, generator=g))
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch has no fbgemm here")
    config = torch.ao.quantization.per_channel_dynamic_qconfig
    theirs = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(float_layer), {"0": config})
    weight, bias = theirs[0].weight(), theirs[0].bias()
    codes, scale = weight.int_repr(), weight.q_per_channel_scales().float()
    packed = ops.linear_pack(codes, torch.ones(1), None, None, 1.0, 0, torch.uint8, Epilogue(torch.int32))
    for _ in range(20):
        x = torch.randn(1, 64, generator=g)
        q, row_scale, row_zero_point = ops.quantize_rows(x, 0, 127, False, torch.uint8)  # torch reduces the range
        y = ops.linear_rows(
            q, packed, row_scale, row_zero_point, scale, codes.sum(1, dtype=torch.int32), bias.detach(), 48
        )
        torch.testing.assert_close(y, theirs(x), rtol=1e-4, atol=float(row_scale * scale.max() * 127))


DOUBLES = torch.ones(3, dtype=torch.float64)
BAD_QUANTIZE = {
    "x must be torch.float32, torch.bfloat16": lambda: ops.quantize_rows(DOUBLES, 0, 255, False, torch.uint8),
    "dtype must be torch.uint8 or torch.int8": lambda: ops.quantize_rows(torch.ones(3), 0, 255, False, torch.int32),
    "qmin and qmax must satisfy": lambda: ops.quantize_rows(torch.ones(3), 0, 256, False, torch.uint8),
    "x must have at least one dimension": lambda: ops.quantize_rows(torch.tensor(1.0), 0, 255, False, torch.uint8),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_QUANTIZE)
def test_bad_arguments_of_quantize_rows_are_named(message):
    with pytest.raises(RuntimeError, match="quantize_rows: .*" + message):
        BAD_QUANTIZE[message]()


def changed(**arguments) -> dict:
    return arguments


def arguments(**changes) -> tuple:
    weight = torch.ones(4, 6, dtype=torch.int8)
    packed = ops.linear_pack(weight, torch.ones(1), None, None, 1.0, 0, torch.uint8, Epilogue(torch.int32))
    found = {
        "input": torch.ones(3, 6, dtype=torch.uint8),
        "packed": packed,
        "row_scale": torch.ones(3),
        "row_zero_point": torch.ones(3, dtype=torch.int32),
        "weight_scale": torch.ones(4),
        "weight_sum": torch.full((4,), 6, dtype=torch.int32),
        "bias": torch.ones(4),
        "out_features": 4,
        "dtype": torch.float32,
    } | changes
    return tuple(found.values())


def float_packed() -> torch.Tensor:
    weight = torch.ones(4, 6, dtype=torch.int8)
    return ops.linear_pack(weight, torch.ones(1), None, None, 1.0, 0, torch.uint8, Epilogue(torch.float32))


def too_deep() -> dict:
    weight = torch.ones(1, 70_000, dtype=torch.int8)
    packed = ops.linear_pack(weight, torch.ones(1), None, None, 1.0, 0, torch.int8, Epilogue(torch.int32))
    return changed(input=torch.ones(3, 70_000, dtype=torch.int8), packed=packed, weight_scale=torch.ones(1),
                weight_sum=torch.ones(1, dtype=torch.int32), bias=None, out_features=1)  # fmt: skip


BAD_LINEAR = {
    "packed must be made by linear_pack with an int32 output": lambda: changed(packed=float_packed()),
    "input must be": lambda: changed(input=torch.ones(3, 6, dtype=torch.int8)),
    r"input must have shape \[..., 6\]": lambda: changed(input=torch.ones(3, 5, dtype=torch.uint8)),
    "row_scale must be torch.float32": lambda: changed(row_scale=torch.ones(3, dtype=torch.float64)),
    "row_scale must have 3 elements": lambda: changed(row_scale=torch.ones(4)),
    "row_zero_point must be torch.int32": lambda: changed(row_zero_point=torch.ones(3)),
    "weight_scale must have 4 elements": lambda: changed(weight_scale=torch.ones(1)),
    "weight_sum must be torch.int32": lambda: changed(weight_sum=torch.ones(4)),
    "bias must have 4 elements": lambda: changed(bias=torch.ones(5)),
    "out_features must be 4": lambda: changed(out_features=5),
    "output_dtype must be float32, bfloat16 or float16": lambda: changed(dtype=torch.uint8),
    "in_features must be at most 65793": too_deep,
}


@pytest.mark.parametrize("message", BAD_LINEAR)
def test_bad_arguments_of_linear_rows_are_named(message):
    with pytest.raises(RuntimeError, match="linear_rows: .*" + message):
        ops.linear_rows(*arguments(**BAD_LINEAR[message]()))
