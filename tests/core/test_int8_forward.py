"""The integer forward in training: the numbers of the converted model, the gradients of the float layer."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import on_fake_cuda
from torch import nn

import qkernels
from qkernels.core.exact_forward import ExactUnit
from qkernels.core.integer import IntegerForward

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "journeys"))
from test_ptq import Network


def network() -> nn.Module:
    torch.manual_seed(0)
    model = Network()
    model.dropout = nn.Identity()
    return model


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 3, 17, 17, generator=torch.Generator().manual_seed(seed))


def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    y = model(x)
    return [y] if isinstance(y, torch.Tensor) else list(y)


def trained(steps: int = 3, **options) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = qkernels.prepare_qat(network(), images(), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(steps):
        one_step(model, optimizer, step)
    return model, optimizer


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    optimizer.zero_grad()
    loss = sum(y.square().mean() for y in outputs(model, images(seed)))
    loss.backward()
    optimizer.step()
    return loss.item()


OPTIONS = [{}, {"weight_granularity": "per_tensor"}, {"rule": "lsq"}, {"rule": "lsq_plus", "bits": 4}, {"rule": "bnn"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_eval_gives_the_bits_of_exact(options):
    model, _ = trained(**options)
    model.eval()
    for got, expected in zip(outputs(model, images(9)), outputs(qkernels.exact(model), images(9)), strict=True):
        assert torch.equal(got, expected)


def test_an_edit_past_autograd_reaches_the_integers():
    """`parameter.data` counts no versions."""
    model, _ = trained()
    qkernels.disable_observer(model.eval())
    before = outputs(model, images(9))
    weight = next(p for p in model.parameters() if p.dim() == 4)
    weight.data.mul_(0.5)
    assert not all(map(torch.equal, outputs(model, images(9)), before))
    for got, expected in zip(outputs(model, images(9)), outputs(qkernels.exact(model), images(9)), strict=True):
        assert torch.equal(got, expected)
    weight.data.mul_(2.0)
    assert all(map(torch.equal, outputs(model, images(9)), before))


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_training_with_everything_frozen_gives_the_bits_of_exact(options):
    model, optimizer = trained(**options)
    qkernels.freeze_bn(model)
    qkernels.disable_observer(model)
    for step in range(3):
        expected = outputs(qkernels.exact(model), images(20 + step))
        for got, wanted in zip(outputs(model, images(20 + step)), expected, strict=True):
            assert torch.equal(got, wanted)
        assert torch.isfinite(torch.tensor(one_step(model, optimizer, step)))


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_the_float_forward(frozen):
    """They are taken where the integers and the simulation agree up to ties, so they agree up to those too."""
    models = [trained(2, forward=forward)[0] for forward in ("float", "int8")]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        if frozen:
            qkernels.freeze_bn(model)
            qkernels.disable_observer(model)
        model.zero_grad()
        sum(y.square().sum() for y in outputs(model, images(5))).backward()
    for (name, expected), got in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if name in ("stem.bias", "block1.project.bias", "block2.project.bias", "up.bias"):
            continue  # a batch norm takes the bias out again
        difference = (expected.grad - got.grad).norm() / expected.grad.norm().clamp(min=1e-6)
        assert difference < 0.1, name


LAYERS = [
    (nn.Linear(6, 4), (5, 6)),
    (nn.Linear(6, 4, bias=False), (2, 3, 6)),
    (nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 9)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 9, 8)),
    (nn.Conv2d(4, 4, 3, padding="same", groups=4, bias=False), (2, 4, 7, 8)),
    (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 3)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2), (2, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 2, stride=2, padding=1), (2, 4, 5, 4)),
    (nn.ConvTranspose3d(2, 3, 2, bias=False), (1, 2, 3, 2, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_each_layer_runs_on_integers_and_has_the_gradients_of_torch(layer, shape, isa):
    model = qkernels.prepare_qat(nn.Sequential(copy.deepcopy(layer), nn.Tanh()), torch.randn(shape), skip=[nn.Tanh])
    trainee = model.get_submodule("0")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    model(x)
    x = next(iter(model.get_submodule("activation_quantizers").children())).on_grid(x).detach().requires_grad_()
    got = trainee(x)
    assert type(got.grad_fn).__name__.startswith(IntegerForward.__name__)
    plain = copy.deepcopy(layer)
    plain.weight = nn.Parameter(
        trainee.from_rows(trainee.quantizers["weight"].on_grid(trainee.rows(trainee.weight))).detach()
    )
    z = x.detach().clone().requires_grad_()
    expected = plain(z)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(expected)
    got.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trainee.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-5)
    if layer.bias is not None:
        torch.testing.assert_close(trainee.bias.grad, plain.bias.grad, rtol=1e-4, atol=1e-5)


def test_a_copy_has_units_of_its_own():
    model, _ = trained()
    model.eval()
    expected = outputs(model, images())
    twin = copy.deepcopy(model)
    assert all(torch.equal(a, b) for a, b in zip(outputs(twin, images()), expected, strict=True))
    own = {id(m) for m in twin.modules()}
    units = [m for m in twin.modules() if isinstance(m, ExactUnit)]
    assert units
    assert all(id(q) in own for unit in units for q in (*unit.target, *(source for source, _ in unit.sources)))
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, images()), expected, strict=True))


def test_a_dropout_before_a_layer_keeps_it_in_float_while_it_drops():
    model = qkernels.prepare_qat(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2)), torch.ones(2, 4)
    )
    model(torch.randn(16, 4)).sum().backward()
    assert not model.get_submodule("3").runs_on_integers(torch.ones(2, 8))
    model.eval()
    assert model.get_submodule("3").runs_on_integers(torch.ones(2, 8))
    x = torch.randn(5, 4)
    assert torch.equal(model(x), qkernels.exact(model)(x))


class Views(nn.Module):
    """Written for contiguous images."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 5)

    def forward(self, x):
        return self.head(F.relu(self.conv(x)).view(x.shape[0], -1))


def test_views_of_images_train_on_integer_kernels():
    model = qkernels.prepare_qat(Views(), torch.randn(2, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    model(x).sum().backward()
    assert qkernels.verify(model, qkernels.convert(model), [x]).total_mismatches == 0


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_a_layer_on_cuda_asks_the_device_for_nothing(layer, shape, granularity):
    options = {"skip": [nn.Tanh], "weight_granularity": granularity}
    model = qkernels.prepare_qat(nn.Sequential(copy.deepcopy(layer), nn.Tanh()), torch.randn(shape), **options)
    model(torch.randn(shape))
    with on_fake_cuda(model) as on_cuda:
        trainee, x = model.get_submodule("0"), on_cuda(shape).requires_grad_()
        y = trainee(x)
        assert type(y.grad_fn).__name__.startswith(IntegerForward.__name__)
        assert y.device.type == "cuda"
        # What the backward calls: the engine of autograd itself needs a device.
        gradients = trainee.gradients(on_cuda(y.shape), x, trainee.weight, (True, True, True))
        assert all(g.device.type == "cuda" for g in gradients)


def test_a_trace_of_a_model_in_training_holds_the_simulation():
    x = torch.randn(4, 8)
    model = qkernels.prepare_qat(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), (x,))
    model(x)
    model.eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        expected = qkernels.prepare_qat(
            nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), (x,), forward="float"
        )
        expected.load_state_dict(model.state_dict())
        assert torch.equal(traced(x), expected.eval()(x))
