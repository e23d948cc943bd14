"""AIMET's encodings files: written, read, and run in int8."""

import copy
import json
import re

import onnx
import pytest
import torch
from aimet_networks import Everything, Network, calibrated, images, prepared_model
from torch import nn

import qkernels
import qkernels.frontends.aimet as aimet
from qkernels.errors import InvalidArgument, Unsupported
from qkernels.frontends.aimet import quantsim

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0"])
@pytest.mark.parametrize("model", [Network, Everything])
def test_exported_encodings_run_in_int8_on_a_float_model(tmp_path, version, model):
    sim = calibrated(model, default_param_bw=4)
    sim.export(tmp_path, "net", dummy_input=images(model), encoding_version=version)
    content = json.loads((tmp_path / "net.encodings").read_text())
    assert content["version"] == version
    x = images(model, seed=2)
    for name in ("net.encodings", "net_torch.encodings"):
        other = quantsim.QuantizationSimModel(prepared_model(model), dummy_input=images(model))
        other.load_encodings(tmp_path / name, partial=False)
        assert torch.equal(other.convert()(x), sim.convert()(x))
    exported = torch.load(tmp_path / "net.pth", weights_only=False)
    assert not any("Quantize" in type(m).__name__ for m in exported.modules())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.first(x)
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.lstm, self.last = nn.Linear(8, 8), nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.lstm(self.first(x))[0])


@pytest.mark.parametrize("model", [Attention, Recurrent])
def test_modules_with_other_outputs_than_tensors_stay_float(model):
    torch.manual_seed(0)
    x = torch.rand(2, 5, 8)
    sim = quantsim.QuantizationSimModel(model().eval(), dummy_input=x)
    sim.compute_encodings(lambda network: network(x))
    converted = sim.convert()
    with torch.no_grad():
        assert torch.allclose(converted(x), sim.model(x), atol=1e-5)
    assert qkernels.verify(sim.prepared(), converted, [x]).total_mismatches == 0


def test_a_grid_coarser_than_a_clamp_leaves_one_code():
    x = images(Everything)
    sim = quantsim.QuantizationSimModel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6()).eval(), dummy_input=x)
    sim.compute_encodings(lambda network: network(x))
    sim.model[1].output_quantizers[0].set_range(0, 255 * 20.0)
    with torch.no_grad():
        assert torch.equal(sim.convert()(x), sim.model(x))


def test_weights_of_normalizations_and_embeddings_are_rounded():
    x = torch.randint(0, 9, (2, 5))
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    nn.init.uniform_(model[2].weight, 0.5, 2.0)
    sim = quantsim.QuantizationSimModel(model, dummy_input=x, default_param_bw=3)
    sim.compute_encodings(lambda network: network(x))
    converted = sim.convert()
    assert len(converted.get_submodule("2").weight.unique()) <= 8
    assert len(converted.get_submodule("0").weight.unique()) <= 8
    with torch.no_grad():
        assert torch.allclose(converted(x), sim.model(x), atol=1e-5)
    other = quantsim.QuantizationSimModel(model, dummy_input=x)
    other.load_encodings(sim.module_encodings(), partial=False)
    assert other.grids() == sim.grids()


def test_names_that_only_an_onnx_graph_has_are_found_in_it(tmp_path):
    """As in the files that AIMET writes: inputs and outputs of the graph have names of their own."""
    sim, x = calibrated(Everything, default_param_bw=4), images(Everything, seed=2)
    torch.onnx.export(sim.get_original_model(sim.model, True).eval(), (x,), tmp_path / "net.onnx", dynamo=False)
    graph = onnx.load(tmp_path / "net.onnx").graph
    names = {"/c1/Conv_input_0": graph.input[0].name, "/fc2/Gemm_output_0": graph.output[0].name}
    content = sim.encodings("0.6.1")
    table = content["activation_encodings"]
    content["activation_encodings"] = {names.get(name, name): rows for name, rows in table.items()}
    assert content["activation_encodings"].keys() - table.keys() == set(names.values())
    (tmp_path / "net.encodings").write_text(json.dumps(content))

    def simulation():
        return quantsim.QuantizationSimModel(prepared_model(Everything), dummy_input=x)

    other = simulation()
    other.load_encodings(tmp_path / "net.encodings", partial=False)  # the graph beside the file
    assert other.grids() == sim.grids()
    assert torch.equal(other.convert()(x), sim.convert()(x))
    other = simulation()
    other.load_encodings(content, partial=False, onnx_file=tmp_path / "net.onnx")
    assert other.grids() == sim.grids()
    (tmp_path / "net.onnx").rename(tmp_path / "elsewhere.onnx")
    with pytest.raises(InvalidArgument, match=rf"{re.escape(names['/c1/Conv_input_0'])}: the model has no such tensor"):
        simulation().load_encodings(tmp_path / "net.encodings")


