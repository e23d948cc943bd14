"""Inputs that converted layers refuse: the layer, what it got and what it expected."""

import numpy
import pytest
import torch
from torch import nn

import qkernels
from qkernels.core.lowering import LoweringUnit, lower
from qkernels.core.qspec import QParams
from qkernels.errors import InvalidArgument, InvalidType

GRID = QParams.per_tensor(0.1, 128, 0, 255, torch.uint8)
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def converted(model, x):
    return qkernels.convert(qkernels.calibrate(qkernels.prepare(model.eval(), x), [x]))


FLOATS = r"Quantize 'input_1_quantize': input must be a float tensor \(float32, bfloat16 or float16\), got "


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (X.double(), r"torch\.float64 \[2, 3, 6, 6\]"),
        (X.int(), r"torch\.int32 \[2, 3, 6, 6\]"),
        (X.numpy(), "ndarray"),
        (X.tolist(), "list"),
        (None, "NoneType"),
    ],
)
def test_the_input_must_be_a_float_tensor(given, got):
    with pytest.raises(InvalidType, match=FLOATS + got):
        converted(nn.Sequential(nn.Conv2d(3, 8, 3)), X)(given)


def test_an_array_of_codes_is_no_tensor():
    layer = converted(nn.Sequential(nn.Conv2d(3, 8, 3)), X).get_submodule("0")
    with pytest.raises(InvalidType, match=r"QConv '0': input must be torch\.uint8, got ndarray"):
        layer(numpy.zeros((2, 3, 6, 6), numpy.uint8))


@pytest.mark.parametrize("given", [X[:, :2], X[0], X[..., None], X[0, 0, 0, 0]])
@pytest.mark.parametrize("make", [nn.Conv2d, nn.ConvTranspose2d])
def test_channels_and_rank_of_a_convolution(make, given):
    int8 = converted(nn.Sequential(make(3, 8, 3)), X)
    int8(X)  # the sizes of images are kept
    with pytest.raises(InvalidArgument, match=r"QConv '0': input must be \[N, 3, 2 spatial dims\], got \["):
        int8(given)


@pytest.mark.parametrize("given", [torch.ones(2, 7), torch.ones(3, 2, 9), torch.ones(())])
def test_features_of_a_linear_layer(given):
    int8 = converted(nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 8))
    with pytest.raises(InvalidArgument, match=r"QLinear '0': input must be \[\.\.\., 8\], got \["):
        int8(given)


def test_other_errors_of_a_linear_layer_stay_what_they_are():
    int8 = converted(nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 8)).get_submodule("0")
    other = int8.with_residual(GRID, int8.out_qparams, None) if int8.can_fuse() else int8
    with pytest.raises((RuntimeError, InvalidType)) as caught:
        other(torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(3, 4, dtype=torch.uint8))
    assert not isinstance(caught.value, InvalidArgument)


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("dims", [[], (), None])
def test_the_mean_over_no_named_dims_is_that_over_all(rank, dims):
    assert torch.ones(2, 3).mean(dim=[]).shape == ()
    with pytest.raises(NotImplementedError, match="mean over dims"):
        lower(LoweringUnit("mean", (GRID,), GRID, options={"dim": dims, "rank": rank}))
