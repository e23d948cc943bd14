"""torch's defaults, a dtype and a device for tensors made from nothing, change nothing."""

import ast
import copy
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels
from qkernels.core.rules.base import RULES

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, groups=8)
        self.middle = nn.Linear(8, 8)
        self.last = nn.Linear(8, 5)

    def forward(self, x):
        x = self.first(x)
        x = F.batch_norm(x, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias)
        x = F.hardswish(self.second(F.relu6(x)))
        return self.last(torch.softmax(self.middle(x.mean((2, 3))), -1))


torch.manual_seed(0)
MODEL = Network().eval()


@contextmanager
def default_of_torch(name, value, usual):
    """A block with another default of torch."""
    choose = getattr(torch, f"set_default_{name}")
    choose(value)
    try:
        yield
    finally:
        choose(usual)


DEFAULTS = {
    "float64": ("dtype", torch.float64, torch.float32),
    "bfloat16": ("dtype", torch.bfloat16, torch.float32),
    "meta": ("device", "meta", None),
}


def assert_same_bits(make):
    """`make` gives the same tensors under every default."""
    expected = make()
    for setting, default in DEFAULTS.items():
        with default_of_torch(*default):
            got = make()
        assert expected.keys() == got.keys()
        for name, tensor in expected.items():
            assert (tensor.dtype, tensor.device) == (got[name].dtype, got[name].device), (setting, name)
            assert torch.equal(tensor, got[name]), (setting, name)


def quantized(path, **options):
    prepared = qkernels.calibrate(qkernels.prepare(MODEL, X, **options), [X])
    converted = qkernels.convert(prepared)
    assert qkernels.verify(prepared, converted, [X]).total_mismatches == 0
    qkernels.save(converted, path)
    plan = qkernels.compile(converted, X)
    outputs = {"plan": plan, "loaded": qkernels.load(path), "exact": qkernels.exact(prepared), "prepared": prepared}
    return {name: model(X) for name, model in outputs.items()} | {"converted": converted(X)} | converted.state_dict()


@pytest.mark.filterwarnings("ignore:compile. torch runs")
@pytest.mark.parametrize("recipe", ["int8", "int8-minmax", "w4a8", "int8-bias", "int8-dynamic"])
def test_recipes_give_the_same_bits(recipe, tmp_path):
    assert_same_bits(lambda: quantized(tmp_path / "net.qk", recipe=recipe))


@pytest.mark.filterwarnings("ignore:compile. torch runs")
@pytest.mark.parametrize("observer", ["percentile", "mse", "moving_average"])
def test_observers_give_the_same_bits(observer, tmp_path):
    assert_same_bits(lambda: quantized(tmp_path / "net.qk", observer=observer))


@pytest.mark.parametrize("rule", RULES)
def test_training_by_each_rule_gives_the_same_bits(rule):
    def trained():
        model = qkernels.prepare_qat(copy.deepcopy(MODEL), X, rule=rule)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        found = {}
        for step in range(2):
            found[f"step {step}"] = model(X)
            optimizer.zero_grad()
            found[f"step {step}"].square().sum().backward()
            optimizer.step()
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        return found | {"trained": model.eval()(X), "converted": qkernels.convert(model)(X)}

    assert_same_bits(trained)


def test_a_grid_of_numbers_is_the_same():
    def numbers():
        grid = qkernels.QParams.per_tensor(0.1, 3)
        read = qkernels.QParams.from_config(grid.to_config())
        return {"scale": grid.scale, "zero_point": grid.zero_point, "read": read.scale, "codes": grid.quantize(X)}

    assert_same_bits(numbers)


# Those whose dtype or device torch's defaults choose; `randint` gives integers by itself.
FACTORIES = {"arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "tensor", "zeros"}


def complaints(path, text):
    for call in ast.walk(ast.parse(text)):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        given = {keyword.arg for keyword in call.keywords}
        if ast.unparse(call.func.value) == "torch" and call.func.attr in FACTORIES and not {"dtype", "device"} <= given:
            yield f"{path}:{call.lineno}: {ast.unparse(call)} must name its dtype and its device"


@pytest.mark.parametrize("folder", ["core", "nn"])
def test_what_is_made_from_nothing_names_its_dtype_and_device(folder):
    files = sorted((Path(qkernels.__file__).parent / folder).rglob("*.py"))
    assert files
    assert [complaint for path in files for complaint in complaints(path, path.read_text())] == []


def test_a_factory_without_dtype_or_device_is_found():
    offences = "torch.zeros(3)", "torch.tensor([1.0], dtype=torch.float32)", "f(torch.arange(3, device=x.device))"
    assert all(list(complaints("a.py", text)) for text in offences)
    assert not list(complaints("a.py", "torch.zeros(3, dtype=torch.float32, device='cpu'); torch.zeros_like(x)"))
