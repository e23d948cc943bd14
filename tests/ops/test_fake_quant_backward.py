"""The gradient of fake_quant: torch's bits, from the kept input alone, on every ISA and under torch.compile."""

import pytest
import torch

from qkernels import ops, reference
from qkernels.testing import isa_cap, supported_isas

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def grid(scale, zero_point):
    return torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)


def channel_grid(channels, seed=0):
    g = torch.Generator().manual_seed(seed)
    scale = torch.rand(channels, generator=g) * 0.05 + 0.01
    return scale, torch.randint(-5, 5, (channels,), dtype=torch.int32, generator=g)


def tensors(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g) * 4).to(dtype), torch.randn(*shape, generator=g).to(dtype)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 15, 16, 17, 31, 33, 4095, 4097, 100_003])
@pytest.mark.parametrize("zero_point", [0, 3, -128, 127])
def test_gradient_equals_torch_per_tensor(isa, n, zero_point):
    x, grad = tensors(n, seed=n)
    theirs = x.clone().requires_grad_()
    torch.fake_quantize_per_tensor_affine(theirs, 0.0371, zero_point, -128, 127).backward(grad)
    ours = x.clone().requires_grad_()
    ops.fake_quant(ours, *grid(0.0371, zero_point), None, -128, 127).backward(grad)
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradient_equals_torch_per_channel(isa, axis, memory_format):
    x, grad = (t.contiguous(memory_format=memory_format) for t in tensors(3, 37, 5, 11))
    scale, zp = channel_grid(x.shape[axis])
    theirs = x.clone().requires_grad_()
    torch.fake_quantize_per_channel_affine(theirs, scale, zp, axis, -128, 127).backward(grad)
    ours = x.clone().requires_grad_()
    ops.fake_quant(ours, scale, zp, axis, -128, 127).backward(grad)
    assert torch.equal(ours.grad, theirs.grad)
    assert ours.grad.stride() == x.stride()


def test_the_ends_of_the_grid_pass_by_the_rounded_value(isa):
    """-128.5 rounds to -128 and passes, 127.5 to 128 and does not: the clamp is decided after the rounding."""
    x = torch.tensor([-128.5, -128.51, 127.49, 127.5, -0.5, 0.5] * 7)
    grad = torch.ones_like(x)
    ours = ops.fake_quant_backward(grad, x, *grid(1.0, 0), None, -128, 127)
    assert ours[:6].tolist() == [1, 0, 1, 0, 1, 1]
    theirs = x.clone().requires_grad_()
    torch.fake_quantize_per_tensor_affine(theirs, 1.0, 0, -128, 127).backward(grad)
    assert torch.equal(ours, theirs.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("channels", [2, 31, 257, 600])
def test_every_dtype_equals_the_reference(isa, dtype, axis, channels):
    x, grad = tensors(channels, channels if channels < 300 else 40, dtype=dtype)
    scale, zp = channel_grid(1 if axis is None else x.shape[axis])
    expected = reference.fake_quant_backward(grad, x, scale, zp, axis, -100, 90)
    out = ops.fake_quant_backward(grad, x, scale, zp, axis, -100, 90)
    assert out.dtype == dtype
    assert torch.equal(out, expected)


def test_hostile_values_follow_the_contract(isa):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, inf, -inf, 3e38, -3e38, 1e-40, 0.0, -0.0] * 6)
    grad = torch.full_like(x, -2.0)
    assert ops.fake_quant_backward(grad, x, *grid(1.0, 1), None, -128, 127)[:8].tolist() == [0] * 5 + [-2] * 3
    # A gradient keeps its bits where it passes and is +0 where it does not, whatever it is.
    for value in (nan, inf, -0.0, 1e-42):
        for dtype in DTYPES:
            grad = torch.full_like(x, value, dtype=dtype)
            out = ops.fake_quant_backward(grad, x.to(dtype), *grid(1.0, 1), None, -128, 127)
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            passes = torch.tensor(([False] * 5 + [True] * 3) * 6)
            assert torch.equal(out.view(bits), torch.where(passes, grad.view(bits), 0))


@pytest.mark.parametrize("change", ["expanded", "transposed", "sliced", "out is grad"])
def test_any_layout_of_grad_and_x(change):
    x, grad = tensors(24, 40)
    scale, zp = channel_grid(40)
    if change == "expanded":
        grad = torch.tensor(0.5).expand(24, 40)
    elif change == "transposed":
        grad = grad.t().contiguous().t()
    elif change == "sliced":
        x, grad = torch.randn(24, 80)[:, ::2] * 4, torch.randn(24, 80)[:, 10:50]
    expected = reference.fake_quant_backward(grad, x, scale, zp, 1, -128, 127)
    if change == "out is grad":
        out = ops.fake_quant_backward_out(grad, x, scale, zp, 1, -128, 127, grad)
        assert out is grad
    else:
        out = ops.fake_quant_backward(grad, x, scale, zp, 1, -128, 127)
    assert torch.equal(out, expected)


