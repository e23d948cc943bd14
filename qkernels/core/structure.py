"""The structure of a converted model as JSON: layers with their configs, and the graph between them.

`describe` and `build` are inverse, up to the contents of tensors. Building makes only layers of the registry, modules
of `_MODULES`, and calls of `_FUNCTIONS` and `_METHODS`: a file can name nothing else.
"""

import builtins
import collections
import copy
import inspect
import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qkernels.core import operations as o
from qkernels.core.attention import DotProductAttention, open_attention
from qkernels.core.convert import ConvertedModel
from qkernels.core.registry import is_layer, layer_class
from qkernels.core.report import Decision, PrepareReport
from qkernels.errors import CheckpointError, InvalidArgument, Unsupported


def _words(text: str) -> list[str]:
    return text.split()


# Besides the operations that `qkernels.core.graph` knows: what float parts between integer ones are made of.
_MORE = {
    "torch": (
        torch,
        "_assert arange argmax bmm clamp_max clamp_min clone cos cumsum div einsum eq erf floor_divide full full_like "
        "ge gt le linspace log lt matmul max maximum min minimum ne ones ones_like outer pow rsub select sin softmax "
        "stack sub sum swapaxes tril triu where zeros zeros_like",
    ),
    "torch.nn.functional": (
        F,
        "adaptive_max_pool2d dropout glu layer_norm log_softmax normalize pad prelu scaled_dot_product_attention "
        "softmax threshold unfold",
    ),
    "operator": (operator, "eq floordiv ge getitem gt le lt matmul mod ne neg pow sub truediv"),
    "builtins": (builtins, "getattr int float len"),
    "collections": (collections, "OrderedDict"),
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{prefix}.{name}": function
    for prefix, (module, names) in _MORE.items()
    for name, function in vars(module).items()
    if name in names.split() or (not name.startswith("_") and callable(function) and function in o.FUNCTIONS)
}
_FUNCTION_OF: dict[Callable[..., Any], str] = {function: name for name, function in reversed(_FUNCTIONS.items())}
_METHODS = frozenset(o.METHODS) | frozenset(
    _words(
        "bmm clamp_max clamp_min dim div float masked_fill matmul max min amax pow repeat size softmax sub sum to "
        "type_as"
    )
)
_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim", "T", "mT"})  # that the graph may read by getattr
_MODULES: dict[str, type[nn.Module]] = {
    name: getattr(nn, name)
    for name in _words(
        "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d "
        "AvgPool1d AvgPool2d AvgPool3d BatchNorm1d BatchNorm2d BatchNorm3d CELU ChannelShuffle CircularPad1d "
        "CircularPad2d CircularPad3d ConstantPad1d ConstantPad2d ConstantPad3d Conv1d Conv2d Conv3d ConvTranspose1d "
        "ConvTranspose2d ConvTranspose3d Dropout Dropout1d Dropout2d Dropout3d ELU Embedding EmbeddingBag Flatten Fold "
        "GELU GLU GRU GroupNorm Hardshrink Hardsigmoid Hardswish Hardtanh Identity InstanceNorm1d InstanceNorm2d "
        "InstanceNorm3d LPPool1d LPPool2d LSTM LayerNorm LeakyReLU Linear LocalResponseNorm LogSigmoid LogSoftmax "
        "MaxPool1d MaxPool2d MaxPool3d Mish PReLU PixelShuffle PixelUnshuffle RMSNorm RNN ReLU ReLU6 ReflectionPad1d "
        "ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d SELU SiLU Sigmoid Softmax "
        "Softmax2d Softmin Softplus Softshrink Softsign Tanh Tanhshrink Threshold Unflatten Unfold Upsample "
        "UpsamplingBilinear2d UpsamplingNearest2d ZeroPad1d ZeroPad2d ZeroPad3d"
    )
} | {"DotProductAttention": DotProductAttention}
_ENUMS = {
    str(value): value
    for value in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
        torch.contiguous_format,
        torch.channels_last,
        torch.channels_last_3d,
        torch.preserve_format,
    )
}


def describe(model: nn.Module) -> dict[str, Any]:
    """`model` as JSON values.

    Raises:
        Unsupported: it holds a function, module or argument that has no JSON form; the message names it.
    """
    return _describe(model, "")


def build(spec: dict[str, Any], tensors: dict[str, Tensor], skeleton: nn.Module | None) -> nn.Module:
    """The model of a description, up to the contents of its tensors: load its state dict next.

    Args:
        spec: from `describe`.
        tensors: the state dict of the model.
        skeleton: an instance of the float model, if part of it is Python code of its own.
    """
    return _build(spec, tensors, "", skeleton)


