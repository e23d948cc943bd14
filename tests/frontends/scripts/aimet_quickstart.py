# ruff: noqa
# A script of a user of AIMET. A test reads `results`.
import tempfile

import aimet_torch.v2 as aimet
import torch
import torch.nn.functional as F
from aimet_torch import batch_norm_fold, model_preparer
from aimet_torch.v2 import quantsim

torch.manual_seed(0)
results = {}


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(in_channels=1, out_channels=16, kernel_size=3, padding=1, stride=2)
        self.bn_1 = torch.nn.BatchNorm2d(16)
        self.conv2 = torch.nn.Conv2d(in_channels=16, out_channels=32, kernel_size=3, padding=1, stride=2)
        self.bn_2 = torch.nn.BatchNorm2d(32)
        self.linear = torch.nn.Linear(in_features=2 * 2 * 32, out_features=10)

    def forward(self, x):
        x = self.conv1(x)
        x = F.relu(self.bn_1(x))
        x = self.conv2(x)
        x = F.relu(self.bn_2(x))
        x = self.linear(x.view(x.shape[0], -1))
        return F.softmax(x, dim=-1)


def evaluate(name, model):
    model.eval()
    with torch.no_grad():
        results[name] = torch.cat([model(x) for x in test_x.split(50)])


def train(model, epochs, lr):
    loss_fn = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        for x, y in zip(train_x.split(50), train_y.split(50)):
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


model = Network()
train(model, 6, 3e-3)
evaluate("float", model)

prepared_model = model_preparer.prepare_model(model)
print(prepared_model)
evaluate("prepared", prepared_model)
batch_norm_fold.fold_all_batch_norms(prepared_model, input_shapes=test_x[:50].shape)
print(prepared_model)

sim = quantsim.QuantizationSimModel(prepared_model, dummy_input=test_x[:50], default_output_bw=8, default_param_bw=4)
with aimet.nn.compute_encodings(sim.model):
    for idx, x in enumerate(train_x.split(50)):
        sim.model(x)
        if idx >= 10:
            break
print(sim.model)
evaluate("simulated", sim.model)
train(sim.model, 1, 1e-4)
evaluate("trained", sim.model)

export_path = tempfile.mkdtemp()
sim.export(export_path, "model", dummy_input=test_x[:50])
results["sim"], results["folder"] = sim, export_path
