"""Outputs of every shape are compared, and batches of every float type that a converted model takes."""

import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Mapping

import pytest
import torch
from torch import nn

import qkernels
from qkernels.core.outputs import output_tensors, tensors
from qkernels.errors import InvalidType

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Both:
    first: torch.Tensor
    second: torch.Tensor
    note: str = ""


@dataclasses.dataclass
class Text:
    note: str


class Record(Mapping):
    """A mapping of one's own, as some libraries return."""

    def __init__(self, **entries):
        self.entries = entries

    def __getitem__(self, key):
        return self.entries[key]

    def __iter__(self):
        return iter(self.entries)

    def __len__(self):
        return len(self.entries)


class Ordered(OrderedDict):
    pass


class Network(nn.Module):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.make = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), make

    def forward(self, x):
        y = torch.relu(self.a(x))
        return self.make(y, self.b(y))


MAKERS = {
    "dataclass": Both,
    "named tuple": Pair,
    "dict subclass": lambda y, z: Ordered(first=y, second=z),
    "nested": lambda y, z: {"all": [Both(y, z)]},
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_verify_and_compare_find_the_tensors_in_an_output(make):
    model = Network(make).eval()
    prepared = qkernels.calibrate(qkernels.prepare(model, X), [X])
    converted = qkernels.convert(prepared)
    report = qkernels.verify(prepared, converted, [X])
    assert report.total_mismatches == 0
    assert report.layers[-1].compared == 2 * 4 * 6 * 6 + 2 * 2 * 6 * 6
    assert report.simulation_sqnr_db > 40
    assert 20 < qkernels.compare(model, converted, [X]).output_sqnr_db < float("inf")


def test_verify_finds_a_difference_inside_a_dataclass():
    model = Network(Both).eval()
    prepared = qkernels.calibrate(qkernels.prepare(model, X), [X])
    converted = qkernels.convert(prepared)
    hook = converted.register_forward_hook(lambda module, args, output: Both(output.first, output.second + 1))
    report = qkernels.verify(prepared, converted, [X])
    hook.remove()
    assert report.layers[-1].differing == 2 * 2 * 6 * 6


def test_an_output_without_tensors_is_refused():
    model = Network(lambda y, z: Text("done")).eval()
    prepared = qkernels.calibrate(qkernels.prepare(model, X), [X])
    with pytest.raises(InvalidType, match=r"^verify: the model's output must hold tensors, .*, got a Text with none$"):
        qkernels.verify(prepared, qkernels.convert(prepared), [X])


def test_tensors_come_in_their_order():
    a, b, c, d = torch.arange(4.0)
    output = (Both(a, b), Record(x=[c], y=None), "text", Pair(d, 1))
    assert [int(t) for t in tensors(output)] == [0, 1, 2, 3]
    assert list(tensors(Both)) == []
    with pytest.raises(InvalidType, match=r"^compare: .* got a NoneType with none"):
        output_tensors("compare", None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [False, True])
def test_verify_takes_the_narrow_floats_that_a_converted_model_takes(dtype, trained):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    if trained:
        prepared = qkernels.prepare_qat(model, X)
        prepared(X).sum().backward()
    else:
        prepared = qkernels.calibrate(qkernels.prepare(model, X), [X])
    converted, x = qkernels.convert(prepared), X.to(dtype)
    assert converted(x).dtype == torch.float32
    report = qkernels.verify(prepared, converted, [x, (x,), {"input": x}])
    assert report.total_mismatches == 0
    assert report.simulation_sqnr_db > 40
    assert torch.equal(converted(x), converted(x.float()))


def test_a_model_that_stays_in_a_narrow_float_gets_its_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).bfloat16().eval()
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="stays float"):
        prepared = qkernels.prepare(model, x)
    assert qkernels.verify(prepared, qkernels.convert(prepared), [x]).total_mismatches == 0