def _describe(module: nn.Module, path: str) -> dict[str, Any]:
    """A module as JSON: a converted layer, a torch.nn module, a sequence, a graph, or a skeleton around those."""
    if is_layer(module):
        return {"layer": module.get_config()}
    if isinstance(module, fx.GraphModule):
        return _describe_graph(module, path)
    if type(module) is nn.Sequential:
        return {"sequential": _describe_children(module, path)}
    if _MODULES.get(type(module).__name__) is type(module):
        return {"nn": type(module).__name__, "arguments": _constructor_arguments(module, path)}
    return {"skeleton": type(module).__qualname__, "children": _describe_children(module, path)}


def _describe_children(module: nn.Module, path: str) -> dict[str, Any]:
    return {name: _describe(child, _join(path, name)) for name, child in module.named_children()}


def _constructor_arguments(module: nn.Module, path: str) -> dict[str, Any]:
    """What to call the class of a torch.nn module with: its attributes of the names of the constructor's parameters."""
    arguments = {}
    for name in _constructor_parameters(module):
        if name in ("self", "device", "dtype", "inplace") or not hasattr(module, name):
            continue
        value = getattr(module, name)
        if name.startswith("_") or (name == "bias" and not isinstance(value, bool)):
            value = value is not None
        elif isinstance(value, Tensor):
            continue
        arguments[name] = _encode(value, path)
    return arguments


def _constructor_parameters(module: nn.Module) -> Iterable[str]:
    if not isinstance(module, nn.RNNBase):
        return inspect.signature(type(module).__init__).parameters
    own = {nn.LSTM: "proj_size", nn.RNN: "nonlinearity"}.get(type(module), "")  # their signature names none
    return _words(f"input_size hidden_size num_layers bias batch_first dropout bidirectional {own}")


def _describe_graph(module: fx.GraphModule, path: str) -> dict[str, Any]:
    codegen = type(module.graph._codegen)
    if codegen is not fx.graph.CodeGen:
        raise Unsupported(f"save: graph {path!r} has custom input or output handling ({codegen.__name__})")
    targets = {node.target for node in module.graph.nodes if node.op == "call_module"}
    modules = {}
    for target in sorted(targets):
        modules[target] = _describe(module.get_submodule(target), _join(path, target))
        if skeleton := _first_skeleton(modules[target]):
            raise Unsupported(
                f"save: module {_join(path, target)!r} is a {skeleton}, whose Python code a saved graph cannot hold. "
                "Let the tracer enter it, or replace it with torch.nn modules"
            )
    spec = {"graph": [_describe_node(node, path) for node in module.graph.nodes], "modules": modules}
    if isinstance(module, ConvertedModel):
        spec["converted"] = {
            "name": type(module).__name__,
            "sources": module.meta["sources"],
            "attributes": _encode(module.meta.get("attributes", {}), path),
            "report": [[row.name, row.kind, row.integer, row.reason] for row in module.report],
        }
    return spec


def _first_skeleton(spec: dict[str, Any]) -> str | None:
    if "skeleton" in spec:
        return spec["skeleton"]
    return next(filter(None, map(_first_skeleton, spec.get("sequential", {}).values())), None)


def _describe_node(node: fx.Node, path: str) -> dict[str, Any]:
    target: Any = node.target
    if node.op == "call_function":
        if target not in _FUNCTION_OF:
            raise Unsupported(
                f"save: graph {path!r} calls {_name(target)} at node {node.name!r}, which is not in the list of "
                "functions that a file may call. Compute with others of torch and torch.nn.functional, or keep what "
                "does not depend on the input in a buffer"
            )
        target = _FUNCTION_OF[target]
    elif node.op == "call_method" and target not in _METHODS:
        raise Unsupported(
            f"save: graph {path!r} calls Tensor.{target} at node {node.name!r}, which a file may not call"
        )
    if target == "builtins.getattr" and node.args[1] not in _ATTRIBUTES:
        raise Unsupported(f"save: graph {path!r} reads attribute {node.args[1]!r}, which a file may not read")
    where = f"{path}:{node.name}"
    entry = {
        "op": node.op,
        "name": node.name,
        "target": target,
        "args": [_encode(a, where) for a in node.args],
        "kwargs": {k: _encode(v, where) for k, v in node.kwargs.items()},
    }
    if node.op == "get_attr":
        value = operator.attrgetter(target)(node.graph.owning_module)
        if isinstance(value, nn.Parameter):  # torch.matmul sums in another order where a gradient is wanted
            entry["requires_grad"] = value.requires_grad
    return entry


def _name(function: Callable[..., Any]) -> str:
    """As a user writes it."""
    name = getattr(function, "__name__", repr(function))
    return f"torch.{name}" if getattr(torch, name, None) is function else getattr(function, "__qualname__", name)


