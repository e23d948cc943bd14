"""lsq: learned scales and zero points whose gradients are right and have the same bits however they are computed."""

import math

import pytest
import torch

from qkernels import ops, reference
from qkernels.testing import isa_cap, supported_isas

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g) * 4).to(dtype), torch.randn(*shape, generator=g).to(dtype)


def learned(channels=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(channels, generator=g) * 0.3 + 0.1, torch.rand(channels, generator=g) * 9 - 4


def closed_form(grad, x, scale, zero_point, axis, qmin, qmax, factor):
    """The gradients in float64 by definition; v in float32, as it decides the rounding. And the sums of |term|."""
    others = [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]

    def along(t):
        return t.reshape([1 if d in others else -1 for d in range(x.dim())])

    def total(t):
        return (t.sum(others) if others else t).reshape(scale.shape)

    z = along(zero_point.round().clamp(qmin, qmax)).double()
    v = (x.float() * (1.0 / along(scale))).double()
    r, g, s = v.round(), grad.double(), along(scale).double()
    inside = (r + z >= qmin) & (r + z <= qmax)
    clamped = torch.where(v.isnan(), qmin - z, torch.minimum(torch.maximum(r, qmin - z), qmax - z))
    terms = g * torch.where(inside, r - v, clamped), torch.where(inside, 0.0, -g * s)
    sums, sizes = [factor * total(t) for t in terms], [factor * total(t.abs()) for t in terms]
    return torch.where(inside, grad, 0), sums, sizes


def check(grads, grad, x, scale, zero_point, axis, qmin, qmax, factor):
    grad_x, sums, sizes = closed_form(grad, x, scale, zero_point, axis, qmin, qmax, factor)
    assert torch.equal(grads[0], grad_x)
    for ours, exact, size in zip(grads[1:], sums, sizes, strict=True):
        assert ours.dtype == torch.float32
        assert ours.shape == scale.shape
        assert ((ours.double() - exact).abs() <= 1e-6 * size + 1e-30).all()


@pytest.mark.parametrize("n", [0, 1, 7, 8, 15, 17, 31, 32, 33, 4095, 4096, 4097, 100_003])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_equal_the_closed_form_per_tensor(isa, n, dtype):
    x, grad = tensors(n, seed=n, dtype=dtype)
    args = *learned(seed=n), None, -8, 7, 1 / math.sqrt(max(n, 1) * 7)
    check(ops.lsq_backward(grad, x, *args), grad, x, *args)


@pytest.mark.parametrize("shape", [(3, 37, 5, 11), (2, 600, 3, 3), (5, 1, 4, 4), (1, 257, 1, 150), (0, 3, 2, 2)])
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_equal_the_closed_form_per_channel(isa, shape, axis, memory_format):
    x, grad = (t.contiguous(memory_format=memory_format) for t in tensors(*shape))
    args = *learned(shape[axis]), axis, -8, 7, 0.25
    grads = ops.lsq_backward(grad, x, *args)
    check(grads, grad, x, *args)
    assert grads[0].stride() == x.stride()


def test_many_rows_of_channels(isa):
    x, grad = tensors(5000, 48)
    args = *learned(48), 1, -8, 7, 1.0
    check(ops.lsq_backward(grad, x, *args), grad, x, *args)


def test_large_tensors(isa):
    x, grad = tensors(3, 3_000_017)
    args = *learned(3), 0, -8, 7, 1.0
    check(ops.lsq_backward(grad, x, *args), grad, x, *args)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_the_reference_agrees(axis):
    x, grad = tensors(30, 40)
    args = *learned(1 if axis is None else x.shape[axis]), axis, -8, 7, 0.5
    ours, expected = ops.lsq_backward(grad, x, *args), reference.lsq_backward(grad, x, *args)
    assert torch.equal(ours[0], expected[0])
    torch.testing.assert_close(ours[1:], expected[1:], rtol=1e-5, atol=1e-5)
    assert torch.equal(ops.lsq(x, *args), reference.lsq(x, *args))


@pytest.mark.parametrize("zero_point", [0.0, 2.4, 2.5, 3.5, -99.0, 99.0])
def test_forward_is_fake_quant_on_the_rounded_zero_point(isa, zero_point):
    x, _ = tensors(1000)
    rounded = torch.tensor([max(-8, min(7, round(zero_point)))], dtype=torch.int32)
    expected = ops.fake_quant(x, torch.tensor([0.3]), rounded, None, -8, 7)
    assert torch.equal(ops.lsq(x, torch.tensor([0.3]), torch.tensor([zero_point]), None, -8, 7, 1.0), expected)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_gradients_agree_with_torch(axis):
    x, grad = tensors(64, 48)
    scale, zero_point = learned(1 if axis is None else x.shape[axis])
    zero_point = zero_point.round()
    leaves = [[t.clone().requires_grad_() for t in (x, scale, zero_point)] for _ in range(2)]
    ops.lsq(*leaves[0], axis, -8, 7, 0.5).backward(grad)
    if axis is None:
        y = torch._fake_quantize_learnable_per_tensor_affine(*leaves[1], -8, 7, 0.5)
    else:
        y = torch._fake_quantize_learnable_per_channel_affine(*leaves[1], axis, -8, 7, 0.5)
    y.backward(grad)
    assert torch.equal(leaves[0][0].grad, leaves[1][0].grad)
    for ours, theirs in zip(leaves[0][1:], leaves[1][1:], strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_zero_point_gradient_of_the_surrogate():
    """By central differences in float64 of clamp(x / s, qmin - z, qmax - z) * s, which has the gradient of z."""
    x, grad = (t.double() for t in tensors(500))
    scale, zero_point = 0.3, 2.0

    def surrogate(z):
        return ((x / scale).clamp(-8 - z, 7 - z) * scale * grad).sum()

    near_edge = (((x / scale) - (-8 - 2)).abs() < 0.6) | (((x / scale) - (7 - 2)).abs() < 0.6)
    grad[near_edge] = 0
    numeric = (surrogate(zero_point + 1e-6) - surrogate(zero_point - 1e-6)) / 2e-6
    args = torch.tensor([scale]), torch.tensor([zero_point]), None, -8, 7, 1.0
    ours = ops.lsq_backward(grad.float(), x.float(), *args)[2]
    assert ours.item() == pytest.approx(numeric.item(), rel=1e-4)


@pytest.mark.parametrize("shape", [(200_003,), (7, 30_011), (600, 7, 49), (3000, 100), (400, 700)])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_threads_and_instruction_sets_do_not_change_bits(shape, axis):
    x, grad = tensors(*shape)
    args = *learned(1 if axis is None else shape[axis]), axis, -8, 7, 0.37
    results = []
    before = torch.get_num_threads()
    try:
        for isa in supported_isas():
            with isa_cap(isa):
                for threads in (1, 2, 3, 8):
                    torch.set_num_threads(threads)
                    results.append(ops.lsq_backward(grad, x, *args))
    finally:
        torch.set_num_threads(before)
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_hostile_values_follow_the_contract(isa):
    nan, inf = float("nan"), float("inf")
    args = torch.tensor([1.0]), torch.tensor([1.0]), None, -8, 7, 1.0
    x = torch.tensor([nan, inf, -inf, 3e38, -3e38, 1e-40, -0.0] * 6)
    grad_x, grad_scale, grad_zero_point = ops.lsq_backward(torch.ones_like(x), x, *args)
    assert grad_x[:7].tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert grad_scale.item() == 6 * (-9 + 6 - 9 + 6 - 9)
    assert grad_zero_point.item() == 6 * -5
    # What is not finite in the gradient stays visible in the sums, and does not spread over the channels.
    for axis, shape in ((0, (2, 40)), (1, (40, 2))):
        x, grad = torch.full(shape, 100.0), torch.ones(shape)
        grad.select(axis, 0)[3] = nan
        _, *sums = ops.lsq_backward(grad, x, *learned(2), axis, -8, 7, 1.0)
        assert [torch.isnan(s).tolist() for s in sums] == [[True, False]] * 2


@pytest.mark.parametrize("change", ["expanded", "transposed", "sliced", "out is grad"])
def test_any_layout_of_grad_and_x(change):
    x, grad = tensors(24, 40)
    if change == "expanded":
        grad = torch.tensor(0.5).expand(24, 40)
    elif change == "transposed":
        x, grad = x.t().contiguous().t(), grad
    elif change == "sliced":
        x, grad = torch.randn(24, 80)[:, ::2] * 4, torch.randn(24, 80)[:, 10:50]
    args = *learned(40), 1, -8, 7, 1.0
    kept = grad.clone()
    grads = ops.lsq_backward_out(grad, x, *args, grad) if change == "out is grad" else ops.lsq_backward(grad, x, *args)
    check(grads, kept, x, *args)


def test_compiled_equals_eager():
    def loss(x, scale, zero_point):
        return (ops.lsq(x * 2, scale, zero_point, 1, -8, 7, 0.1) ** 2).sum()

    inputs = tensors(64, 33)[0], *learned(33)
    leaves = [[t.clone().requires_grad_() for t in inputs] for _ in range(2)]
    loss(*leaves[0]).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves[1]).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(*leaves, strict=True))


