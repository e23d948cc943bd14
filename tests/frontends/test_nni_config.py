"""What NNI 3.0 lets a config_list say: which targets of which modules get which settings, and what is refused."""

from dataclasses import replace

import pytest
import torch
from nni_cases import Net, entry

import qkernels.frontends.nni as nni
from qkernels.errors import InvalidArgument, InvalidState, Unsupported
from qkernels.frontends.nni.config import Setting, parse

INT8, INT4, UINT8 = Setting(8, True, "affine"), Setting(4, True, "affine"), Setting(8, False, "affine")
OLD = {"quant_dtype": None, "target_names": None, "quant_types": ["weight"], "quant_bits": {"weight": 8}}
WHOLE_4D, ROWS = Setting(8, True, "symmetric", rank=4), Setting(8, True, "symmetric", per_channel=True)
EACH, COLUMNS = replace(ROWS, block=(1, 1, 1, 1)), replace(ROWS, block=(-1, 1, 0))
CHANNELS = Setting(8, True, "affine", True, (-1, 1, 0))
LINES = replace(CHANNELS, block=(1, 2, -1, -1))


def targets(*config_list):
    return parse(Net(), list(config_list)).targets


def one(path="conv1", **changed):
    """The targets of one module under one entry."""
    return targets(entry(**{"op_names": [path], **changed}))[path]


def weight(**settings):
    return {"weight": {"quant_dtype": "int8", "quant_scheme": "symmetric", **settings}}


@pytest.mark.parametrize(
    ("selection", "paths"),
    [
        ({"op_names": ["conv2"]}, ["conv2"]),
        ({"op_names": None, "op_names_re": ["conv[12]$"]}, ["conv1", "conv2"]),
        ({"op_names": ["fc"], "op_names_re": ["conv1"]}, ["conv1", "fc"]),
        ({"op_names": None, "op_types": ["Conv2d"]}, ["conv1", "conv2"]),
        ({"op_names": None, "op_types": ["default"]}, ["conv1", "conv2", "fc"]),
        ({"op_names": None, "op_types": ["Conv2d", "Linear", "Conv3d"]}, ["conv1", "conv2", "fc"]),
        ({"op_names": ["conv1", "fc"], "op_types": ["Conv2d"]}, ["conv1"]),
        ({"op_names": None, "op_types": ["Conv2d"], "exclude_op_names": ["conv1"]}, ["conv2"]),
        ({"op_names": None, "op_types": ["default"], "exclude_op_names_re": ["conv"]}, ["fc"]),
        ({"op_names": None, "op_types": ["default"], "exclude_op_types": ["Linear"]}, ["conv1", "conv2"]),
        ({"op_names": None, "op_partial_names": ["nv2"]}, ["conv2"]),
        ({"op_names": ["conv1"], "op_types": []}, ["conv1"]),
        ({"op_names": [], "op_types": ["Linear"]}, ["fc"]),
    ],
)
def test_modules_are_selected_by_names_patterns_and_types_without_what_is_excluded(selection, paths):
    assert list(targets(entry(**selection))) == paths


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"target_names": None}, {"_input_0": INT8, "weight": INT8, "bias": INT8, "_output_0": INT8}),
        ({"target_names": ["_output_0"]}, {"_output_0": INT8}),
        ({"target_names": ["_input_input"]}, {"_input_0": INT8}),
        ({"target_names": ["weight"], "quant_dtype": "uint8"}, {"weight": UINT8}),
        ({"target_names": ["weight"], "target_settings": weight(granularity="out_channel")}, {"weight": ROWS}),
        ({"target_names": ["weight"], "target_settings": weight(granularity=[1, -1, -1, -1])}, {"weight": ROWS}),
        ({"target_names": ["weight"], "target_settings": weight(granularity=[1, 1, 3, 3])}, {"weight": ROWS}),
        ({"target_names": ["weight"], "target_settings": weight(granularity=([1], "back", -1))}, {"weight": ROWS}),
        ({"target_names": ["weight"], "target_settings": weight(granularity=([1], "back"))}, {"weight": EACH}),
        ({"target_names": ["weight"], "target_settings": weight(granularity="in_channel")}, {"weight": WHOLE_4D}),
        ({"op_names": ["conv2"], "target_names": ["weight"], "target_settings": weight(granularity="in_channel")},
         {"weight": COLUMNS}),
        ({"target_names": ["_input_"], "granularity": "per_channel"}, {"_input_0": CHANNELS}),
        ({"target_names": ["_input_"], "granularity": [2, -1, -1]}, {"_input_0": LINES}),
        ({"target_names": ["bias"], "granularity": "out_channel"}, {"bias": replace(INT8, per_channel=True)}),
        ({"target_names": ["weight"], "granularity": [-1, -1, -1, -1]}, {"weight": replace(INT8, rank=4)}),
        ({"target_names": ["weight"], "target_settings": weight(quant_scheme="affine")}, {"weight": INT8}),
        ({"target_names": ["weight"], "apply_method": "qat_clamp_round"}, {"weight": INT8}),
        ({"target_names": ["weight", "_input_"], "target_settings": {"_input_": {"quant_dtype": "int4"}}},
         {"weight": INT8, "_input_0": INT4}),
        ({"target_names": ["_input_", "_input_0"], "target_settings": {"_input_0": {"quant_dtype": "int4"}}},
         {"_input_0": INT4}),
        ({"target_names": ["_input_0"], "target_settings": {"_input_": {"quant_dtype": "int4"}}}, {"_input_0": INT4}),
        ({"target_names": ["_input_"], "target_settings": {"_input_input": {"quant_dtype": "int4"}}},
         {"_input_0": INT4}),
        ({"target_names": []}, {"_input_0": INT8, "weight": INT8, "bias": INT8, "_output_0": INT8}),
    ],
)  # fmt: skip
def test_targets_get_the_settings_of_the_entry_and_their_own_over_them(change, found):
    assert list(targets(entry(**{"op_names": ["conv1"], **change})).values()) == [found]