def _build(spec: dict[str, Any], tensors: dict[str, Tensor], path: str, skeleton: nn.Module | None) -> nn.Module:
    if "layer" in spec:
        module = layer_class(spec["layer"]["kind"]).from_config(spec["layer"])
        module.name = path
        return module
    if "nn" in spec:
        if spec["nn"] not in _MODULES:
            raise CheckpointError(f"load: {spec['nn']!r} is not in the list of modules that a file may hold")
        with torch.device("cpu"):  # where a file's tensors are, whatever torch's default is
            module = _MODULES[spec["nn"]](**{name: _decode(v, {}) for name, v in spec["arguments"].items()})
        return _in_dtypes_of(tensors, module, path)
    if "sequential" in spec:
        children = {name: _build(s, tensors, _join(path, name), None) for name, s in spec["sequential"].items()}
        return nn.Sequential(OrderedDict(children))
    if "graph" in spec:
        return _build_graph(spec, tensors, path)
    return _fill_skeleton(spec, tensors, path, skeleton)


def _in_dtypes_of(tensors: dict[str, Tensor], module: nn.Module, path: str) -> nn.Module:
    """The module itself, each Parameter and buffer of its own in the dtype of the tensor that is meant for it."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        stored = tensors.get(_join(path, name))
        if tensor is not None and stored is not None and tensor.dtype != stored.dtype:
            tensor.data = tensor.data.to(stored.dtype)
    return module


def _fill_skeleton(
    spec: dict[str, Any], tensors: dict[str, Tensor], path: str, skeleton: nn.Module | None
) -> nn.Module:
    name = spec["skeleton"]
    if skeleton is None:
        raise InvalidArgument(
            f"load: the model has Python code of its own ({name} at {path or 'the top'!r}), which a file cannot hold: "
            "pass load(path, skeleton=model) with an instance of the float model"
        )
    if type(skeleton).__qualname__ != name:
        raise InvalidArgument(
            f"load: skeleton at {path or 'the top'!r} must be a {name}, got {type(skeleton).__qualname__}"
        )
    model = skeleton if path else open_attention(copy.deepcopy(skeleton))
    for child, child_spec in spec["children"].items():
        setattr(model, child, _build(child_spec, tensors, _join(path, child), getattr(model, child, None)))
    return _in_dtypes_of(tensors, model, path)


def _build_graph(spec: dict[str, Any], tensors: dict[str, Tensor], path: str) -> fx.GraphModule:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    root: dict[str, Any] = {
        target: _build(s, tensors, _join(path, target), None) for target, s in spec["modules"].items()
    }
    for entry in spec["graph"]:
        op, target = entry["op"], entry["target"]
        args = tuple(_decode(a, nodes) for a in entry["args"])
        kwargs = {k: _decode(v, nodes) for k, v in entry["kwargs"].items()}
        if op == "call_function":
            target = _allowed_function(target, args)
        elif op == "call_method" and target not in _METHODS:
            raise CheckpointError(f"load: Tensor.{target} is not in the list of methods that a file may call")
        elif op == "get_attr":
            value = torch.zeros_like(tensors[_join(path, target)])
            is_parameter = "requires_grad" in entry
            root[target] = nn.Parameter(value, entry["requires_grad"]) if is_parameter else value
        node = graph.create_node(op, target, args, kwargs, name=entry["name"])
        nodes[entry["name"]] = node
    graph.lint()
    if "converted" not in spec:
        return fx.GraphModule(root, graph)
    converted = spec["converted"]
    model = ConvertedModel(root, graph, converted["name"])
    model.meta["sources"] = converted["sources"]
    model.meta["report"] = PrepareReport(tuple(Decision(*row) for row in converted["report"]))
    model.adopt(_decode(converted["attributes"], {}))
    return model


def _allowed_function(name: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    if name not in _FUNCTIONS or (name == "builtins.getattr" and args[1] not in _ATTRIBUTES):
        raise CheckpointError(f"load: {name} is not in the list of functions that a file may call")
    return _FUNCTIONS[name]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# ---- arguments: plain JSON values stay, anything else is a dict with one key that says what it is ----


def _encode(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):  # includes fx's immutable list
        return [_encode(v, where) for v in value]
    if isinstance(value, tuple):  # includes torch.Size
        return {"tuple": [_encode(v, where) for v in value]}
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"dict": {k: _encode(v, where) for k, v in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_encode(v, where) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if str(value) in _ENUMS:
        return {"enum": str(value)}
    raise Unsupported(f"save: {where!r} has an argument of type {type(value).__name__}, which JSON cannot hold")


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "float":
            return float(content)
        case "node":
            return nodes[content]
        case "tuple":
            return tuple(_decode(v, nodes) for v in content)
        case "dict":
            return {k: _decode(v, nodes) for k, v in content.items()}
        case "slice":
            return slice(*(_decode(v, nodes) for v in content))
        case "ellipsis":
            return ...
        case "enum":
            return _ENUMS[content]
    raise CheckpointError(f"load: unknown argument kind {kind!r}")
