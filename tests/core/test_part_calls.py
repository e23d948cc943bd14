"""What only running tells: hidden writes, parts called in several ways, and code that reads more than outputs."""

import pytest
import torch
from torch import nn

import qkernels
from qkernels.errors import Unsupported

torch.manual_seed(0)


@torch.fx.wrap
def scale_inplace(t):
    t *= 2
    return t


@torch.fx.wrap
def double_(t):
    return t.mul_(2)


@torch.fx.wrap
def square_(t):
    return t.mul_(2)


class Net(nn.Module):
    """Two convolutions, and code between them."""

    def __init__(self, between, c=None):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.between, self.c = between, c

    def forward(self, x):
        return self.between(self, x)


def images(width=16):
    return torch.randn(2, 3, 8, width)


def prepared_and_converted(model):
    prepared = qkernels.calibrate(qkernels.prepare(model.eval(), images()), [images(12), images(), images(24)])
    return prepared, qkernels.convert(prepared)


def assert_follows(model, converted, x):
    with torch.no_grad():
        expected = model(x)
        assert (converted(x) - expected).norm() < 0.1 * expected.norm()


def hidden_write(net, x):
    h = net.a(x)
    scaled = scale_inplace(h)
    return net.b(h) + scaled.mean()


def named_like_a_dtype(net, x):
    h = net.a(x)
    double_(h)
    return net.b(h)


def named_like_a_function(net, x):
    h = net.a(x)
    square_(h)
    return net.b(h)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (hidden_write, "scale_inplace writes in place to a, which its name does not say"),
        (named_like_a_dtype, "double_ writes in place by double_, for which there is no form"),
        (named_like_a_function, "square_ writes in place by square_, for which there is no form"),
    ],
)
def test_a_write_inside_a_wrapped_function_is_seen_by_later_readers(between, reason):
    model = Net(between)
    prepared, converted = prepared_and_converted(model)
    assert reason in str(prepared.report)
    assert_follows(model, converted, images())


def overlapping_ends(net, x):
    h = net.a(x)
    u, v = h[..., :8], h[..., -8:]
    u.mul_(2.0)
    return net.b(torch.cat([u, v], 1)[:, 4:12])


def test_pieces_that_meet_at_another_size_only_are_written_as_the_model_does():
    model = Net(overlapping_ends)
    _, converted = prepared_and_converted(model)
    assert_follows(model, converted, images(12))


PIECES = {
    "boundary": lambda y: (y[:, :4], y[:, 4:]),
    "counted from the end": lambda y: (y[..., :-3], y[..., -3:]),
    "indices": lambda y: (y[:, 0], y[:, 1]),
    "one split, called twice": lambda y: (y.split(4, 1)[0], y.split(4, 1)[1]),
    "last": lambda y: (y[..., -1], y[..., -2]),
}
MEETING = {
    "different ends": lambda y: (y[..., :8], y[..., -8:]),
    "the rest": lambda y: (y[..., :8], y[..., 7:]),
    "pieces from both ends": lambda y: (y.chunk(4, 3)[0], y.chunk(4, 3)[-1]),
    "a sparse view of all": lambda y: (y[:, :4].as_strided((8,), (1,)), y[:, 4:].as_strided((8,), (1,))),
}


@pytest.mark.parametrize("name", [*PIECES, *MEETING])
def test_a_graph_is_kept_where_pieces_cannot_meet_at_any_size(name):
    of = (PIECES | MEETING)[name]

    def between(net, x):
        u, v = of(net.a(x))
        u.mul_(2.0)
        return net.b(net.a(x)) + u.mean() + v.mean()

    prepared, _ = prepared_and_converted(Net(between))
    assert ("has no graph" in str(prepared.report)) is (name in MEETING)


def to_dtype_of_parameters(net, x):
    h = net.a(x)
    return net.b(h.to(next(net.b.parameters()).dtype) if bool(h.shape[-1] > 2) else h)


def test_code_that_looks_for_parameters_of_a_part_is_refused():
    model = Net(to_dtype_of_parameters).eval()
    with pytest.raises(Unsupported, match=r"reads what its parts no longer have \(StopIteration"):
        qkernels.prepare(model, images())


def test_code_that_finds_parameters_beside_the_layers_is_not():
    def between(net, x):
        h = net.a(x)
        dtype = next(net.parameters()).dtype
        return net.b(h.to(dtype) if bool(h.shape[-1] > 2) else h) + net.c

    model = Net(between, nn.Parameter(torch.ones(1)))
    prepared, converted = prepared_and_converted(model)
    assert len(list(prepared.b.parameters())) == 2
    assert_follows(model, converted, images())


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x, m=None, flag=False):
        y = self.conv(x)
        y = y if m is None else y * m
        return y.relu() if flag else y


@pytest.mark.parametrize("second", [{"m": torch.full((1,), 2.0)}, {"flag": True}])
def test_a_part_called_with_other_arguments_later_is_opened(second):
    def between(net, x):
        h = net.a(x)
        return net.c(net.c(h), **second) if bool(h.shape[-1] > 2) else h

    model = Net(between, Optional())
    prepared, converted = prepared_and_converted(model)
    rows = {row.name: row for row in prepared.report}
    assert "is called with different arguments" in rows["c"].reason
    assert rows["c.conv"].integer
    assert_follows(model, converted, images())


def test_limits_that_cross_give_the_upper_one():
    model = Net(lambda net, x: net.b(net.a(x).clamp(0.5, -0.5)))
    _, converted = prepared_and_converted(model)
    assert_follows(model, converted, images())


def test_a_branch_whose_refusal_forward_catches_is_left_to_python():
    def between(net, x):
        h = net.a(x)
        try:
            wide = bool(h.shape[-1] > 16)
        except Exception:
            wide = False
        return net.b(h * 3 if wide else h)

    model = Net(between)
    prepared, converted = prepared_and_converted(model)
    assert "has no graph: its forward branches on gt" in str(prepared.report)
    assert_follows(model, converted, images(24))


def test_a_constant_that_is_no_number_does_not_cost_the_graph():
    prepared = qkernels.prepare(Net(lambda net, x: (net.b(net.a(x)), float("nan"))).eval(), images())
    assert "has no graph" not in str(prepared.report)
