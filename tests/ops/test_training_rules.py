"""PACT and DoReFa: the gradients of their formulas, the same bits however they are computed."""

import pytest
import torch

from qkernels import ops, reference
from qkernels.errors import InvalidArgument
from qkernels.testing import isa_cap, supported_isas

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [0, 1, 7, 8, 15, 16, 17, 33, 4095, 4097, 30_003]


def tensors(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g) * 2).to(dtype), torch.randn(*shape, generator=g).to(dtype)


def grid(scale, zero_point=0):
    return torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)


def same_bits_everywhere(run):
    results = []
    before = torch.get_num_threads()
    try:
        for isa in supported_isas():
            with isa_cap(isa):
                for threads in (1, 2, 3, 8):
                    torch.set_num_threads(threads)
                    results.append(run())
    finally:
        torch.set_num_threads(before)
    return all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


# ---- PACT ----


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pact_equals_the_reference(isa, n, dtype):
    x, grad = tensors(n, seed=n, dtype=dtype)
    args = *grid(0.3, 2), None, -4, 7
    assert torch.equal(ops.pact(x, *args), reference.pact(x, *args))
    ours, expected = ops.pact_backward(grad, x, *args), reference.pact_backward(grad, x, *args)
    assert torch.equal(ours[0], expected[0])
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_pact_gradients_are_those_of_the_clip_in_float64(isa, axis):
    x, grad = tensors(3, 17, 5)
    channels = 1 if axis is None else x.shape[axis]
    scale = torch.rand(channels, generator=torch.Generator().manual_seed(1)) * 0.3 + 0.2
    zero_point = torch.arange(channels, dtype=torch.int32) % 5 - 2
    leaves = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
    ops.pact(*leaves, zero_point, axis, -4, 7).backward(grad)
    wide = [x.double().requires_grad_(), scale.double().requires_grad_()]
    shape = [-1 if axis is not None and d == axis % 3 else 1 for d in range(3)]
    low, high = ((end - zero_point).reshape(shape) * wide[1].reshape(shape) for end in (-4, 7))
    clipped = torch.minimum(torch.maximum(wide[0], low), high)
    clipped.backward(grad.double())
    assert torch.equal(leaves[0].grad, wide[0].grad.float())
    torch.testing.assert_close(leaves[1].grad.double(), wide[1].grad, rtol=1e-5, atol=1e-5)


def test_pact_clip_passes_gradcheck():
    """The surrogate of the test above, by differences."""
    x = torch.linspace(-3, 3, 41, dtype=torch.float64).add(0.013).requires_grad_()
    scale = torch.tensor([0.25], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, s: torch.minimum(torch.maximum(x, -4 * s), 7 * s), (x, scale), eps=1e-5)


# ---- DoReFa ----


def test_tanh_is_within_two_units_in_the_last_place(isa):
    """Seen through a grid so fine that it hardly rounds: largest = 1, steps of 2^-21."""
    x = torch.cat([torch.linspace(-12, 12, 200_001), torch.tensor([20.0])])
    step = 2.0**-21
    y = ops.dorefa_weight(x, *grid(step), -(2**21), 2**21).double()
    assert (y - torch.tanh(x.double())).abs().max() <= step / 2 + 2 * 2**-24


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dorefa_weights_equal_the_reference_up_to_ties(isa, n, dtype):
    x, _ = tensors(n, seed=n, dtype=dtype)
    args = *grid(1 / 7), -7, 7
    ours, expected = ops.dorefa_weight(x, *args), reference.dorefa_weight(x, *args)
    assert ((ours - expected).abs() > 1e-6).float().sum() <= 1 + n // 10_000
    assert ((ours - expected).abs() < 1 / 7 + 1e-2).all()


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dorefa_weight_gradient_equals_float64(isa, n, dtype):
    x, grad = tensors(n, seed=n, dtype=dtype)
    args = *grid(1 / 7), -7, 7
    ours, expected = ops.dorefa_weight_backward(grad, x, *args), reference.dorefa_weight_backward(grad, x, *args)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("ties", [False, True])
def test_dorefa_weight_gradient_is_that_of_the_formula(ties):
    """By autograd in float64 of tanh(x) / max |tanh(x)|, which is checked by differences."""
    x, grad = tensors(40)
    if ties:
        x[3], x[30] = x.abs().max() + 0.1, -x.abs().max() - 0.1

    def formula(x):
        t = torch.tanh(x)
        return t / t.abs().amax()

    wide = x.double().requires_grad_()
    assert ties or torch.autograd.gradcheck(formula, (wide,))
    (expected,) = torch.autograd.grad(formula(wide), wide, grad.double())
    leaf = x.clone().requires_grad_()
    ops.dorefa_weight(leaf, *grid(1 / 127), -127, 127).backward(grad)
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_dorefa_weights_of_zeros_and_of_any_layout():
    assert torch.equal(ops.dorefa_weight(torch.zeros(5), *grid(0.1), -10, 10), torch.zeros(5))
    assert torch.isfinite(ops.dorefa_weight_backward(torch.ones(5), torch.zeros(5), *grid(0.1), -10, 10)).all()
    x, grad = tensors(6, 8)
    args = *grid(1 / 7), -7, 7
    for view in (x[:, ::2], x.t(), x[:1].expand(6, 8)):
        plain = view.contiguous()
        g = grad.reshape(-1)[: view.numel()].reshape(view.shape)
        assert torch.equal(ops.dorefa_weight(view, *args), ops.dorefa_weight(plain, *args))
        torch.testing.assert_close(
            ops.dorefa_weight_backward(g, view, *args), ops.dorefa_weight_backward(g, plain, *args)
        )


