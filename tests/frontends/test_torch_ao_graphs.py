"""The front end for torch.ao's FX graph mode, against torch.ao itself."""

import copy
import operator

import pytest
import torch
from torch import nn
from torch_ao_models import images, ours, per_channel, train

import qkernels
from qkernels.core.prepare import quantizers
from qkernels.core.recipe import Match, make_recipe
from qkernels.errors import InvalidArgument, InvalidType, Unsupported
from qkernels.frontends import torch_ao

ao = pytest.importorskip("torch.ao.quantization")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("seeded_engine")]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.pool(torch.relu(x + self.bn2(self.conv2(x))))
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


class Calls(nn.Module):
    """Functions on parameters, as torch takes them: all arguments by position."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.2)
        self.table, self.bias = nn.Parameter(torch.randn(10, 8) * 0.2), nn.Parameter(torch.randn(10) * 0.2)

    def forward(self, x):
        x = nn.functional.relu(nn.functional.conv2d(x, self.kernel, None, (1, 1), (1, 1), (1, 1), 1))
        return nn.functional.linear(x.mean([2, 3]), self.table, self.bias)


class Sums(nn.Module):
    def forward(self, x):
        return nn.functional.relu(x + x.flip(-1))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("network", [Residual, Calls, Sums])
def test_graphs_prepared_by_torch_convert_bit_identically(network, trained):
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

    x = images()
    if trained:
        graph = prepare_qat_fx(network().train(), ao.get_default_qat_qconfig_mapping("fbgemm"), (x,))
        graph(x)
    else:
        graph = prepare_fx(network().eval(), ao.QConfigMapping().set_global(per_channel(ao)), (x,))
    graph.eval()(x)
    mine = torch_ao.convert(copy.deepcopy(graph), example_inputs=x)
    assert not mine.report.stayed_float
    torch.backends.quantized.engine = "fbgemm"
    theirs = convert_fx(graph)
    grid = next(m for m in mine.modules() if getattr(m, "kind", "") == "quantize").out_qparams
    x = grid.dequantize(grid.quantize(x))
    with torch.no_grad():
        assert torch.equal(mine(x), theirs(x))


@pytest.mark.parametrize("api", [torch_ao, ao], ids=["ours", "torch"])
def test_prepare_fx_and_convert_fx(api):
    model, x = Residual().eval(), images()
    prepared = torch_ao.prepare_fx(model, api.get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    converted = torch_ao.convert_fx(prepared)
    assert not converted.report.stayed_float
    assert qkernels.verify(prepared, converted, [x]).total_mismatches == 0
    assert (converted(x) - model(x)).norm() < 0.05 * model(x).norm()


def test_mapping_and_qconfigs_and_our_options_are_one_recipe():
    recipe = make_recipe("int8-minmax")
    qconfig = torch_ao.QConfig(
        torch_ao.MinMaxObserver.with_args(eps=recipe.activation.spec.min_scale),
        torch_ao.PerChannelMinMaxObserver.with_args(
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            quant_min=-127,
            quant_max=127,
            eps=recipe.weight.spec.min_scale,
        ),
    )
    mapping = torch_ao.QConfigMapping().set_global(qconfig).set_module_name("conv2", None)
    model = Residual().eval()
    model.qconfig, model.conv2.qconfig = qconfig, None
    expected = make_recipe("int8-minmax", skip=["conv2"])
    assert torch_ao.mapping_recipe(mapping) == expected
    assert torch_ao.recipe(model) == expected


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m.set_global("x86"), InvalidArgument, r"QConfigMapping: must be a QConfig, such as .* got 'x86'"),
        (lambda m: m.set_object_type(nn.Conv2d, "x86"), InvalidArgument, "QConfigMapping: Conv2d: must be a QConfig"),
        (lambda m: m.set_module_name("conv9", None), InvalidArgument, "has the name 'conv9'; did you mean"),
        (lambda m: m.set_module_name_regex("conv[", None), InvalidArgument, r"'conv\[' is no regular expression"),
        (lambda m: m.set_object_type(3, None), InvalidType, "got 3"),
        (lambda m: m.set_module_name_object_type_order("", nn.Conv2d, 0, None), Unsupported, "a path of its own"),
    ],
)
def test_a_wrong_mapping_is_refused_with_what_is_wrong(change, error, message):
    mapping = torch_ao.QConfigMapping().set_global(per_channel(torch_ao))
    with pytest.raises(error, match=message):
        torch_ao.prepare_fx(Residual().eval(), change(mapping), (images(),))


def test_rules_of_torchs_mapping_that_have_no_counterpart_are_refused():
    mapping = ao.QConfigMapping().set_global(per_channel(ao)).set_module_name_object_type_order("", nn.Conv2d, 0, None)
    with pytest.raises(Unsupported, match="module_name_object_type_order"):
        torch_ao.prepare_fx(Residual().eval(), mapping, (images(),))
    with pytest.raises(Unsupported, match=r"prepare_fx: backend_config has no counterpart.*set_object_type"):
        torch_ao.prepare_fx(Residual().eval(), torch_ao.QConfigMapping(), (images(),), backend_config={"a": 1})


def test_a_qconfig_that_is_none_is_refused():
    model = ours().eval()
    model.qconfig = "x86"
    with pytest.raises(InvalidArgument, match=r"MobileNetV2\.qconfig: must be a QConfig, such as get_default_qconfig"):
        torch_ao.prepare(model)


def test_mapping_order_is_that_of_torch():
    mapping = (
        torch_ao.QConfigMapping()
        .set_global(torch_ao.default_qconfig)
        .set_object_type(nn.Conv2d, torch_ao.default_per_channel_qconfig)
        .set_module_name_regex("conv.*", torch_ao.default_qconfig)
        .set_module_name_regex("conv2", torch_ao.default_per_channel_qconfig)
        .set_module_name("conv1", None)
    )
    recipe = torch_ao.mapping_recipe(mapping)
    assert recipe.for_module("conv1", ["Conv2d"]).skip
    assert not recipe.for_module("conv2", ["Conv2d"]).weight.spec.per_channel  # the first regex wins
    assert recipe.for_module("other", ["Conv2d"]).weight.spec.per_channel


FUNCTION_RULES = [
    (operator.add, {"add"}),
    (torch.add, set()),  # the model writes x + y
    (torch.relu, {"relu", "relu_1"}),
    ("add", set()),
    (nn.functional.adaptive_avg_pool2d, {"adaptive_avg_pool2d"}),
]


@pytest.mark.parametrize("api", [torch_ao, ao], ids=["ours", "torch"])
@pytest.mark.parametrize(("function", "floats"), FUNCTION_RULES)
def test_object_types_may_be_functions_as_the_model_calls_them(api, function, floats):
    mapping = api.QConfigMapping().set_global(per_channel(api)).set_object_type(function, None)
    prepared = torch_ao.prepare_fx(Residual().eval(), mapping, (images(),))
    assert {row.name for row in prepared.report.stayed_float if row.reason == "skipped by the recipe"} == floats
    prepared(images())
    assert qkernels.verify(prepared, torch_ao.convert_fx(prepared), [images()]).total_mismatches == 0


def test_a_function_gets_the_grid_that_its_rule_says():
    own = torch_ao.QConfig(torch_ao.MinMaxObserver.with_args(quant_max=15, quant_min=0), per_channel(torch_ao).weight)
    mapping = torch_ao.QConfigMapping().set_global(per_channel(torch_ao)).set_object_type(operator.add, own)
    prepared = torch_ao.prepare_fx(Residual().eval(), mapping, (images(),))
    codes = {q.source: q.spec.qmax for q in quantizers(prepared)}
    assert {source for source, highest in codes.items() if highest == 15} == {"add"}
    assert torch_ao.mapping_recipe(mapping).overrides[0].match == Match("type", "operator.add")


@pytest.mark.parametrize("trained", [False, True])
def test_torchs_own_default_mappings_ask_for_nothing_that_the_core_does_not_do(trained):
    name = "get_default_qat_qconfig_mapping" if trained else "get_default_qconfig_mapping"
    theirs, mine = (torch_ao.mapping_recipe(getattr(api, name)("onednn")) for api in (ao, torch_ao))
    assert (theirs.activation, theirs.weight) == (mine.activation, mine.weight)
    for rule in theirs.overrides:
        assert not rule.skip
        assert rule.activation in (None, mine.activation) or rule.match.pattern == "PReLU"


def test_training_a_graph():
    x = images()
    model = torch_ao.prepare_qat_fx(Residual().train(), torch_ao.get_default_qat_qconfig_mapping("x86"), (x,))
    train(model, 2)
    converted = torch_ao.convert_fx(model.eval())
    assert qkernels.verify(model, converted, [x]).total_mismatches == 0
