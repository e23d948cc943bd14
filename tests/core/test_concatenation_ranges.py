"""The tensors of a concatenation share a grid, and what watches them takes all of one forward for one tensor."""

import copy

import pytest
import torch
from torch import nn
from torch.ao.quantization import MovingAverageMinMaxObserver

import qkernels
from qkernels.core.quantizer import Quantizer
from qkernels.errors import CalibrationError

FACTOR = 6.0


class Branches(nn.Module):
    """Two branches, the first with the smaller or the larger values."""

    def __init__(self, norm=nn.Identity, activation=nn.Identity, large_first=False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.norm_a, self.norm_b = norm(8), norm(8)
        self.activation_a, self.activation_b = activation(), activation()
        self.head = nn.Conv2d(16, 4, 1)
        with torch.no_grad():
            large = (self.a, self.norm_a) if large_first else (self.b, self.norm_b)
            (large[0] if norm is nn.Identity else large[1]).weight.mul_(FACTOR)

    def forward(self, x):
        a = self.activation_a(self.norm_a(self.a(x)))
        return self.head(torch.cat([a, self.activation_b(self.norm_b(self.b(x)))], 1))


def images(seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(4, 3, 12, 12, generator=g)).to(memory_format=torch.channels_last)


def shared(model: nn.Module) -> Quantizer:
    (found,) = (m for m in model.modules() if isinstance(m, Quantizer) and m.joins)
    return found


def watched(model: nn.Module, batches: list[torch.Tensor]) -> torch.nn.Module:
    """torch's observer after what goes into the concatenation of `model`, batch by batch."""
    seen, theirs = [], MovingAverageMinMaxObserver(averaging_constant=0.01)
    quantizer = shared(model)
    handle = quantizer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0].detach(), kwargs.get("clamp"))), with_kwargs=True
    )
    for x in batches:
        seen.clear()
        model(x)
        theirs(torch.cat([t if clamp is None else t.clamp(*clamp) for t, clamp in seen], 1))
    handle.remove()
    return theirs


@pytest.mark.parametrize("large_first", [False, True])
@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize("forward", ["int8", "float"])
def test_training_follows_the_extremes_of_all_branches(forward, activation, large_first):
    batches = [images(seed) for seed in range(6)]
    model = qkernels.prepare_qat(
        Branches(activation=activation, large_first=large_first), (batches[0],), forward=forward
    )
    theirs = watched(model, batches)
    observer = shared(model).observer
    torch.testing.assert_close(observer.low.reshape(()), theirs.min_val.clamp(max=0.0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(observer.high.reshape(()), theirs.max_val, rtol=1e-6, atol=1e-6)
    assert shared(model).scale.item() == shared(model).observer.qparams().scale.item()


@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU, nn.Hardswish])
def test_calibration_follows_the_extremes_of_all_branches(activation):
    batches = [images(seed) for seed in range(6)]
    model = qkernels.prepare(Branches(activation=activation), (batches[0],), observer="moving_average")
    with qkernels.calibrating(model):
        theirs = watched(model, batches)
    observer = shared(model).observer
    torch.testing.assert_close(observer.high.reshape(()), theirs.max_val, rtol=1e-6, atol=1e-6)


def test_a_norm_in_one_op_with_the_grid_sees_the_same(monkeypatch):
    batches = [images(seed) for seed in range(4)]
    apart = qkernels.prepare_qat(Branches(nn.BatchNorm2d, nn.ReLU), (batches[0],))
    monkeypatch.setattr(Quantizer, "takes_norm", lambda self, x, clamp: False)
    for x in batches:
        apart(x)
    monkeypatch.undo()
    fused = qkernels.prepare_qat(Branches(nn.BatchNorm2d, nn.ReLU), (batches[0],))
    for x in batches:
        fused(x)
    for name in ("low", "high"):
        ours, theirs = getattr(shared(fused).observer, name), getattr(shared(apart).observer, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_compiled_training_follows_the_same_ranges():
    batches = [images(seed) for seed in range(4)]
    eager = qkernels.prepare_qat(Branches(activation=nn.ReLU), (batches[0],), forward="float")
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, backend="aot_eager")
    for x in batches:
        torch.testing.assert_close(run(x), eager(x), rtol=0, atol=0)
    for name in ("low", "high"):
        assert torch.equal(getattr(shared(compiled).observer, name), getattr(shared(eager).observer, name))


def test_branches_far_apart_convert_as_well_as_a_range_of_everything():
    batches = [images(seed) for seed in range(8)]
    reached = {}
    for observer in ("moving_average", "minmax"):
        network = Branches().eval()
        model = qkernels.prepare_qat(network, (batches[0],), observer=observer)
        for x in batches * 3:
            model(x)
        converted = qkernels.convert(model)
        assert qkernels.verify(model.eval(), converted, batches[:2]).total_mismatches == 0
        with torch.no_grad():
            noise = torch.cat([converted(x) - network(x) for x in batches])
            signal = torch.cat([network(x) for x in batches])
        reached[observer] = 10 * torch.log10(signal.square().sum() / noise.square().sum()).item()
    assert reached["moving_average"] > reached["minmax"] - 3.0


def test_a_batch_at_fault_in_a_later_branch_changes_nothing_of_the_earlier():
    model = qkernels.prepare_qat(Branches(), (images(0),))
    model(images(0))
    before = shared(model).observer.high.clone()
    poison = model.get_submodule("b").register_forward_hook(lambda module, args, y: y * float("nan"))
    with pytest.raises(CalibrationError, match="NaN"):
        model(images(0))
    poison.remove()
    torch.testing.assert_close(shared(model).observer.high, before, rtol=0.01, atol=0)
    assert torch.isfinite(model(images(1))).all()
