"""What forward takes and returns: variable arguments, arguments that are no tensors, kinds of dicts."""

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import qkernels

X = torch.randn(4, 8)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def layers(self, x):
        return self.last(self.first(x).relu())


class Keywords(Two):
    def forward(self, x, **options):
        return self.layers(x) + options.get("offset", 0)


class Positions(Two):
    def forward(self, x, *more):
        return self.layers(x) + sum(more)


class Unread(Two):
    def forward(self, x, *more, **options):
        return self.layers(x)


@pytest.mark.parametrize("prepare", [qkernels.prepare, qkernels.prepare_qat])
@pytest.mark.parametrize("kind", [Keywords, Positions])
def test_a_variable_number_of_arguments_is_left_to_python(prepare, kind):
    prepared = qkernels.calibrate(prepare(kind().eval(), X).eval(), [X])
    assert "has no graph" in str(prepared.report)
    assert qkernels.convert(prepared)(X).shape == (4, 4)


def test_arguments_that_are_not_read_are_none():
    prepared = qkernels.prepare(Unread().eval(), X)
    assert not prepared.report.stayed_float


class Skips(Two):
    def forward(self, x, skip=None, skip_1=None, scale=1.0):
        y = self.layers(x)
        y = y if skip is None else y + skip
        return (y if skip_1 is None else y + skip_1) * scale


@pytest.mark.parametrize("given", [{}, {"skip_1": torch.randn(4, 4)}, {"skip": torch.randn(4, 4)}, {"scale": 2.0}])
def test_arguments_whose_names_differ_by_a_number_are_told_apart(given):
    model = Skips().eval()
    prepared = qkernels.prepare(model, {"x": X, **given})
    assert "has no graph" not in str(prepared.report)
    torch.testing.assert_close(prepared(x=X, **given), model(X, **given))
    if "scale" in given:
        with pytest.raises(AssertionError, match="scale has been specialized"):
            prepared(X, scale=3.0)


class Ordered(Two):
    def forward(self, x):
        y = self.first(x)
        return OrderedDict(features=[y], out=self.last(y))


class Bag(dict):
    pass


class Bagged(Two):
    def forward(self, x):
        return Bag(out=self.layers(x), inner=OrderedDict(x=x))


@dataclass
class Output(OrderedDict):
    out: torch.Tensor
    hidden: object = None

    def __post_init__(self):
        self.update(out=self.out)


class Dataclass(Two):
    def forward(self, x):
        return Output(self.layers(x))


@pytest.mark.parametrize("kind", [Ordered, Bagged, Dataclass])
def test_kinds_of_dicts_stay_what_they_are(kind):
    model = kind().eval()
    prepared = qkernels.calibrate(qkernels.prepare(model, X), [X])
    assert not prepared.report.stayed_float
    for each in (prepared, qkernels.convert(prepared)):
        got = each(X)
        assert type(got) is type(model(X))
        assert list(got) == list(model(X))


def test_an_ordered_dict_is_saved_and_compiled(tmp_path):
    converted = qkernels.convert(qkernels.calibrate(qkernels.prepare(Ordered().eval(), X), [X]))
    qkernels.save(converted, tmp_path / "model")
    loaded = qkernels.load(tmp_path / "model")(X)
    assert type(loaded) is OrderedDict
    assert torch.equal(loaded["out"], converted(X)["out"])
    plan = qkernels.compile(converted, X)
    assert torch.equal(plan(X)["out"], converted(X)["out"])
    plan.save(tmp_path / "plan")


def test_a_dict_that_cannot_be_made_again_is_left_to_python():
    class Needs(dict):
        def __init__(self, *, out):
            super().__init__(out=out)

    class Returns(Two):
        def forward(self, x):
            return Needs(out=self.layers(x))

    prepared = qkernels.prepare(Returns().eval(), X)
    assert "has no graph" in str(prepared.report)
    assert type(prepared(X)) is Needs
