"""A live batch norm and the grid behind it in one op: what the steps one by one give, in training on integers."""

import copy
import math

import pytest
import torch
from fake_cuda import on_fake_cuda
from torch import nn

import qkernels
from qkernels import ops
from qkernels.core.layers import Prepared
from qkernels.core.norm import Norm
from qkernels.core.quantizer import Quantizer
from qkernels.errors import CalibrationError

ACTIVATIONS = [nn.Identity, nn.ReLU, nn.ReLU6]


def network(activation=nn.ReLU6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        activation(),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.BatchNorm2d(16),
        activation(),
        nn.Flatten(),
        nn.Linear(16 * 8 * 8, 24),
    )


def images(seed=0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(4, 3, 12, 12, generator=g) * 3).to(memory_format=torch.channels_last)


def count_fused(monkeypatch) -> list[torch.Tensor]:
    seen, op = [], ops.batch_norm_fake_quant

    def counted(x, *arguments):
        seen.append(x)
        return op(x, *arguments)

    monkeypatch.setattr(ops, "batch_norm_fake_quant", counted)
    return seen


def step(model: nn.Module, seed: int) -> float:
    model.zero_grad()
    loss = model(images(seed)).square().mean()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.01 * p.grad
    return loss.item()


def apart(model: nn.Module) -> nn.Module:
    """The model with batch norms and grids one by one."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, Prepared):
            layer.reader = None
    return model


@pytest.mark.parametrize("rule", ["ste", "lsq", "lsq_plus"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_states_and_gradients_are_those_of_the_steps_one_by_one(monkeypatch, rule, activation):
    model = qkernels.prepare_qat(network(activation), images(), rule=rule)
    step(model, 0)  # chooses the grids
    fused, plain = count_fused(monkeypatch), apart(model)
    y, expected = model(images(1)), plain(images(1))
    assert len(fused) == 2
    assert (y - expected).norm() <= 0.02 * expected.norm()  # where a rounding fell to the other side
    for (name, buffer), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-4, atol=1e-4, msg=name)
    for m in (model, plain):
        m.zero_grad()
        m(images(1)).square().mean().backward()
    for (name, p), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if name != "3.bias":  # the batch norm takes it out again
            assert (p.grad - other.grad).norm() <= 0.03 * other.grad.norm() + 1e-6, name


def test_batches_are_counted_and_running_statistics_are_those_of_torch():
    """The first layer reads the input, on which integers and floats agree."""
    model = qkernels.prepare_qat(network(), images())
    for seed in range(3):
        model(images(seed))
    norm = next(m for m in model.modules() if isinstance(m, Norm))
    assert norm.num_batches_tracked == 3
    other = apart(qkernels.prepare_qat(network(), images()))
    for seed in range(3):
        other(images(seed))
    expected = next(m for m in other.modules() if isinstance(m, Norm))
    torch.testing.assert_close(norm.running_mean, expected.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var, expected.running_var, rtol=1e-5, atol=1e-6)


def test_the_codes_of_the_next_layer_are_made_in_the_same_pass(monkeypatch):
    model = qkernels.prepare_qat(network(), images())
    step(model, 0)
    made, op = [], ops.quantize
    monkeypatch.setattr(ops, "quantize", lambda x, *grid: made.append(x.dim()) or op(x, *grid))
    step(model, 1)
    assert made == [2]  # behind the flatten


def test_without_observing_the_grid_stays_and_the_norm_goes_on(monkeypatch):
    model = qkernels.prepare_qat(network(), images())
    step(model, 0)
    qkernels.disable_observer(model)
    scales = [q.scale.clone() for q in model.modules() if isinstance(q, Quantizer) and not q.is_weight]
    fused = count_fused(monkeypatch)
    model(images(1) * 5)
    assert len(fused) == 2
    after = [q.scale for q in model.modules() if isinstance(q, Quantizer) and not q.is_weight]
    assert all(torch.equal(a, b) for a, b in zip(scales, after, strict=True))
    assert next(m for m in model.modules() if isinstance(m, Norm)).num_batches_tracked == 2


@pytest.mark.parametrize(
    "change",
    [
        qkernels.freeze_bn,
        qkernels.disable_fake_quant,
        nn.Module.eval,
        lambda model: [setattr(m, "momentum", None) for m in model.modules() if isinstance(m, Norm)],
        lambda model: [m.register_forward_hook(lambda *_: None) for m in model.modules() if isinstance(m, Norm)],
    ],
    ids=["frozen", "no rounding", "eval", "cumulative average", "hooks"],
)
def test_what_is_not_one_step_is_done_one_by_one(monkeypatch, change):
    model = qkernels.prepare_qat(network(), images())
    step(model, 0)
    change(model)
    fused = count_fused(monkeypatch)
    model(images(1))
    assert not fused


def test_an_infinite_weight_is_reported_with_the_module():
    model = qkernels.prepare_qat(network(), images())
    step(model, 0)
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, Norm)).bias[2] = math.inf
    with pytest.raises(CalibrationError, match="the output of"):
        model(images(1))


def test_training_resumes_with_the_same_bits():
    model = qkernels.prepare_qat(network(), images())
    for seed in range(3):
        step(model, seed)
    other = qkernels.prepare_qat(network(), images())
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert [step(model, 10 + k) for k in range(5)] == [step(other, 10 + k) for k in range(5)]


def test_a_batch_that_is_used_twice_and_a_hook_on_the_layer_change_nothing():
    """The Quantizer knows what it has made by identity: another tensor is rounded as always."""
    model = qkernels.prepare_qat(network(), images())
    step(model, 0)
    twin = copy.deepcopy(model)
    layer = next(m for m in twin.modules() if isinstance(m, Prepared))
    layer.register_forward_hook(lambda module, args, y: y * 1.0)
    y, expected = twin(images(1)), model(images(1))
    assert (y - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("rule", ["ste", "lsq", "lsq_plus"])
def test_on_cuda_it_is_one_op_too_and_nothing_asks_for_a_value(monkeypatch, rule):
    model = qkernels.prepare_qat(network(), images(), rule=rule)
    step(model, 0)
    fused = count_fused(monkeypatch)
    with on_fake_cuda(model) as new:
        x = new(4, 12, 12, 3).permute(0, 3, 1, 2)
        assert model(x).device.type == "cuda"
        assert [t.device.type for t in fused] == ["cuda", "cuda"]
        channels, grid = [new(16) for _ in range(4)], (new(1), new(1, dtype=torch.int32), 0, 255)
        for factor, sizes in ((None, 0), (0.5, 1)):
            made = ops.norm_fake_quant_backward(fused[0], fused[0], *channels, *grid, 0.0, 6.0, factor)
            assert [t.shape for t in made] == [fused[0].shape, (16,), (16,), (sizes,), (sizes,)]
            assert made[0].stride() == fused[0].stride()
            assert {t.device.type for t in made} == {"cuda"}
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        model(x)
        assert len(fused) == 2
