"""Grids for blocks of a tensor, and grids of more than 8 bits: simulated, and listed as what stays float."""

import json

import pytest
import torch
from torch import nn

import qkernels
from qkernels.core.attach import Site
from qkernels.core.attached import Attached, Holder
from qkernels.core.blocks import counts, from_rows, to_rows
from qkernels.core.grids import from_json, grids_of, prepare_grids, to_json
from qkernels.core.qspec import QParams, QSpec
from qkernels.core.recipe import Match, Override, Recipe, TensorRecipe
from qkernels.errors import InvalidArgument, Unsupported

BLOCK = QSpec(torch.int8, -127, 127, True, True, block=(2, 4, -1, -1))
WIDE = QSpec.activation(16)


@pytest.mark.parametrize("block", [(2, 4, -1, -1), (1, -1, 3, 1), (-1, 1, 0), (8, 2, 0), (-1, 0), (0,)])
def test_rows_of_blocks_and_back(block):
    x = torch.arange(8 * 4 * 3 * 3.0).reshape(8, 4, 3, 3)
    rows = to_rows(x, block)
    assert torch.equal(from_rows(rows, x.shape, block), x)
    assert len(rows) == torch.tensor(counts(x.shape, block)).prod()


def test_a_row_is_a_block():
    x = torch.arange(8 * 4 * 3 * 3.0).reshape(8, 4, 3, 3)
    rows = to_rows(x, (2, 2, -1, -1))
    assert counts(x.shape, (2, 2, -1, -1)) == (4, 2, 1, 1)
    for i in range(4):
        for j in range(2):
            assert torch.equal(rows[2 * i + j], x[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten())


@pytest.mark.parametrize("block", [(3, -1, -1, -1), (1, 1), (1, 1, 1, 1, 1)])
def test_blocks_that_do_not_fit_are_refused(block):
    with pytest.raises(InvalidArgument, match=r"weight of shape \[8, 4, 3, 3\] has no blocks of size"):
        to_rows(torch.zeros(8, 4, 3, 3), block, "weight")


@pytest.mark.parametrize(
    "change", [{"block": (0, 1)}, {"block": (-2,)}, {"per_channel": False, "block": (1,)}, {"axis": 1, "block": (1,)}]
)
def test_a_block_that_means_nothing_is_refused(change):
    with pytest.raises(InvalidArgument, match="a block needs"):
        QSpec(**{"per_channel": True, **change})


def test_block_grids_and_recipes_go_through_json():
    grid = QParams(torch.tensor([0.5, 1.0]), torch.tensor([0, 1]), 0, -8, 7, torch.int8, (2, 0))
    assert QParams.from_config(json.loads(json.dumps(grid.to_config()))) == grid
    recipe = Recipe(weight=TensorRecipe(BLOCK))
    assert Recipe.from_json(recipe.to_json()) == recipe
    wide = Recipe(TensorRecipe(WIDE), TensorRecipe(QSpec.weight(16)))
    assert Recipe.from_json(wide.to_json()) == wide


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()


@pytest.mark.parametrize("weight", [BLOCK, QSpec.weight(12)])
@pytest.mark.parametrize("trained", [False, True])
def test_prepare_simulates_such_weights_and_lists_the_layer(weight, trained, tmp_path):
    recipe = Recipe(overrides=(Override(Match("name", "2"), weight=TensorRecipe(weight)),))
    x = torch.randn(4, 3, 12, 12)
    if trained:
        prepared = qkernels.prepare_qat(network(), x, recipe)
        prepared(x).sum().backward()
        prepared.eval()
    else:
        prepared = qkernels.calibrate(qkernels.prepare(network(), x, recipe), [x])
    reasons = {row.name: row.reason for row in prepared.report}
    assert reasons["0"] == ""
    assert reasons["2"] == weight.simulated
    converted = qkernels.convert(prepared)
    assert qkernels.verify(prepared, converted, [x]).total_mismatches == 0
    torch.testing.assert_close(converted(x), prepared(x), rtol=0, atol=1e-3)
    float_weight = converted.get_submodule("2").weight
    assert not torch.equal(float_weight, network()[2].weight)
    qkernels.save(converted, tmp_path / "net.qk")
    assert torch.equal(qkernels.load(tmp_path / "net.qk")(x), converted(x))


def test_prepare_refuses_such_activations():
    with pytest.raises(Unsupported, match="65536 codes"):
        qkernels.prepare(network(), torch.randn(1, 3, 8, 8), activation_bits=16)


class Held(Holder):
    def __init__(self, model, sites):
        self.attached = Attached(model, sites, trained=False)


def attached_network(x):
    per_channel = QSpec(torch.uint8, 0, 255, per_channel=True, block=(-1, 1, 0))
    ordinary = TensorRecipe(QSpec.activation(), "minmax")
    sites = {
        "0": Site({0: TensorRecipe(WIDE)}, None, TensorRecipe(QSpec.weight()), bias=TensorRecipe(QSpec.weight(4))),
        "1": Site(output=TensorRecipe(per_channel)),
        "2": Site({0: ordinary}, None, TensorRecipe(BLOCK)),
        "4": Site(output=ordinary),
    }
    held = Held(network(), sites)
    held.bound_model(x)
    held.attached.settle()
    return held


def test_attached_simulation_is_what_is_converted_saved_and_compiled(tmp_path):
    x = torch.randn(4, 3, 12, 12)
    held = attached_network(x)
    simulated = held.bound_model(x)
    prepared = held.prepared(x)
    converted = qkernels.convert(prepared)
    assert qkernels.verify(prepared, converted, [x]).total_mismatches == 0
    torch.testing.assert_close(converted(x), simulated, rtol=0, atol=1e-5)
    assert {type(m).__name__ for m in converted.modules()} >= {"FakeQuantize", "Quantize"}
    reasons = {row.name: row.reason for row in prepared.report}
    assert "65536 codes" in reasons["0"]
    assert "block of [2, 4, -1, -1]" in reasons["2"]
    qkernels.save(converted, tmp_path / "net.qk")
    again = qkernels.load(tmp_path / "net.qk")
    assert torch.equal(again(x), converted(x))
    assert torch.equal(qkernels.compile(again, x)(x), converted(x))


def test_block_and_wide_grids_go_without_a_model_and_back():
    x = torch.randn(4, 3, 12, 12)
    held = attached_network(x)
    grids = from_json(to_json(grids_of(held.bound_model)))
    assert grids == grids_of(held.bound_model)
    assert grids["2"]["weight"].blocks == (4, 2, 1, 1)
    assert grids["0"]["bias"].bits == 4
    assert grids["0"]["input0"].codes == 65536
    with pytest.raises(Unsupported, match="unknown shape"):
        prepare_grids(network(), x, grids)
    del grids["1"]
    converted = qkernels.convert(prepare_grids(network(), x, grids))
    held.bound_model[1].quantizers["output"].state = qkernels.core.quantizer.State.OFF
    torch.testing.assert_close(converted(x), held.bound_model(x), rtol=0, atol=1e-5)