def test_encoding_of_a_grid_is_that_of_the_schema():
    sim = calibrated(default_param_bw=4)
    row = sim.module_encodings()["param_encodings"]["conv1.weight"][0]
    assert (row["bitwidth"], row["dtype"], row["is_symmetric"], row["offset"]) == (4, "int", "True", -8)
    assert row["min"] == pytest.approx(-8 * row["scale"])
    assert row["max"] == pytest.approx(7 * row["scale"])
    entry = sim.encodings("1.0.0")["param_encodings"][0]
    assert (entry["enc_type"], entry["bw"], entry["is_sym"], len(entry["scale"])) == ("PER_CHANNEL", 4, True, 8)


def test_encodings_go_through_a_file_without_loss(tmp_path):
    sim = calibrated(Everything, default_param_bw=4)
    optimizer = torch.optim.SGD(sim.model.parameters(), lr=1e-2)
    sim.model(images(Everything)).square().sum().backward()
    optimizer.step()
    for version in ("0.6.1", "1.0.0"):
        expected = sim.encodings(version)
        other = quantsim.QuantizationSimModel(
            prepared_model(Everything), dummy_input=images(Everything), default_param_bw=4
        )
        other.load_encodings(json.loads(json.dumps(expected)), partial=False)
        assert other.encodings(version) == expected


def test_unknown_names_in_encodings_are_errors_with_close_matches():
    sim = calibrated()
    content = sim.module_encodings()
    content["param_encodings"]["conv3.weight"] = content["param_encodings"].pop("conv1.weight")
    with pytest.raises(InvalidArgument, match=r"param_encodings\.conv3\.weight.*conv1\.weight"):
        sim.load_encodings(content)
    sim.load_encodings(content, strict=False)
    with pytest.raises(InvalidArgument, match="16 channels"):
        sim.load_encodings({"param_encodings": {"conv2.weight": content["param_encodings"]["conv3.weight"]}})


def row(**changed):
    usual = {"bitwidth": 8, "scale": 0.1, "offset": -128, "is_symmetric": "True", "min": -12.8, "max": 12.7}
    return usual | {"dtype": "int"} | changed


def row_with(**changed):
    return {"param_encodings": {"conv1.weight": [row(**changed)]}}


