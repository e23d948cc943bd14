"""The journey of training with quantization: train, save in the middle, go on, freeze, convert; compiled, in bf16."""

import copy
import io

import pytest
import torch
from torch import nn

import qkernels
from qkernels.core.observers import OBSERVERS
from qkernels.core.prepare import quantizers
from qkernels.core.rules import RULES
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


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("forward", ["float", "int8"])
def test_a_state_dict_in_the_middle_resumes_with_the_same_losses(rule, forward):
    options = {"rule": rule, "forward": forward, "start_step": 2}
    model = made(**options)
    optimizer = optimizer_of(model)
    run(model, optimizer, range(5))
    qkernels.freeze_bn(model)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = run(model, optimizer, range(5, 25))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = made(**options)
    optimizer = optimizer_of(again)
    again.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert run(again, optimizer, range(5, 25)) == expected


def test_a_state_dict_within_the_delay_resumes_too():
    model = made(start_step=4)
    optimizer = optimizer_of(model)
    run(model, optimizer, range(2))
    state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = run(model, optimizer, range(2, 8))
    again = made(start_step=4)
    optimizer = optimizer_of(again)
    again.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    assert run(again, optimizer, range(2, 8)) == expected


def test_the_state_of_another_model_is_refused_by_name():
    model = made()
    with pytest.raises(RuntimeError, match=r"Missing key.*quantizers\.weight\.scale"):
        model.load_state_dict(Small().state_dict())
    with pytest.raises(RuntimeError, match=r"growth"):
        model.load_state_dict(made(rule="lsq").state_dict())
    state = made(weight_granularity="per_tensor").state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for conv1\.quantizers\.weight"):
        model.load_state_dict(state)


@pytest.mark.parametrize("start", ["new", "grids chosen"])
@pytest.mark.parametrize("rule", RULES)
def test_a_compiled_model_agrees_with_the_eager_one(rule, start):
    """To the last bit, forward and backward, where a clamp is fused into a Quantizer too."""
    model = made(rule=rule, forward="float").train()
    if start == "grids chosen":
        run(model, optimizer_of(model), range(2))
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for step in range(2, 4):
        model.zero_grad()
        twin.zero_grad()
        expected, got = model(images(step)), compiled(images(step))
        assert torch.equal(got, expected)
        expected.square().sum().backward()
        got.square().sum().backward()
        for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (a.grad is None) is (b.grad is None), name
            assert a.grad is None or torch.equal(a.grad, b.grad), name
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)


def test_autocast_trains_in_bfloat16():
    model = made()
    optimizer = optimizer_of(model)
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(images(step % 2)).float() - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert qkernels.verify(model, qkernels.convert(model), [images(40)]).total_mismatches == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("step", [0, 2])
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


@pytest.mark.parametrize("rule", ["ste", "lsq", "pact"])
def test_nan_and_inf_are_left_out_and_counted_if_asked(rule):
    model = made(rule=rule, non_finite="ignore")
    optimizer = optimizer_of(model)
    run(model, optimizer, range(2))
    assert qkernels.non_finite_counts(model) == {}
    x = images(9)
    x[0, 0, 0, 0], x[1, 0, 0, 0], x[1, 1, 1, 1] = float("nan"), float("inf"), float("nan")
    model(x).sum().backward()
    if rule == "ste":
        assert qkernels.non_finite_counts(model) == {"x": (2, 1)}
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    assert all(bool(torch.isfinite(q.qparams().scale).all()) for q in quantizers(model))
    with qkernels.calibrating(model):
        model(x)
    assert qkernels.non_finite_counts(model)["x"] == (2, 1)


def test_low_bits_by_name_do_not_search_a_range_at_every_step():
    """The search for the least squared error starts what is learned; grids that follow weights take their extremes."""
    observers = {
        rule: {q.recipe.observer for q in quantizers(made(recipe="w4a8", rule=rule)) if q.is_weight}
        for rule in ("ste", "lsq")
    }
    assert observers == {"ste": {"minmax"}, "lsq": {"mse"}}
    asked = made(recipe="w4a8", weight_observer="mse")
    assert {q.recipe.observer for q in quantizers(asked) if q.is_weight} == {"mse"}


def test_weights_of_zero_constant_activations_and_empty_batches_are_defined():
    model = made()
    with torch.no_grad():
        model.get_submodule("conv2").weight.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    model(torch.ones(2, 3, 8, 8)).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    optimizer.step()
    assert qkernels.verify(model, qkernels.convert(model), [torch.ones(2, 3, 8, 8)]).total_mismatches == 0
    qkernels.freeze_bn(model)
    before = copy.deepcopy(model.state_dict())
    assert model(torch.ones(0, 3, 8, 8)).shape == (0, 4)
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items() if "weight" not in name)


def test_a_batch_of_one_is_that_of_torch():
    """A batch norm of one value a channel is an error of torch's; one image has many values."""
    model = made()
    model(images(1, batch=1)).sum().backward()
    flat = qkernels.prepare_qat(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(2, 3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        flat(torch.randn(1, 3))
    flat(torch.randn(2, 3))
    assert flat.eval()(torch.randn(1, 3)).shape == (1, 4)


@pytest.mark.parametrize("observer", sorted(OBSERVERS))
def test_a_calibration_that_is_interrupted_leaves_the_training_state(observer):
    model = made(observer=observer)
    run(model, optimizer_of(model), range(2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt), qkernels.calibrating(model):  # noqa: PT012
        model(images(50))
        raise KeyboardInterrupt
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    run(model, optimizer_of(model), range(1))


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