@pytest.mark.parametrize("bits", [1, 4, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (4, 3, 3, 5), (2, 1000), (0, 3), (7, 0)])
def test_gradients_in_few_bits_equal_the_reference(isa, bits, dtype, shape):
    x, _ = tensors(*shape, dtype=dtype)
    for seed in (0, -1, 2**62 + 12345):
        seed = torch.tensor([seed])
        assert torch.equal(ops.dorefa_gradient(x, seed, bits), reference.dorefa_gradient(x, seed, bits))


def test_gradients_in_few_bits_are_unbiased_on_a_grid_of_their_own():
    x = torch.rand(1, 501) * 1.6 - 0.8
    x[0, 0] = 1.0
    total = torch.zeros_like(x)
    for seed in range(800):
        y = ops.dorefa_gradient(x, torch.tensor([seed]), 2)
        assert y.unique().numel() <= 4
        total += y
    # Values of the grid are 2/3 apart: the mean of 800 has a deviation of at most 2/3 * 0.5 / sqrt(800) = 0.012.
    assert (total / 800 - x)[0, 1:].abs().max() < 5 * 0.012
    assert (total / 800 - x)[0, 1:].mean().abs() < 0.002


def test_a_sample_that_is_not_finite_becomes_nan_and_a_zero_one_stays_zero(isa):
    x, _ = tensors(5, 20)
    x[1, 3], x[2, 4], x[3] = float("nan"), float("-inf"), 0.0
    y = ops.dorefa_gradient(x, torch.tensor([1]), 4)
    assert y[1].isnan().all()
    assert y[2].isnan().all()
    assert (y[3] == 0).all()
    assert torch.isfinite(y[[0, 4]]).all()


@pytest.mark.parametrize("bits", [0, 17])
def test_round_gradient_refuses_bits_in_the_forward(bits):
    with pytest.raises(InvalidArgument, match=rf"^round_gradient: bits must be in \[1, 16\], got {bits}$"):
        ops.round_gradient(torch.randn(3), bits)


def test_round_gradient_is_the_identity_with_a_rounded_gradient():
    x, grad = tensors(4, 6)
    x.requires_grad_()
    y = ops.round_gradient(x, 3, seed=torch.tensor([5]))
    assert torch.equal(y, x)
    y.backward(grad)
    assert torch.equal(x.grad, ops.dorefa_gradient(grad, torch.tensor([5]), 3))
    torch.manual_seed(0)
    first = torch.autograd.grad(ops.round_gradient(x, 3), x, grad)[0]
    assert not torch.equal(first, torch.autograd.grad(ops.round_gradient(x, 3), x, grad)[0])
    torch.manual_seed(0)
    assert torch.equal(first, torch.autograd.grad(ops.round_gradient(x, 3), x, grad)[0])


# ---- all ----


def test_threads_and_instruction_sets_do_not_change_bits():
    x, grad = tensors(7, 10_011)
    scale = torch.rand(7, generator=torch.Generator().manual_seed(1)) * 0.3 + 0.1
    zero_point = torch.zeros(7, dtype=torch.int32)
    assert same_bits_everywhere(lambda: ops.pact_backward(grad, x, scale, zero_point, 0, -4, 7))
    args = *grid(1 / 7), -7, 7
    assert same_bits_everywhere(
        lambda: (
            ops.dorefa_weight(x, *args),
            ops.dorefa_weight_backward(grad, x, *args),
            ops.dorefa_gradient(grad, torch.tensor([3]), 4),
        )
    )


def test_compiled_equals_eager():
    def loss(x, w, scale, zero_point):
        a = ops.pact(x * 1.5, scale, zero_point, None, 0, 15)
        b = ops.dorefa_weight(w, scale.detach(), zero_point, -7, 7)
        return (ops.round_gradient(a @ b, 4, seed=torch.tensor([1])) ** 2).sum()

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x, _ = tensors(6, 8)
        leaves = [x.requires_grad_(), tensors(8, 4)[0].requires_grad_(), torch.tensor([0.1]).requires_grad_()]
        run(*leaves, torch.tensor([0], dtype=torch.int32)).backward()
        results.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


X, S, Z = torch.ones(3, 4), torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("pact", (X.double(), S, Z, None, -8, 7), "x must be torch.float32, torch.bfloat16 or torch.float16"),
        ("pact", (X, -S, Z, None, -8, 7), "scale must be positive"),
        ("pact_backward", (X[:2], X, S, Z, None, -8, 7), r"grad must have shape \[3, 4\]"),
        ("pact_backward", (X, X, S, Z, 0, -8, 7), "scale must have 3 elements"),
        ("dorefa_weight", (X * float("nan"), S, Z, -7, 7), "x must be finite"),
        ("dorefa_weight", (X, torch.ones(3), Z, -7, 7), "scale must have 1 element"),
        ("dorefa_weight_backward", (X.half(), X, S, Z, -7, 7), "grad must have the dtype and shape of x"),
        ("dorefa_gradient", (X, torch.tensor([1]), 17), r"bits must be in \[1, 16\], got 17"),
        ("dorefa_gradient", (X, torch.tensor([1.0]), 4), "seed must be an int64 tensor of 1 element"),
    ],
)
def test_bad_input_is_refused_by_name(op, arguments, message):
    function = ops.pact if op == "pact" else getattr(ops, op)
    prefix = "fake_quant" if op == "pact" else op
    with pytest.raises(RuntimeError, match=f"{prefix}: {message}"):
        function(*arguments)
