"""NNI's quickstart with its import lines changed, on images from a package; at the end the network in integers."""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _common import add_data, add_json, digits, milliseconds, write_results
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset

import qkernels
import qkernels.frontends.nni as nni
from qkernels.cli import positive
from qkernels.frontends.nni import SCHEDULER, QATQuantizer, TorchEvaluator


class Mnist(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 20, 5, 1)
        self.conv2 = torch.nn.Conv2d(20, 50, 5, 1)
        self.fc1 = torch.nn.Linear(4 * 4 * 50, 500)
        self.fc2 = torch.nn.Linear(500, 10)
        self.relu1 = torch.nn.ReLU6()
        self.relu2 = torch.nn.ReLU6()
        self.relu3 = torch.nn.ReLU6()
        self.max_pool1 = torch.nn.MaxPool2d(2, 2)
        self.max_pool2 = torch.nn.MaxPool2d(2, 2)
        self.batchnorm1 = torch.nn.BatchNorm2d(20)

    def forward(self, x):
        x = self.relu1(self.batchnorm1(self.conv1(x)))
        x = self.max_pool1(x)
        x = self.relu2(self.conv2(x))
        x = self.max_pool2(x)
        x = x.view(-1, 4 * 4 * 50)
        x = self.relu3(self.fc1(x))
        x = self.fc2(x)
        return F.log_softmax(x, dim=1)


parser = argparse.ArgumentParser(description=__doc__)
add_data(parser)
parser.add_argument("--epochs", type=positive, default=5)
parser.add_argument("--seed", type=int, default=0)
add_json(parser)
arguments = parser.parse_args()
torch.manual_seed(arguments.seed)

data = digits(arguments.data)
train_dataloader = DataLoader(TensorDataset(data.train_x, data.train_y), batch_size=64, shuffle=True)
test_dataloader = DataLoader(TensorDataset(data.test_x, data.test_y), batch_size=1000)


def training_step(batch, model) -> Tensor:
    x, y = batch[0], batch[1]
    logits = model(x)
    return F.nll_loss(logits, y)


def training_model(
    model: torch.nn.Module,
    optimizer: Optimizer,
    training_step: Callable,
    scheduler: SCHEDULER | None = None,
    max_steps: int | None = None,
    max_epochs: int | None = None,
):
    model.train()
    max_epochs = max_epochs if max_epochs else 1 if max_steps is None else 100
    current_steps = 0
    for epoch in range(max_epochs):
        print(f"Epoch {epoch} start!")
        for batch in train_dataloader:
            optimizer.zero_grad()
            loss = training_step(batch, model)
            loss.backward()
            optimizer.step()
            current_steps += 1
            if max_steps and current_steps == max_steps:
                return
        if scheduler is not None:
            scheduler.step()


def evaluating_model(model: torch.nn.Module):
    model.eval()
    correct = 0
    with torch.no_grad():
        for x, y in test_dataloader:
            preds = torch.argmax(model(x), dim=1)
            correct += preds.eq(y.view_as(preds)).sum().item()
    return correct / len(test_dataloader.dataset)


model = Mnist()
optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
start = time.time()
training_model(model, optimizer, training_step, None, None, arguments.epochs)
float_seconds = time.time() - start
float_accuracy = evaluating_model(model)
print(f"pure training {arguments.epochs} epochs: {float_seconds}s    Acc.: {float_accuracy}")
image = data.test_x[:1]
float_time = milliseconds(model, image)  # its view() needs the plain layout

optimizer = nni.trace(SGD)(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
evaluator = TorchEvaluator(training_model, optimizer, training_step)
config_list = [
    {
        "op_names": ["conv1", "conv2", "fc1", "fc2"],
        "target_names": ["_input_", "weight", "_output_"],
        "quant_dtype": "int8",
        "quant_scheme": "affine",
        "granularity": "default",
    },
    {
        "op_names": ["relu1", "relu2", "relu3"],
        "target_names": ["_output_"],
        "quant_dtype": "int8",
        "quant_scheme": "affine",
        "granularity": "default",
    },
]
quantizer = QATQuantizer(model, config_list, evaluator, len(train_dataloader))
quantizer.track_forward(next(iter(train_dataloader))[0])
start = time.time()
_, calibration_config = quantizer.compress(None, max_epochs=arguments.epochs)
trained_seconds = time.time() - start
print(calibration_config)
simulated_accuracy = evaluating_model(model)
print(f"quantized training {arguments.epochs} epochs: {trained_seconds}s    Acc.: {simulated_accuracy}")

# What the original cannot: the network in integers.
converted = quantizer.convert()
mismatches = qkernels.verify(quantizer.prepared(), converted, [data.test_x[:256]]).total_mismatches
assert mismatches == 0
plan = qkernels.compile(converted, image)
print(f"training with quantization took {trained_seconds / float_seconds:.2f} times as long (NNI: 1.55)")
print(f"verify: {mismatches} codes differ between simulation and integers")
print("                 accuracy   batch 1")
rows = {
    "float": (float_accuracy, float_time),
    "simulation": (simulated_accuracy, milliseconds(model, image)),
    "int8 modules": (evaluating_model(converted), milliseconds(converted, image)),
    "int8 plan": (evaluating_model(plan), milliseconds(plan, image)),
}
for name, (accuracy, time_of_one) in rows.items():
    print(f"{name:<16} {accuracy:.4f}   {time_of_one:.3f} ms")
write_results(
    arguments.json,
    arguments.seed,
    data=data.name,
    images=[len(data.train_x), len(data.test_x)],
    training_seconds={"float": float_seconds, "quantized": trained_seconds},
    training_time_ratio=trained_seconds / float_seconds,
    mismatches=mismatches,
    rows={name: {"accuracy": accuracy, "batch_1_ms": t} for name, (accuracy, t) in rows.items()},
    original={"float": 0.9901, "quantized": 0.9918, "training_time_ratio": 1.55},
)
