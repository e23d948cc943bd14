"""fake_quant: the same bits as torch and as the reference, on every ISA."""

import pytest
import torch

from qkernels import ops, reference


def grid(scale, zero_point):
    return torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 15, 16, 17, 4095, 4097, 100_003])
@pytest.mark.parametrize("zero_point", [0, 3, -128, 127])
def test_equals_torch_on_finite_data(isa, n, zero_point):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)) * 4
    scale, zp = grid(0.0371, zero_point)
    expected = torch.fake_quantize_per_tensor_affine(x, 0.0371, zero_point, -128, 127)
    assert torch.equal(ops.fake_quant(x, scale, zp, None, -128, 127), expected)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_per_channel_equals_reference(isa, axis):
    x = torch.randn(5, 7, 19) * 4
    channels = x.shape[axis]
    scale = torch.rand(channels) * 0.1 + 0.01
    zp = torch.randint(-5, 5, (channels,), dtype=torch.int32)
    expected = reference.fake_quant(x, scale, zp, axis, -128, 127)
    assert torch.equal(ops.fake_quant(x, scale, zp, axis, -128, 127), expected)


def test_hostile_values_follow_the_contract(isa):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, inf, -inf, 3e38, -3e38, 1e-40, 0.5, 1.5, 2.5] * 5)
    scale, zp = grid(1.0, 1)
    y = ops.fake_quant(x, scale, zp, None, -128, 127)
    assert y[:9].tolist() == [-129, 126, -129, 126, -129, 0, 0, 2, 2]
    assert torch.equal(y, reference.fake_quant(x, scale, zp, None, -128, 127))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-40])
def test_bad_scale_is_refused_by_name(scale):
    with pytest.raises(RuntimeError, match="fake_quant: scale must be positive, finite and normal"):
        ops.fake_quant(torch.ones(3), *grid(scale, 0), None, -128, 127)