def test_under_autocast_a_bfloat16_activation_trains_float32_grids():
    layer, (scale, zero_point) = torch.nn.Linear(40, 24), learned(24)
    scale.requires_grad_(), zero_point.requires_grad_()
    x, _ = tensors(16, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        activation = layer(x)
        y = ops.lsq(activation, scale, zero_point, 1, -8, 7, 1.0)
        fake = ops.fake_quant(activation, torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32), None, -8, 7)
    assert y.dtype == fake.dtype == torch.bfloat16
    (y.float() + fake.float()).square().sum().backward()
    assert [t.grad.dtype for t in (layer.weight, scale, zero_point)] == [torch.float32] * 3
    assert scale.grad.abs().sum() > 0
    assert layer.weight.grad.abs().sum() > 0


def test_training_finds_the_best_scale():
    """Gradient descent on the squared error ends within 5% of the error of the best scale."""
    x, _ = tensors(4096)
    zero_point = torch.zeros(1)

    def error(scale):
        return ((ops.lsq(x, scale, zero_point, None, -8, 7, 1.0) - x) ** 2).mean()

    scale = torch.tensor([0.5], requires_grad=True)
    for step in range(200):
        error(scale).backward()
        with torch.no_grad():
            scale -= 2e-2 / (1 + step / 20) * scale.grad
            scale.grad = None
    best = min(error(torch.tensor([0.5 + i / 200])).item() for i in range(300))
    assert error(scale).item() == pytest.approx(best, rel=0.05)


