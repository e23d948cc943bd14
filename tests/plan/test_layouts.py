"""Outputs lie in memory as those of the modules, and islands read what they read in the model.

torch's float kernels give other bits for other strides.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from networks import converted, leaves, tensors

import qkernels

pytestmark = pytest.mark.filterwarnings("ignore:compile")


class Net(nn.Module):
    """`what(self, x)` with layers to use."""

    def __init__(self, what):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.point, self.linear = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1), nn.Linear(16, 8)
        self.what = what

    def forward(self, x):
        return self.what(self, x)


def compiled(what, shape=(2, 3, 14, 14)):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = converted(Net(what), x)
    return qkernels.compile(model, x), model, x


def inputs():
    """One tensor in many layouts."""
    (x,) = tensors([(4, 3, 17, 15)], seed=1)
    wide = torch.zeros(4, 6, 17, 30)
    wide[:, ::2, :, 1::2] = x
    return {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "batch_innermost": x.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "gaps": wide[:, ::2, :, 1::2],
        "expanded": x[:1].expand(4, -1, -1, -1),
    }


def twice(x):
    """An integer step that keeps a layout, where it is returned or a layer reads it too."""
    return x + x


# ---- outputs

STEPS = {
    "conv": lambda m, x: m.conv(x),
    "linear": lambda m, x: m.linear(m.conv(x).permute(0, 2, 3, 1)),
    "pool": lambda m, x: F.max_pool2d(m.conv(x), 2),
    "add": lambda m, x: m.conv(x) + m.conv(x).transpose(0, 0),
    "add_permuted": lambda m, x: m.conv(x).permute(0, 2, 3, 1) + m.linear(m.conv(x).permute(0, 2, 3, 1)).mean(),
    "quantized_input_read_twice": lambda m, x: (m.conv(x), x * x),
    "broadcast": lambda m, x: m.conv(x) * F.adaptive_avg_pool2d(m.conv(x), 1),
    "broadcast_pixels": lambda m, x: x[:, :1] * m.conv(x)[:, :, :1],
    "slice": lambda m, x: twice((x * x)[:, 1:, ::2]),
    "view": lambda m, x: twice(m.conv(x).flatten(2).transpose(1, 2)),
    "reshape": lambda m, x: twice(m.conv(x).transpose(2, 3).reshape(x.shape[0], -1, 2)),
    "expansion": lambda m, x: twice(m.conv(x)[:, :1].expand(-1, 5, -1, -1)),
    "pixel_shuffle": lambda m, x: m.point(m.conv(x)) + F.pixel_unshuffle(F.pixel_shuffle(m.point(m.conv(x)), 2), 2),
    "cat": lambda m, x: torch.cat([m.conv(x), m.point(m.conv(x))], 1),
    "cat_of_slices": lambda m, x: torch.cat([m.conv(x)[:, 3:], m.conv(x)[:, :3]], 1),
    "cat_of_others": lambda m, x: torch.cat([m.conv(x), x], 1),
    "pad": lambda m, x: twice(F.pad(m.conv(x), (1, 0, 2, -1))),
    "pad_input": lambda m, x: twice(F.pad(x * x, (1, 1))),
    "crop": lambda m, x: twice(F.pad(x * x, (-1, 0, -2, -1))),
    "interpolate": lambda m, x: twice(F.interpolate(x * x, scale_factor=2)),
    "views_of_floats": lambda m, x: (m.conv(x)[:, 2:], m.conv(x).chunk(2, 1)[1].transpose(1, 2), x[..., 0]),
}


@pytest.mark.parametrize("name", STEPS)
def test_outputs_lie_as_copies_of_those_of_the_modules(name):
    plan, model, x = compiled(STEPS[name])
    for layout, given in {"example": x, **inputs()}.items():
        for got, expected in zip(leaves(plan(given)), leaves(model(given)), strict=True):
            assert torch.equal(got, expected), layout
            wanted = torch.empty_like(expected).stride()
            differ = [d for d, n in enumerate(got.shape) if n != 1 and got.stride(d) != wanted[d]]
            assert not differ, (layout, got.shape, got.stride(), wanted)


# ---- islands


def read_by_both(layer, y):
    """An integer layer and an island read `y`."""
    return layer(y), torch.sin(y).sum(1), torch.sin(y)


ISLANDS = {
    "sum": lambda m, x: (m.conv(x), x.sum((1, 2, 3))),
    "contiguous": lambda m, x: (m.conv(x), x.contiguous().mean((2, 3))),
    "contiguous_steps": lambda m, x: m.conv(x).contiguous().mean(),
    "permuted_and_contiguous": lambda m, x: (m.conv(x), x.permute(0, 2, 3, 1).contiguous().sum((1, 2))),
    "clone": lambda m, x: (m.conv(x), x.clone(memory_format=torch.contiguous_format).sum((2, 3))),
    "strides": lambda m, x: (m.conv(x), x.contiguous().stride(0)),
    "silu_of_a_column": lambda m, x: F.silu(m.conv(x)[..., 0]),
    "gelu_of_a_chunk": lambda m, x: F.gelu(m.conv(x).chunk(2, 1)[1]),
    "gelu_of_pixels": lambda m, x: F.gelu(m.conv(x)[:, 3:, ::2]),
    "tokens": lambda m, x: torch.softmax(m.conv(x).flatten(2).transpose(1, 2), -1),
    "sin_of_an_input_read_twice": lambda m, x: read_by_both(m.conv, x * x),
    "sin_of_a_view_that_steps_read": lambda m, x: read_by_both(m.linear, twice(m.conv(x).permute(0, 3, 2, 1))),
    "sin_of_a_padded_input": lambda m, x: read_by_both(m.conv, twice(F.pad(x * x, (1, 1)))),
    "sin_of_a_cropped_input": lambda m, x: read_by_both(m.conv, twice(F.pad(x * x, (-1, -2)))),
    "view_between_islands": lambda m, x: m.conv(torch.sin(x)[:, :, ::2].contiguous() * torch.cos(x)[:, :, 1:].mean()),
    "view_that_steps_read_too": lambda m, x: (lambda v: (torch.sin(v).sum(1), m.linear(v)))(
        torch.sin(m.conv(x)).permute(0, 2, 3, 1)
    ),
}


@pytest.mark.parametrize("name", ISLANDS)
def test_islands_give_the_bits_of_the_modules_in_every_layout(name):
    plan, model, x = compiled(ISLANDS[name])
    assert isinstance(plan, qkernels.plan.PlanWithIslands)
    for layout, given in {"example": x, **inputs()}.items():
        for got, expected in zip(leaves(plan(given)), leaves(model(given)), strict=True):
            assert got == expected if isinstance(got, int) else torch.equal(got, expected), layout


class Product(nn.Module):
    """The product of two inputs in a float function; convolutions read it and an operand too."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 4, 1)

    def forward(self, a, b):
        product = a * b
        return self.conv(a), self.other(product), torch.sin(product).sum(1), torch.sin(product)


