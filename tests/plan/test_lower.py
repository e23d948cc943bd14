"""The bytes of a plan mean the converted model: an independent reader that runs them gives the same bits."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from networks import NETWORKS, converted, leaves, network, tensors
from reader import PlanFile

import qkernels
from qkernels.plan.compiler import record
from qkernels.plan.format import plan_bytes
from qkernels.plan.lower import lower_graph


def plan_file(model, *example):
    lowered = lower_graph(model.graph, model, record(model, example))
    assert lowered.refused == {}
    return PlanFile(bytes(plan_bytes(lowered.network)))


def assert_same_bits(file, model, inputs):
    expected, got = leaves(model(*inputs)), file.run(*inputs)
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype
        assert torch.equal(g, e)


@pytest.mark.parametrize("name", NETWORKS)
def test_steps_compute_what_the_modules_do(name):
    model, example_shapes, other_shapes = network(name)
    example = tensors(example_shapes)
    int8 = converted(model, *example)
    file = plan_file(int8, *example)
    assert_same_bits(file, int8, example)
    assert_same_bits(file, int8, tensors(other_shapes, seed=1))


VIEWS = {
    "flatten_all": lambda x: x.flatten(),
    "flatten_spatial": lambda x: torch.flatten(x, 2, -1),
    "reshape_by_sizes": lambda x: x.reshape(x.shape[0], -1, x.size(3)),
    "reshape_by_arithmetic": lambda x: x.reshape(x.size(0) * x.size(1), x.shape[2] // 1, -1),
    "unflatten": lambda x: x.unflatten(1, (2, -1)),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "permute_torch": lambda x: torch.permute(x, (3, 0, 2, 1)),
    "transpose": lambda x: x.transpose(1, -1),
    "movedim": lambda x: torch.movedim(x, 1, -1),
    "movedim_many": lambda x: x.movedim((0, 1), (-1, 0)),
    "unsqueeze_squeeze": lambda x: x.unsqueeze(-1).squeeze(-1).unsqueeze(0),
    "chunk": lambda x: x.chunk(3, 1)[2],
    "split_number": lambda x: x.split(3, dim=1)[1],
    "split_list": lambda x: torch.split(x, [1, 4, 3], 1)[1],
    "unbind": lambda x: torch.unbind(x, 1)[3],
    "select": lambda x: x.select(1, -1),
    "narrow": lambda x: x.narrow(1, 2, 4),
    "narrow_open": lambda x: torch.narrow(x, 2, 1, 3),
    "getitem_integer": lambda x: x[:, 2],
    "getitem_last": lambda x: x[:, -1, ..., 0],
    "getitem_slices": lambda x: x[:, 1:-1, ::2, 3:],
    "getitem_new": lambda x: x[:, None, 1:3, None, 0],
    "getitem_dynamic": lambda x: x[:, :, : x.shape[2] // 2],
    "expand": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "expand_more": lambda x: x.expand(2, -1, -1, -1, -1),
    "expand_as": lambda x: x[:, :1].expand_as(x),
    "view_as": lambda x: x.flatten(1).view_as(x),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x[..., :4, :4], 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 4),
    "pad": lambda x: F.pad(x, (1, 0, 2, -1)),
    "interpolate": lambda x: F.interpolate(x, scale_factor=1.5),
    "interpolate_to": lambda x: F.interpolate(x, size=(3, 9), mode="nearest-exact"),
    "interpolate_like": lambda x: F.interpolate(x[..., :2, :2], size=x.shape[-2:]),
    "clone_detach": lambda x: x.clone().detach().contiguous(),
}


class Viewed(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.conv, self.linear, self.name = nn.Conv2d(3, 8, 1), nn.Linear(1, 2), name

    def forward(self, x):
        return self.linear(VIEWS[self.name](F.relu(self.conv(x))).unsqueeze(-1))  # the linear keeps the view integer


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_steps(name):
    example = tensors([(2, 3, 6, 5)])
    model = converted(Viewed(name), *example)
    file, plan = plan_file(model, *example), qkernels.compile(model, tuple(example))
    for inputs in (example, tensors([(3, 3, 8, 7)], seed=1)):
        assert_same_bits(file, model, inputs)
        assert torch.equal(plan(*inputs), model(*inputs))


def test_input_sizes_that_the_first_layer_fixes_are_required():
    model, shapes, _ = network("resnet")
    example = tensors(shapes)
    assert plan_file(converted(model, *example), *example).inputs == [(0, (-1, 3, -1, -1))]
