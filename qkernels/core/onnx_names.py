"""Which module the tensors of an ONNX graph belong to, so that grids which name them find their place.

torch's exporter through TorchScript calls a node `/features/features.0/Conv`, after its module and those around it, and
most tensors after the node that makes them, `/features/features.0/Conv_output_0`; AIMET calls the node by its module
alone, `features.0`. Inputs and outputs of the graph, and all tensors of torch's newer exporter, have names that tell no
module (`x.1`, `85`, `conv2d_3`): for these the nodes of the graph say who makes and who reads them.
"""

import os
import re
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from qkernels.core.attach import OUTPUT
from qkernels.errors import InvalidArgument, Unsupported

SCOPES = (
    "pkg.torch.onnx.name_scopes"  # the modules around a node, the innermost last but one, as torch's exporter notes
)
Place = tuple[str, str]  # a module's path and "output" or "input<i>", the keys of `grids.Grids`


def scope_of(path: str, model: nn.Module) -> str:
    """What torch's exporter calls the module at `path`: `layer1/layer1.0/conv` for `layer1.0.conv`."""
    scopes: list[str] = []
    for i, name in enumerate(names := path.split(".")):
        parent = model.get_submodule(".".join(names[:i]))
        if isinstance(parent, (nn.Sequential, nn.ModuleList)) and scopes:
            name = f"{scopes[-1]}.{name}"
            if isinstance(parent, nn.ModuleList):  # which is never called itself
                scopes.pop()
        scopes.append(name)
    return "/".join(scopes)


def place_of(name: str, paths: Collection[str]) -> Place | None:
    """The place that a name such as `/features/features.0/Conv_output_0` tells; None if it is no module of `paths`."""
    parts = re.fullmatch(r"/(.+)/\w+_(input|output)_(\d+)", name)
    path = _path_of(parts[1], paths) if parts else None
    if path is None:
        return None
    if parts[2] == "output" and parts[3] != "0":
        raise InvalidArgument(f"{name}: modules have one output")
    return path, OUTPUT if parts[2] == "output" else f"input{parts[3]}"


def _path_of(scope: str, paths: Collection[str]) -> str | None:
    """The module of a scope: `layer1.0.conv` itself, `layer1/0/conv` or `layer1/layer1.0/conv`."""
    merged: list[str] = []
    scope = re.sub(r"#\d+(\.end)?$", "", scope)  # as AIMET numbers the nodes of one module
    for name in scope.split("/"):
        outer, _, own = name.rpartition(".")
        if outer and merged and f".{merged[-1]}".endswith(f".{outer}"):
            merged[-1] += f".{own}"
        else:
            merged.append(name)
    return next((path for path in (".".join(merged), scope.replace("/", ".")) if path in paths), None)


def places_in(file: str | os.PathLike, paths: Collection[str]) -> dict[str, list[Place]]:
    """Where each tensor of the graph in an ONNX file belongs: the output of a module, or else the inputs that read it.

    Tensors that no module of `paths` makes or reads are left out, and those inside of a module.

    Raises:
        Unsupported: the package `onnx` is not installed.
        InvalidArgument: the file holds no ONNX model.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise Unsupported(f"{os.fspath(file)}: reading the graph needs the package onnx, which is not here") from None
    try:
        graph = onnx.load(file, load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise InvalidArgument(f"{os.fspath(file)}: must be an ONNX model: {error}") from None
    stored = {tensor.name for tensor in graph.initializer}
    stored |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    owners = [(node, _owner(node, stored, paths)) for node in graph.node]
    makers = {name: owner for node, owner in owners for name in node.output}
    found: dict[str, list[Place]] = {}
    for name, path, index in _inputs(owners, makers, stored):
        if makers.get(name) is None:
            found.setdefault(name, []).append((path, f"input{index}"))
    read_elsewhere = {n for node, owner in owners for n in node.input if makers.get(n) != owner}
    for name in read_elsewhere.union(tensor.name for tensor in graph.output) - stored:
        if makers.get(name) is not None:
            found[name] = [(makers[name], OUTPUT)]
    return found


def _owner(node: Any, stored: Collection[str], paths: Collection[str]) -> str | None:
    """The module that a node is part of: by its name, the scopes noted beside it, or the parameters that it reads."""
    parts = re.fullmatch(r"/(.+)/[^/]+", node.name)
    named = _path_of(parts[1] if parts else node.name, paths)
    scopes = [p.value for p in node.metadata_props if p.key == SCOPES]
    inside = re.findall(r"'([^']*)'", scopes[0])[::-1] if scopes else []
    reads = [name.rpartition(".")[0] for name in node.input if name in stored]
    return named or next((path for path in (*inside, *reads) if path in paths), None)


def _inputs(owners: list, makers: dict[str, str | None], stored: Collection[str]) -> Iterator[tuple[str, str, int]]:
    """(tensor, module, which of its inputs): what a module reads and did not make, in the order of its nodes."""
    seen: dict[str, list[str]] = {}
    for node, owner in owners:
        for name in node.input if owner is not None else ():
            known = seen.setdefault(owner, [])
            if name and name not in stored and name not in known and makers.get(name) != owner:
                known.append(name)
                yield name, owner, len(known) - 1
