"""The names that ONNX graphs give to tensors; against what torch's exporter writes."""

import pytest
import torch
from torch import nn

from qkernels.core.onnx_names import SCOPES, place_of, places_in, scope_of
from qkernels.errors import InvalidArgument

onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.filterwarnings("ignore")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU()
        self.seq = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), nn.Conv2d(3, 3, 1))

    def forward(self, x):
        return self.relu(self.seq(self.conv(x)))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1, self.parts = nn.Sequential(Block(), nn.Sequential(Block())), nn.ModuleList([Block(), nn.ReLU()])

    def forward(self, x):
        return self.parts[1](self.parts[0](self.layer1(x)))


class Tail(nn.Module):
    """A module of several nodes, one behind a reshape, a weight under another name, a sum of two modules."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.fc, self.add = nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Linear(14, 5), Sum()
        self.last = nn.Linear(4 * 14 * 5, 2)

    def forward(self, x):
        x = self.fc(self.act(self.conv(x)))
        return self.last(self.add(x, x.sigmoid()).flatten(1))


class Sum(nn.Module):
    def forward(self, a, b):
        return a + b


def leaves(model):
    return [path for path, module in model.named_modules() if not list(module.children())]


@pytest.fixture
def exported(tmp_path):
    def export(model):
        torch.onnx.export(model.eval(), (torch.rand(1, 3, 16, 16),), tmp_path / "net.onnx", dynamo=False)
        return tmp_path / "net.onnx"

    return export


def test_scopes_are_those_of_the_exporter(exported):
    model = Nested()
    nodes = [node.name for node in onnx.load(exported(model)).graph.node]
    expected = {f"/{scope_of(path, model)}/{type(model.get_submodule(path)).__name__}" for path in leaves(model)}
    assert {name.replace("Relu", "ReLU").replace("Conv", "Conv2d") for name in nodes} == expected


def test_a_scope_leads_back_to_its_module():
    model = Nested()
    for path in leaves(model):
        assert place_of(f"/{scope_of(path, model)}/Conv_output_0", leaves(model)) == (path, "output")
        assert place_of(f"/{path.replace('.', '/')}/Conv_input_1", leaves(model)) == (path, "input1")
    assert place_of("/layer1/layer1.0/other/Conv_output_0", leaves(model)) is None
    assert place_of("x.1", leaves(model)) is None
    with pytest.raises(InvalidArgument, match=r"/parts\.1/Relu_output_1: modules have one output"):
        place_of("/parts.1/Relu_output_1", leaves(model))


def test_inputs_outputs_and_what_no_module_makes_are_found_by_the_graph(exported):
    model = Tail()
    file = exported(model)
    graph, places = onnx.load(file).graph, places_in(file, leaves(model))
    assert places[graph.input[0].name] == [("conv", "input0")]
    assert places[graph.output[0].name] == [("last", "output")]
    by_kind = {node.op_type: node for node in graph.node}
    assert places[by_kind["Flatten"].output[0]] == [("last", "input0")]
    sigmoids = [node.output[0] for node in graph.node if node.op_type == "Sigmoid"]
    inside, between = sorted(sigmoids, key=lambda name: not name.startswith("/act/"))
    assert inside not in places
    assert places[between] == [("add", "input1")]
    assert places["/act/Mul_output_0"] == [("act", "output")]
    assert places["/fc/Add_output_0"] == [("fc", "output")]
    assert "/fc/MatMul_output_0" not in places


@pytest.mark.parametrize("named_by", ["module", "scopes", "parameters"])
def test_nodes_say_their_module_in_three_ways(tmp_path, named_by):
    """By its name alone, as AIMET; in a note beside, as torch's exporter through torch.export; by what they read."""
    names = {"conv": "block.conv", "relu": "block.relu"} if named_by == "module" else {}
    conv = onnx.helper.make_node("Conv", ["x", "block.conv.weight"], ["conv2d"], names.get("conv", "node_conv2d"))
    relu = onnx.helper.make_node("Relu", ["conv2d"], ["relu"], names.get("relu", "node_relu"))
    if named_by == "scopes":
        for node, kind in ((conv, "conv"), (relu, "relu")):
            node.metadata_props.add(key=SCOPES, value=f"['', 'block', 'block.{kind}', '{kind}2d']")
    value = lambda name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)  # noqa: E731
    weight = onnx.numpy_helper.from_array(torch.rand(3, 3, 1, 1).numpy(), "block.conv.weight")
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([conv, relu], "g", [value("x")], [value("relu")], [weight])),
        tmp_path / "net.onnx",
    )
    places = places_in(tmp_path / "net.onnx", ["block.conv", "block.relu"])
    expected = {"x": [("block.conv", "input0")], "conv2d": [("block.conv", "output")]}
    if named_by != "parameters":
        expected["relu"] = [("block.relu", "output")]
    assert places == expected


@pytest.mark.parametrize("content", [None, b"no model"])
def test_a_file_that_is_no_model_is_refused_by_name(tmp_path, content):
    if content is not None:
        (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(InvalidArgument, match=r"net\.onnx: must be an ONNX model"):
        places_in(tmp_path / "net.onnx", ["conv"])


def test_without_the_package_it_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(NotImplementedError, match=r"net\.onnx: reading the graph needs the package onnx"):
        places_in(tmp_path / "net.onnx", ["conv"])
