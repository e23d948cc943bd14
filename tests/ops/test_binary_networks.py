"""Binary networks: signs and their gradient, and products of packed signs that equal float products exactly."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels
from qkernels import ops, reference
from qkernels.core.recipe import Match, Override, make_recipe
from qkernels.testing import isa_cap, supported_isas

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 1.5
    x.view(-1)[::7] = 0.0
    x.view(-1)[3::11] = -0.0
    return x.to(dtype)


# ---- sign ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_weight", [False, True])
@pytest.mark.parametrize("shape", [(0,), (1,), (40_003,), (3, 5, 7)])
def test_signs_and_gradients_equal_the_reference(isa, dtype, is_weight, shape):
    x, grad = random(*shape, dtype=dtype), random(*shape, seed=1, dtype=dtype)
    leaf = x.clone().requires_grad_()
    y = ops.binary_sign(leaf, is_weight)
    assert torch.equal(y, reference.binary_sign(x))
    y.backward(grad)
    assert torch.equal(leaf.grad, reference.binary_sign_backward(grad, x, is_weight))


def test_signs_of_hostile_values():
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, inf, -inf, -0.0, 1.0, -1.0, 1.0001])
    assert ops.binary_sign(x).tolist() == [-1, 1, -1, 1, 1, -1, 1]
    assert ops.binary_sign_backward(torch.full((7,), 2.0), x).tolist() == [0, 0, 0, 2, 2, 2, 0]
    assert ops.binary_sign_backward(torch.full((7,), 2.0), x, is_weight=True).tolist() == [0, 2, 0, 2, 2, 2, 2]


def test_the_gradient_is_that_of_hardtanh():
    """Checked by differences in float64."""
    x = torch.linspace(-3, 3, 41, dtype=torch.float64).add(0.013).requires_grad_()
    assert torch.autograd.gradcheck(F.hardtanh, (x,))
    leaf = x.detach().float().requires_grad_()
    ops.binary_sign(leaf).sum().backward()
    assert torch.equal(leaf.grad, torch.autograd.grad(F.hardtanh(x).sum(), x)[0].float())


@pytest.mark.parametrize("view", [lambda x: x.t(), lambda x: x[:, ::2], lambda x: x[:1].expand(6, 8)])
def test_signs_of_any_layout(view):
    x = view(random(6, 8))
    grad = random(*x.shape, seed=1)
    assert torch.equal(ops.binary_sign(x), reference.binary_sign(x))
    assert torch.equal(ops.binary_sign_backward(grad, x), reference.binary_sign_backward(grad, x))


def test_compiled_equals_eager():
    def loss(x, w):
        return (ops.binary_sign(x) @ ops.binary_sign(w, is_weight=True)).square().sum()

    grads = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [random(6, 8).requires_grad_(), random(8, 4).requires_grad_()]
        run(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---- packed ----


@pytest.mark.parametrize("n", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_equal_the_reference(n, dtype):
    for shape, axis in (((5, n), -1), ((2, n, 3, 4), 1), ((n,), 0)):
        x = random(*shape, dtype=dtype)
        assert torch.equal(ops.pack_signs(x, axis), reference.pack_signs(x, axis))


@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("k", [1, 64, 65, 300])
def test_linear_equals_the_float_product_of_signs(isa, m, n, k):
    x, weight = random(m, k), random(n, k, seed=1)
    scale, bias = torch.rand(n), torch.randn(n)
    packed = ops.binary_weight_pack(weight)
    signs = torch.where(x >= 0, 1.0, -1.0), torch.where(weight >= 0, 1.0, -1.0)
    sums = ops.binary_linear(ops.pack_signs(x, -1), packed, torch.ones(n), None, k)
    assert torch.equal(sums, F.linear(*signs))
    ours = ops.binary_linear(ops.pack_signs(x, -1), packed, scale, bias, k)
    assert torch.equal(ours, reference.binary_linear(*signs, scale, bias))


CONVS = [
    ((2, 3, 5, 6), (4, 3, 3, 3), (1, 1), (1, 1), (1, 1)),
    ((1, 64, 7, 7), (33, 64, 3, 3), (2, 2), (1, 1), (1, 1)),
    ((2, 70, 6, 9), (40, 70, 3, 2), (1, 2), (2, 0), (1, 1)),
    ((1, 130, 9, 8), (32, 130, 3, 3), (1, 1), (2, 2), (2, 2)),
    ((1, 65, 4, 4), (1, 65, 1, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 8, 12, 12), (5, 8, 11, 11), (4, 4), (5, 5), (1, 1)),
    ((0, 8, 4, 4), (5, 8, 3, 3), (1, 1), (1, 1), (1, 1)),
]


@pytest.mark.parametrize(("shape", "weight_shape", "stride", "padding", "dilation"), CONVS)
def test_conv_equals_the_float_convolution_of_signs_padding_included(
    isa, shape, weight_shape, stride, padding, dilation
):
    x, weight = random(*shape), random(*weight_shape, seed=1)
    signs = torch.where(x >= 0, 1.0, -1.0), torch.where(weight >= 0, 1.0, -1.0)
    geometry = stride, padding, dilation
    operands = ops.pack_signs(x, 1), ops.binary_weight_pack(weight)
    channels, kernel = weight_shape[0], weight_shape[2:]
    sums = ops.binary_conv2d(*operands, torch.ones(channels), None, shape[1], kernel, *geometry)
    assert torch.equal(sums, F.conv2d(*signs, None, *geometry))
    scale, bias = torch.rand(channels), torch.randn(channels)
    ours = ops.binary_conv2d(*operands, scale, bias, shape[1], kernel, *geometry)
    assert torch.equal(ours, reference.binary_conv2d(*signs, scale, bias, *geometry))
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_threads_and_instruction_sets_do_not_change_bits():
    x, weight = random(2, 70, 30, 30), random(40, 70, 3, 3, seed=1)
    results = []
    before = torch.get_num_threads()
    try:
        for isa in supported_isas():
            with isa_cap(isa):
                for threads in (1, 2, 3, 8):
                    torch.set_num_threads(threads)
                    operands = ops.pack_signs(x, 1), ops.binary_weight_pack(weight)
                    results.append(ops.binary_conv2d(*operands, torch.ones(40), None, 70, [3, 3], padding=[1, 1]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


X, W, S = torch.zeros(2, 5, 5, 2, dtype=torch.int64), torch.zeros(1, 18, 32, dtype=torch.int64), torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X.float(), W, S, None, 70, [3, 3], [1, 1], [1, 1], [1, 1]), "input must be an int64 tensor of packed signs"),
        ((X, W, S, None, 200, [3, 3], [1, 1], [1, 1], [1, 1]), "input must hold 4 words for 200 inputs"),
        ((X, W, S, None, 70, [3, 2], [1, 1], [1, 1], [1, 1]), "packed must be made by binary_weight_pack"),
        ((X, W, S.double(), None, 70, [3, 3], [1, 1], [1, 1], [1, 1]), "scale must be float32"),
        ((X, W, S, S[:2], 70, [3, 3], [1, 1], [1, 1], [1, 1]), "bias must be float32 with one element an output"),
        ((X, W, S, None, 70, [3, 3], [0, 1], [1, 1], [1, 1]), "kernel_size, stride and dilation must be at least 1"),
        (
            (X, W, S, None, 2**23, [3, 3], [1, 1], [1, 1], [1, 1]),
            r"times the taps of the kernel must be in \[1, 2\^24\]",
        ),
        ((X, W, S, None, 70, [3], [1, 1], [1, 1], [1, 1]), "must have 2 elements"),
        ((X, W, S, None, 70, [3, 3], [1, 1], [0, 0], [3, 3]), "the kernel must fit into the padded input"),
        ((X[0], W, S, None, 70, [3, 3], [1, 1], [1, 1], [1, 1]), r"input must have shape \[N, H, W, words\]"),
    ],
)
def test_bad_input_of_a_convolution_is_refused_by_name(arguments, message):
    with pytest.raises(RuntimeError, match=f"binary_conv2d: .*{message}"):
        ops.binary_conv2d(*arguments)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("binary_sign", (X,), "x must be torch.float32"),
        ("binary_sign_backward", (S[:2], S), "grad must have the dtype and shape of x"),
        ("pack_signs", (S, 1), "axis must be in"),
        ("binary_weight_pack", (S,), "weight must have shape"),
        ("binary_linear", (X[0, 0], W, S, None, 70), "packed must be made by binary_weight_pack"),
    ],
)
def test_bad_input_is_refused_by_name(op, arguments, message):
    with pytest.raises(RuntimeError, match=f"{op}: .*{message}"):
        getattr(ops, op)(*arguments)


# ---- a network ----


def test_a_converted_layer_on_signs_has_the_sums_of_packed_signs():
    """Trained under `bnn`, converted to int8 codes without a mismatch: the bits of those codes give the same sums."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 70, 3), nn.BatchNorm2d(70), nn.Hardtanh(), nn.Conv2d(70, 33, 3, padding=1), nn.BatchNorm2d(33),
        nn.Hardtanh(), nn.Flatten(), nn.Linear(33 * 36, 4),
    )  # fmt: skip
    eight = make_recipe("int8", observer="moving_average")
    signs, weights = replace(eight.activation, rule="bnn"), replace(eight.weight, rule="bnn")
    overrides = Override(Match.of("0"), activation=signs), Override(Match.of("3"), weight=weights)
    model = qkernels.prepare_qat(network, random(4, 3, 8, 8), replace(eight, overrides=overrides))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(5):
        optimizer.zero_grad()
        (model(random(4, 3, 8, 8, seed=step)) - 1).square().mean().backward()
        optimizer.step()
    converted, x = qkernels.convert(model), random(4, 3, 8, 8, seed=99)
    assert qkernels.verify(model, converted, [x]).total_mismatches == 0

    layer, seen = converted.get_submodule("3"), []
    layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    converted(x)
    a = seen[0].float() - layer.in_qparams[0].zero_point
    w = torch.sign(layer.weight.float())
    assert set(a.unique().tolist()) == {-1.0, 1.0}
    assert layer.weight.unique().numel() == 2
    packed = ops.pack_signs(a, 1), ops.binary_weight_pack(w)
    sums = ops.binary_conv2d(*packed, torch.ones(33), None, 70, (3, 3), padding=(1, 1))
    assert torch.equal(sums, F.conv2d(a, w, padding=1))
