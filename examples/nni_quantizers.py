"""Each quantizer of NNI 2.x with its import line changed, on real images; then each network in integers.

Naive, QAT (batch norms folded; schemes per tensor and per channel), LSQ, DoReFa, BNN and Observer on one float network.
"""

import argparse
import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from _common import add_data, add_json, digits, fastest_float, milliseconds, write_results
from torch import nn

import qkernels
from qkernels.cli import positive
from qkernels.frontends.nni_v2 import (
    BNNQuantizer,
    DoReFaQuantizer,
    LsqQuantizer,
    NaiveQuantizer,
    ObserverQuantizer,
    QAT_Quantizer,
    set_quant_scheme_dtype,
)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU6()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU6()
        self.pool1, self.pool2 = nn.MaxPool2d(2), nn.MaxPool2d(2)
        self.fc = nn.Linear(64 * 7 * 7, 10)

    def forward(self, x):
        x = self.pool1(self.relu1(self.bn1(self.conv1(x))))
        x = self.pool2(self.relu2(self.bn2(self.conv2(x))))
        return self.fc(x.flatten(1))


LAYERS = {"op_types": ["Conv2d", "Linear"]}
ALL = [{"quant_types": ["weight", "input", "output"], "quant_bits": 8, **LAYERS}]
INPUTS = [{"quant_types": ["weight", "input"], "quant_bits": {"weight": 8, "input": 8}, **LAYERS}]
PER_CHANNEL = [{**INPUTS[0], "quant_dtype": {"weight": "int"}, "quant_scheme": {"weight": "per_channel_symmetric"}}]
FOUR_BITS = [{"quant_types": ["weight", "input"], "quant_bits": {"weight": 4, "input": 8}, **LAYERS}]
HIDDEN = [{"quant_types": ["weight"], "quant_bits": 1, "op_names": ["conv2"]}]
CASES = {
    "Naive": (NaiveQuantizer, None),
    "Observer": (ObserverQuantizer, ALL),
    "QAT": (QAT_Quantizer, INPUTS),
    "QAT, per channel": (QAT_Quantizer, PER_CHANNEL),
    "LSQ": (LsqQuantizer, INPUTS),
    "LSQ, 4-bit weights": (LsqQuantizer, FOUR_BITS),
    "DoReFa, 4-bit weights": (DoReFaQuantizer, FOUR_BITS),
    "BNN, signs in conv2": (BNNQuantizer, HIDDEN),
}


def train(model, images, epochs, optimizer):
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images.train_x))
        for part in order.split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images.train_x[part]), images.train_y[part]).backward()
            optimizer.step()
    return model.eval()


def accuracy(model, images):
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(x).argmax(1) for x in images.test_x.split(500)])
    return (found == images.test_y).double().mean().item()


def quantize(kind, config_list, model, images, epochs):
    """The quantizer, after it has trained or calibrated `model`."""
    example = images.test_x[:1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    if kind is NaiveQuantizer:
        quantizer = kind(model, dummy_input=example)
        quantizer.compress()
    elif kind is ObserverQuantizer:
        quantizer = kind(model.eval(), config_list, dummy_input=example)
        with torch.no_grad():
            for x in images.train_x[:256].split(64):
                model(x)
        quantizer.compress()
    else:
        quantizer = kind(model, config_list, optimizer, dummy_input=example)
        quantizer.compress()
        train(model, images, epochs, optimizer)
    return quantizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=positive, default=3, help="of each training (default: %(default)s)")
    add_data(parser)
    parser.add_argument("--images", type=positive, help="of the training part (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    add_json(parser)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    images = digits(options.data)
    images = replace(images, train_x=images.train_x[: options.images], train_y=images.train_y[: options.images])
    image = images.test_x[:1]
    set_quant_scheme_dtype("weight", "per_tensor_symmetric", "int")

    network = Network()
    train(network, images, options.epochs, torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9))
    rows = [("float", accuracy(network, images), None, None, fastest_float(network, image), None)]
    for name, (kind, config_list) in CASES.items():
        model = copy.deepcopy(network)
        quantizer = quantize(kind, config_list, model, images, options.epochs)
        simulated, prepared = accuracy(model, images), quantizer.prepared()
        converted = quantizer.convert()
        assert qkernels.verify(prepared, converted, [images.test_x[:128]]).total_mismatches == 0
        plan = qkernels.compile(converted, image)
        times = milliseconds(converted, image), milliseconds(plan, image)
        rows.append((name, simulated, accuracy(converted, images), accuracy(plan, images), *times))
        if kind is QAT_Quantizer:  # what was folded comes back
            with tempfile.TemporaryDirectory() as folder:
                exported = quantizer.export_model(str(Path(folder) / "m.pth"), str(Path(folder) / "c.pth"))
            print(f"{name}: {exported['conv1']}")
    print(f"{'':<22} simulation  modules     plan    modules ms   plan ms   ({len(images.test_y)} images, batch 1)")
    for name, simulated, modules, plan, *times in rows:
        shares = [f"{'':>8}" if share is None else f"{share:8.2%}" for share in (simulated, modules, plan)]
        print(f"{name:<22} {'  '.join(shares)}    " + "   ".join("" if t is None else f"{t:9.3f}" for t in times))
    print("verify: 0 codes differ in every row")
    columns = ("simulation", "modules", "plan", "modules_ms", "plan_ms")
    write_results(
        options.json,
        options.seed,
        data=images.name,
        images=[len(images.train_x), len(images.test_x)],
        rows={name: dict(zip(columns, values, strict=True)) for name, *values in rows},
        mismatches=0,
    )


if __name__ == "__main__":
    main()
