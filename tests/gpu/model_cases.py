"""Part model: converted networks give the codes on the GPU that they give on the CPU, layer by layer."""

import copy
from typing import Any

import device
import torch
from cases import Cases
from device import equal, tensors
from gpu_networks import NETWORKS, batches, float_network
from torch import Tensor, nn

import qkernels
from qkernels.core.observers import OBSERVERS


def outputs_of_layers(model: nn.Module, x: Tensor) -> list[tuple[str, Tensor]]:
    """What every leaf module gave, by name and in the order of the calls, and in the end the model itself."""
    found: list[tuple[str, Tensor]] = []

    def note(name: str) -> Any:
        return lambda module, args, output: found.extend((name, t.detach().clone()) for t in tensors(output))

    hooks = [m.register_forward_hook(note(name)) for name, m in model.named_modules() if not any(m.children())]
    try:
        with torch.no_grad():
            found += [("the output", t) for t in tensors(model(x))]
    finally:
        for hook in hooks:
            hook.remove()
    return found


def compare_layers(here: nn.Module, there: nn.Module, inputs: list[Tensor]) -> None:
    """Raises unless `here`, on the CPU, and `there`, on the device, give the same bits in every layer; names the first
    that differs.
    """
    for number, x in enumerate(inputs):
        expected, got = outputs_of_layers(here, x), outputs_of_layers(there, device.on(x))
        assert [name for name, _ in got] == [name for name, _ in expected], "other layers were called"
        for (name, one), (_, other) in zip(got, expected, strict=True):
            try:
                equal(one, other)
            except AssertionError as error:
                raise AssertionError(f"batch {number}, {name}: {error}") from None


def calibrated(model: nn.Module, inputs: list[Tensor], **options: Any) -> nn.Module:
    """Prepared, calibrated and converted where the model and its inputs are."""
    prepared = qkernels.prepare(model, inputs[0], **options)
    with qkernels.calibrating(prepared):
        for x in inputs:
            prepared(x)
    return qkernels.convert(prepared)


def model(small: bool) -> Cases:
    def moved(network: nn.Module, shape: tuple[int, ...], **options: Any) -> None:
        inputs = batches(shape)
        converted = calibrated(network, inputs, **options)
        compare_layers(converted, copy.deepcopy(converted).to(device.NAME), inputs)

    def born_there(network: nn.Module, shape: tuple[int, ...], **options: Any) -> None:
        """All of it on the device; then the integer network moves to the CPU."""
        inputs = batches(shape)
        converted = calibrated(network.to(device.NAME), device.on(inputs), **options)
        assert all(t.device.type == device.NAME for t in converted.buffers()), "a buffer has stayed on the CPU"
        compare_layers(copy.deepcopy(converted).to("cpu"), converted, inputs)

    for name, (make, shape) in NETWORKS.items():
        yield name, lambda make=make, shape=shape: moved(float_network(make), shape)
        yield f"{name}, from the beginning", lambda make=make, shape=shape: born_there(float_network(make), shape)
    make, shape = NETWORKS["squeeze-excitation"]
    for observer in sorted(OBSERVERS):
        options = {"observer": observer}
        run = lambda options=options: born_there(float_network(make), shape, **options)  # noqa: E731
        yield f"calibrated by {observer}", run
    for how in (moved, born_there):
        run = lambda how=how: how(float_network(lambda: nn.Linear(100, 70)), (40, 100), recipe="int8-dynamic")  # noqa: E731
        yield f"int8-dynamic, {'moved' if how is moved else 'from the beginning'}", run