GOOD = {
    "grad": torch.ones(3, 4),
    "x": torch.ones(3, 4),
    "scale": torch.tensor([0.1]),
    "zero_point": torch.tensor([0.0]),
    "axis": None,
    "qmin": -8,
    "qmax": 7,
    "grad_factor": 1.0,
}
BAD = [
    ({"x": torch.ones(3, 4, dtype=torch.int32)}, "x must be torch.float32, torch.bfloat16 or torch.float16"),
    ({"axis": -3}, "axis must be in"),
    ({"axis": 1}, "scale must have 4 elements"),
    ({"scale": torch.tensor([-0.1])}, "scale must be positive"),
    ({"scale": torch.tensor([float("nan")])}, "scale must be positive"),
    ({"scale": torch.tensor([0.1], dtype=torch.float64)}, "scale must be torch.float32"),
    ({"zero_point": torch.tensor([0], dtype=torch.int32)}, "zero_point must be float32"),
    ({"zero_point": torch.tensor([float("inf")])}, "zero_point must be finite"),
    ({"zero_point": torch.zeros(2)}, "zero_point must have 1 element"),
    ({"qmin": 7}, "qmin must be below qmax"),
    ({"qmin": -(1 << 40)}, r"qmin and qmax must be in \[-2\^21, 2\^21\]"),
]
BAD_BACKWARD = [
    ({"grad": torch.ones(3)}, r"grad must have shape \[3, 4\]"),
    ({"grad": torch.ones(3, 4, dtype=torch.float16)}, "grad must be torch.float32"),
    ({"grad_factor": float("inf")}, "grad_factor must be finite"),
]


@pytest.mark.parametrize(("change", "message"), BAD + BAD_BACKWARD)
def test_bad_input_of_the_backward_is_refused_by_name(change, message):
    with pytest.raises(RuntimeError, match=f"lsq_backward: {message}"):
        ops.lsq_backward(**(GOOD | change))


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_refused_by_name(change, message):
    arguments = GOOD | change
    del arguments["grad"]
    with pytest.raises(RuntimeError, match=f"lsq: {message}"):
        ops.lsq(**arguments)
