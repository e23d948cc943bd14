"""Models are prepared under autocast as without it."""

import copy

import pytest
import torch
from torch import nn

import qkernels
from qkernels.core.grids import Grid, prepare_grids
from qkernels.core.prepare import quantizers
from qkernels.errors import InvalidType

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Parts(nn.Module):
    """Has no graph as a whole."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x) if x.sum() > -1e9 else x


@pytest.fixture(params=["whole", "parts"])
def model(request):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    network = nn.Sequential(*layers).eval()
    return network if request.param == "whole" else Parts(network).eval()


def under_autocast(call, *args):
    with torch.autocast("cpu", torch.bfloat16):
        return call(*args)


@pytest.mark.parametrize("prepare", [qkernels.prepare, qkernels.prepare_qat])
def test_a_model_is_prepared_under_autocast_as_without_it(prepare, model):
    prepared, expected = under_autocast(prepare, model, X), prepare(model, X)
    assert prepared.report.integer
    assert str(prepared.report) == str(expected.report)
    converted = [qkernels.convert(qkernels.calibrate(p, [X])) for p in (prepared, expected)]
    assert torch.equal(*(c(X) for c in converted))


def test_what_was_prepared_under_autocast_trains_under_it(model):
    prepared = under_autocast(qkernels.prepare_qat, model, X)
    assert prepared.report.integer
    y = under_autocast(prepared, X)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad is not None for p in prepared.parameters())


def test_a_model_that_rounds_in_float32_says_so_under_autocast(model):
    prepared = qkernels.calibrate(under_autocast(qkernels.prepare, model, X), [X])
    with pytest.raises(
        InvalidType, match=r"takes float32, got torch.bfloat16; call the model outside of torch.autocast"
    ):
        under_autocast(prepared, X)
    with pytest.raises(InvalidType, match=r"takes float32, got torch.float64$"):
        next(quantizers(prepared))(X.double())


def test_grids_from_elsewhere_are_placed_under_autocast_as_without_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    codes = Grid((0.05,), (-128,), 256)
    grids = {"0": {"input0": codes, "weight": Grid((0.01,), (-127,), 255, symmetric=True), "output": codes}}
    prepared = under_autocast(prepare_grids, copy.deepcopy(model), X, grids)
    expected = prepare_grids(model, X, grids)
    assert prepared.report.integer
    assert str(prepared.report) == str(expected.report)
