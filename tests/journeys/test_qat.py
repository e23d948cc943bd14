"""The journey of training with quantization: train, convert, and what is refused."""

import copy

import pytest
import torch
from torch import nn

import qkernels
from qkernels.errors import CalibrationError, InvalidState


class Small(nn.Module):
    """A residual, a pool and a cat."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn2 = nn.BatchNorm2d(8)
        self.pool = nn.AvgPool2d(2)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        z = nn.functional.relu6(self.bn2(self.conv2(y)) + y)
        y = self.pool(torch.cat([y, z], 1))
        return self.fc(y.mean((2, 3)))


def images(seed: int, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def made(**options) -> nn.Module:
    torch.manual_seed(0)
    return qkernels.prepare_qat(Small(), images(0), **options)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = (model(images(step)) - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("bad", [float("nan")])
@pytest.mark.parametrize("step", [0])
def test_nan_and_inf_are_an_error_that_names_the_module(bad, step):
    model = made()
    run(model, optimizer_of(model), range(step))
    x = images(9)
    x[0, 0, 0, 0] = bad
    before = copy.deepcopy(model.get_submodule("activation_quantizers").state_dict())
    with pytest.raises(CalibrationError, match=r"output of x has .* among"):
        model(x)
    after = model.get_submodule("activation_quantizers").state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_a_model_that_is_partly_code_of_its_own_trains_part_by_part():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.small = Small()
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            y = self.small(x)
            return self.head(y) if float(y.sum()) > -1e9 else y

    torch.manual_seed(0)
    model = qkernels.prepare_qat(Outer(), images(0))
    assert model.training
    losses = run(model, optimizer_of(model), range(12))
    assert losses[-1] < losses[0]
    converted = qkernels.convert(model)
    assert not converted.training
    assert qkernels.verify(model, converted, [images(5)]).total_mismatches == 0


def test_converting_before_any_batch_says_what_to_do():
    with pytest.raises(InvalidState, match="no grid"):
        qkernels.convert(made())
