"""`verify` beside the integers: the prepared model's own forward, made another way."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

import qkernels
from qkernels.core.noise import SignalToNoise
from qkernels.core.quantizer import Quantizer, State


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Hardswish(), nn.Conv2d(4, 2, 1)).eval()
    batches = [torch.randn(4, 3, 12, 12) for _ in range(3)]
    prepared = qkernels.calibrate(qkernels.prepare(model, batches[0]), batches[:2])
    return prepared, qkernels.convert(prepared), batches[2]


def test_it_finds_what_exact_and_convert_have_in_common(network, monkeypatch):
    """A grid that both take for another leaves no integer that differs."""
    prepared, converted, x = network
    assert qkernels.verify(prepared, converted, [x]).simulation_sqnr_db > 40
    right = Quantizer.qparams

    def wrong(quantizer):
        grid = right(quantizer)
        return dataclasses.replace(grid, scale=grid.scale / 8) if quantizer.source == "2" else grid

    monkeypatch.setattr(Quantizer, "qparams", wrong)
    report = qkernels.verify(prepared, qkernels.convert(prepared), [x])
    assert report.total_mismatches == 0
    assert report.simulation_sqnr_db < 20
    assert f"against the prepared model's own: {report.simulation_sqnr_db:.1f} dB" in str(report)


def test_it_leaves_the_prepared_model_as_it_is(network):
    prepared, converted, x = network
    watching = copy.deepcopy(prepared).train()
    quantizers = [m for m in watching.modules() if isinstance(m, Quantizer)]
    for quantizer in quantizers:
        quantizer.state = State.OBSERVE
    before = {name: tensor.clone() for name, tensor in watching.state_dict().items()}
    assert qkernels.verify(watching, converted, [10 * x]).simulation_sqnr_db > 30
    assert watching.training
    assert {quantizer.state for quantizer in quantizers} == {State.OBSERVE}
    assert all(torch.equal(tensor, before[name]) for name, tensor in watching.state_dict().items())


@pytest.mark.parametrize(
    ("expected", "got", "db"),
    [
        ([3.0, 4.0], [3.0, 4.5], 20.0),
        ([1.0, 2.0], [1.0, 2.0], math.inf),
        ([0.0, 0.0], [0.0, 1.0], -math.inf),
        ([10.0, math.nan, math.inf], [9.0, math.nan, math.inf], 20.0),
        ([1.0, math.nan], [1.0, 0.0], -math.inf),
        ([1.0, math.inf], [1.0, -math.inf], -math.inf),
        ([1.0, math.inf], [1.0, math.nan], -math.inf),
        ([], [], math.inf),
    ],
)
def test_signal_to_noise(expected, got, db):
    ratio = SignalToNoise()
    ratio.add(torch.tensor(expected), torch.tensor(got))
    assert ratio.db == pytest.approx(db)
