"""Quantizers are named after the nodes of the graph, whatever those are called."""

import pytest
import torch
from torch import nn

import qkernels
from qkernels.core.placement import QUANTIZERS

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)

    def forward(self, half):
        return self.a(half)


class Train(Half):
    def forward(self, train, train_):
        return self.a(train) + self.a(train_)


class To(Half):
    def forward(self, x):
        return self.a(x.to(torch.float32)) + self.a(x.cpu().to(torch.float32))


NAMES = {
    Half: ((X,), ["half_"]),
    Train: ((X, X.abs()), ["train__", "train_"]),
    To: ((X,), ["to_", "to_1"]),
}


@pytest.mark.parametrize("make", NAMES)
def test_nodes_named_like_attributes_of_modules(make):
    inputs, names = NAMES[make]
    prepared = qkernels.prepare(make().eval(), inputs)
    assert {name for name, _ in getattr(prepared, QUANTIZERS).named_children()} >= set(names)
    qkernels.calibrate(prepared, [inputs])
    assert qkernels.verify(prepared, qkernels.convert(prepared), [inputs]).total_mismatches == 0


def test_other_names_stay_those_of_the_nodes():
    class Plain(Half):
        def forward(self, x):
            return self.a(self.a(x).relu().flatten(2)[:, :3].unflatten(2, (4, 4)))

    prepared = qkernels.prepare(Plain().eval(), X)
    assert [name for name, _ in getattr(prepared, QUANTIZERS).named_children()] == ["x", "relu"]
