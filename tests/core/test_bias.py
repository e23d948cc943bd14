"""Bias correction: no layer is off on average, and what is corrected is what ships."""

import pytest
import torch
from torch import nn

import qkernels
from qkernels.core.layers import Prepared
from qkernels.core.prepare import quantizers
from qkernels.core.quantizer import State
from qkernels.errors import InvalidArgument, InvalidState


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, bias=False),
            nn.ReLU6(),
            nn.Conv2d(16, 16, 3, groups=16, bias=False),
            nn.ConvTranspose2d(16, 8, 2, stride=2),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


@pytest.fixture
def calibrated():
    torch.manual_seed(0)
    x = torch.rand(16, 3, 12, 12) + 0.5
    prepared = qkernels.prepare(Depthwise(), x[:1], weight_bits=4)
    with qkernels.calibrating(prepared):
        prepared(x)
    return prepared, x


def layer_means(model, x):
    """The per-channel means of every weighted layer's output."""
    means = {}
    handles = [
        module.register_forward_hook(
            lambda m, i, o, n=name: means.__setitem__(n, o.mean([d for d in range(o.dim()) if d != 1]))
        )
        for name, module in model.named_modules()
        if isinstance(module, Prepared)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return means


def float_means(prepared, x):
    states = [(q, q.state) for q in quantizers(prepared)]
    for quantizer, _ in states:
        quantizer.state = State.OFF
    means = layer_means(prepared, x)
    for quantizer, state in states:
        quantizer.state = state
    return means


def test_every_channel_has_the_float_mean_afterwards(calibrated):
    prepared, x = calibrated
    expected, before = float_means(prepared, x), layer_means(prepared, x)
    qkernels.correct_bias(prepared, x)
    after = layer_means(prepared, x)
    assert len(after) == 4
    for name, mean in expected.items():
        assert float((after[name] - mean).abs().max()) < 1e-4, name
    assert max(float((before[name] - mean).abs().max()) for name, mean in expected.items()) > 1e-2


def test_the_converted_model_has_the_corrected_biases(calibrated):
    prepared, x = calibrated
    qkernels.correct_bias(prepared, x)
    converted = qkernels.convert(prepared)
    assert qkernels.verify(prepared, converted, [x]).total_mismatches == 0
    assert converted.get_submodule("body.0").bias is not None


def test_the_original_model_and_the_states_are_left_alone():
    torch.manual_seed(0)
    model, x = Depthwise().eval(), torch.rand(4, 3, 12, 12)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    prepared = qkernels.prepare(model, x)
    with qkernels.calibrating(prepared):
        prepared(x)
    states = [q.state for q in quantizers(prepared)]
    qkernels.correct_bias(prepared, x)
    assert [q.state for q in quantizers(prepared)] == states
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(module._forward_hooks for module in prepared.modules())


def test_an_uncalibrated_or_float_model_is_refused():
    x = torch.rand(2, 3, 12, 12)
    with pytest.raises(InvalidState, match="calibrate first"):
        qkernels.correct_bias(qkernels.prepare(Depthwise(), x), x)
    with pytest.raises(InvalidArgument, match="must come from `prepare`"):
        qkernels.correct_bias(Depthwise(), x)
