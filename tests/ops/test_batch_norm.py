"""Batch norm fused with the grid behind it: torch's numbers in float64, the bits of fake_quant and quantize."""

import pytest
import torch
import torch.nn.functional as F

from qkernels import ops, reference
from qkernels.testing import isa_cap, supported_isas

INF = float("inf")
SHAPES = [
    (2, 1, 1, 1),
    (3, 17, 5, 6),
    (2, 16, 9, 7),
    (1, 96, 12, 13),
    (2, 300, 4, 3),
    (9, 1030),
    (2, 5, 3),
    (2, 8, 3, 4, 5),
]
CLAMPS = [(None, None), (0.0, None), (0.0, 6.0), (-1.0, 1.5)]


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def case(shape, offset=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    channels = shape[1]
    x, grad = (channels_last(torch.randn(shape, generator=g)) for _ in range(2))
    x = x * (torch.rand(channels, generator=g) + 0.5).reshape(-1, *[1] * (len(shape) - 2)) + offset
    weight, bias = torch.randn(channels, generator=g) + 0.1, torch.randn(channels, generator=g)
    return channels_last(x), grad, weight, bias


def numbers(scale, zero_point):
    return torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)


def statistics(x, weight, bias, momentum=0.1, eps=1e-5):
    running = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    return ops.batch_norm_statistics(x, weight, bias, *running, momentum, eps), running


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics_are_those_of_torch_in_float64(isa, shape, offset):
    x, _, weight, bias = case(shape, offset)
    found, running = statistics(x, weight, bias)
    double = torch.zeros(shape[1]).double(), torch.ones(shape[1]).double()
    y = F.batch_norm(x.double(), *double, weight.double(), bias.double(), True, 0.1, 1e-5)
    torch.testing.assert_close(running[0].double(), double[0], rtol=2e-7, atol=1e-7)
    torch.testing.assert_close(running[1].double(), double[1], rtol=1e-6, atol=0)
    normalized = reference._affine(x, found.factor, found.shift)
    assert torch.equal(found.extremes, torch.stack(torch.aminmax(normalized)))
    # as in torch, factor and shift are rounded once each, and their terms cancel where the mean is large
    terms = reference._affine(x.abs(), found.factor.abs(), found.shift.abs()).double()
    assert ((normalized.double() - y).abs() <= terms * 2**-21 + 1e-6).all()


def test_statistics_without_parameters_and_of_a_constant(isa):
    x = torch.full((4, 3), 7.25)
    found, running = statistics(x, None, None, momentum=1.0)
    assert torch.equal(found.mean, torch.full((3,), 7.25))
    assert torch.equal(found.factor, found.inv_std)
    assert torch.equal(running[1], torch.zeros(3))
    assert (found.extremes.abs() <= 7.25 * found.factor[0] * 2**-22).all()


@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
def test_extremes_tell_of_a_value_that_is_not_finite(isa, value):
    x, _, weight, bias = case((3, 17, 5, 6))
    x[2, 16, 4, 5] = value
    assert not torch.isfinite(statistics(x, weight, bias)[0].extremes).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("clamp", CLAMPS, ids=str)
def test_forward_has_the_bits_of_fake_quant_and_quantize(isa, shape, clamp):
    x, _, weight, bias = case(shape)
    found, _ = statistics(x, weight, bias)
    for dtype, zero_point, qmin, qmax in ((torch.uint8, 3, 0, 255), (torch.int8, -5, -128, 100)):
        arguments = found.factor, found.shift, *numbers(0.02, zero_point), qmin, qmax, *clamp
        y, codes = ops.norm_fake_quant(x, *arguments, dtype)
        expected, expected_codes = reference.norm_fake_quant(x, *arguments, dtype)
        assert torch.equal(y, expected)
        assert torch.equal(codes, expected_codes)
        assert y.stride() == codes.stride() == x.stride()
        alone, nothing = ops.norm_fake_quant(x, *arguments)
        assert torch.equal(alone, y)
        assert nothing.numel() == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize(
    ("clamp", "codes"), [((None, None), (-100, 90)), ((0.0, None), (3, 90)), ((-0.5, 0.3), (-47, 33))]
)
def test_straight_through_gradients_are_those_of_torch_in_float64(isa, shape, offset, clamp, codes):
    x, grad, weight, bias = case(shape, offset)
    found, _ = statistics(x, weight, bias)
    grid = numbers(0.01, 3)
    got = ops.norm_fake_quant_backward(grad, x, *found[:4], *grid, -100, 90, *clamp)  # some values are clipped
    passes = ops.fake_quant_backward(torch.ones_like(x), reference._affine(x, *found[2:4]), *grid, None, *codes)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], True, 0.1, 1e-5)
    for ours, expected in zip(got[:3], torch.autograd.grad(y, leaves, (grad * passes).double()), strict=True):
        size = expected.abs().max().item()
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=(2e-6 + 2e-7 * offset) * (1 + size))
    assert got[3].numel() == got[4].numel() == 0


