"""On a GPU nothing of a forward waits for the device."""

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import on_fake_cuda
from torch import nn

import qkernels
from qkernels.core.quantizer import Quantizer, State
from qkernels.core.rules import RULES

SHAPE = (2, 3, 16, 16)


class Network(nn.Module):
    """Every clamp, table, addition, product, concatenation and pool."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
        self.left, self.right = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, 1, 1)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.up = nn.ConvTranspose2d(16, 12, 2, 2)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.depthwise(x))
        x = torch.cat([F.silu(self.left(x)), F.hardtanh(self.right(x), 0.1, 0.9)], 1)
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        x = F.max_pool2d(self.up(x * gate), 3, 2, 1)
        return self.head(F.avg_pool2d(x, 4).mean((2, 3)))


def trained(rule: str) -> nn.Module:
    torch.manual_seed(0)
    model = qkernels.prepare_qat(Network(), torch.randn(SHAPE), rule=rule)
    model(torch.randn(SHAPE)).sum().backward()
    return model


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_prepared_network_asks_the_device_for_nothing(rule, training):
    model = trained(rule).train(training)
    with on_fake_cuda(model) as new:
        for _ in range(2):
            assert model(new(SHAPE)).device.type == "cuda"


@pytest.mark.parametrize("rule", ["ste", "lsq"])
def test_a_network_whose_norms_are_frozen_asks_the_device_for_nothing(rule):
    model = trained(rule)
    qkernels.freeze_bn(model)
    with on_fake_cuda(model) as new:
        assert model(new(SHAPE)).device.type == "cuda"


@pytest.mark.parametrize("recipe", ["int8", "int8-minmax"])
def test_the_batches_of_a_calibration_ask_the_device_for_nothing(recipe):
    model = qkernels.prepare(Network().eval(), torch.randn(SHAPE), recipe=recipe)
    for quantizer in model.modules():
        if isinstance(quantizer, Quantizer):
            quantizer.state = State.OBSERVE
    with on_fake_cuda(model) as new:
        assert model(new(SHAPE)).device.type == "cuda"
