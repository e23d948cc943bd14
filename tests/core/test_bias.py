"""Bias correction: no layer is off on average, and what is corrected is what ships."""

import pytest
import torch
from torch import nn

import qkernels
from qkernels.core.corrections import BiasCorrection
from qkernels.core.layers import Prepared
from qkernels.core.prepare import quantizers
from qkernels.core.qspec import QSpec
from qkernels.core.quantizer import State
from qkernels.core.recipe import Match, Override, Recipe, TensorRecipe
from qkernels.errors import CalibrationError


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


def inputs():
    torch.manual_seed(0)
    return torch.rand(16, 3, 12, 12) + 0.5


def calibrated(x, corrections=("bias",), batch=16):
    torch.manual_seed(0)
    prepared = qkernels.prepare(Depthwise(), x[:1], weight_bits=4, corrections=corrections)
    return qkernels.calibrate(prepared, x.split(batch))


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


@pytest.mark.parametrize("batch", [16, 5])
def test_every_channel_has_the_float_mean_afterwards(batch):
    x = inputs()
    before, prepared = calibrated(x, ()), calibrated(x, batch=batch)
    expected, was, now = float_means(prepared, x), layer_means(before, x), layer_means(prepared, x)
    assert len(now) == 4
    for name, mean in expected.items():
        assert float((now[name] - mean).abs().max()) < 1e-4, name
    assert max(float((was[name] - mean).abs().max()) for name, mean in expected.items()) > 1e-2


def test_only_as_many_calls_are_used_as_have_the_samples_asked_for():
    x = inputs()
    prepared = calibrated(x, corrections=[BiasCorrection(samples=7)], batch=5)
    expected, now = float_means(prepared, x[:10]), layer_means(prepared, x[:10])
    assert all(float((now[name] - mean).abs().max()) < 1e-4 for name, mean in expected.items())


def test_the_converted_model_has_the_corrected_biases():
    x = inputs()
    prepared = calibrated(x)
    converted = qkernels.convert(prepared)
    assert qkernels.verify(prepared, converted, [x]).total_mismatches == 0
    assert converted.get_submodule("body.0").bias is not None


def test_calibration_again_starts_from_the_float_model():
    x = inputs()
    once, twice = calibrated(x), calibrated(x)
    qkernels.calibrate(twice, x.split(16))
    for name, value in once.state_dict().items():
        assert torch.equal(value, twice.state_dict()[name]), name


def test_the_original_model_and_its_hooks_are_left_alone():
    x = inputs()
    model = Depthwise().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    prepared = qkernels.calibrate(qkernels.prepare(model, x, "int8-bias"), [x])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in prepared.modules())


def test_an_interrupted_calibration_leaves_the_corrections_of_before():
    x = inputs()
    prepared = calibrated(x)
    before = {name: t.clone() for name, t in prepared.state_dict().items()}

    def interrupted():
        yield 2 * x
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qkernels.calibrate(prepared, interrupted())
    assert all(torch.equal(t, before[name]) for name, t in prepared.state_dict().items())


def test_calibrating_only_parts_of_the_model_is_refused():
    x = inputs()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prepared = qkernels.prepare(model, torch.rand(2, 4), corrections="bias")
    with pytest.raises(CalibrationError, match="call the prepared model itself"):
        qkernels.calibrate(prepared, [x], lambda model, batch: [quantizer(batch) for quantizer in quantizers(model)])


class Parts(nn.Module):
    """Has no graph."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x, *, flip=False):
        y = self.first(x)
        if float(y.sum()) > 1e9:
            y = -y
        return self.second(y.flip(0) if flip else y)


def test_a_model_without_a_graph_is_corrected_too():
    torch.manual_seed(0)
    x = torch.randn(32, 4) + 1
    prepared = qkernels.prepare(Parts(), x[:1], "w4a8-adaround")
    qkernels.calibrate(prepared, [{"x": batch} for batch in x.split(8)])
    expected, now = float_means(prepared, x), layer_means(prepared, x)
    assert all(float((now[name] - mean).abs().max()) < 1e-4 for name, mean in expected.items())
    assert qkernels.verify(prepared, qkernels.convert(prepared), [x]).total_mismatches == 0


class Summing(nn.Module):
    """Takes sequences with the time in dimension 0, as torch's recurrent modules do by default."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x, mask=None):
        x = x if mask is None else x * mask
        return self.b(torch.relu(self.a(torch.cumsum(x, 0))))


def test_sequences_are_not_put_together_along_their_time():
    torch.manual_seed(0)
    model, sequences = Summing().eval(), [torch.rand(8, 4, 8) for _ in range(8)]
    plain, corrected = (
        qkernels.calibrate(qkernels.prepare(model, sequences[0], recipe), sequences) for recipe in ("int8", "int8-bias")
    )
    with torch.no_grad():
        off = [torch.cat([p(x) - model(x) for x in sequences]) for p in (plain, corrected)]
    assert off[1].square().mean() < 1.1 * off[0].square().mean()
    assert off[1].mean((0, 1)).abs().max() < 1e-5


def test_arguments_that_only_look_like_batches_stay_as_they_are():
    torch.manual_seed(0)
    model, batches = Summing().eval(), [(torch.rand(8, 8, 8), torch.rand(8, 1, 1)) for _ in range(12)]
    prepared = qkernels.calibrate(qkernels.prepare(model, batches[0], "int8-bias"), batches)
    with torch.no_grad():
        off = torch.cat([prepared(*batch) - model(*batch) for batch in batches[:8]])
    assert off.mean((0, 1)).abs().max() < 1e-5


def test_a_vector_is_a_sample_too():
    torch.manual_seed(0)
    vectors = [torch.randn(8) for _ in range(8)]
    prepared = qkernels.prepare(nn.Linear(8, 8).eval(), vectors[0], "int8-bias")
    assert not qkernels.calibrate(prepared, vectors)(vectors[0]).isnan().any()


def test_a_layer_that_is_only_simulated_is_corrected_too():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(64, 16)
    wide = Override(Match.of("2"), weight=TensorRecipe(QSpec.weight(12)))
    prepared = qkernels.prepare(model, x, Recipe(overrides=(wide,), corrections="bias"))
    qkernels.calibrate(prepared, [x])
    expected, now = float_means(prepared, x), layer_means(prepared, x)
    assert len(now) == 2
    assert all(float((now[name] - mean).abs().max()) < 1e-5 for name, mean in expected.items())