def test_its_second_derivative_is_refused_where_the_incoming_gradient_is_constant():
    x, _, weight, bias = case(SHAPES[0])
    x.requires_grad_()
    found, _ = statistics(x.detach(), weight, bias)
    y, _ = ops.batch_norm_fake_quant(x, weight, bias, found, torch.tensor([0.02]), torch.tensor([1.6]), -100, 90)
    (first,) = torch.autograd.grad((y + x**3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="batch_norm_fake_quant: its gradient cannot be differentiated again"):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("clamp", CLAMPS, ids=str)
def test_learned_gradients_are_those_of_the_steps_one_by_one(isa, shape, clamp):
    x, grad, weight, bias = case(shape)
    leaves = [t.requires_grad_() for t in (x, weight, bias, torch.tensor([0.02]), torch.tensor([1.6]))]
    found, _ = statistics(x.detach(), weight.detach(), bias.detach())
    y, _ = ops.batch_norm_fake_quant(*leaves[:3], found, *leaves[3:], -100, 90, *clamp, grad_factor=0.3)
    t = F.batch_norm(x, None, None, weight, bias, True, 0.1, 1e-5)
    u = t if clamp == (None, None) else F.relu(t) if clamp[1] is None else F.hardtanh(t, *clamp)
    expected = ops.lsq(u, *leaves[3:], None, -100, 90, 0.3)
    assert ((y - expected).abs() > 1e-6).float().mean() < 1e-2  # a rounding apart where the norms are one apart
    one_by_one = torch.autograd.grad(expected, leaves, grad)
    for ours, theirs in zip(torch.autograd.grad(y, leaves, grad), one_by_one, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= 2e-3 * theirs.norm() + 1e-4
    arguments = *numbers(0.02, 2), -100, 90, *clamp, 0.3
    direct = ops.norm_fake_quant_backward(grad, x.detach(), *found[:4], *arguments)
    for ours, theirs in zip(
        direct, reference.norm_fake_quant_backward(grad, x.detach(), *found[:4], *arguments), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6 * (1 + theirs.abs().max().item()))


def everything(shape):
    x, grad, weight, bias = case(shape, 3.0)
    found, running = statistics(x, weight, bias)
    results = [
        *found,
        *running,
        *ops.norm_fake_quant(x, *found[2:4], *numbers(0.02, 0), 0, 255, None, None, torch.uint8),
    ]
    for rest in ((None, None, None), (0.0, 2.0, None), (0.0, 6.0, 0.5)):
        results += ops.norm_fake_quant_backward(grad, x, *found[:4], *numbers(0.02, 0), 0, 255, *rest)
    return results


@pytest.mark.parametrize("shape", [(2, 24, 70, 90), (3, 520, 17, 19), (1, 100, 300, 301)], ids=str)
def test_the_bits_do_not_depend_on_instruction_sets_and_threads(shape):
    before = torch.get_num_threads()
    expected = everything(shape)
    try:
        for isa in supported_isas():
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                with isa_cap(isa):
                    assert all(torch.equal(a, b) for a, b in zip(everything(shape), expected, strict=True))
    finally:
        torch.set_num_threads(before)


class Stopped(torch.autograd.Function):
    """Has a place in the graph, and no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_where_no_gradient_arrives_none_is_made():
    x, _, weight, bias = case((2, 16, 9, 7))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    grid = torch.tensor([0.05]), torch.tensor([128], dtype=torch.int32), 0, 255
    y, codes = ops.batch_norm_fake_quant(
        x, weight, bias, statistics(x.detach(), weight.detach(), bias.detach())[0], *grid, code_dtype=torch.uint8
    )
    z, _ = ops.fake_quant_codes(x, *grid, torch.uint8)
    assert not codes.requires_grad
    (Stopped.apply(y) + Stopped.apply(z)).backward()
    assert all(t.grad is None for t in leaves)


def test_gradients_of_another_layout_and_expanded_ones():
    x, grad, weight, bias = case((2, 16, 9, 7))
    found, _ = statistics(x, weight, bias)
    expected = ops.norm_fake_quant_backward(grad, x, *found[:4], *numbers(0.02, 0), -128, 127)
    got = ops.norm_fake_quant_backward(grad.contiguous(), x, *found[:4], *numbers(0.02, 0), -128, 127)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    one = torch.ones(1, 1, 1, 1).expand(x.shape)
    expected = ops.norm_fake_quant_backward(torch.ones_like(x), x, *found[:4], *numbers(0.02, 0), -128, 127)
    got = ops.norm_fake_quant_backward(one, x, *found[:4], *numbers(0.02, 0), -128, 127)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 4, 3, 5)}, "x must be .* channels_last"),
        ({"x": torch.randn(1, 4)}, "at least 2 values a channel"),
        ({"x": torch.randn(0, 4)}, "at least 2 values a channel"),
        ({"x": torch.randn(8, 4).double()}, "x must be float32"),
        ({"weight": torch.randn(3)}, r"weight must be float32 \[4\]"),
        ({"running_var": torch.randn(8)[::2]}, "running_var must be contiguous"),
        ({"momentum": float("nan")}, "momentum must be in"),
        ({"eps": -1.0}, "eps must not be negative"),
    ],
)
def test_bad_arguments_of_statistics_are_errors(change, message):
    arguments = {
        "x": torch.randn(8, 4),
        "weight": None,
        "bias": None,
        "running_mean": torch.zeros(4),
        "running_var": torch.ones(4),
        "momentum": 0.1,
        "eps": 1e-5,
    }
    with pytest.raises(RuntimeError, match=f"batch_norm_statistics: .*{message}"):
        ops.batch_norm_statistics(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": torch.ones(3)}, r"factor must be float32 \[4\]"),
        ({"scale": torch.zeros(1)}, "scale must be positive"),
        ({"scale": torch.tensor([float("nan")])}, "scale must be positive"),
        ({"qmin": 4, "qmax": 4}, "qmin must be below qmax"),
        ({"qmax": 1 << 22}, "qmin and qmax must be in"),
        ({"qmin": -1, "code_dtype": torch.uint8}, "qmin"),
        ({"floor": 2.0, "ceiling": 1.0}, "floor must not be above ceiling"),
        ({"floor": float("nan")}, "floor must not be above ceiling"),
        ({"zero_point": torch.tensor([256], dtype=torch.int32)}, "zero_point must be in"),
        ({"zero_point": torch.tensor([float("nan")])}, "zero_point must be finite"),
        ({"zero_point": torch.zeros(2, dtype=torch.int32)}, "zero_point must have 1 element"),
        ({"code_dtype": torch.int32}, "code_dtype must be"),
    ],
)
def test_bad_arguments_of_the_forward_are_errors(change, message):
    arguments = {
        "x": torch.randn(8, 4),
        "factor": torch.ones(4),
        "shift": torch.zeros(4),
        "scale": torch.tensor([0.1]),
        "zero_point": torch.tensor([0], dtype=torch.int32),
        "qmin": 0,
        "qmax": 255,
    }
    with pytest.raises(RuntimeError, match=f"norm_fake_quant: .*{message}"):
        ops.norm_fake_quant(**{**arguments, **change})


@pytest.mark.parametrize(
    ("grad", "options", "message"),
    [
        (torch.randn(8, 3), (None, None, None), "grad must have shape"),
        (torch.randn(8, 4).double(), (None, None, None), "grad must be float32"),
        (torch.randn(8, 4), (None, None, INF), "grad_factor must be finite"),
    ],
)
def test_bad_arguments_of_the_backward_are_errors(grad, options, message):
    channels = [torch.ones(4) for _ in range(4)]
    with pytest.raises(RuntimeError, match=f"norm_fake_quant_backward: .*{message}"):
        ops.norm_fake_quant_backward(grad, torch.randn(8, 4), *channels, *numbers(0.1, 0), 0, 255, *options)
