"""Models whose forward writes to their own buffers: they keep their Python code, and their state is not touched."""

import pytest
import torch
from torch import nn

import qkernels

torch.manual_seed(0)
BATCHES = [torch.randn(2, 3, 6, 6) for _ in range(3)]


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("cache", None)

    def forward(self, x):
        y = self.first(x).relu()
        return self.update(y) + self.last(y)


class Counts(Stateful):
    def update(self, y):
        self.seen.add_(1.0)
        return self.seen


class Assigns(Stateful):
    def update(self, y):
        self.seen = self.seen + 1
        return self.seen


class Averages(Stateful):
    """Is written to by the values of the batch, and read by nobody."""

    def update(self, y):
        self.seen.mul_(0.9).add_(0.1 * y.mean())
        return 0.0


class WritesToData(Stateful):
    def update(self, y):
        self.seen.data[:1].view(-1).add_(1.0)
        return self.seen


@pytest.mark.parametrize("kind", [Counts, Assigns, Averages, WritesToData])
@pytest.mark.parametrize("prepare", [qkernels.prepare, qkernels.prepare_qat])
def test_state_goes_on_in_the_prepared_and_the_converted_model(kind, prepare):
    model = kind().eval()
    prepared = prepare(model, BATCHES[0])
    row = next(iter(prepared.report))
    assert row.name == ""
    assert "its forward writes to seen" in row.reason
    assert [m.seen.item() for m in (model, prepared)] == [0, 0]
    qkernels.calibrate(prepared.eval(), BATCHES)
    converted = qkernels.convert(prepared)
    for m in (model, converted):
        m.seen.zero_()
    for x in BATCHES:
        expected = model(x).detach()
        assert (converted(x) - expected).norm() < 0.1 * expected.norm()
        torch.testing.assert_close(converted.seen, model.seen, atol=0.02, rtol=0)
    assert converted.seen.item() != 0


def test_a_cache_that_the_first_call_fills_keeps_the_graph():
    class Fills(Stateful):
        def update(self, y):
            if self.cache is None:
                self.cache = torch.ones(1)
            return self.cache

    model = Fills().eval()
    prepared = qkernels.prepare(model, BATCHES[0])
    assert "has no graph" not in str(prepared.report)
    assert model.cache is None


def test_a_parameter_that_the_forward_overwrites_is_left_to_python():
    class Limits(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.gain = nn.Linear(8, 8), nn.Parameter(torch.full((8,), 3.0))

        def forward(self, x):
            with torch.no_grad():
                self.gain.clamp_(max=2.0)
            return self.layer(x) * self.gain

    model, x = Limits().eval(), torch.randn(4, 8)
    prepared = qkernels.calibrate(qkernels.prepare(model, x), [x])
    assert "writes to gain, which belongs to the model" in str(prepared.report)
    expected = model(x).detach()
    torch.testing.assert_close(qkernels.convert(prepared)(x), expected, atol=0.05 * float(expected.abs().max()), rtol=0)
