"""The front end for AIMET scripts; against AIMET itself where it is installed (.ci/originals.sh)."""

import copy
import json
import re

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels
import qkernels.frontends.aimet as aimet
from qkernels.errors import InvalidArgument, InvalidState, Unsupported
from qkernels.frontends.aimet import batch_norm_fold, model_preparer, quantsim
from qkernels.frontends.aimet.config import DEFAULT

pytestmark = pytest.mark.filterwarnings("ignore")


class Network(nn.Module):
    """The network of AIMET's quickstart, narrower."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn_1 = nn.Conv2d(1, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8)
        self.conv2, self.bn_2 = nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16)
        self.linear = nn.Linear(7 * 7 * 16, 10)

    def forward(self, x):
        x = F.relu(self.bn_1(self.conv1(x)))
        x = F.relu(self.bn_2(self.conv2(x)))
        x = self.linear(x.view(x.shape[0], -1))
        return F.softmax(x, dim=-1)


class Everything(nn.Module):
    """Additions, products, concatenation, averages, reuse, passing operations, transposed convolution."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.b1, self.b2, self.up = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 8, 2, 2)
        self.pool, self.relu6, self.act = nn.MaxPool2d(2), nn.ReLU6(), nn.Hardswish()
        self.avg, self.flat, self.drop = nn.AvgPool2d(2), nn.Flatten(), nn.Dropout()
        self.fc1, self.fc2 = nn.Linear(8, 10), nn.Linear(18, 10)

    def forward(self, x):
        x = torch.relu(self.b1(self.c1(x)))
        x = F.relu(x + self.b2(self.c2(x)))
        x = self.act(self.up(self.relu6(self.c3(self.pool(x)))))
        mean = x.mean([2, 3])  # not of what is averaged below: a tensor on its own grid, added to itself, gives ties
        x = self.avg(x * torch.sigmoid(x))
        x = self.fc1(self.drop(self.flat(F.adaptive_avg_pool2d(x, 1))) + mean)
        return self.fc2(torch.cat([x, mean], 1))


class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), act)
        self.relu, self.last = nn.ReLU(), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.relu(x + self.last(self.relu(self.body(x))))


