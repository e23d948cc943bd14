"""What the tests of the torch.ao front end share: one network under both, calibrated and trained."""

import pytest
import torch
from mobilenet_v2 import SMALL, MobileNetV2
from torch import nn

from qkernels.frontends import torch_ao

ao = pytest.importorskip("torch.ao.quantization")


def ours(classes=10):
    return MobileNetV2(torch_ao, torch_ao.FloatFunctional, classes)


def torchs(classes=10, layout=SMALL):
    return MobileNetV2(ao, torch.ao.nn.quantized.FloatFunctional, classes, layout)


def images(count=4, size=32, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def per_channel(api):
    """Codes up to 127 on the data it saw: beyond, the depthwise kernel of fbgemm saturates."""
    return api.QConfig(api.MinMaxObserver.with_args(reduce_range=True), api.default_per_channel_weight_observer)


def calibrated(model, api, qconfig, batches):
    model = model.eval().fuse()
    model.qconfig = qconfig
    api.prepare(model, inplace=True)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return model


def torch_converted(model):
    torch.backends.quantized.engine = "fbgemm"
    return ao.convert(model)


def train(model, steps, classes=10):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(steps):
        x = images(seed=step)
        nn.functional.cross_entropy(model(x), torch.arange(len(x)) % classes).backward()
        optimizer.step()
        optimizer.zero_grad()
