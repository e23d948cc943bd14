"""Forward hooks run in the prepared and the converted model as in the float one, and the report says so."""

import pytest
import torch
from torch import nn

import qkernels

torch.manual_seed(0)
X = torch.randn(2, 3, 8, 8)


def network():
    inner = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Identity(), inner, nn.Dropout(0.1), nn.Flatten(), nn.Linear(128, 4))


@pytest.mark.parametrize("kind", ["forward", "pre"])
@pytest.mark.parametrize("path", ["", "1", "2", "3", "4"])
def test_a_hook_that_only_looks_runs_once_a_call(path, kind):
    calls, model = [], network().eval()
    module = model.get_submodule(path)
    register = module.register_forward_hook if kind == "forward" else module.register_forward_pre_hook
    register(lambda module, *values: calls.append(path))
    prepared = qkernels.calibrate(qkernels.prepare(model, X), [X])
    converted = qkernels.convert(prepared)
    for each in (model, prepared, converted):
        calls.clear()
        each(X)
        assert calls == [path]
    rows = {row.name: row.reason for row in prepared.report.stayed_float}
    assert "hook" in rows[path]
    assert any(row.name == "0" for row in prepared.report.integer)


@pytest.mark.parametrize("path", ["", "1", "2", "3", "4"])
def test_a_hook_that_changes_the_output_does_so_in_integers(path):
    model = network().eval()
    model.get_submodule(path).register_forward_hook(lambda module, args, out: out * 2 + 1)
    prepared = qkernels.calibrate(qkernels.prepare(model, X), [X])
    expected = model(X).detach()
    torch.testing.assert_close(qkernels.convert(prepared)(X), expected, atol=0.03 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_dropout_with_hooks_stays_in_training(p):
    calls, model = [], nn.Sequential(nn.Linear(8, 8), nn.Dropout(p), nn.Linear(8, 4))
    model[1].register_forward_hook(lambda *values: calls.append(1))
    trained = qkernels.prepare_qat(model, torch.randn(4, 8))
    calls.clear()
    trained(torch.randn(4, 8)).sum().backward()
    assert calls == [1]


def test_hooks_of_an_attention_that_is_taken_apart_run():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

        def forward(self, x):
            return self.last(self.attention(x, x, x)[0])

    calls, model, x = [], Attends().eval(), torch.randn(2, 5, 8)
    model.attention.register_forward_hook(lambda *values: calls.append(1))
    prepared = qkernels.calibrate(qkernels.prepare(model, x), [x])
    calls.clear()
    qkernels.convert(prepared)(x)
    assert calls == [1]
    assert any(row.name == "attention.q_proj" for row in prepared.report.integer)
