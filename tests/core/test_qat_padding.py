"""Training with paddings that torch pads beforehand: integer forward, and the gradients of torch."""

import pytest
import torch
from torch import nn

import qkernels

LAYERS = {
    "reflect": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(3, 4, 3, 2, padding=(1, 2), padding_mode="circular"),
    "replicate": lambda: nn.Conv2d(3, 6, 3, padding=2, dilation=2, groups=3, padding_mode="replicate"),
    "reflect, same": lambda: nn.Conv2d(3, 4, (3, 4), padding="same", padding_mode="reflect"),
    "same": lambda: nn.Conv2d(3, 4, (4, 3), padding="same"),
    "symmetric same": lambda: nn.Conv2d(3, 4, 3, padding="same"),
    "valid": lambda: nn.Conv2d(3, 4, 3, padding="valid", padding_mode="reflect"),
    "1d": lambda: nn.Conv1d(3, 4, 4, padding="same", padding_mode="circular"),
    "3d": lambda: nn.Conv3d(3, 4, 2, padding="same"),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 3, 2, padding=(0, 1), output_padding=1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_eval_gives_the_bits_of_the_converted_model(name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    x = torch.randn(2, 3, *[7] * (layer.weight.dim() - 2))
    model = qkernels.prepare_qat(nn.Sequential(layer), x)
    model(x).sum().backward()
    qkernels.disable_observer(model)
    model.eval()
    assert torch.equal(model(x), qkernels.exact(model)(x))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_simulation(name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    x = torch.randn(2, 3, *[7] * (layer.weight.dim() - 2))
    found = []
    for forward in ("int8", "float"):
        model, own = qkernels.prepare_qat(nn.Sequential(layer), x, forward=forward), x.clone().requires_grad_()
        y = model(own)
        y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
        found.append([own.grad, *(p.grad for p in model.parameters())])
    for int8, simulated in zip(*found, strict=True):
        torch.testing.assert_close(int8, simulated, rtol=1e-4, atol=1e-4)
    assert found[0][0].abs().sum() > 0
