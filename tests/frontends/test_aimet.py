"""The front end for AIMET scripts: preparation, simulation, configuration."""

import json

import pytest
import torch
import torch.nn.functional as F
from aimet_networks import STRICT, Everything, Nested, Network, calibrated, images, prepared_model, with_bias
from torch import nn

import qkernels
import qkernels.frontends.aimet as aimet
from qkernels.errors import InvalidArgument, InvalidState, Unsupported
from qkernels.frontends.aimet import batch_norm_fold, model_preparer, quantsim

pytestmark = pytest.mark.filterwarnings("ignore")


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


def test_a_call_of_glu_becomes_a_module():
    class Gate(nn.Module):
        def forward(self, x):
            return nn.functional.glu(x, dim=1)

    prepared, x = model_preparer.prepare_model(Gate()), torch.randn(2, 6, 4)
    assert prepared.module_glu.dim == 1
    assert torch.equal(prepared(x), nn.functional.glu(x, 1))


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


@pytest.mark.parametrize(
    "call",
    [
        lambda model: batch_norm_fold.fold_all_batch_norms(model, (4, 9)),
        lambda model: quantsim.QuantizationSimModel(model, dummy_input=torch.rand(4, 9)),
    ],
)
def test_an_input_that_the_model_fails_on_is_called_so(call):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
    with pytest.raises(InvalidArgument, match="dummy_input or input_shapes: the model does not run"):
        call(model)
