"""Part training: networks are trained with every rule, and what they become gives the same codes on both devices."""

import copy
import itertools
from typing import Any

import device
import torch
from cases import Cases
from device import equal
from gpu_networks import NETWORKS, TRACED, TRAINED, batches, float_network
from model_cases import compare_layers
from torch import nn

import qkernels
from qkernels.core.rules import RULES


def training(small: bool) -> Cases:
    def train(prepared: nn.Module, model: nn.Module, shape: tuple[int, ...], how: str = "eager") -> None:
        """A few steps, in each of which every gradient is finite, and not all are zero."""
        optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
        for _ in range(3):
            x = torch.randn(shape).to(device.NAME)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=how == "autocast"):
                loss = model(x).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            gradients = {name: p.grad for name, p in prepared.named_parameters() if p.grad is not None}
            wrong = [name for name, grad in gradients.items() if not grad.isfinite().all()]
            assert not wrong, f"gradients that are not finite: {wrong}"
            assert any(grad.abs().sum() > 0 for grad in gradients.values()), "all gradients are zero"
            optimizer.step()
        assert loss.isfinite(), f"the loss is {loss.item()}"

    def rule(name: str) -> None:
        """Trained on the device from the beginning, then converted there."""
        make, shape = TRAINED
        network = float_network(make).train().to(device.NAME)
        prepared = qkernels.prepare_qat(network, device.on(batches(shape, 1)[0]), rule=name)
        train(prepared, prepared, shape)
        converted = qkernels.convert(prepared)
        compare_layers(copy.deepcopy(converted).to("cpu"), converted, batches(shape))

    def moved(rule: str, how: str) -> None:
        """Prepared on the CPU, trained on the device."""
        make, shape = TRACED if how == "compiled" and small else NETWORKS["mobile"]
        network = float_network(make).train()
        prepared = qkernels.prepare_qat(network, batches(shape, 1)[0], rule=rule).to(device.NAME)
        model = torch.compile(prepared, backend="aot_eager") if how == "compiled" else prepared
        train(prepared, model, shape, how)

    def integer_forward(layer: nn.Module, shape: tuple[int, ...]) -> None:
        """A layer in training: the bits of its integer forward, packed on the device."""
        x = batches(shape, 1)[0]
        prepared = qkernels.prepare_qat(nn.Sequential(layer, nn.Tanh()), x, skip=[nn.Tanh])
        prepared(x)
        there = copy.deepcopy(prepared).to(device.NAME)
        for model in (prepared, there):
            qkernels.disable_observer(model)
        on_device = there(device.on(x))
        equal(there.get_submodule("0")(device.on(x)), prepared.get_submodule("0")(x).detach())
        on_device.sum().backward()
        assert there.get_submodule("0").weight.grad.isfinite().all()

    for name in sorted(RULES):
        yield f"rule {name}", lambda name=name: rule(name)
    for name, how in itertools.product(("ste", "lsq"), ("eager", "autocast", "compiled")):
        yield f"moved, {name}, {how}", lambda name=name, how=how: moved(name, how)
    layers: list[tuple[nn.Module, Any]] = [
        (nn.Linear(70, 33), (5, 70)),
        (nn.Conv2d(16, 24, 3, 2, 1), (2, 16, 9, 9)),
        (nn.Conv2d(32, 32, 3, 1, 1, groups=32), (2, 32, 9, 9)),
        (nn.ConvTranspose2d(16, 16, 3, 2), (2, 16, 5, 5)),
    ]
    for layer, size in layers:
        yield f"int8 forward of {layer}", lambda layer=layer, size=size: integer_forward(layer, size)
