"""Arguments and results that are no tensors, in plans."""

import pytest
import torch
from torch import nn

import qkernels
from qkernels.errors import Unsupported

torch.manual_seed(0)
X = torch.randn(4, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def layers(self, x):
        return self.last(self.first(x).relu())


class Unread(Net):
    def forward(self, x, *more, **options):
        return self.layers(x)


class Given(Net):
    def forward(self, x, options):
        return self.layers(x) + options["offset"]


class Scaled(Net):
    def forward(self, x, scale=1.0):
        return self.layers(x) * scale


class Sized(Net):
    def forward(self, x):
        return self.layers(x), x.shape[0]


def converted(model, inputs):
    return qkernels.convert(qkernels.calibrate(qkernels.prepare(model.eval(), inputs), [inputs]))


def test_arguments_that_are_not_read_do_not_keep_a_model_from_a_plan():
    model = converted(Unread(), X)
    assert torch.equal(qkernels.compile(model, X)(X), model(X))


@pytest.mark.parametrize(
    ("kind", "inputs"), [(Given, {"x": X, "options": {"offset": torch.ones(4)}}), (Scaled, {"x": X, "scale": 2.0})]
)
def test_only_an_argument_with_a_default_is_to_be_left_out(kind, inputs):
    model = converted(kind(), inputs)
    with pytest.raises(Unsupported, match="is not a tensor") as refused:
        qkernels.compile(model, inputs)
    assert ("leave it out" in str(refused.value)) is (kind is Scaled)


def test_a_returned_size_is_named_where_it_keeps_a_plan_from_a_file(tmp_path):
    model = converted(Sized(), X)
    with pytest.warns(UserWarning, match="output"):
        plan = qkernels.compile(model, X)
    assert plan.islands == {"output": "the model returns a size of a tensor"}
    with pytest.raises(Unsupported, match=r"\(output: the model returns a size of a tensor\)"):
        plan.save(tmp_path / "net.plan")
