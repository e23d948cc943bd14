"""Converted models on disk: one safetensors file, no pickle, every bit covered by a checksum.

The tensors are canonical (int8 weights, grids, bias, tables), so a file written on one machine runs on any other. The
structure - layers with their configs, the graph between them - is JSON in the safetensors metadata:

    qkernels        format version
    model           module specification, see `_describe`
    tensor_sha256   name -> digest of its bytes
    sha256          digest of the whole file, taken with this field set to zeros

Any safetensors reader can list the tensors. Building the graph again makes only layers, modules, functions and methods
of fixed lists.
"""

import builtins
import copy
import hashlib
import inspect
import json
import math
import operator
import os
import secrets
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qkernels.core.convert import ConvertedModel
from qkernels.core.quantizer import Quantizer
from qkernels.core.registry import is_layer, layer_class
from qkernels.core.report import Decision, PrepareReport
from qkernels.errors import CheckpointError, InvalidArgument, Unsupported


def _words(text: str) -> list[str]:
    return text.split()


FORMAT_VERSION = "1"
_ZERO_DIGEST = "0" * 64
_DIGEST_FIELD = b'"sha256":"'

_FUNCTION_NAMES = {
    "torch": (
        torch,
        "abs add bmm cat chunk clamp clone concat cos div einsum eq erf exp flatten flip floor_divide ge gt le log lt "
        "matmul max maximum mean min minimum mul narrow ne neg outer permute pow relu reshape rsqrt select sigmoid sin "
        "softmax split sqrt squeeze stack sub sum swapaxes tanh transpose unbind unflatten unsqueeze where",
    ),
    "torch.nn.functional": (
        F,
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d avg_pool1d avg_pool2d "
        "avg_pool3d celu dropout elu gelu glu hardsigmoid hardswish hardtanh interpolate layer_norm leaky_relu "
        "log_softmax max_pool1d max_pool2d max_pool3d mish normalize pad pixel_shuffle prelu relu relu6 "
        "scaled_dot_product_attention selu sigmoid silu softmax softplus tanh unfold",
    ),
    "operator": (operator, "add eq floordiv ge getitem gt le lt matmul mod mul ne neg pow sub truediv"),
    "builtins": (builtins, "getattr int float len"),
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{prefix}.{name}": getattr(module, name)
    for prefix, (module, names) in _FUNCTION_NAMES.items()
    for name in names.split()
}
_FUNCTION_OF: dict[Callable[..., Any], str] = {function: name for name, function in reversed(_FUNCTIONS.items())}
_METHODS = frozenset(
    _words(
        "abs add chunk clamp clone contiguous dim expand expand_as flatten float mean mul narrow permute relu "
        "reshape size softmax split squeeze sub sum tanh to transpose unbind unflatten unsqueeze view view_as "
        "sigmoid sqrt pow div matmul bmm max min amax repeat type_as detach select masked_fill t"
    )
)
_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim", "T", "mT"})  # that the graph may read by getattr
_NN_CLASSES = frozenset(
    _words(
        "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool2d AvgPool1d AvgPool2d AvgPool3d "
        "BatchNorm1d BatchNorm2d BatchNorm3d CELU Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d "
        "ConvTranspose3d Dropout Dropout1d Dropout2d Dropout3d ELU Embedding Flatten GELU GLU GroupNorm Hardsigmoid "
        "Hardswish Hardtanh Identity InstanceNorm1d InstanceNorm2d InstanceNorm3d LayerNorm LeakyReLU Linear "
        "LogSoftmax MaxPool1d MaxPool2d MaxPool3d Mish PReLU PixelShuffle ReLU ReLU6 SELU SiLU Sigmoid Softmax "
        "Softmax2d Softplus Softsign Tanh Unflatten Upsample ZeroPad2d"
    )
)
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


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes a converted model to `path`, atomically: the file there is the old one or the new one, never a part.

    A model that could not be traced as a whole is written too, without its Python code: `load(path, skeleton=model)`
    then needs an instance of the original class.

    Raises:
        Unsupported: the graph holds a function or a module that cannot be described in JSON; the message names it.
    """
    if any(isinstance(module, Quantizer) for module in model.modules()):
        raise InvalidArgument("save: the model is prepared, not converted: call qkernels.convert(prepared) first")
    tensors = {name: t.detach().contiguous().cpu().clone() for name, t in model.state_dict().items()}
    content = {
        "model": _describe(model, ""),
        "tensor_sha256": {name: _digest(t) for name, t in tensors.items()},
    }
    metadata = {"qkernels": FORMAT_VERSION, "content": json.dumps(content, allow_nan=False), "sha256": _ZERO_DIGEST}
    blob = bytearray(safetensors.torch.save(tensors, metadata))
    at = _digest_position(blob)
    blob[at : at + 64] = hashlib.sha256(blob).hexdigest().encode()
    _write_atomically(Path(path), blob)


def load(path: str | os.PathLike, skeleton: nn.Module | None = None) -> nn.Module:
    """Reads a model that `save` wrote.

    Args:
        path: the file.
        skeleton: needed only for a model that could not be traced as a whole: an instance of the float model, whose
            Python code is used (it is copied, not changed).

    Raises:
        CheckpointError: the file is truncated, damaged in any bit, not a qkernels file, or of another format version.
        InvalidArgument: a skeleton is needed, or does not fit.
    """
    blob = bytearray(Path(path).read_bytes())
    content = _checked_content(blob, path)
    tensors = safetensors.torch.load(bytes(blob))
    try:
        model = _build(content["model"], tensors, "", skeleton)
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"load: {path}: malformed model description ({error!r})") from error
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if missing or unexpected:
        raise CheckpointError(f"load: {path}: tensors {missing + unexpected} do not match the model description")
    return model.eval()


# ---- the file ----


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()


def _header_end(blob: bytearray) -> int | None:
    """The end of the safetensors header, or None if its length is impossible."""
    if len(blob) < 8:
        return None
    (length,) = struct.unpack_from("<Q", blob)
    return 8 + length if length <= len(blob) - 8 else None


def _digest_position(blob: bytearray) -> int:
    """Where the hexadecimal file digest stands, or -1."""
    end = _header_end(blob)
    at = -1 if end is None else blob.find(_DIGEST_FIELD, 8, end)
    return -1 if at < 0 or at + len(_DIGEST_FIELD) + 64 > len(blob) else at + len(_DIGEST_FIELD)


def _checked_content(blob: bytearray, path: Any) -> dict[str, Any]:
    """The description in the header, after the digest of the whole file has been found right."""
    at = _digest_position(blob)
    if at < 0:
        raise CheckpointError(f"load: {path} is not a qkernels model, or is truncated ({len(blob)} bytes)")
    stated = bytes(blob[at : at + 64])
    blob[at : at + 64] = _ZERO_DIGEST.encode()
    if hashlib.sha256(blob).hexdigest().encode() != stated:
        raise CheckpointError(f"load: {path} is damaged: {_what_is_damaged(blob)}. Restore it from a good copy")
    metadata = json.loads(blob[8 : _header_end(blob)])["__metadata__"]
    if metadata.get("qkernels") != FORMAT_VERSION:
        raise CheckpointError(
            f"load: {path} has format version {metadata.get('qkernels')!r}; this qkernels reads {FORMAT_VERSION!r}"
        )
    return json.loads(metadata["content"])


def _what_is_damaged(blob: bytearray) -> str:
    """The first tensor whose bytes are wrong, if the header can still be read."""
    end = _header_end(blob)
    try:
        header = json.loads(bytes(blob[8:end]))
        digests = json.loads(header["__metadata__"]["content"])["tensor_sha256"]
        for name, digest in digests.items():
            start, stop = header[name]["data_offsets"]
            if hashlib.sha256(blob[end + start : end + stop]).hexdigest() != digest:
                return f"tensor {name!r} fails its checksum"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "the header fails its checksum"
    return "the file fails its checksum"


def _write_atomically(path: Path, blob: bytearray) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


# ---- modules ----


def _describe(module: nn.Module, path: str) -> dict[str, Any]:
    """A module as JSON: a converted layer, a torch.nn module, a sequence, a graph, or a skeleton around those."""
    if is_layer(module):
        return {"layer": module.get_config()}
    if isinstance(module, fx.GraphModule):
        return _describe_graph(module, path)
    if type(module) is nn.Sequential:
        return {"sequential": _describe_children(module, path)}
    if type(module) is getattr(nn, type(module).__name__, None) and type(module).__name__ in _NN_CLASSES:
        return {"nn": type(module).__name__, "arguments": _constructor_arguments(module, path)}
    return {"skeleton": type(module).__qualname__, "children": _describe_children(module, path)}


def _describe_children(module: nn.Module, path: str) -> dict[str, Any]:
    return {name: _describe(child, _join(path, name)) for name, child in module.named_children()}


def _constructor_arguments(module: nn.Module, path: str) -> dict[str, Any]:
    """What to call the class of a torch.nn module with: its attributes of the names of the constructor's parameters."""
    arguments = {}
    for name in inspect.signature(type(module).__init__).parameters:
        if name in ("self", "device", "dtype", "inplace", "args", "kwargs") or not hasattr(module, name):
            continue
        value = getattr(module, name)
        if name == "bias" or name.startswith("_"):
            value = value is not None
        elif isinstance(value, Tensor):
            continue
        arguments[name] = _encode(value, path)
    return arguments


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
            name = getattr(target, "__qualname__", repr(target))
            raise Unsupported(
                f"save: graph {path!r} calls {name} at node {node.name!r}, which is not in the list of functions that "
                "a file may call. Use an equivalent of torch or torch.nn.functional"
            )
        target = _FUNCTION_OF[target]
    elif node.op == "call_method" and target not in _METHODS:
        raise Unsupported(
            f"save: graph {path!r} calls Tensor.{target} at node {node.name!r}, which a file may not call"
        )
    if target == "builtins.getattr" and node.args[1] not in _ATTRIBUTES:
        raise Unsupported(f"save: graph {path!r} reads attribute {node.args[1]!r}, which a file may not read")
    where = f"{path}:{node.name}"
    return {
        "op": node.op,
        "name": node.name,
        "target": target,
        "args": [_encode(a, where) for a in node.args],
        "kwargs": {k: _encode(v, where) for k, v in node.kwargs.items()},
    }


def _build(spec: dict[str, Any], tensors: dict[str, Tensor], path: str, skeleton: nn.Module | None) -> nn.Module:
    if "layer" in spec:
        module = layer_class(spec["layer"]["kind"]).from_config(spec["layer"])
        module.name = path
        return module
    if "nn" in spec:
        if spec["nn"] not in _NN_CLASSES:
            raise CheckpointError(f"load: {spec['nn']!r} is not in the list of modules that a file may hold")
        return getattr(nn, spec["nn"])(**{name: _decode(v, {}) for name, v in spec["arguments"].items()})
    if "sequential" in spec:
        children = {name: _build(s, tensors, _join(path, name), None) for name, s in spec["sequential"].items()}
        return nn.Sequential(OrderedDict(children))
    if "graph" in spec:
        return _build_graph(spec, tensors, path)
    return _fill_skeleton(spec, tensors, path, skeleton)


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
    model = copy.deepcopy(skeleton) if not path else skeleton
    for child, child_spec in spec["children"].items():
        setattr(model, child, _build(child_spec, tensors, _join(path, child), getattr(model, child, None)))
    return model


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
            root[target] = torch.zeros_like(tensors[_join(path, target)])
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