def per_channel(scale, offset):
    entry = {"name": "conv1.weight", "bw": 8, "is_sym": True, "dtype": "INT", "enc_type": "PER_CHANNEL"}
    return {"param_encodings": [entry | {"scale": scale, "offset": offset}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"param_encodings": {"conv1.weight": []}}, r"param_encodings\.conv1\.weight: encoding without 'bitwidth'"),
        ({"param_encodings": {"conv1.weight": [{"bitwidth": 8}]}}, "without 'scale', got"),
        ({"param_encodings": [{"name": "conv1.weight", "bw": 8}]}, r"param_encodings\[0\]: encoding without 'is_sym'"),
        ({"encodings": [{"output_dtype": "int8", "y_scale": 0.1}]}, r"encodings\[0\]: encoding without 'name'"),
        ({"encoding": []}, r"encodings\.encoding: unknown key; did you mean 'encodings'"),
        ({"param_encoding": {}, "activation_encodings": {}}, r"param_encoding: unknown key; did you mean 'param_enc"),
        ({"version": "1.0.0"}, r"none of .*, only the keys \['version'\]"),
        ([1], r"encodings: must be a dict, got \[1\]"),
        ({"param_encodings": None}, "param_encodings: must be a dict or a list, got None"),
        (row_with(scale=0.0), r"param_encodings\.conv1\.weight: scale must be positive, finite and normal, got 0\.0"),
        (row_with(scale=float("nan")), r"conv1\.weight: scale must be positive, finite and normal, got nan"),
        (row_with(offset=5), r"conv1\.weight: zero must be one of the 256 codes, got code -5"),
        (row_with(bitwidth="eight"), r"conv1\.weight: bitwidth, scale and offset must be numbers"),
        (row_with(bitwidth=16), r"conv1\.weight: from min to max there are 256 codes, in bitwidth 16 65536"),
        (per_channel([0.1, 0.2], [-128]), r"param_encodings\[0\]: must have as many offsets as scales"),
        (per_channel([0.1] * 3, [-128] * 3), r"conv1\.weight: 3 grids for 8 channels"),
        (
            {"encodings": [{"name": "conv1.weight", "output_dtype": "int8", "y_scale": [0.1], "y_zero_point": [1, 2]}]},
            r"encodings\[0\]: must have as many offsets as scales",
        ),
        (
            {"activation_encodings": {"t.1": [row()]}, "param_encodings": {}},
            r"activation_encodings\.t\.1: the model has no such tensor.*onnx_file=.*_torch\.encodings",
        ),
    ],
)
def test_wrong_encodings_are_errors_that_say_where_and_what(content, message):
    with pytest.raises(InvalidArgument, match=message):
        calibrated().load_encodings(content)


def test_what_is_no_json_or_has_no_integers_is_refused_by_name(tmp_path):
    (tmp_path / "net.encodings").write_text("{")
    with pytest.raises(InvalidArgument, match=r"net\.encodings'?: must be a JSON file: Expecting"):
        calibrated().load_encodings(tmp_path / "net.encodings")
    with pytest.raises(InvalidArgument, match=r"net\.encodings'?: must be a JSON file: Expecting"):
        calibrated(config_file=tmp_path / "net.encodings")
    for missing in (
        lambda path: calibrated().set_and_freeze_param_encodings(path),
        lambda path: calibrated(config_file=path),
    ):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            missing(str(tmp_path / "nowhere"))
    with pytest.raises(Unsupported, match=r"param_encodings\.conv1\.weight: dtype 'float' has no integer layers"):
        calibrated().load_encodings({"param_encodings": {"conv1.weight": [{"bitwidth": 16, "dtype": "float"}]}})


def test_schemes_may_be_given_by_name_or_as_an_enum():
    scheme = aimet.QuantScheme.post_training_tf_enhanced
    by_name, by_enum = (calibrated(quant_scheme=given) for given in ("tf_enhanced", scheme))
    assert by_enum.grids() == by_name.grids()
    assert by_enum.grids() != calibrated().grids()


def test_a_file_that_covers_a_part_leaves_the_rest_alone_or_takes_it_out():
    sim, content = calibrated(), calibrated(default_param_bw=4).module_encodings()
    part = {"param_encodings": {"conv2.weight": content["param_encodings"]["conv2.weight"]}}
    before = sim.module_encodings()
    sim.load_encodings(part)
    after = sim.module_encodings()
    assert after["param_encodings"].pop("conv2.weight")[0]["bitwidth"] == 4
    assert after["activation_encodings"] == before["activation_encodings"]
    assert after["param_encodings"].items() <= before["param_encodings"].items()
    assert qkernels.verify(sim.prepared(), sim.convert(), [images()]).total_mismatches == 0
    sim.load_encodings(part, partial=False)
    assert [name for name, _ in sim.named_quantizers()] == ["conv2.param_quantizers.weight"]


def test_frozen_encodings_stay():
    sim = calibrated()
    content = {"param_encodings": copy.deepcopy(sim.module_encodings()["param_encodings"])}
    for row in content["param_encodings"]["conv1.weight"]:
        row |= {key: 2 * row[key] for key in ("scale", "min", "max")}
    sim.set_and_freeze_param_encodings(content)
    expected = sim.encodings()["param_encodings"]
    with aimet.nn.compute_encodings(sim.model):
        sim.model(images(seed=9))
    assert sim.encodings()["param_encodings"] == expected
    assert not sim.model.conv1.param_quantizers["weight"].min.requires_grad
