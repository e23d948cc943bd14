"""`compare`: every integer layer against the float tensor that it stands for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels
from qkernels.errors import InvalidArgument
from qkernels.report import compare
from qkernels.report.plot import plot_comparison, plot_demo


class Net(nn.Module):
    """Batch norm, an in-place addition, an in-place relu: what a comparison by tensors must not trip over."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x)
        y = self.body(x)
        y += x
        y = F.relu(y, inplace=True)
        return self.head(y.mean((2, 3)))


class Branching(nn.Module):
    """Control flow on data: converted part by part."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Net(), nn.Linear(10, 4)

    def forward(self, x):
        y = self.first(x)
        return self.second(y) if y.sum() > -1e9 else y


def converted(model, x):
    prepared = qkernels.prepare(model, x[:1])
    with qkernels.calibrating(prepared):
        prepared(x)
    return qkernels.convert(prepared)


@pytest.fixture(params=[Net, Branching])
def pair(request):
    torch.manual_seed(0)
    model, x = request.param().eval(), torch.randn(8, 3, 9, 9)
    return model, converted(model, x), x


def test_every_integer_layer_is_close_to_its_float_tensor(pair):
    model, integer, x = pair
    comparison = compare(model, integer, [x[:4], x[4:]])
    names = [layer.name for layer in comparison.layers]
    assert any(name.endswith("stem.0") for name in names)
    assert any(name.endswith("head") for name in names)
    assert all(layer.sqnr_db > 20 for layer in comparison.layers), str(comparison)
    assert comparison.output_sqnr_db > 20
    assert comparison.samples == 8
    assert 0.5 <= comparison.top1_agreement <= 1.0


def test_a_wrong_layer_is_the_worst(pair):
    model, integer, x = pair
    name, layer = next((n, m) for n, m in integer.named_modules() if n.endswith("stem.0"))
    layer.weight.zero_()
    comparison = compare(model, integer, [x])
    measured = {layer.name: layer.sqnr_db for layer in comparison.layers}
    assert measured[name] < 5
    assert comparison.worst(1)[0].sqnr_db < 5


def test_the_models_are_left_as_they_were(pair):
    model, integer, x = pair
    model.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    compare(model, integer, [x])
    assert model.training
    assert model.first.stem.training if isinstance(model, Branching) else model.stem.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_text_has_a_row_for_every_layer(pair):
    model, integer, x = pair
    comparison = compare(model, integer, [x])
    lines = str(comparison).splitlines()
    assert len(lines) == len(comparison.layers) + 3
    assert lines[-1].startswith("top-1 agreement")


def test_no_batches_and_a_float_model_are_errors(pair):
    model, integer, x = pair
    with pytest.raises(InvalidArgument, match="at least one batch"):
        compare(model, integer, [])
    with pytest.raises(InvalidArgument, match="must come from `convert`"):
        compare(model, model, [x])


def test_pictures_are_written(pair, tmp_path):
    pytest.importorskip("matplotlib")
    model, integer, x = pair
    comparison = compare(model, integer, [x])
    plot_comparison(comparison, tmp_path / "layers.png")
    rows = [
        {"engine": name, "accuracy": 0.9, "bytes": 1000, "latency_ms": {"1": ms, "64": 10 * ms}}
        for name, ms in (("float32", 2.0), ("qkernels int8", 0.5))
    ]
    plot_demo(rows, comparison, "title", tmp_path / "demo.png")
    for name in ("layers.png", "demo.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
