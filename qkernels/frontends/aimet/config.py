"""The quantsim configuration: a JSON file or dict that says what is quantized by default and by ONNX operation."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from qkernels.core import operations as o
from qkernels.errors import InvalidArgument, close_matches
from qkernels.frontends.aimet import model_preparer as functions
from qkernels.frontends.common import check_words

DEFAULT: dict[str, Any] = {
    "defaults": {
        "ops": {"is_output_quantized": True},
        "params": {"is_quantized": True, "is_symmetric": True},
        "strict_symmetric": False,
        "per_channel_quantization": True,
    },
    "params": {"bias": {"is_quantized": False}},
    "op_type": {},
    "supergroups": [
        {"op_list": ["Conv", "Relu"]},
        {"op_list": ["ConvTranspose", "Relu"]},
        {"op_list": ["Conv", "Clip"]},
        {"op_list": ["Add", "Relu"]},
        {"op_list": ["Gemm", "Relu"]},
    ],
    "model_input": {"is_input_quantized": True},
    "model_output": {},
}
FLAGS = ("is_quantized", "is_symmetric")
PARAMS = ("weight", "bias", "running_mean", "running_var")
OP_TYPES: dict[str, tuple[type, ...]] = {
    "Conv": o.CONVS[:3],
    "ConvTranspose": o.CONVS[3:],
    "Gemm": (nn.Linear,),
    "MatMul": (functions.MatMul,),
    "Relu": (nn.ReLU,),
    "Clip": (nn.ReLU6, nn.Hardtanh),
    "Add": (functions.Add,),
    "Sub": (functions.Subtract,),
    "Mul": (functions.Multiply,),
    "Div": (functions.Divide,),
    "Concat": (functions.Concat,),
    "ReduceMean": (functions.Mean,),
    "Sigmoid": (nn.Sigmoid,),
    "Tanh": (nn.Tanh,),
    "Softmax": (nn.Softmax,),
    "HardSwish": (nn.Hardswish,),
    "HardSigmoid": (nn.Hardsigmoid,),
    "Gelu": (nn.GELU,),
    "Elu": (nn.ELU,),
    "LeakyRelu": (nn.LeakyReLU,),
    "PRelu": (nn.PReLU,),
    "BatchNormalization": o.BATCH_NORMS,
    "LayerNormalization": (nn.LayerNorm,),
    "InstanceNormalization": (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    "MaxPool": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    "AveragePool": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    "GlobalAveragePool": (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    "Flatten": (nn.Flatten,),
    "Dropout": (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    "Cast": (),
}


def op_type(module: nn.Module) -> str:
    """The ONNX operation of a module; its class name if it has none."""
    return next((name for name, classes in OP_TYPES.items() if isinstance(module, classes)), type(module).__name__)


@dataclass(frozen=True)
class Tensors:
    """What one kind of operation does with its tensors."""

    is_output_quantized: bool = False
    is_input_quantized: bool = False
    is_symmetric: bool = False
    params_quantized: bool = False
    params_symmetric: bool = False
    per_channel: bool = False
    bias_quantized: bool = False
    bias_symmetric: bool = False


@dataclass(frozen=True)
class Config:
    """A configuration, read."""

    defaults: Tensors
    by_type: Mapping[str, Tensors] = field(default_factory=dict)
    strict_symmetric: bool = False
    supergroups: tuple[tuple[str, ...], ...] = ()
    input_quantized: bool = False
    output_quantized: bool | None = None

    def is_strict(self, symmetric: bool) -> bool:
        return symmetric and self.strict_symmetric

    def of(self, module: nn.Module) -> Tensors:
        return self.by_type.get(op_type(module), self.defaults)


def read_config(source: "str | Path | Mapping[str, Any] | None") -> Config:
    """The configuration of a file, a dict, "default" or None.

    Raises:
        InvalidArgument: a key is unknown or a value is not what it should be; the message says at which path.
    """
    if source is None or source == "default":
        return _parse(DEFAULT)
    if isinstance(source, Mapping):
        return _parse(source)
    if not isinstance(source, (str, Path)):
        raise InvalidArgument(f'config_file must be "default", a JSON file or a dict, got {source!r}')
    path = Path(source)
    if not path.is_file():
        raise InvalidArgument(f'config_file must be "default", a JSON file or a dict, got {source!r}')
    return _parse(json.loads(path.read_text()))


def _parse(config: Mapping[str, Any]) -> Config:
    top = "defaults params op_type supergroups supergroup_pass_list model_input model_output"
    _known(config, top, "config")
    defaults = config.get("defaults", {})
    _known(
        defaults,
        "ops params strict_symmetric unsigned_symmetric per_channel_quantization supported_kernels hw_version",
        "config.defaults",
    )
    base = _tensors(Tensors(), defaults, "config.defaults")
    base = replace(base, bias_quantized=base.params_quantized, bias_symmetric=base.params_symmetric)
    base = _named_params(base, config.get("params", {}), "config.params")
    by_type = {}
    _known(config.get("op_type", {}), "", "config.op_type", any_key=True)
    for name, values in config.get("op_type", {}).items():
        where = f"config.op_type.{name}"
        if name not in OP_TYPES:
            raise InvalidArgument(f"{where}: unknown operation{close_matches(name, OP_TYPES)}")
        _known(
            values,
            "is_output_quantized is_input_quantized is_symmetric params per_channel_quantization supported_kernels",
            where,
        )
        by_type[name] = _tensors(base, {**values, "ops": values}, where)
    groups = []
    for i, group in enumerate(config.get("supergroups", ())):
        _known(group, "op_list", f"config.supergroups[{i}]")
        check_words(group.get("op_list"), f"config.supergroups[{i}].op_list")
        for name in group["op_list"]:
            if name not in OP_TYPES:
                where = f"config.supergroups[{i}].op_list"
                raise InvalidArgument(f"{where}: unknown operation {name!r}{close_matches(name, OP_TYPES)}")
        groups.append(tuple(group["op_list"]))
    inputs, outputs = config.get("model_input", {}), config.get("model_output", {})
    _known(inputs, "is_input_quantized", "config.model_input")
    _known(outputs, "is_output_quantized", "config.model_output")
    output = _bool(outputs, "is_output_quantized", False, "config.model_output") if outputs else None
    return Config(
        base,
        by_type,
        _bool(defaults, "strict_symmetric", False, "config.defaults"),
        tuple(groups),
        _bool(inputs, "is_input_quantized", False, "config.model_input"),
        output,
    )


def _tensors(base: Tensors, values: Mapping[str, Any], where: str) -> Tensors:
    ops, params = values.get("ops", {}), values.get("params", {})
    _known(params, f"{' '.join(FLAGS)} {' '.join(PARAMS)}", f"{where}.params")
    base = _named_params(base, {k: v for k, v in params.items() if k not in FLAGS}, f"{where}.params")
    params = {k: v for k, v in params.items() if k in FLAGS}
    per_channel = _bool(values, "per_channel_quantization", base.per_channel, where)
    return replace(
        base,
        is_output_quantized=_bool(ops, "is_output_quantized", base.is_output_quantized, where),
        is_input_quantized=_bool(ops, "is_input_quantized", base.is_input_quantized, where),
        is_symmetric=_bool(ops, "is_symmetric", base.is_symmetric, where),
        params_quantized=_bool(params, "is_quantized", base.params_quantized, f"{where}.params"),
        params_symmetric=_bool(params, "is_symmetric", base.params_symmetric, f"{where}.params"),
        per_channel=per_channel,
    )


def _named_params(base: Tensors, params: Mapping[str, Any], where: str) -> Tensors:
    """`base` with what is said for parameters by their names."""
    _known(params, " ".join(PARAMS), where)
    for name, values in params.items():
        here = f"{where}.{name}"
        _known(values, " ".join(FLAGS), here)
        prefix = {"weight": "params", "bias": "bias"}.get(name, "params")
        said = {
            f"{prefix}_{flag[3:]}": _bool(values, flag, getattr(base, f"{prefix}_{flag[3:]}"), here) for flag in FLAGS
        }
        if name in ("weight", "bias"):  # statistics are never rounded
            base = replace(base, **said)
    return base


def _known(values: Mapping[str, Any], keys: str, where: str, any_key: bool = False) -> None:
    if not isinstance(values, Mapping):
        raise InvalidArgument(f"{where}: must be an object, got {values!r}")
    for key in values if not any_key else ():
        if key not in keys.split():
            raise InvalidArgument(f"{where}.{key}: unknown key{close_matches(key, keys.split())}")


def _bool(values: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    value = values.get(key, default)
    if value in ("True", "False", True, False):
        return value in ("True", True)
    raise InvalidArgument(f'{where}.{key}: must be "True" or "False", got {value!r}')
