"""Grids: the choice of scale and zero point, and the values that carry them."""

import pytest
import torch

from qkernels.core.qspec import QParams, QSpec, choose_qparams
from qkernels.errors import InvalidArgument, Unsupported


def choose(spec, low, high):
    return choose_qparams(spec, torch.tensor(low), torch.tensor(high))


def test_affine_grid_equals_torch_ao_observer():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        x = torch.randn(64, generator=generator) * 10 ** float(torch.randn(1, generator=generator)) + float(
            torch.randn(1, generator=generator)
        )
        theirs = torch.ao.quantization.MinMaxObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
        theirs(x)
        scale, zero_point = theirs.calculate_qparams()
        grid = choose(QSpec(), float(x.min()), float(x.max()))
        assert torch.equal(grid.scale, scale)
        assert torch.equal(grid.zero_point, zero_point)


def test_weight_grid_is_symmetric_and_narrow():
    grid = choose_qparams(QSpec.weight(), torch.tensor([-1.0, -0.5]), torch.tensor([0.5, 2.0]))
    assert (grid.qmin, grid.qmax, grid.dtype, grid.axis) == (-127, 127, torch.int8, 0)
    assert grid.zero_point.tolist() == [0, 0]
    assert torch.equal(grid.scale, torch.tensor([1.0, 2.0]) / 127.0)


@pytest.mark.parametrize(("low", "high"), [(0.5, 3.0), (-3.0, -0.5), (-1e-3, 7.0), (-1.0, 1e-30), (0.0, 0.0)])
def test_zero_is_always_on_the_grid(low, high):
    scale, zero_point = choose(QSpec(), low, high).item()
    assert 0 <= zero_point <= 255
    assert scale > 0


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1e20, 3e38])
def test_scales_stay_far_from_the_ends_of_float32(size):
    for spec in (QSpec(), QSpec.weight(per_channel=False)):
        scale, _ = choose(spec, -size, size).item()
        assert 2.0**-50 <= scale <= 2.0**50


def test_an_all_zero_tensor_gets_scale_one():
    assert choose(QSpec.weight(per_channel=False), 0.0, 0.0).item() == (1.0, 0)


@pytest.mark.parametrize(("low", "high"), [(float("nan"), 1.0), (0.0, float("inf")), (2.0, 1.0)])
def test_a_range_without_meaning_is_refused(low, high):
    with pytest.raises(InvalidArgument, match="choose_qparams"):
        choose(QSpec(), low, high)


def test_fewer_bits_narrow_the_codes():
    assert (QSpec.activation(4).qmin, QSpec.activation(4).qmax) == (0, 15)
    assert (QSpec.weight(4).qmin, QSpec.weight(4).qmax) == (-7, 7)
    with pytest.raises(InvalidArgument, match="bits"):
        QSpec.weight(22)


def test_more_bits_are_int32_and_only_simulated():
    assert QSpec.weight(16) == QSpec(torch.int32, -32767, 32767, symmetric=True, per_channel=True)
    assert (QSpec.activation(16).dtype, QSpec.activation(16).qmax) == (torch.int32, 65535)
    assert "65536 codes" in QSpec.activation(16).simulated
    assert not QSpec.activation(8).simulated
    grid = choose_qparams(QSpec.activation(16), torch.tensor([-1.0]), torch.tensor([2.0]))
    x = torch.linspace(-2.0, 3.0, 10_001)
    expected = torch.fake_quantize_per_tensor_affine(x, float(grid.scale), int(grid.zero_point), 0, 65535)
    assert torch.equal(grid.fake_quantize(x), expected)
    with pytest.raises(Unsupported, match="only simulated"):
        grid.quantize(x)


def test_values_round_trip_through_json_and_compare():
    import json

    grid = QParams(torch.tensor([0.1, 1e-9]), torch.tensor([3, 200]), axis=1)
    again = QParams.from_config(json.loads(json.dumps(grid.to_config())))
    assert again == grid
    assert hash(again) == hash(grid)
    assert grid != QParams(torch.tensor([0.1, 1e-9]), torch.tensor([3, 201]), axis=1)
    spec = QSpec.weight(5)
    assert QSpec.from_config(json.loads(json.dumps(spec.to_config()))) == spec


@pytest.mark.parametrize(
    ("scale", "zero_point", "message"),
    [(0.0, 0, "scale"), (-1.0, 0, "scale"), (float("nan"), 0, "scale"), (1e-42, 0, "scale"), (1.0, 256, "zero_point")],
)
def test_a_grid_that_cannot_be_is_refused(scale, zero_point, message):
    with pytest.raises(InvalidArgument, match=message):
        QParams.per_tensor(scale, zero_point)
