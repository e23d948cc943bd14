"""Training scripts in the words of NNI 3.0, run by the original and by the front end.

As a program, `python nni_cases.py results.pt` runs them with the original (nni 3.0 must be importable) and saves what
comes out.
"""

import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

BATCHES, STEPS = 4, 8


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(4, 6, 3, stride=2), nn.ReLU6()
        self.pool, self.fc = nn.MaxPool2d(2, 2), nn.Linear(6 * 3 * 3, 10)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.pool(self.relu2(self.conv2(x)))
        return F.log_softmax(self.fc(x.flatten(1)), dim=1)


def entry(**changed):
    usual = {
        "op_names": ["conv1", "conv2", "fc"],
        "target_names": ["_input_", "weight", "_output_"],
        "quant_dtype": "int8",
        "quant_scheme": "affine",
        "granularity": "default",
    }
    return {key: value for key, value in (usual | changed).items() if value is not None}


PER_CHANNEL = {"weight": {"quant_dtype": "int8", "quant_scheme": "symmetric", "granularity": "out_channel"}}
WEIGHTS = ["weight"]
RELU = entry(op_names=["relu1", "relu2"], target_names=["_output_"])

# name: (class, config_list, options of the class)
CASES = {
    "qat affine": ("QATQuantizer", [entry(), RELU], {}),
    "qat symmetric": ("QATQuantizer", [entry(quant_scheme="symmetric"), RELU], {}),
    "qat uint4 weights": ("QATQuantizer", [entry(target_settings={"weight": {"quant_dtype": "uint4"}})], {}),
    "qat out_channel": ("QATQuantizer", [entry(target_settings=PER_CHANNEL)], {}),
    "qat delayed": ("QATQuantizer", [entry()], {"quant_start_step": 3}),
    "qat never": ("QATQuantizer", [entry()], {"quant_start_step": STEPS - 1}),
    "qat first wins": ("QATQuantizer", [entry(target_names=WEIGHTS), entry(quant_dtype="int4")], {}),
    "qat bn fold": ("QATQuantizer", [entry(fuse_names=[("conv1", "bn1", "relu1")])], {}),
    "lsq": ("LsqQuantizer", [entry(quant_scheme="symmetric")], {}),
    "dorefa": ("DoReFaQuantizer", [entry(target_names=WEIGHTS, quant_dtype="int4")], {}),
    "bnn": ("BNNQuantizer", [entry(target_names=WEIGHTS, op_names=["conv2"])], {}),
    "ptq": ("PtqQuantizer", [entry()], {}),
}


def run(api, name):
    """Calibration config, losses and logits of one case."""
    kind, config_list, options = CASES[name]
    torch.manual_seed(0)
    model = Net()
    images, labels = torch.randn(BATCHES, 8, 1, 16, 16), torch.randint(0, 10, (BATCHES, 8))
    losses = []

    def training_step(batch, model):
        return F.nll_loss(model(batch[0]), batch[1])

    def training_func(model, optimizer, training_step, scheduler, max_steps, max_epochs):
        model.train()
        for step in range(max_steps):
            optimizer.zero_grad()
            loss = training_step((images[step % BATCHES], labels[step % BATCHES]), model)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    def evaluating_func(model):
        model.eval()
        with torch.no_grad():
            for batch in images:
                model(batch)

    optimizer = api.trace(SGD)(model.parameters(), lr=0.01, momentum=0.9)
    evaluator = api.TorchEvaluator(training_func, optimizer, training_step, evaluating_func=evaluating_func)
    quantizer = getattr(api, kind)(model, config_list, evaluator, **options)
    quantizer.track_forward(images[0])
    _, calibration = quantizer.compress(STEPS, None)
    with torch.no_grad():
        logits = model.eval()(images[1])
    plain = {m: {t: dict(e) for t, e in targets.items()} for m, targets in calibration.items()}
    return SimpleNamespace(calibration=plain, losses=losses, logits=logits, quantizer=quantizer, images=images)


def main():
    import nni
    from nni.compression import TorchEvaluator, quantization

    classes = {kind: getattr(quantization, kind) for kind, _, _ in CASES.values()}
    api = SimpleNamespace(trace=nni.trace, TorchEvaluator=TorchEvaluator, **classes)
    found = {}
    for name in CASES:
        result = run(api, name)
        found[name] = {"calibration": result.calibration, "losses": result.losses, "logits": result.logits}
    torch.save(found, sys.argv[1])


if __name__ == "__main__":
    main()
