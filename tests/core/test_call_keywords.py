"""Arguments by keyword mean what torch means by them: numpy's names too; what is not known stays float."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import qkernels
from qkernels.core.operations import operation
from qkernels.frontends.aimet.model_preparer import prepare_model

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(16, 8, 1)
        self.calls = calls

    def forward(self, x):
        return self.calls(self, self.a(x))


CALLS = {
    "cat": (lambda s, y: s.c(torch.cat([y, -y], axis=1)), "cat"),
    "mean": (lambda s, y: s.b(y * y.mean((2, 3), keepdims=True)), "adaptive_avg_pool"),
    "mean over axis": (lambda s, y: s.b(y * y.mean(axis=(2, 3), keepdims=True)), "adaptive_avg_pool"),
    "sigmoid": (lambda s, y: s.b(torch.sigmoid(x=y) + y), "lookup"),
    "add": (lambda s, y: s.b(torch.add(x1=y, x2=y.sigmoid())), "add"),
    "mul": (lambda s, y: s.b(torch.mul(a=y, x2=y.sigmoid())), "mul"),
    "flatten": (lambda s, y: s.b(torch.unsqueeze(input=y, dim=0).squeeze(axis=0)), "conv"),
}


def converted(calls):
    torch.manual_seed(0)
    model = Net(calls).eval()
    prepared = qkernels.calibrate(qkernels.prepare(model, X), [X])
    return model, prepared, qkernels.convert(prepared)


@pytest.mark.parametrize("name", CALLS)
def test_names_of_numpy(name):
    calls, kind = CALLS[name]
    model, prepared, int8 = converted(calls)
    assert kind in {getattr(m, "kind", "") for m in int8.modules()}
    expected, got = model(X), int8(X)
    assert got.shape == expected.shape
    assert 10 * torch.log10(expected.square().sum() / (expected - got).square().sum()) > 25
    assert qkernels.verify(prepared, int8, [X]).total_mismatches == 0


def test_a_call_with_an_unknown_keyword_is_no_operation():
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    assert operation(graph.call_function(torch.exp, (), {"input": x}), {}).kind == "exp"
    assert operation(graph.call_function(torch.exp, (x,), {"out": y}), {}) is None
    assert operation(graph.call_method("mean", (x,), {"axis": 1, "where": y}), {}) is None


def test_a_window_of_computed_size_is_float():
    model, prepared, int8 = converted(lambda s, y: s.b(F.interpolate(F.avg_pool2d(y, (y.shape[2], y.shape[3])), 8)))
    (row,) = [row for row in prepared.report if row.kind == "avg_pool"]
    assert row.reason == "an argument of avg_pool is computed at run time"
    other = torch.randn(2, 3, 5, 7)
    assert int8(other).shape == model(other).shape


MODULE_CALLS = {
    "cat": lambda y: torch.cat([y, -y], axis=1),
    "mean": lambda y: torch.mean(y, axis=(2, 3), keepdims=True),
    "sum": lambda y: y.sum(axis=1),
    "softmax": lambda y: torch.softmax(y, axis=1),
    "add": lambda y: torch.add(x1=y, x2=y.sigmoid()),
}


@pytest.mark.parametrize("name", MODULE_CALLS)
def test_calls_that_become_modules_know_numpys_names(name):
    class Calls(nn.Module):
        def forward(self, x):
            return MODULE_CALLS[name](x)

    assert torch.equal(prepare_model(Calls())(X), MODULE_CALLS[name](X))


def test_a_view_as_the_dtype_of_a_tensor_is_no_reshape():
    model, prepared, int8 = converted(lambda s, y: s.b(y.view(y.dtype)))
    assert qkernels.verify(prepared, int8, [X]).total_mismatches == 0
    assert torch.allclose(prepared(X), model(X), atol=0.2)
