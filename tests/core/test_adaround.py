"""Learned rounding: a smaller error of what layers compute, by codes next to the weight, repeatable, and shipped."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels
from qkernels.core import adaround
from qkernels.core.corrections import AdaRound
from qkernels.core.layers import Prepared
from qkernels.core.lowering import Clamp

QUICK = AdaRound(samples=48, steps=100, batch=24, learning_rate=1e-1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        x = F.relu6(self.depthwise(x))
        return self.head(F.relu(self.up(x)).mean((2, 3)))


def inputs():
    torch.manual_seed(1)
    return torch.randn(48, 3, 10, 10).cumsum(3)  # neighbours alike: errors of a weight's neighbours can cancel


def calibrated(corrections):
    torch.manual_seed(0)
    model, x = Net().eval(), inputs()
    prepared = qkernels.prepare(model, x[:1], "w4a8", weight_bits=3, corrections=corrections)
    return model, qkernels.calibrate(prepared, x.split(16)), x


@pytest.fixture(scope="module")
def learned():
    return calibrated((QUICK, "bias"))[1]


def test_inference_mode_around_it_changes_nothing(learned):
    with torch.inference_mode():
        again = calibrated((QUICK, "bias"))[1]
    for name, value in learned.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def squared_error(model, prepared, x):
    with torch.no_grad():
        return float((model(x) - prepared(x)).square().sum())


def test_the_network_is_closer_to_float_than_with_rounding_to_nearest(learned):
    model, nearest, x = calibrated("bias")
    assert squared_error(model, learned, x) < 0.8 * squared_error(model, nearest, x)


def test_every_code_is_next_to_its_weight_and_on_the_grid(learned):
    changed = 0
    for layer in learned.modules():
        if isinstance(layer, Prepared):
            grid = layer.quantizers["weight"].qparams()
            rows = layer.rows(layer.weight.detach())
            codes = grid.quantize(rows + layer.weight_correction).float()
            exact = rows / grid.scale.reshape(-1, *[1] * (rows.dim() - 1))
            assert bool(((codes - exact.clamp(grid.qmin, grid.qmax)).abs() < 1).all())
            assert bool(((codes >= grid.qmin) & (codes <= grid.qmax)).all())
            changed += int((codes != grid.quantize(rows)).sum())
    assert changed > 10


def test_the_converted_model_has_the_learned_codes(learned):
    converted = qkernels.convert(learned)
    assert qkernels.verify(learned, converted, inputs().split(16)).total_mismatches == 0
    layer = learned.get_submodule("head")
    codes = layer.weight_qparams().quantize(layer.corrected_weight().detach())
    assert torch.equal(converted.get_submodule("head").weight, codes)


def test_a_prepared_model_keeps_what_was_learned_in_its_state(learned):
    _, other, x = calibrated((AdaRound(samples=2, steps=1), "bias"))
    other.load_state_dict(learned.state_dict())
    again = copy.deepcopy(other)
    with torch.no_grad():
        assert torch.equal(learned(x), other(x))
        assert torch.equal(learned(x), again(x))


def test_the_same_seed_gives_the_same_codes_and_the_global_generator_is_left_alone(learned):
    prepared, x = copy.deepcopy(learned), inputs()
    state = torch.random.get_rng_state()
    qkernels.calibrate(prepared, x.split(16))
    assert torch.equal(state, torch.random.get_rng_state())
    for name, value in learned.state_dict().items():
        assert torch.equal(value, prepared.state_dict()[name]), name


def test_nothing_is_learned_where_it_does_not_help():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    layer.weight.data = torch.randint(-7, 8, (4, 4)).float()
    layer.weight.data[:, 0] = 7.0
    prepared = qkernels.prepare(layer, torch.randn(2, 4), weight_bits=4, corrections=QUICK)
    qkernels.calibrate(prepared, [torch.randn(64, 4)])
    (layer,) = (m for m in prepared.modules() if isinstance(m, Prepared))
    assert not bool(layer.weight_correction.any())


def test_the_rectified_sigmoid_starts_at_the_weight_and_reaches_both_ends():
    fraction = torch.linspace(0, 0.999, 100)
    assert torch.allclose(adaround.rectified_sigmoid(adaround.start_of(fraction)), fraction, atol=1e-6)
    assert adaround.rectified_sigmoid(torch.tensor([-9.0, 9.0])).tolist() == [0.0, 1.0]


def test_beta_falls_from_first_to_last():
    assert adaround.beta_at(0.2, 0.2) == adaround.FIRST_BETA
    assert math.isclose(adaround.beta_at(1.0, 0.2), adaround.LAST_BETA)
    assert adaround.beta_at(0.5, 0.2) > adaround.beta_at(0.6, 0.2)


def test_the_clamp_behind_a_layer_belongs_to_its_reconstruction():
    prepared = qkernels.prepare(Net(), inputs()[:1], "w4a8-adaround")
    clamps = adaround.fused_clamps(prepared)
    assert [clamps.get(prepared.get_submodule(n)) for n in ("conv", "depthwise", "up", "head")] == [
        Clamp(0.0),
        Clamp(0.0, 6.0),
        Clamp(0.0),
        None,
    ]


@pytest.mark.parametrize("recipe", ["w4a8-bias", "w3a3", "w2a2"])
def test_narrow_grids_ship_what_was_evaluated(recipe, isa):
    torch.manual_seed(0)
    model, x = Net().eval(), inputs()[:16]
    prepared = qkernels.calibrate(qkernels.prepare(model, x[:1], recipe), [x])
    converted = qkernels.convert(prepared)
    assert qkernels.verify(prepared, converted, [x, x[:3]]).total_mismatches == 0
    weight = converted.get_submodule("conv").weight
    qmax = prepared.get_submodule("conv").quantizers["weight"].spec.qmax
    assert weight.dtype == torch.int8
    assert int(weight.abs().max()) <= qmax
