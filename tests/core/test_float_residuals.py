"""Additions that only float operations read stay float: codes would cost accuracy and save nothing."""

import torch
import torch.nn.functional as F
from torch import nn

import qkernels


def rows(model, *inputs):
    prepared = qkernels.prepare(model.eval(), inputs)
    return prepared, {row.name: row for row in prepared.report}


class Block(nn.Module):
    """A block of a vision transformer without its attention."""

    def __init__(self):
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.narrow(F.gelu(self.wide(self.norm(x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)
        self.blocks = nn.Sequential(*[Block() for _ in range(4)])
        self.token = nn.Parameter(torch.randn(1, 1, 16))

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], 1, 16), self.embed(x)], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])


class Chain(nn.Module):
    """Additions between convolutions, and behind the last one."""

    def __init__(self, last):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.last = last

    def forward(self, x):
        y = self.a(x)
        y = torch.relu(y + self.b(y))
        z = y + self.c(y)
        return self.last(z)


def test_residuals_between_layer_norms_are_float():
    torch.manual_seed(0)
    model, x = Transformer(), torch.randn(8, 6, 8)
    prepared, found = rows(model, x)
    additions = [row for row in found.values() if row.kind in ("add", "cat")]
    assert len(additions) == 5
    assert {(row.integer, row.reason) for row in additions} == {(False, "only float operations read it")}
    assert sum(row.integer for row in found.values() if row.kind == "linear") == 10
    qkernels.calibrate(prepared, [(x,)])
    int8 = qkernels.convert(prepared)
    assert qkernels.verify(prepared, int8, [x]).total_mismatches == 0
    skipped = qkernels.calibrate(qkernels.prepare(model, x, skip=[torch.cat]), [x])
    assert qkernels.compare(model, int8, [x]).output_sqnr_db > 25
    assert torch.equal(int8(x), qkernels.convert(skipped)(x))


def test_residuals_that_a_layer_reads_are_integer():
    layer = nn.Conv2d(8, 4, 1)
    _, found = rows(
        Chain(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), layer)), torch.ones(1, 3, 8, 8)
    )
    assert all(row.integer for row in found.values())


def test_a_pool_of_codes_counts_as_a_reader():
    _, found = rows(Chain(nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Softmax(1))), torch.ones(1, 3, 8, 8))
    assert [row.kind for row in found.values() if not row.integer] == ["Softmax"]


def test_what_the_model_returns_is_integer():
    _, found = rows(Chain(nn.ReLU()), torch.ones(1, 3, 8, 8))
    assert all(row.integer for row in found.values())


def test_the_clamp_of_a_float_addition_is_float():
    _, found = rows(Chain(nn.Sequential(nn.ReLU(), nn.Softmax(1))), torch.ones(1, 3, 8, 8))
    assert [row.kind for row in found.values() if not row.integer] == ["add", "relu", "Softmax"]
