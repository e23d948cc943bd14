"""Networks and simulations that several tests of the AIMET front end share."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels.frontends.aimet as aimet


class Network(nn.Module):
    """The network of AIMET's quickstart, narrower."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn_1 = nn.Conv2d(1, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8)
        self.conv2, self.bn_2 = nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16)
        self.linear = nn.Linear(7 * 7 * 16, 10)

    def forward(self, x):
        x = F.relu(self.bn_1(self.conv1(x)))
        x = F.relu(self.bn_2(self.conv2(x)))
        x = self.linear(x.view(x.shape[0], -1))
        return F.softmax(x, dim=-1)


class Everything(nn.Module):
    """Additions, products, concatenation, averages, reuse, passing operations, transposed convolution."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.b1, self.b2, self.up = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 8, 2, 2)
        self.pool, self.relu6, self.act = nn.MaxPool2d(2), nn.ReLU6(), nn.Hardswish()
        self.avg, self.flat, self.drop = nn.AvgPool2d(2), nn.Flatten(), nn.Dropout()
        self.fc1, self.fc2 = nn.Linear(8, 10), nn.Linear(18, 10)

    def forward(self, x):
        x = torch.relu(self.b1(self.c1(x)))
        x = F.relu(x + self.b2(self.c2(x)))
        x = self.act(self.up(self.relu6(self.c3(self.pool(x)))))
        mean = x.mean([2, 3])  # not of what is averaged below: a tensor on its own grid, added to itself, gives ties
        x = self.avg(x * torch.sigmoid(x))
        x = self.fc1(self.drop(self.flat(F.adaptive_avg_pool2d(x, 1))) + mean)
        return self.fc2(torch.cat([x, mean], 1))


class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), act)
        self.relu, self.last = nn.ReLU(), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.relu(x + self.last(self.relu(self.body(x))))


class Nested(nn.Module):
    """Functions and modules called twice inside of blocks, in lists and sequences."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(Block(nn.SiLU()), nn.Sequential(Block(nn.ReLU6())))
        self.parts = nn.ModuleList([Block(nn.Sigmoid()), nn.Linear(3, 10)])

    def forward(self, x):
        x = self.parts[0](self.layer1(x))
        x = x.reshape(x.shape[0], x.shape[1] // 1, -1, x.shape[3])
        return self.parts[1](torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def images(model=Network, count=8, seed=0):
    shape = (1, 28, 28) if model is Network else (3, 16, 16)
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) - 0.3


def prepared_model(model=Network, api=aimet):
    torch.manual_seed(0)
    network = model().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    prepared = api.model_preparer.prepare_model(network)
    api.batch_norm_fold.fold_all_batch_norms(prepared, input_shapes=tuple(images(model).shape))
    return prepared


def calibrated(model=Network, api=aimet, **options):
    sim = api.quantsim.QuantizationSimModel(prepared_model(model, api), dummy_input=images(model), **options)
    with api.nn.compute_encodings(sim.model):
        sim.model(images(model))
    return sim


STRICT = {
    "ops": {"is_output_quantized": True},
    "params": {"is_quantized": True, "is_symmetric": True},
    "strict_symmetric": True,
    "per_channel_quantization": True,
}


def with_bias(**config):
    return {
        "defaults": {**STRICT, **config},
        "params": {"bias": {"is_quantized": True}},
        "model_input": {"is_input_quantized": True},
    }


def differences(mine, theirs, where=""):
    if isinstance(theirs, dict):
        yield from (f"{where}.{key}" for key in mine.keys() ^ theirs.keys())
        for key in mine.keys() & theirs.keys():
            yield from differences(mine[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, list):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            yield from differences(a, b, f"{where}[{i}]")
    elif isinstance(theirs, float):
        if mine != pytest.approx(theirs, rel=1e-4, abs=1e-9):
            yield f"{where}: {mine} is not {theirs}"
    elif mine != theirs:
        yield f"{where}: {mine} is not {theirs}"