def test_large_tensors_are_stored_past_the_caches_with_the_same_bits(isa):
    x, grad = tensors(3, 3_000_017)
    scale, zp = channel_grid(3)
    expected = reference.fake_quant_backward(grad, x, scale, zp, 0, -128, 127)
    assert torch.equal(ops.fake_quant_backward(grad, x, scale, zp, 0, -128, 127), expected)


def test_gradient_of_the_surrogate():
    """Of the function that the estimator differentiates, clamp(x, (qmin - zp) * s, (qmax - zp) * s), by differences."""
    x = torch.linspace(-3, 3, 61, dtype=torch.float64) + 0.013
    scale, zp = grid(0.125, 2)
    low, high = (-8 - 2) * 0.125, (7 - 2) * 0.125
    surrogate = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: t.clamp(low, high), (surrogate,), eps=1e-4)
    (expected,) = torch.autograd.grad(surrogate.clamp(low, high).sum(), surrogate)
    edge = ((x - low).abs() < 0.0625) | ((x - high).abs() < 0.0625)  # within half a step the two differ
    ours = x.float().requires_grad_()
    ops.fake_quant(ours, scale, zp, None, -8, 7).sum().backward()
    assert torch.equal(ours.grad[~edge], expected.float()[~edge])


def test_double_backward_is_the_same_mask():
    x, grad = tensors(50)
    x.requires_grad_(), grad.requires_grad_()
    args = *grid(0.05, 3), None, -128, 127
    (first,) = torch.autograd.grad(ops.fake_quant(x, *args), x, grad, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), grad)
    assert torch.equal(second, ops.fake_quant_backward(torch.ones(50), x.detach(), *args))


def test_compiled_equals_eager():
    def loss(x, weight):
        scale, zp = grid(0.05, 3)
        return (ops.fake_quant(x * weight, scale, zp, None, -128, 127) ** 2).sum()

    x, weight = tensors(64, 33)
    eager = weight.clone().requires_grad_()
    loss(x, eager).backward()
    compiled = weight.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x, compiled).backward()
    assert torch.equal(compiled.grad, eager.grad)


def test_threads_and_instruction_sets_do_not_change_bits():
    x, grad = tensors(200_003)
    results = []
    before = torch.get_num_threads()
    try:
        for isa in supported_isas():
            with isa_cap(isa):
                for threads in (1, 2, 3, 8):
                    torch.set_num_threads(threads)
                    results.append(ops.fake_quant_backward(grad, x, *grid(0.03, 1), None, -128, 127))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


GOOD = {
    "grad": torch.ones(3, 4),
    "x": torch.ones(3, 4),
    "scale": torch.tensor([0.1]),
    "zero_point": torch.tensor([0], dtype=torch.int32),
    "axis": None,
    "qmin": -128,
    "qmax": 127,
}
BAD = [
    ({"grad": torch.ones(4, 3)}, r"grad must have shape \[3, 4\]"),
    ({"grad": torch.ones(3, 4, dtype=torch.bfloat16)}, "grad must be torch.float32, as x is, got torch.bfloat16"),
    ({"x": torch.ones(3, 4, dtype=torch.float64)}, "x must be torch.float32, torch.bfloat16 or torch.float16"),
    ({"axis": 2}, "axis must be in"),
    ({"axis": 0}, "scale must have 3 elements"),
    ({"scale": torch.tensor([0.0])}, "scale must be positive"),
    ({"zero_point": torch.tensor([200], dtype=torch.int32)}, "zero_point must be in"),
    ({"zero_point": torch.tensor([0.0])}, "zero_point must be torch.int32"),
    ({"qmin": 127}, "qmin must be below qmax"),
    ({"qmax": 1 << 22}, r"qmin and qmax must be in \[-2\^21, 2\^21\]"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_refused_by_name(change, message):
    with pytest.raises(RuntimeError, match=f"fake_quant_backward: {message}"):
        ops.fake_quant_backward(**(GOOD | change))


@pytest.mark.parametrize("out", [torch.empty(4, 3), torch.empty(3, 4, dtype=torch.float16), torch.empty(4, 3).t()])
def test_bad_out_is_refused_by_name(out):
    with pytest.raises(RuntimeError, match="fake_quant_backward: out must"):
        ops.fake_quant_backward_out(**GOOD, out=out)
