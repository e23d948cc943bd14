"""The Quantizer: four states, its grid in the state_dict."""

import pytest
import torch

from qkernels.core.qspec import QParams, QSpec
from qkernels.core.quantizer import Quantizer, State
from qkernels.core.recipe import RECIPES, TensorRecipe
from qkernels.errors import CalibrationError, InvalidState, InvalidType


def make(observer="minmax"):
    return Quantizer(TensorRecipe(QSpec(), observer), "block.conv")


def test_each_state_does_what_it_says():
    x = torch.tensor([-1.0, 0.3, 4.1])
    q = make()
    assert q(x) is x
    q.state = State.OBSERVE
    assert q(x) is x
    q.choose()
    assert q.qparams() == QParams.per_tensor(float(torch.tensor(5.1) / 255), 50)
    expected = torch.fake_quantize_per_tensor_affine(x, *q.qparams().item(), 0, 255)
    for state in (State.FAKE_QUANT, State.FROZEN):
        q.state = state
        assert torch.equal(q(x), expected)


def test_state_and_grid_are_in_the_state_dict():
    q = make()
    q.state = State.OBSERVE
    q(torch.randn(10))
    q.choose()
    q.state = State.FROZEN
    again = make()
    again.load_state_dict(q.state_dict())
    assert again.state is State.FROZEN
    assert again.qparams() == q.qparams()


def test_per_channel_grids():
    q = Quantizer(RECIPES["int8"].weight, "conv.weight", channels=3)
    w = torch.randn(3, 4, 2, 2)
    q.state = State.OBSERVE
    q(w)
    q.choose()
    q.state = State.FAKE_QUANT
    grid = q.qparams()
    expected = torch.fake_quantize_per_channel_affine(w, grid.scale, grid.zero_point, 0, -127, 127)
    assert torch.equal(q(w), expected)


def test_errors_name_the_module():
    q = make()
    with pytest.raises(InvalidState, match=r"block\.conv"):
        q.qparams()
    q.state = State.OBSERVE
    with pytest.raises(CalibrationError, match=r"block\.conv"):
        q(torch.tensor([float("nan")]))
    q.state = State.FAKE_QUANT
    with pytest.raises(InvalidType, match=r"block\.conv.*bfloat16"):
        q(torch.ones(1, dtype=torch.bfloat16))


@pytest.mark.parametrize("observer", ["minmax", "mse", "moving_average"])
@pytest.mark.parametrize("seen", [False, True])
def test_a_range_is_taken_whatever_the_observer_saw(observer, seen):
    q = Quantizer(TensorRecipe(QSpec.weight(), observer), "block.conv.weight", 2, is_weight=True)
    if seen:
        q.watch(torch.randn(2, 10))
    ends = torch.tensor([1.0, 3.0])
    q.take_range(-ends, ends)
    torch.testing.assert_close(q.scale, ends / ((q.spec.qmax - q.spec.qmin) / 2))


def test_a_trained_range_lasts_through_another_kind_of_grid():
    """Its Parameters too: an optimizer may have them."""
    q = Quantizer(TensorRecipe(QSpec(), rule="range"), "block.relu", trained=True)
    low, high = q.rule.low, q.rule.high
    q.take_ends(torch.tensor(-1.0), torch.tensor(3.0))
    assert q.numbers() == (pytest.approx(4 / 255), 64)
    q.change_kind(TensorRecipe(QSpec.activation(4), "mse", rule="range"))
    assert q.numbers() == (pytest.approx(4 / 15), 4)
    q.change_kind(TensorRecipe(QSpec(symmetric=True), rule="range"))
    assert q.numbers() == (pytest.approx(4 / 255), q.spec.middle)
    assert (q.rule.low, q.rule.high, low.item(), high.item()) == (low, high, -1.0, 3.0)