def test_island_reads_a_product_in_the_order_of_its_first_operand():
    example = tensors([(5, 8, 5, 7)] * 2)
    model = converted(Product(), *example)
    plan = qkernels.compile(model, tuple(example))
    a, b = tensors([(17, 8, 5, 7)] * 2, seed=1)
    odd = a.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    for given in ((odd, b), (b, odd), (a, odd), (a[:, :, :, ::1], b)):
        for got, expected in zip(plan(*given), model(*given), strict=True):
            assert torch.equal(got, expected)
            assert got.stride() == expected.stride()


def test_copies_between_steps_stay_steps_where_no_island_reads_their_layout():
    what = [
        lambda m, x: (torch.softmax(m.point(F.channel_shuffle(m.conv(x), 2)), 1),),
        lambda m, x: read_by_both(m.point, twice(F.channel_shuffle(m.conv(x), 2))),
    ]
    islands = []
    for function in what:
        plan, model, _ = compiled(function)
        islands.append(set(plan.islands))
        for given in inputs().values():
            for got, expected in zip(plan(given), model(given), strict=True):
                assert torch.equal(got, expected)
    assert islands[0] == {"softmax"}
    assert islands[1] == {"channel_shuffle", "sin", "sum_1", "sin_1"}


# ---- sizes


def test_native_parts_know_the_sizes_that_the_whole_graph_knows():
    def what(m, x):
        y = m.conv(x)
        left, right = (y * torch.softmax(y, 1)).chunk(2, 1)
        return F.relu(left) + right

    plan, model, x = compiled(what)
    assert set(plan.islands) == {"softmax"}
    for given in (x, *inputs().values()):
        assert torch.equal(plan(given), model(given))
