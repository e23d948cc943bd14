"""AIMET's quickstart with its import lines changed, on real images, to the end that AIMET leaves to others.

Train in float, prepare, fold, simulate 4-bit weights and 8-bit activations, train on, export; then convert to integers.
"""

import argparse
import tempfile

import torch
import torch.nn.functional as F
from _common import add_data, add_json, digits, milliseconds, write_results
from torch.utils.data import DataLoader, TensorDataset

import qkernels
import qkernels.frontends.aimet as aimet
from qkernels.cli import positive
from qkernels.frontends.aimet import batch_norm_fold, model_preparer, quantsim


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(in_channels=1, out_channels=128, kernel_size=3, padding=1, stride=2)
        self.bn_1 = torch.nn.BatchNorm2d(128)
        self.conv2 = torch.nn.Conv2d(in_channels=128, out_channels=256, kernel_size=3, padding=1, stride=2)
        self.bn_2 = torch.nn.BatchNorm2d(256)
        self.linear = torch.nn.Linear(in_features=7 * 7 * 256, out_features=10)

    def forward(self, x):
        x = self.conv1(x)
        x = F.relu(self.bn_1(x))
        x = self.conv2(x)
        x = F.relu(self.bn_2(x))
        x = self.linear(x.view(x.shape[0], -1))
        return F.softmax(x, dim=-1)


def evaluate(model, data_loader):
    model.eval()
    correct = total = 0
    with torch.no_grad():
        for x, y in data_loader:
            correct += (torch.argmax(model(x), dim=1) == y).sum()
            total += x.shape[0]
    return float(correct / total * 100.0)


def train(model, data_loader, epochs):
    loss_fn = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    model.train()
    for _ in range(epochs):
        for x, y in data_loader:
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def loaders(name, count=None):
    images = digits(name)

    def loader(x, y):
        return DataLoader(TensorDataset(x[:count], y[:count]), batch_size=128, shuffle=True)

    return loader(images.train_x, images.train_y), loader(images.test_x, images.test_y)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=positive, default=4, help="of float training (default: %(default)s)")
    add_data(parser)
    parser.add_argument("--images", type=positive, help="only so many for training and so many for testing")
    parser.add_argument("--seed", type=int, default=0)
    add_json(parser)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    train_loader, test_loader = loaders(options.data, options.images)
    sample_input, _ = next(iter(train_loader))

    model = Network()
    train(model, train_loader, options.epochs)
    accuracy = {"float": evaluate(model, test_loader)}

    prepared_model = model_preparer.prepare_model(model)
    assert evaluate(prepared_model, test_loader) == accuracy["float"]
    batch_norm_fold.fold_all_batch_norms(prepared_model, input_shapes=sample_input.shape)

    sim = quantsim.QuantizationSimModel(
        prepared_model, dummy_input=sample_input, default_output_bw=8, default_param_bw=4
    )
    with aimet.nn.compute_encodings(sim.model):
        for idx, (x, _) in enumerate(train_loader):
            sim.model(x)
            if idx >= 10:
                break
    print(sim.model)
    accuracy["simulated, after calibration"] = evaluate(sim.model, test_loader)
    train(sim.model, train_loader, 1)
    accuracy["simulated, after training"] = evaluate(sim.model, test_loader)
    with tempfile.TemporaryDirectory() as folder:
        sim.export(folder, "model", dummy_input=sample_input)

    converted = sim.convert()
    accuracy["integers"] = evaluate(converted, test_loader)
    mismatches = qkernels.verify(sim.prepared(), converted, [sample_input]).total_mismatches
    assert mismatches == 0
    for name, percent in accuracy.items():
        print(f"{name:<30} {percent:6.2f} %")
    print(f"verify: {mismatches} codes differ")
    networks = {"float": model.eval(), "simulation": sim.model.eval(), "integers": converted}
    times = {name: milliseconds(network, sample_input) for name, network in networks.items()}
    for name, time in times.items():
        print(f"{name:<30} {time:6.2f} ms a batch of {len(sample_input)}")
    write_results(
        options.json,
        options.seed,
        images=[len(loader.dataset) for loader in (train_loader, test_loader)],
        accuracy=accuracy,
        batch_of_128_ms=times,
        mismatches=mismatches,
        original={"float": 91.7, "simulated, after calibration": 91.2, "simulated, after training": 92.1},
    )


if __name__ == "__main__":
    main()
