"""quantize, dequantize, fake_quant: one definition, the same bits on every ISA and in every layout."""

import numpy as np
import onnxruntime
import pytest
import torch

from qkernels import ops, reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
GRIDS = {
    "uint8": (0.0371, 131, 0, 255, torch.uint8),
    "int8": (0.0371, -3, -128, 127, torch.int8),
    "int8_symmetric": (0.05, 0, -127, 127, torch.int8),
    "uint4": (0.5, 7, 0, 15, torch.uint8),
    "odd_zero_point": (1.0, 255, 0, 255, torch.uint8),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "channel_slice": lambda x: torch.cat([x, x], 1)[:, 1 : 1 + x.shape[1]],
    "row_slice": lambda x: torch.cat([x, x], 3)[..., 2 : 2 + x.shape[3]],
    "every_second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda x: x[:, :1].expand_as(x),
}


def seeded(*key) -> torch.Generator:
    return torch.Generator().manual_seed(hash(key) % 2**31)


def per_tensor(scale, zero_point):
    return torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)


def hostile(n: int, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Random values, a third of them ties, a few NaN, infinities and extremes."""
    x = torch.randn(n, generator=generator) * 4
    ties = (torch.randint(-300, 300, (n,), generator=generator) + 0.5) * scale
    x = torch.where(torch.rand(n, generator=generator) < 0.3, ties, x)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-42, -0.0, 2.5e9, -2.5e9])
    return torch.where(
        torch.rand(n, generator=generator) < 0.1, odd[torch.randint(0, len(odd), (n,), generator=generator)], x
    )


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 8191, 8193, 100_003])
def test_codes_equal_reference_for_every_length(isa, name, n):
    scale, zero_point, qmin, qmax, dtype = GRIDS[name]
    x = hostile(n, scale, seeded(n))
    grid = per_tensor(scale, zero_point)
    q = ops.quantize(x, *grid, None, qmin, qmax, dtype)
    assert torch.equal(q, reference.quantize(x, *grid, None, qmin, qmax, dtype))
    assert torch.equal(ops.dequantize(q, *grid, None), reference.dequantize(q, *grid, None))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("float_dtype", FLOATS)
def test_codes_are_those_that_fake_quant_implies(isa, name, float_dtype):
    scale, zero_point, qmin, qmax, dtype = GRIDS[name]
    x = hostile(5000, scale, seeded(name)).to(float_dtype)
    grid = per_tensor(scale, zero_point)
    q = ops.quantize(x, *grid, None, qmin, qmax, dtype)
    y = ops.dequantize(q, *grid, None, float_dtype)
    assert torch.equal(y, ops.fake_quant(x, *grid, None, qmin, qmax))
    assert not torch.signbit(y[y == 0]).any()


@pytest.mark.parametrize("float_dtype", FLOATS)
def test_equals_torch_fake_quantize_bit_for_bit(isa, float_dtype):
    x = hostile(20_000, 0.0371, seeded(1)).to(float_dtype)
    x = x[torch.isfinite(x) & (x.abs() < 1e9)]
    expected = torch.fake_quantize_per_tensor_affine(x, 0.0371, 3, -128, 127)
    y = ops.fake_quant(x, *per_tensor(0.0371, 3), None, -128, 127)
    integers = torch.int32 if float_dtype == torch.float32 else torch.int16
    assert torch.equal(y.view(integers), expected.view(integers))


def test_per_channel_equals_torch_fake_quantize(isa):
    x = torch.randn(6, 37, 5, generator=seeded(2)) * 4
    scale = torch.rand(37, generator=seeded(3)) * 0.1 + 0.01
    zero_point = torch.randint(-128, 128, (37,), dtype=torch.int32, generator=seeded(4))
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 1, -128, 127)
    assert torch.equal(ops.fake_quant(x, scale, zero_point, 1, -128, 127), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1])
@pytest.mark.parametrize("channels", [1, 3, 70])
@pytest.mark.parametrize("float_dtype", FLOATS[:2])
def test_every_layout_and_axis_equals_reference(isa, layout, axis, channels, float_dtype):
    generator = seeded(channels)
    x = LAYOUTS[layout](torch.randn(2, channels, 5, 7, generator=generator).to(float_dtype) * 4)
    n = 1 if axis is None else x.shape[axis]
    scale = torch.rand(n, generator=generator) * 0.1 + 0.01
    zero_point = torch.randint(0, 256, (n,), dtype=torch.int32, generator=generator)
    q = ops.quantize(x, scale, zero_point, axis, 0, 255, torch.uint8)
    assert torch.equal(q, reference.quantize(x, scale, zero_point, axis, 0, 255, torch.uint8))
    assert q.stride() == torch.empty_like(x, dtype=torch.uint8).stride()
    y = ops.dequantize(q, scale, zero_point, axis, float_dtype)
    assert torch.equal(y, reference.dequantize(q, scale, zero_point, axis, float_dtype))
    fake = ops.fake_quant(x, scale, zero_point, axis, 0, 255)
    assert torch.equal(fake, y)
    assert fake.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("float_dtype", FLOATS)
def test_sums_of_products_are_dequantized_as_torch_does(isa, layout, axis, float_dtype):
    generator = seeded(layout, axis)
    q = LAYOUTS[layout](torch.randint(-(2**31), 2**31 - 1, (2, 19, 5, 7), generator=generator, dtype=torch.int32))
    n = 1 if axis is None else q.shape[axis]
    scale, zero_point = torch.rand(n, generator=generator) * 1e-7 + 1e-9, torch.zeros(n, dtype=torch.int32)
    along = [1] * 4 if axis is None else [-1 if d == axis % 4 else 1 for d in range(4)]
    y = ops.dequantize(q, scale, zero_point, axis, float_dtype)
    assert torch.equal(y, (q.float() * scale.reshape(along)).to(float_dtype))
    assert y.stride() == torch.empty_like(q).stride()


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 8193])
def test_sums_of_every_length(isa, n):
    q = torch.randint(-(2**20), 2**20, (n + 1,), generator=seeded(n), dtype=torch.int32)[1:]
    assert torch.equal(ops.dequantize(q, *per_tensor(0.013, 0), None), q.float() * torch.tensor(0.013))


def test_wide_innermost_channels_cross_the_block(isa):
    x = torch.randn(13, 1500, generator=seeded(5))
    scale = torch.rand(1500, generator=seeded(6)) * 0.1 + 0.01
    zero_point = torch.randint(-128, 128, (1500,), dtype=torch.int32, generator=seeded(7))
    for data in (x, x[::2]):
        q = ops.quantize(data, scale, zero_point, -1, -128, 127, torch.int8)
        assert torch.equal(q, reference.quantize(data, scale, zero_point, -1, -128, 127, torch.int8))


def test_more_dimensions_than_the_walk_holds(isa):
    x = torch.randn([2] * 11, generator=seeded(8)).permute(list(range(10, -1, -1)))[(slice(0, 1),) * 4]
    grid = per_tensor(0.1, 3)
    q = ops.quantize(x, *grid, None, 0, 255, torch.uint8)
    assert torch.equal(q, reference.quantize(x, *grid, None, 0, 255, torch.uint8))


@pytest.mark.parametrize("offset", [1, 3, 13])
def test_unaligned_slices_equal_reference(isa, offset):
    x = hostile(3000, 0.1, seeded(9))[offset:]
    grid = per_tensor(0.1, 100)
    out = torch.empty(3001, dtype=torch.uint8)[offset + 1 :]
    ops.quantize_out(x, *grid, None, 0, 255, out)
    assert torch.equal(out, reference.quantize(x, *grid, None, 0, 255, torch.uint8))
    back = torch.empty(3000)[offset:]
    assert torch.equal(ops.dequantize_out(out, *grid, None, back), reference.dequantize(out, *grid, None))


@pytest.mark.parametrize("float_dtype", FLOATS)
def test_results_large_enough_to_bypass_the_cache(isa, float_dtype):
    n = (32 << 20) // torch.empty(0, dtype=float_dtype).element_size() + 37
    x = (torch.arange(n + 5, dtype=torch.int64) % 1999 - 999).to(float_dtype)[5:]
    grid = per_tensor(7.3, 4)
    q = ops.quantize(x, *grid, None, -128, 127, torch.int8)
    period = reference.quantize(x[:1999], *grid, None, -128, 127, torch.int8)
    assert torch.equal(q[:1999], period)
    assert torch.equal(q[1999:], q[:-1999])
    y = ops.fake_quant(x, *grid, None, -128, 127)
    assert torch.equal(y, ops.dequantize(q, *grid, None, float_dtype))
    assert torch.equal(y[:1999], reference.fake_quant(x[:1999], *grid, None, -128, 127))
    assert torch.equal(y[1999:], y[:-1999])


def test_in_place_fake_quant(isa):
    x = torch.randn(10_001, generator=seeded(10))
    expected = reference.fake_quant(x, *per_tensor(0.1, 3), None, 0, 255)
    assert torch.equal(ops.fake_quant_out(x, *per_tensor(0.1, 3), None, 0, 255, x), expected)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_bits_do_not_depend_on_the_number_of_threads(isa, axis):
    x = torch.randn(257, 1031, generator=seeded(11))
    n = 1 if axis is None else x.shape[axis]
    scale = torch.rand(n, generator=seeded(12)) * 0.1 + 0.01
    zero_point = torch.randint(0, 256, (n,), dtype=torch.int32, generator=seeded(13))
    expected = reference.quantize(x, scale, zero_point, axis, 0, 255, torch.uint8)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(ops.quantize(x, scale, zero_point, axis, 0, 255, torch.uint8), expected)
    finally:
        torch.set_num_threads(before)


def test_agrees_with_onnx_runtime_where_the_formulas_agree(isa):
    """ONNX divides by the scale; with a power of two and no NaN that is the same number, ties included for even zp."""
    onnx = pytest.importorskip("onnx")
    helper, types = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])],
        "quantize",
        [helper.make_tensor_value_info("x", types.FLOAT, [None])],
        [helper.make_tensor_value_info("q", types.UINT8, [None])],
        [helper.make_tensor("s", types.FLOAT, [], [0.0625]), helper.make_tensor("z", types.UINT8, [], [130])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(10_000, generator=seeded(14)) * 6
    expected = torch.from_numpy(np.asarray(session.run(None, {"x": x.numpy()})[0]))
    assert torch.equal(ops.quantize(x, *per_tensor(0.0625, 130), None, 0, 255, torch.uint8), expected)


GOOD = per_tensor(0.1, 3)
X = torch.ones(2, 3)
BAD_CALLS = {
    "float64 x": (
        lambda: ops.quantize(X.double(), *GOOD, None, 0, 255, torch.uint8),
        "x must be torch.float32, torch.bfloat16",
    ),
    "int32 output": (
        lambda: ops.quantize(X, *GOOD, None, 0, 255, torch.int32),
        "dtype must be torch.uint8 or torch.int8",
    ),
    "qmax of another dtype": (lambda: ops.quantize(X, *GOOD, None, 0, 255, torch.int8), "-128 <= qmin < qmax <= 127"),
    "qmin not below qmax": (lambda: ops.quantize(X, *GOOD, None, 3, 3, torch.uint8), "qmin and qmax must satisfy"),
    "axis": (lambda: ops.quantize(X, *GOOD, 2, 0, 255, torch.uint8), r"axis must be in \[-2, 1\]"),
    "too few scales": (lambda: ops.quantize(X, *GOOD, 1, 0, 255, torch.uint8), "scale must have 3 elements"),
    "zero_point": (lambda: ops.quantize(X, *per_tensor(0.1, 256), None, 0, 255, torch.uint8), r"zero_point must be in"),
    "zero_point dtype": (
        lambda: ops.quantize(X, GOOD[0], torch.zeros(1), None, 0, 255, torch.uint8),
        "zero_point must be torch.int32",
    ),
    "float q": (lambda: ops.dequantize(X, *GOOD, None), "q must be uint8, int8 or int32"),
    "zero point of sums": (
        lambda: ops.dequantize(X.int(), *per_tensor(0.1, 1), None),
        "zero_point must be 0 for int32",
    ),
    "int output": (
        lambda: ops.dequantize(X.byte(), *GOOD, None, torch.int32),
        "must be torch.float32, torch.bfloat16 or torch.float16",
    ),
    "out dtype": (
        lambda: ops.fake_quant_out(X, *GOOD, None, 0, 255, X.half()),
        "fake_quant: out must be torch.float32, got torch.float16",
    ),
    "out shape": (
        lambda: ops.fake_quant_out(X, *GOOD, None, 0, 255, torch.empty(3, 2)),
        r"out must have shape \[2, 3\], got \[3, 2\]",
    ),
    "out layout": (
        lambda: ops.fake_quant_out(X, *GOOD, None, 0, 255, torch.empty(3, 2).t()),
        "out must have the layout of x",
    ),
    "out with gaps": (
        lambda: ops.quantize_out(X, *GOOD, None, 0, 255, torch.empty(2, 6, dtype=torch.uint8)[:, ::2]),
        "out must be dense",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_refused_by_name(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(RuntimeError, match=message):
        call()


GRID_CALLS = {
    "quantize": lambda grid: ops.quantize(X, *grid, None, 0, 255, torch.uint8),
    "dequantize": lambda grid: ops.dequantize(X.byte(), *grid, None),
    "fake_quant": lambda grid: ops.fake_quant(X, *grid, None, 0, 255),
}


@pytest.mark.parametrize("op", GRID_CALLS)
@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-40])
def test_bad_scale_is_refused_by_name(op, scale):
    grid = per_tensor(scale, 3)
    with pytest.raises(RuntimeError, match=f"{op}: scale must be positive, finite and normal"):
        GRID_CALLS[op](grid)


def test_memory_that_is_not_there_is_an_error_that_names_the_op_and_the_size():
    huge = torch.ones(1).expand(1 << 58)
    grid = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"^quantize: out of memory for a torch.uint8 tensor of shape \[2882"):
        ops.quantize(huge, *grid, None, 0, 255, torch.uint8)
    assert ops.quantize(torch.ones(3), *grid, None, 0, 255, torch.uint8).tolist() == [1, 1, 1]