class Nested(nn.Module):
    """Functions and modules called twice inside of blocks, in lists and sequences."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(Block(nn.SiLU()), nn.Sequential(Block(nn.ReLU6())))
        self.parts = nn.ModuleList([Block(nn.Sigmoid()), nn.Linear(3, 10)])

    def forward(self, x):
        x = self.parts[0](self.layer1(x))
        x = x.reshape(x.shape[0], x.shape[1] // 1, -1, x.shape[3])
        return self.parts[1](torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def images(model=Network, count=8, seed=0):
    shape = (1, 28, 28) if model is Network else (3, 16, 16)
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) - 0.3


def prepared_model(model=Network, api=aimet):
    torch.manual_seed(0)
    network = model().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    prepared = api.model_preparer.prepare_model(network)
    api.batch_norm_fold.fold_all_batch_norms(prepared, input_shapes=tuple(images(model).shape))
    return prepared


def calibrated(model=Network, api=aimet, **options):
    sim = api.quantsim.QuantizationSimModel(prepared_model(model, api), dummy_input=images(model), **options)
    with api.nn.compute_encodings(sim.model):
        sim.model(images(model))
    return sim


# ---- preparation -----------------------------------------------------------------------------------------------------


def test_prepare_model_names_modules_as_aimet():
    model = Network().eval()
    prepared = model_preparer.prepare_model(model)
    assert [name for name, _ in prepared.named_children()][-3:] == ["module_relu", "module_relu_1", "module_softmax"]
    assert str(prepared.module_softmax) == "Softmax(dim=-1)"
    assert torch.equal(prepared(images()), model(images()))
    assert prepared.conv1.weight is model.conv1.weight


def test_a_module_called_twice_becomes_two():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()

        def forward(self, x):
            return self.relu(self.b(self.relu(self.a(x))))

    assert isinstance(model_preparer.prepare_model(Twice()).module_relu_1, nn.ReLU)


def test_modules_for_functions_stand_in_the_module_that_calls_them():
    names = {name for name, _ in model_preparer.prepare_model(Nested().eval()).named_modules()}
    assert {"module_floordiv", "layer1.0.module_add", "layer1.1.0.module_add_1", "parts.0.module_add_2"} <= names
    assert {"layer1.0.body.2.sigmoid", "layer1.0.body.2.mul", "layer1.0.module_relu_1"} <= names
    assert {"layer1.1.0.module_relu_1", "module_adaptive_avg_pool2d"} <= names


def test_control_flow_is_an_error_that_says_what_to_do():
    class Flow(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(Unsupported, match="modules_to_exclude"):
        model_preparer.prepare_model(Flow())


@pytest.mark.parametrize("model", [Network, Everything])
def test_folding_keeps_the_function_and_returns_pairs(model):
    prepared = model_preparer.prepare_model(model().eval())
    expected = prepared(images(model))
    pairs = batch_norm_fold.fold_all_batch_norms(prepared, input_shapes=images(model).shape)
    assert len(pairs) == 2
    assert all(isinstance(norm, nn.BatchNorm2d) for _, norm in pairs)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in prepared.modules())
    assert torch.allclose(prepared(images(model)), expected, atol=1e-5)


# ---- simulation ------------------------------------------------------------------------------------------------------


def test_quantizers_stand_where_the_quickstart_prints_them():
    sim = calibrated(default_output_bw=8, default_param_bw=4)
    text = str(sim.model)
    assert "(conv1): QuantizedConv2d(" in text
    assert "(weight): QuantizeDequantize(shape=[8, 1, 1, 1], bitwidth=4, symmetric=True)" in text
    assert "(bias): None" in text
    where = [name for name, q in sim.named_quantizers()]
    assert where == [
        "conv1.param_quantizers.weight",
        "conv1.input_quantizers.0",
        "conv2.param_quantizers.weight",
        "linear.param_quantizers.weight",
        "linear.output_quantizers.0",
        "module_relu.output_quantizers.0",
        "module_relu_1.output_quantizers.0",
        "module_softmax.output_quantizers.0",
    ]
    assert type(sim.model.bn_1) is nn.Identity


@pytest.mark.parametrize("model", [Network, Everything])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_simulated_is_what_runs(model, bits):
    sim = calibrated(model, default_param_bw=bits)
    converted = sim.convert()
    assert qkernels.verify(sim.prepared(), converted, [images(model)]).total_mismatches == 0
    assert {row.kind for row in converted.report.stayed_float} <= {"Softmax"}
    x = images(model, seed=1)
    with torch.no_grad():
        assert torch.allclose(converted(x), sim.model(x), atol=2e-2 * float(sim.model(x).abs().max()))


def test_running_before_calibration_is_an_error():
    sim = quantsim.QuantizationSimModel(prepared_model(), dummy_input=images())
    with pytest.raises(InvalidState, match="no grid"):
        sim.model(images())
    with pytest.raises(InvalidState, match="no grid"):
        sim.convert()


def test_callback_and_context_calibrate_alike():
    one = calibrated()
    other = quantsim.QuantizationSimModel(prepared_model(), dummy_input=images())
    other.compute_encodings(lambda model, x: model(x), images())
    assert one.encodings() == other.encodings()


def test_an_error_while_calibrating_leaves_no_quantizer_watching():
    sim = calibrated()
    before = sim.model(images())
    with pytest.raises(ZeroDivisionError), aimet.nn.compute_encodings(sim.model):
        raise ZeroDivisionError
    assert torch.equal(sim.model(images()), before)


def test_quantizers_can_be_taken_out_and_put_in():
    sim = calibrated()
    sim.model.module_softmax.output_quantizers[0] = None
    sim.model.module_relu.output_quantizers[0] = aimet.QuantizeDequantize((), bitwidth=4, symmetric=False)
    with aimet.nn.compute_encodings(sim.model):
        sim.model(images())
    assert len(sim.model.module_relu(images()).unique()) <= 16
    assert qkernels.verify(sim.prepared(), sim.convert(), [images()]).total_mismatches == 0


def test_training_with_a_plain_optimizer_moves_ranges_too():
    sim = calibrated(default_param_bw=4)
    names = dict(sim.model.named_parameters())
    assert {"conv1.param_quantizers.weight.min", "module_relu.output_quantizers.0.max"} <= names.keys()
    before = {name: p.detach().clone() for name, p in names.items()}
    optimizer = torch.optim.Adam(sim.model.parameters(), lr=1e-3)
    sim.model.train()
    for step in range(5):
        loss = F.cross_entropy(sim.model(images(seed=step)), torch.arange(8))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [name for name, p in names.items() if not torch.equal(p, before[name])]
    assert {"conv2.weight", "conv1.param_quantizers.weight.min", "module_relu.output_quantizers.0.max"} <= set(moved)
    sim.model.eval()
    assert qkernels.verify(sim.prepared(), sim.convert(), [images()]).total_mismatches == 0
    again = quantsim.QuantizationSimModel(prepared_model(), dummy_input=images(), default_param_bw=4)
    again.model.load_state_dict(sim.model.state_dict())
    assert again.encodings() == sim.encodings()
    again.load_encodings(sim.encodings(), partial=False)
    assert again.encodings() == sim.encodings()
    assert torch.equal(again.model.eval()(images()), sim.model(images()))
    assert torch.equal(again.convert()(images()), sim.convert()(images()))


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_configuration_file(tmp_path):
    config = {
        "defaults": {
            "ops": {"is_output_quantized": "True", "is_symmetric": "False"},
            "params": {"is_quantized": "True", "is_symmetric": "True"},
            "strict_symmetric": "True",
            "per_channel_quantization": "False",
        },
        "params": {"bias": {"is_quantized": "False"}},
        "op_type": {"Gemm": {"per_channel_quantization": "True", "is_output_quantized": "False"}},
        "supergroups": [],
        "model_input": {},
        "model_output": {},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    sim = calibrated(config_file=str(path))
    assert sim.model.conv1.input_quantizers[0] is None
    assert sim.model.conv1.output_quantizers[0] is not None
    assert sim.model.conv1.param_quantizers["weight"].spec.qmin == -127
    assert sim.model.conv1.param_quantizers["weight"].shape == ()
    assert sim.model.linear.param_quantizers["weight"].shape == (10, 1)
    assert sim.model.linear.output_quantizers[0] is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"default": {}}, r"config\.default: unknown key; did you mean 'defaults'"),
        ({"defaults": {"ops": {"is_symmetric": "yes"}}}, r"config\.defaults\.ops\.is_symmetric: must be"),
        (
            {"defaults": {"ops": {"is_output_quantised": True}}},
            r"config\.defaults\.ops\.is_output_quantised: unknown",
        ),
        (
            {"defaults": {"unsigned_symmetric": "True", "ops": {"is_symmetric": "True"}}},
            r"config\.defaults\.unsigned_symmetric: AIMET has no such",
        ),
        ({"op_type": {"Convv": {}}}, r"config\.op_type\.Convv: unknown key; did you mean 'Conv'"),
        ({"supergroups": [{"op_list": ["Conv", "Rel"]}]}, r"config\.supergroups\[0\]\.op_list.*'Relu'"),
        ({"params": {"bias": {"is_quantized": "maybe"}}}, r"config\.params\.bias\.is_quantized"),
        ({"params": {"bais": {"is_quantized": True}}}, r"config\.params\.bais: unknown key; did you mean 'bias'"),
        ({"op_type": {"Conv": {"params": {"wieght": {}}}}}, r"config\.op_type\.Conv\.params\.wieght: unknown key; did"),
        (
            {"op_type": {"Conv": {"params": {"weight": {"is_quantised": True}}}}},
            r"params\.weight\.is_quantised: unknown",
        ),
        ({"op_type": []}, r"config\.op_type: must be a dict, got \[\]"),
        ({"supergroups": [{"op_lst": ["Conv"]}]}, r"config\.supergroups\[0\]\.op_lst: unknown key; did you mean"),
        ({"supergroups": [{"op_list": "Conv"}]}, r"supergroups\[0\]\.op_list: must be a list of strings, got 'Conv'"),
        ([1], r'config_file must be "default", a JSON file or a dict, got \[1\]'),
    ],
)
def test_configuration_errors_say_where(config, message):
    with pytest.raises((InvalidArgument, Unsupported), match=message):
        quantsim.QuantizationSimModel(prepared_model(), dummy_input=images(), config_file=config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_scheme": "tf_enhance"}, "did you mean 'tf_enhanced'"),
        ({"default_output_bw": 32}, "bitwidth must be from 2 to 21"),
        ({"default_param_bw": "4"}, "bitwidth must be from 2 to 21, got '4'"),
        ({"default_data_type": "float"}, "int"),
    ],
)
def test_options_without_integers_are_errors(options, message):
    with pytest.raises((InvalidArgument, Unsupported), match=message):
        quantsim.QuantizationSimModel(prepared_model(), dummy_input=images(), **options)


def with_bias(**config):
    return {
        "defaults": {**STRICT, **config},
        "params": {"bias": {"is_quantized": True}},
        "model_input": {"is_input_quantized": True},
    }


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_rounded_bias_is_what_the_integer_layer_adds(per_channel, tmp_path):
    config = with_bias(per_channel_quantization=per_channel, strict_symmetric=False)
    sim = calibrated(Everything, config_file=config)
    bias = sim.model.fc1.param_quantizers["bias"]
    assert bias.shape == ((10,) if per_channel else ())
    int8, x = sim.convert(), images(Everything, seed=1)
    assert qkernels.verify(sim.prepared(), int8, [x]).total_mismatches == 0
    with torch.no_grad():
        assert torch.equal(int8.get_submodule("fc1").bias, bias(sim.model.fc1.bias))
        assert torch.allclose(int8(x), sim.model(x), atol=1e-4)
    sim.export(tmp_path, "net", dummy_input=x)
    other = quantsim.QuantizationSimModel(prepared_model(Everything), dummy_input=x, config_file=config)
    other.load_encodings(tmp_path / "net_torch.encodings", partial=False)
    assert torch.equal(other.convert()(x), int8(x))


def test_more_than_eight_bits_are_simulated_exported_and_stay_float(tmp_path):
    x = images(Everything, seed=1)
    wide, narrow = (calibrated(Everything, default_output_bw=bits, default_param_bw=8) for bits in (16, 8))
    assert wide.model.c1.input_quantizers[0].extra_repr() == "shape=[1], bitwidth=16, symmetric=False"
    prepared = wide.prepared()
    assert not any(row.integer for row in prepared.report)
    assert "65536 codes" in next(row.reason for row in prepared.report if row.name == "c1")
    converted = wide.convert()
    assert qkernels.verify(prepared, converted, [x]).total_mismatches == 0
    with torch.no_grad():
        assert torch.allclose(converted(x), wide.model(x), atol=1e-5)
        assert not torch.allclose(wide.model(x), narrow.model(x), atol=1e-3)
    for version in ("0.6.1", "1.0.0"):
        wide.export(tmp_path, "net", dummy_input=x, encoding_version=version)
        other = quantsim.QuantizationSimModel(prepared_model(Everything), dummy_input=x)
        other.load_encodings(tmp_path / "net.encodings", partial=False)
        assert other.model.c1.input_quantizers[0].bitwidth == 16
        with torch.no_grad():
            assert torch.equal(other.model(x), wide.model(x))


def test_recipe_is_that_of_the_core():
    sim = calibrated(config_file={"defaults": STRICT})
    recipe = sim.recipe
    expected = qkernels.Recipe().weight.spec
    assert (recipe.weight.spec.qmin, recipe.weight.spec.qmax) == (expected.qmin, expected.qmax)
    assert recipe.weight.spec.per_channel
    assert not recipe.weight.spec.uneven
    assert recipe.activation.spec.dtype is torch.uint8


STRICT = {
    "ops": {"is_output_quantized": True},
    "params": {"is_quantized": True, "is_symmetric": True},
    "strict_symmetric": True,
    "per_channel_quantization": True,
}


# ---- encodings -------------------------------------------------------------------------------------------------------


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
    with pytest.raises(InvalidArgument, match=r"nowhere'?: must be a JSON file: .*No such file"):
        calibrated().set_and_freeze_param_encodings(str(tmp_path / "nowhere"))
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


# ---- AIMET itself ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original():
    found = pytest.importorskip("aimet_torch", reason="needs aimet-torch and torchvision", exc_type=ImportError)
    from aimet_torch import batch_norm_fold, model_preparer, quantsim  # noqa: F401

    return found


def differences(mine, theirs, where=""):
    if isinstance(theirs, dict):
        yield from (f"{where}.{key}" for key in mine.keys() ^ theirs.keys())
        for key in mine.keys() & theirs.keys():
            yield from differences(mine[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, list):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            yield from differences(a, b, f"{where}[{i}]")
    elif isinstance(theirs, float):
        if mine != pytest.approx(theirs, rel=1e-4, abs=1e-9):
            yield f"{where}: {mine} is not {theirs}"
    elif mine != theirs:
        yield f"{where}: {mine} is not {theirs}"


@pytest.mark.parametrize("model", [Network, Everything, Nested])
@pytest.mark.parametrize("bits", [4, 8])
def test_encodings_and_logits_are_those_of_aimet(original, tmp_path, model, bits):
    theirs = calibrated(model, original, default_param_bw=bits)
    mine = calibrated(model, default_param_bw=bits)
    theirs.export(str(tmp_path), "net", dummy_input=images(model))
    expected = json.loads((tmp_path / "net_torch.encodings").read_text())
    got = mine.module_encodings()
    for table in ("activation_encodings", "param_encodings"):
        assert not list(differences(got[table], expected[table]))
    with torch.no_grad():
        x = images(model)
        assert torch.allclose(mine.model(x), theirs.model(x).as_subclass(torch.Tensor), atol=1e-4)
    for file in ("net_torch.encodings", "net.encodings"):  # by module; by tensor of the graph beside it
        other = quantsim.QuantizationSimModel(prepared_model(model), dummy_input=images(model))
        other.load_encodings(tmp_path / file, partial=False)
        with torch.no_grad():
            for seed in range(3):
                x = images(model, seed=seed)
                expected = theirs.model(x).as_subclass(torch.Tensor)
                assert torch.allclose(other.model(x), expected, atol=1e-4)
                assert torch.allclose(other.convert()(x), expected, atol=1e-4)


def places(module):
    """Where a module has quantizers, and of which shape and kind those of its parameters are."""
    parameters = getattr(module, "param_quantizers", {}).items()
    output = getattr(module, "output_quantizers", [None])[0] is not None
    return output, {name: (tuple(q.shape), q.bitwidth, q.symmetric) for name, q in parameters if q is not None}


def test_quantizers_stand_behind_the_same_modules_as_in_aimet(original):
    shuffles = [nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.ChannelShuffle(2), nn.Flatten(), nn.Unflatten(1, (2, 2))]
    resizes = [nn.Upsample(scale_factor=2, mode=mode) for mode in ("nearest", "bilinear")]
    pads = [nn.ZeroPad2d(1), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1), nn.ConstantPad2d(1, 0.5)]
    pools = [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(2), nn.LPPool2d(2, 2)]
    others = [nn.Identity(), nn.Dropout(), nn.GroupNorm(2, 4), nn.LogSoftmax(1), nn.Softplus(), nn.SELU()]
    weighted = [nn.BatchNorm2d(4), nn.PReLU(), nn.PReLU(4), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm(12)]
    convs = [nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 3, groups=4), nn.ConvTranspose2d(4, 4, 3, groups=4)]
    chains = [(conv, act) for conv in (*convs, nn.Conv2d(4, 4, 3, groups=2)) for act in (nn.ReLU(), nn.ReLU6())]
    chains += [(nn.Conv2d(4, 4, 3), nn.Hardtanh()), (nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU())]
    alone = (*shuffles, *resizes, nn.UpsamplingNearest2d(scale_factor=2), *pads, *pools, *others, *weighted)
    for middle in [*((module,) for module in alone), *chains]:
        model, found = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), *middle, nn.Hardswish()).eval(), []
        for api in (aimet, original):
            sim = api.quantsim.QuantizationSimModel(model, dummy_input=torch.rand(2, 3, 14, 14))
            found.append([places(module) for module in sim.model.children()])
        assert found[0] == found[1], middle


@pytest.mark.parametrize("model", [Network, Everything])
def test_without_supergroups_a_relu_shares_its_grid_with_what_it_reads_as_in_aimet(original, tmp_path, model):
    config = {key: value for key, value in DEFAULT.items() if key != "supergroups"} | {"supergroups": []}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config).replace("true", '"True"').replace("false", '"False"'))
    theirs, mine = (calibrated(model, api, config_file=str(path)) for api in (original, aimet))
    theirs.export(str(tmp_path), "net", dummy_input=images(model))
    expected, got = json.loads((tmp_path / "net_torch.encodings").read_text()), mine.module_encodings()
    for table in ("activation_encodings", "param_encodings"):
        assert not list(differences(got[table], expected[table]))
    with torch.no_grad():
        x = images(model, seed=1)
        assert torch.allclose(mine.model(x), theirs.model(x).as_subclass(torch.Tensor), atol=1e-4)
    assert qkernels.verify(mine.prepared(), mine.convert(), [x]).total_mismatches == 0


PARAMS = {
    "bias": {"params": {"bias": {"is_quantized": "True"}}},
    "affine bias": {"params": {"bias": {"is_quantized": "True", "is_symmetric": "False"}}},
    "unmentioned bias": {},
    "no bias": {"params": {"bias": {"is_quantized": "False"}}},
    "float weights": {"params": {"weight": {"is_quantized": "False"}, "bias": {"is_quantized": "False"}}},
    "affine weights of one type": {
        "params": {"bias": {"is_quantized": "False"}},
        "op_type": {"Gemm": {"params": {"weight": {"is_symmetric": "False"}}}},
    },
    "bias of one type": {
        "params": {"bias": {"is_quantized": "False"}},
        "op_type": {"Gemm": {"params": {"bias": {"is_quantized": "True"}}}},
    },
}


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("bits", [8, 12])
def test_biases_and_wide_outputs_are_those_of_aimet(original, tmp_path, name, per_channel, bits):
    if name == "affine bias" and per_channel:
        pytest.skip("a grid for each number of a bias, which AIMET finds by another search")
    config = {
        "defaults": {
            "ops": {"is_output_quantized": "True"},
            "params": {"is_quantized": "True", "is_symmetric": "True"},
            "per_channel_quantization": str(per_channel),
        },
        "params": {},
        "op_type": {},
        "supergroups": DEFAULT["supergroups"],
        "model_input": {"is_input_quantized": "True"},
        "model_output": {},
    } | PARAMS[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    theirs, mine = (
        calibrated(Everything, api, config_file=str(path), default_output_bw=bits) for api in (original, aimet)
    )
    theirs.export(str(tmp_path), "net", dummy_input=images(Everything))
    expected, got = json.loads((tmp_path / "net_torch.encodings").read_text()), mine.module_encodings()
    for table in ("activation_encodings", "param_encodings"):
        assert not list(differences(got[table], expected[table]))
    with torch.no_grad():
        for seed in range(3):
            x = images(Everything, seed=seed)
            outputs = mine.model(x), theirs.model(x).as_subclass(torch.Tensor), mine.convert()(x)
            assert torch.allclose(outputs[0], outputs[1], atol=1e-4)
            assert torch.allclose(outputs[2], outputs[1], atol=1e-4)


def test_aimet_takes_weights_of_16_bits_for_rounded_ones(original):
    """And so gives them a grid several times wider than they are; the outputs are close all the same."""
    theirs, mine = (calibrated(Everything, api, default_param_bw=16, default_output_bw=16) for api in (original, aimet))
    weight = mine.model.fc1.weight.abs().amax(1)
    assert torch.allclose(mine.model.fc1.param_quantizers["weight"].get_max().flatten(), weight, rtol=1e-3)
    wide = theirs.model.fc1.param_quantizers["weight"].get_max().flatten().as_subclass(torch.Tensor)
    assert (wide > 2 * weight).any()
    with torch.no_grad():
        x = images(Everything)
        assert torch.allclose(mine.model(x), theirs.model(x).as_subclass(torch.Tensor), atol=1e-3)


@pytest.mark.parametrize(
    ("model", "bits", "optimizer", "codes"),
    [
        (Network, 4, torch.optim.SGD, 0),
        (Network, 8, torch.optim.SGD, 1),
        (Everything, 4, torch.optim.SGD, 0),
        (Everything, 8, torch.optim.SGD, 0),
        (Everything, 4, torch.optim.Adam, 0),
        (Everything, 8, torch.optim.Adam, 0),
    ],
)
def test_training_steps_are_those_of_aimet(original, model, bits, optimizer, codes):
    """Weights and ranges after eight steps, and the logits: up to one code where the last bit of a range decides.

    A range is float32 in AIMET, and float64 here.
    """
    trained, logits, losses = [], [], []
    for api in (aimet, original):
        sim = calibrated(model, api, default_param_bw=bits)
        step_of = optimizer(sim.model.parameters(), lr=1e-2 if optimizer is torch.optim.SGD else 1e-4)
        losses.append([])
        for step in range(8):
            y = sim.model(images(model, seed=step))
            loss = F.cross_entropy(y, torch.arange(8))
            loss.backward()
            step_of.step()
            step_of.zero_grad()
            losses[-1].append(loss.item())
        trained.append(
            {n: p.detach().flatten().float().as_subclass(torch.Tensor) for n, p in sim.model.named_parameters()}
        )
        with torch.no_grad():
            logits.append(sim.model.eval()(images(model, seed=99)).as_subclass(torch.Tensor))
    mine, theirs = trained
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], rtol=1e-4, atol=1e-5), name
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert torch.allclose(*logits, rtol=0, atol=1e-4 + codes * logits[1].max().item() / 255)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (-0.002, 1.0), (-0.5, 1.0), (0.01, 1.0), (-1.0, 0.0)])
def test_gradients_of_a_range_are_those_of_aimet(original, ends):
    """Also where the zero point is the first or last code, and stays there."""
    from aimet_torch.v2.quantization.affine import QuantizeDequantize

    x = torch.tensor([-0.7, 0.0, 0.3, 0.9, 1.2, 1.5])
    theirs, mine = QuantizeDequantize((), 8, symmetric=False), aimet.quantizers.QuantizeDequantize((1,), 8)
    theirs.set_range(*ends)
    mine.set_range(*ends)
    for quantizer in (theirs, mine):
        quantizer(x).as_subclass(torch.Tensor).sum().backward()
    assert mine.min.grad.item() == pytest.approx(theirs.min.grad.item(), rel=1e-4)
    assert mine.max.grad.item() == pytest.approx(theirs.max.grad.item(), rel=1e-4)
