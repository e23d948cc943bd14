"""One grid a group of elements along a dimension: the same as spreading the grids over the elements."""

import pytest
import torch

from qkernels import ops, reference


def problem(shape, axis, group_size, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=g) * 4).to(dtype)
    grid_shape = list(shape)
    grid_shape[axis] //= group_size
    scale = torch.rand(grid_shape, generator=g) * 0.3 + 0.05
    zero_point = torch.randint(-3, 4, grid_shape, generator=g, dtype=torch.int32)
    return x, torch.randn(shape, generator=g).to(dtype), scale, zero_point


def spread(values, axis, group_size):
    return values.repeat_interleave(group_size, dim=axis)


CASES = [
    ((6, 256), 1, 32),
    ((6, 256), -1, 128),
    ((6, 256), 0, 2),
    ((2, 8, 3, 5), 1, 4),
    ((64,), 0, 64),
    ((3, 14), 1, 7),
]


@pytest.mark.parametrize(("shape", "axis", "group_size"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", ["input", "mask"])
def test_fake_quant_equals_element_grids(isa, shape, axis, group_size, dtype, keep):
    x, grad, scale, zero_point = problem(shape, axis, group_size, dtype)
    elements = [spread(t, axis, group_size).reshape(-1) for t in (scale, zero_point)]
    expected = reference.fake_quant(x.reshape(-1), *elements, 0, -8, 7).reshape(shape)
    leaf = x.requires_grad_()
    y = ops.fake_quant(leaf, scale, zero_point, axis, -8, 7, keep=keep, group_size=group_size)
    assert torch.equal(y, expected)
    y.backward(grad)
    flat = reference.fake_quant_backward(grad.reshape(-1), x.detach().reshape(-1), *elements, 0, -8, 7)
    assert torch.equal(leaf.grad, flat.reshape(shape))


@pytest.mark.parametrize(("shape", "axis", "group_size"), CASES)
def test_lsq_gradients_equal_the_sums_over_groups(isa, shape, axis, group_size):
    x, grad, scale, zero_point = problem(shape, axis, group_size)
    leaves = [t.clone().requires_grad_() for t in (x, scale, zero_point.float())]
    ops.lsq(*leaves, axis, -8, 7, 0.5, group_size=group_size).backward(grad)
    elements = [spread(t, axis, group_size).reshape(-1) for t in (scale, zero_point.float())]
    by_element = reference.lsq_backward(grad.reshape(-1), x.reshape(-1), *elements, 0, -8, 7, 0.5)
    assert torch.equal(leaves[0].grad, by_element[0].reshape(shape))
    for leaf, terms in zip(leaves[1:], by_element[1:], strict=True):
        terms = terms.reshape(shape).unflatten(axis, (-1, group_size)).double().sum(axis % len(shape) + 1)
        torch.testing.assert_close(leaf.grad.double(), terms, rtol=1e-5, atol=1e-5)


def test_compiled_equals_eager():
    x, grad, scale, zero_point = problem((6, 256), 1, 32)

    def run(x):
        return ops.fake_quant(x * 1.5, scale, zero_point, 1, -8, 7, group_size=32)

    grads = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        function(leaf).backward(grad)
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("axis", "group_size", "shape", "message"),
    [
        (1, 48, (6, 5), "group_size must divide the 256 elements of dimension 1, got 48"),
        (1, 0, (6, 8), "group_size must divide"),
        (2, 32, (6, 8), r"group_size needs an axis in \[-2, 1\], got 2"),
        (None, 32, (6, 8), "group_size needs an axis"),
        (1, 32, (8, 6), r"scale must have shape \[6, 8\]"),
    ],
)
def test_bad_groups_are_refused_by_name(axis, group_size, shape, message):
    scale, zero_point = torch.ones(shape), torch.zeros(shape, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"fake_quant: {message}"):
        ops.fake_quant(torch.ones(6, 256), scale, zero_point, axis, -8, 7, group_size=group_size)
    with pytest.raises(ValueError, match=f"lsq: {message}"):
        ops.lsq(torch.ones(6, 256), scale, zero_point.float(), axis, -8, 7, 1.0, group_size=group_size)
