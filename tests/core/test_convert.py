"""convert: what the converted graph looks like, and that mixed recipes keep their bits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels
from qkernels.core.qspec import QSpec
from qkernels.core.recipe import Match, Override, Recipe, TensorRecipe
from qkernels.core.registry import is_layer


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 1)
        self.conv3, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8, 3)

    def forward(self, x):
        a, b = F.relu(self.conv1(x)), self.conv2(x)
        y = self.conv3(torch.cat([a, b], 1)) + a
        return self.head(F.adaptive_avg_pool2d(y * b, 1).flatten(1))


IMAGE = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def convert(recipe="int8", model=None, **options):
    torch.manual_seed(0)
    prepared = qkernels.prepare((model or Branches()).eval(), IMAGE, recipe, **options)
    qkernels.calibrate(prepared, [IMAGE])
    return prepared, qkernels.convert(prepared)


def override(what, **grids) -> Recipe:
    base = Recipe()
    return Recipe(base.activation, base.weight, (Override(Match.of(what), **grids),))


FOUR_BITS = TensorRecipe(QSpec.activation(4), "minmax")
SIGNED = TensorRecipe(QSpec.activation(dtype=torch.int8), "minmax")


@pytest.mark.parametrize("grid", [FOUR_BITS, SIGNED], ids=["4 bit", "int8"])
@pytest.mark.parametrize("where", ["x", "conv1", "conv2", "conv3", "cat", "add", "mul", "adaptive_avg_pool2d"])
def test_every_tensor_may_have_a_grid_of_its_own_kind(where, grid):
    prepared, converted = convert(override(where, activation=grid))
    specs = [q.spec for q in prepared.modules() if getattr(q, "source", "") == where and hasattr(q, "spec")]
    assert grid.spec in specs
    assert qkernels.verify(prepared, converted, [IMAGE]).total_mismatches == 0


def test_weights_of_one_layer_with_other_bits():
    prepared, converted = convert(override("conv3", weight=TensorRecipe(QSpec.weight(4), "mse")))
    assert int(converted.conv3.weight.abs().max()) <= 7
    assert int(converted.conv1.weight.abs().max()) == 127
    assert qkernels.verify(prepared, converted, [IMAGE]).total_mismatches == 0


@pytest.mark.parametrize(
    "skip", ["conv1", "conv2", "conv3", "head", "cat", "add", "mul", "adaptive_avg_pool2d", "relu"]
)
def test_any_operation_may_be_left_float(skip):
    model = Branches().eval()
    prepared, converted = convert(model=model, skip=[skip])
    assert skip in [row.name for row in prepared.report.stayed_float]
    assert qkernels.verify(prepared, converted, [IMAGE]).total_mismatches == 0
    torch.testing.assert_close(converted(IMAGE), model(IMAGE), rtol=0.1, atol=0.05)


def test_layers_keep_the_path_of_their_module_and_know_their_source():
    _, converted = convert()
    layers = {path: module for path, module in converted.named_modules() if is_layer(module)}
    assert {"conv1", "conv2", "conv3", "head", "x_quantize", "cat", "mul"} <= layers.keys()
    assert all(module.name == path for path, module in layers.items())
    float_names = [n.name for n in qkernels.core.graph.trace(Branches().eval(), (IMAGE,)).graph.nodes]
    assert set(converted.meta["sources"].values()) <= set(float_names)
    assert converted.meta["sources"]["conv1"] == "relu"


def test_grids_are_buffers_and_weights_canonical():
    _, converted = convert()
    state = converted.state_dict()
    assert state["conv1.weight"].dtype == torch.int8
    assert state["conv1.weight"].shape == (8, 4, 3, 3)
    assert state["conv1.weight_scale"].shape == (8,)
    assert not list(converted.parameters())


def test_a_constant_operand_is_rounded_once_and_takes_any_batch():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
            self.position = nn.Parameter(torch.randn(1, 5, 6))

        def forward(self, x):
            return self.last(F.relu(self.fc(x) + self.position))

    model = Model().eval()
    x = torch.randn(7, 5, 4)
    prepared = qkernels.prepare(model, x[:1])
    qkernels.calibrate(prepared, [x])
    converted = qkernels.convert(prepared)
    assert [module.kind for module in converted.modules() if is_layer(module)].count("quantize") == 1
    assert qkernels.verify(prepared, converted, [x]).total_mismatches == 0
    torch.testing.assert_close(converted(x), model(x), rtol=0.1, atol=0.1)


def test_depth_of_a_network_is_not_limited():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(600))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x

    x = torch.randn(2, 2)
    prepared = qkernels.prepare(Deep().eval(), x, observer="minmax")
    with qkernels.calibrating(prepared):
        prepared(x)
    converted = qkernels.convert(prepared)
    assert qkernels.verify(prepared, converted, [x]).total_mismatches == 0
    assert torch.equal(qkernels.compile(converted, x)(x), converted(x))
