"""Writing in place: later readers of the old name see the new value, in the converted model too."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels
from qkernels.core.graph import arguments, simplify, trace
from qkernels.core.in_place import drop_in_place

torch.manual_seed(0)
BATCHES = [torch.randn(2, 3, 6, 6) for _ in range(3)]
MASK = torch.tensor([True] + [False] * 7).view(1, 8, 1, 1)


class Writes(nn.Module):
    """Overwrites what a convolution returned, reads it again under its old name, and reads the result."""

    def __init__(self, write):
        super().__init__()
        self.first, self.last, self.write = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), write

    def forward(self, x):
        y = self.first(x)
        z = self.write(y)
        return self.last(y) + z.mean()


def _double_into(y):
    return torch.mul(y, 2.0, out=y)


WRITES = {
    "leaky_relu_": lambda y: F.leaky_relu_(y, 0.2),
    "elu_": F.elu_,
    "elu_ of alpha": lambda y: F.elu_(y, 0.5),
    "elu_ of three numbers": lambda y: torch._C._nn.elu_(y, 0.5, 2.0, 1.0),
    "hardtanh_": F.hardtanh_,
    "celu_": lambda y: torch.celu_(y, 0.5),
    "threshold_": lambda y: torch.threshold_(y, 0.1, 0.0),
    "torch.sigmoid_": torch.sigmoid_,
    "exp_": lambda y: y.exp_(),
    "neg_": lambda y: y.neg_(),
    "abs_": lambda y: y.abs_(),
    "pow_": lambda y: y.pow_(2),
    "clamp_min_": lambda y: y.clamp_min_(0.0),
    "clamp_": lambda y: y.clamp_(-0.5, 0.5),
    "masked_fill_": lambda y: y.masked_fill_(MASK, 3.0),
    "zero_": lambda y: y.zero_(),
    "fill_": lambda y: y.fill_(0.5),
    "copy_": lambda y: y.copy_(y * 3 + 1),
    "lerp_": lambda y: y.lerp_(y * 2, 0.5),
    "gt_": lambda y: y.gt_(-100.0),
    "add_ of doubles": lambda y: y.add_(y.double() * 2),
    "out=": _double_into,
    "keywords": lambda y: F.relu(input=y, inplace=True),
}


def follows(model, batches=BATCHES, tolerance=0.06):
    """Asserts that the converted model follows the float one."""
    model = model.eval()
    prepared = qkernels.calibrate(qkernels.prepare(model, batches[0]), batches)
    converted = qkernels.convert(prepared)
    for x in batches:
        expected = model(x)
        torch.testing.assert_close(converted(x), expected, atol=tolerance * float(expected.abs().max()), rtol=0)
    return prepared, converted


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():  # where torch lets more be overwritten
        yield


def has_graph(prepared):
    return "has no graph" not in str(prepared.report)


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_seen_by_later_readers_and_the_model_keeps_its_graph(name):
    prepared, _ = follows(Writes(WRITES[name]))
    assert has_graph(prepared)


@pytest.mark.parametrize("name", WRITES)
def test_nothing_writes_in_a_simplified_graph(name):
    model = Writes(WRITES[name]).eval()
    traced = trace(model, *arguments(BATCHES[0]))
    expected = model(BATCHES[1])
    simplify(traced)
    torch.testing.assert_close(traced(BATCHES[1]), expected)
    left = [n for n in traced.graph.nodes if str(n.target).endswith("_") or {"out", "inplace"} & n.kwargs.keys()]
    assert not [n for n in left if n.kwargs.get("inplace") is not False]


@pytest.mark.parametrize(
    "write",
    [
        lambda y: y[:, 0].add_(5.0),
        lambda y: y.uniform_(0.5, 0.5),
        lambda y: y.copy_(y[:1] * 2),
        lambda y: torch.gt(y, -100.0, out=y),
        lambda y: y.mT.mul_(2.0),
        lambda y: y.data.mul_(2.0),
    ],
)
def test_a_write_with_no_other_form_is_left_to_python(write):
    prepared, _ = follows(Writes(write))
    assert "writes in place" in str(prepared.report)


class Pieces(nn.Module):
    """Overwrites one view of a tensor and reads another."""

    def __init__(self, of, write=torch.relu_):
        super().__init__()
        self.first, self.last, self.of, self.write = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), of, write

    def forward(self, x):
        a, b = self.of(self.first(x))
        self.write(a)
        return self.last(torch.cat([a, b], 1)[:, :8])


@pytest.mark.parametrize(
    "of",
    [
        lambda y: y.chunk(2, 1),
        lambda y: (y[:, :4], y[:, 4:]),
        lambda y: (y.narrow(1, 0, 4), y.select(1, 5).unsqueeze(1).expand(-1, 4, -1, -1)),
    ],
)
def test_pieces_that_share_no_element_keep_the_graph(of):
    prepared, _ = follows(Pieces(of))
    assert has_graph(prepared)


@pytest.mark.parametrize(
    "of", [lambda y: (y[:, :4], y[:, 3:7]), lambda y: (y.view(2, 8, 36).view(2, 8, 6, 6)[:, :4], y[:, :4])]
)
def test_pieces_that_share_elements_do_not(of):
    model = Pieces(of).eval()
    prepared, _ = follows(model)
    assert "shares its memory" in str(prepared.report)


def test_sizes_are_not_written_to():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            n = x.size(0)
            twice = n
            twice *= 2
            return self.last(self.first(x)).reshape(n, 4) * twice

    prepared, _ = follows(Counts(), [torch.randn(4, 8) for _ in range(2)])
    assert has_graph(prepared)


def test_an_operator_that_writes_is_known():
    names = [name for name in dir(operator) if name.startswith("i") and hasattr(operator, f"__{name}__")]
    for name in set(names) - {"index", "inv", "invert", "is_", "is_not", "indexOf", "itemgetter", "iconcat"}:
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        written = graph.call_function(getattr(operator, name), (x, x))
        for node in (x, written):
            node.meta["value"] = qkernels.core.operations.Value("tensor", (2,), torch.int64)
        graph.output(written)
        assert drop_in_place(torch.fx.GraphModule(nn.Module(), graph)) is None
        assert written.target is not getattr(operator, name), name


def test_a_saved_model_keeps_what_was_written(tmp_path):
    _, converted = follows(Writes(WRITES["leaky_relu_"]))
    qkernels.save(converted, tmp_path / "model")
    assert torch.equal(qkernels.load(tmp_path / "model")(BATCHES[0]), converted(BATCHES[0]))