def test_without_a_dtype_it_is_int8_and_without_a_scheme_symmetric():
    found = targets({"op_names": ["conv1"], "target_names": ["weight"], "quant_dtype": None})
    assert found == {"conv1": {"weight": Setting(8, True)}}
    assert Setting(8, True).spec(True).symmetric


def test_the_first_entry_of_a_target_wins():
    found = targets(entry(op_names=["conv1"], target_names=["weight"]), entry(op_names=["conv1"], quant_dtype="int4"))
    assert found == {"conv1": {"weight": INT8, "_input_0": INT4, "_output_0": INT4}}


def test_keys_of_2_are_taken():
    old = {"quant_types": ["weight", "input"], "quant_bits": {"weight": 4, "input": 8}, "op_types": ["Conv2d"]}
    assert targets(old, {"op_names": ["conv1"], "exclude": True}) == {
        "conv2": {"weight": Setting(4, True), "_input_0": Setting(8, True)}
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"op_names": ["conv1"], "op_types": ["Linear"]}, InvalidArgument, r"config_list\[0\]: selects no module"),
        ({"op_names": ["relu1"], "target_names": ["weight"]}, InvalidArgument, "relu1 is a ReLU and has none of"),
        ({"target_names": ["_input_mask"]}, InvalidArgument, "conv1 has no argument 'mask'; there are"),
        ({"target_names": ["_input_3"]}, InvalidArgument, "conv1 has no argument '3'"),
        ({"target_names": ["_output_1"]}, Unsupported, "use _output_0"),
        ({"target_names": ["_input_"], "granularity": "out_channel"}, InvalidArgument, "is for parameters"),
        ({"target_settings": weight(granularity="per_channel")}, InvalidArgument, "'per_channel' is for inputs"),
        ({"target_settings": weight(granularity=[4, 4])}, InvalidArgument, r"granularity of shape .* \[1, 1, 4, 4\]"),
        ({"target_settings": weight(granularity=[[2], "middle"])}, InvalidArgument, r"granularity\[1\]: must be one"),
        ({"target_settings": weight(granularity=[1, 1, 1, 1, 1])}, InvalidArgument, "granularity of shape"),
        ({"target_settings": weight(granularty="default")}, InvalidArgument, "granularty: unknown key; did you mean"),
        ({"apply_method": "truncate"}, InvalidArgument, "apply_method: must be one of"),
        ({"quant_dtype": "int0"}, InvalidArgument, "quant_dtype: must be None, int"),
        ({"op_names": "conv1"}, InvalidArgument, r"config_list\[0\]\.op_names: must be a list of strings, got 'conv1'"),
        ({"op_types": [torch.nn.Conv2d]}, InvalidArgument, "op_types: must be a list of strings"),
        ({"op_names_re": ["conv["]}, InvalidArgument, r"op_names_re: 'conv\[' is no regular expression: untermin"),
        ({"target_names": "weight"}, InvalidArgument, "target_names: must be a list of strings, got 'weight'"),
        ({"target_settings": {"wieght": {"quant_dtype": "int8"}}}, InvalidArgument,
         r"target_settings: unknown target 'wieght'"),
        ({"fuse_names": "conv1"}, InvalidArgument, r"fuse_names: must be a list of tuples of names, got 'conv1'"),
        ({"fuse_names": ["conv1"]}, InvalidArgument, r"fuse_names\[0\]: must be \(layer, norm\)"),
        ({"fuse_names": [("conv1", "bn1"), ("conv1", "bn1", "relu1")]}, InvalidArgument,
         r"fuse_names\[1\]: conv1 is fused with \('bn1', None\) already"),
        ({"target_settings": weight(granularity=([2], "front", "all"))}, InvalidArgument, "granularity: must be sizes"),
        ({"target_settings": weight(granularity=([2], "front", 1, 1))}, InvalidArgument, "granularity: must be sizes"),
        ({"target_settings": weight(granularity=[])}, InvalidArgument, "granularity: must be sizes"),
        ({"target_settings": {"weight": {"quant_dtype": "int8"}}, "quant_scheme": "odd"}, InvalidArgument,
         r"config_list\[0\]\.quant_scheme: must be one of"),
        ({"quant_dtype": ""}, InvalidArgument, r"config_list\[0\]\.quant_dtype: must be None, int"),
        ({"quant_bits": 4}, InvalidArgument, r"config_list\[0\]: quant_types and quant_bits belong together"),
        ({"quant_types": ["weight"], "quant_bits": 4}, InvalidArgument, r"\[0\]\.quant_dtype: not with quant_types"),
        ({**OLD, "quant_types": ["weight", "input"]}, InvalidArgument, r"\.quant_bits: must be from 2 to 21 for input"),
        ({**OLD, "quant_bits": 40}, InvalidArgument, r"config_list\[0\]\.quant_bits: must be from 2 to 21 for weight"),
        ({**OLD, "quant_bits": {"wieght": 8}}, InvalidArgument,
         "quant_bits.wieght: unknown key; did you mean 'weight'"),
        ({"exclude": "yes"}, InvalidArgument, r"exclude: must be one of \[True, False\], got 'yes'"),
        ({"exclude": True}, InvalidArgument, "config_list: no module is left to quantize"),
        ({"exclude_op_types": ["Conv4d"]}, InvalidArgument, "exclude_op_types: no module is a 'Conv4d'; did you mean"),
        ({"exclude_op_names": ["conv7"]}, InvalidArgument, "exclude_op_names: the model has no module 'conv7'"),
        ({"quant_start_step": 3}, Unsupported, r"QATQuantizer\(..., quant_start_step=n\)"),
        ({"fuse_names": [("relu1", "conv1")]}, Unsupported, "only layers with weights are fused"),
        ({"fuse_names": [("conv1", "relu1", "bn1")]}, InvalidArgument, "only a BatchNorm and ReLU"),
        ({"fuse_names": [("fc", "relu1")], "op_names": ["conv1"]}, InvalidArgument, "fc is fused .* has no settings"),
        ({"fuse_names": [("conv1", "relu1")], "op_names": ["conv1", "relu1"]}, InvalidArgument, "takes no settings"),
        ({"target_settings": {"_input_0": {"quant_dtype": "int4"}, "_input_input": {"quant_dtype": "int2"}}},
         InvalidArgument, "_input_0 of conv1 has two settings, '_input_0' and '_input_input'"),
        ({"target_names": ["weight"], "target_settings": {"_input_": {"quant_dtype": "int4"}}}, InvalidArgument,
         r"config_list\[0\]\.target_settings\._input_: is no target of conv1; there are \['weight'\]"),
        ({"target_names": ["input_0"]}, InvalidArgument, "unknown target 'input_0'; did you mean '_input_0'"),
        ({"target_names": ["input"]}, InvalidArgument, "unknown target 'input'; did you mean '_input_'"),
        ({"target_names": ["_input_00"]}, InvalidArgument, "conv1 has no argument '00'; there are"),
    ],
)  # fmt: skip
def test_what_means_nothing_or_two_things_is_refused_with_its_path(change, error, message):
    with pytest.raises(error, match=message):
        targets(entry(**{"op_names": ["conv1"], **change}))


def test_a_calibration_config_of_another_kind_is_refused():
    def quantizer(**changed):
        model = Net()
        evaluator = nni.TorchEvaluator(None, torch.optim.SGD(model.parameters(), lr=0.1), None)
        made = nni.QATQuantizer(model, [entry(**changed)], evaluator)
        made.track_forward(torch.randn(2, 1, 16, 16))
        return made

    incomplete = {"conv1": {"weight": {"quant_dtype": "int8", "quant_scheme": "affine", "zero_point": 0}}}
    with pytest.raises(InvalidArgument, match=r"calibration_config\.conv1\.weight\.scale: missing; there are"):
        quantizer().update_calibration_config(incomplete)
    config = quantizer(quant_dtype="int4").get_calibration_config()
    with pytest.raises(InvalidState, match=r"conv1\.\w+: .*is not a grid of kind"):
        quantizer().update_calibration_config(config)
    with pytest.raises(InvalidArgument, match=r"nothing is quantized at fc\.weight; did you mean|nothing is quantized"):
        quantizer(op_names=["conv1"]).update_calibration_config({"fc": quantizer().get_calibration_config()["fc"]})
