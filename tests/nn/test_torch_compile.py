"""Converted models under `torch.compile` and `torch.export`: the same bits, and never those of weights of before."""

import io

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import qkernels
from qkernels.errors import InvalidState

EXAMPLE = (2, 3, 8, 8)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.act, self.pool, self.head = nn.Hardswish(), nn.MaxPool2d(2), nn.Linear(16, 4)

    def forward(self, x):
        x = self.act(self.first(x))
        x = torch.cat([self.pool(x + self.second(x)), self.pool(x * x)], 1)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def converted():
    return made(0)


def made(seed):
    torch.manual_seed(seed)
    torch._dynamo.reset()
    prepared = qkernels.prepare(Network().eval(), torch.randn(EXAMPLE))
    qkernels.calibrate(prepared, [torch.randn(EXAMPLE)])
    return qkernels.convert(prepared)


def test_compiled_as_one_graph(converted):
    x = torch.randn(EXAMPLE)
    expected = converted(x)
    assert torch.equal(torch.compile(converted, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="torch 2.11 loads constants of a program to odd addresses"
)
def test_exported_and_loaded_for_any_batch(converted):
    x, file = torch.randn(EXAMPLE), io.BytesIO()
    converted(x)
    program = torch.export.export(converted, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (2, 5):
        x = torch.randn(batch, *EXAMPLE[1:])
        assert torch.equal(loaded(x), converted(x))


def test_compiled_model_follows_a_loaded_state(converted):
    x, other = torch.randn(EXAMPLE), made(1)
    converted(x)
    compiled = torch.compile(converted, backend="aot_eager")
    compiled(x)
    converted.load_state_dict(other.state_dict())
    assert torch.equal(compiled(x), other(x))


def test_export_of_a_model_that_was_never_called_says_so(converted):
    with pytest.raises(InvalidState, match="call the converted model once before"):
        torch.export.export(converted, (torch.randn(EXAMPLE),))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("trace", [torch.jit.trace, lambda model, x: make_fx(model)(x)])
def test_traced_before_the_first_call(converted, trace):
    """What is derived then is no part of the trace, and good for everything that comes."""
    x, expected = torch.randn(EXAMPLE), made(0)
    assert torch.equal(trace(converted, torch.randn(EXAMPLE))(x), expected(x))
    assert torch.equal(torch.compile(converted, fullgraph=True, backend="aot_eager")(x), expected(x))
    assert torch.equal(torch.export.export(converted, (x,)).module()(x), expected(x))
