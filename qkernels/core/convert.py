"""`convert`: the integer network, built by reading the prepared one.

A Quantizer call says: here the tensor gets onto a grid. If a layer comes right before it (with at most a fused clamp
between), the two become one integer layer from the lowering table; if a float tensor comes before it, it becomes
`Quantize`. Where a float operation reads an integer tensor, `Dequantize` goes in between. Grids for which there are no
integer layers (more than 8 bits, blocks) stay simulated: `FakeQuantize` rounds the float tensor.

Node names: the layers keep the path of the float module they come from, or the name of the float call.
`meta["sources"]` of the converted graph maps each layer's path to the node whose output it computes, in the graph that
`qkernels.core.graph.trace` makes of the float model.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from qkernels.core import graph as g
from qkernels.core import operations as o
from qkernels.core.expect import expect_calibrated
from qkernels.core.fusion import clamp_of, is_fused
from qkernels.core.graph import NetworkGraph
from qkernels.core.layers import Prepared
from qkernels.core.lowering import Clamp, LoweringUnit, lower
from qkernels.core.norm import as_torch_norm
from qkernels.core.operations import Operation
from qkernels.core.peephole import merge_layers
from qkernels.core.placed import Leave
from qkernels.core.placement import unit_of
from qkernels.core.plain import compute_formulas
from qkernels.core.prepare import PreparedModel, prepared_layers
from qkernels.core.qspec import MIN_SCALE, QParams
from qkernels.core.quantizer import Quantizer
from qkernels.core.registry import is_layer, layer_class
from qkernels.core.report import PrepareReport


class ConvertedModel(NetworkGraph):
    """An integer network: what `convert` returns for a model that has a graph."""

    def __prepare_scriptable__(self) -> nn.Module:
        """For `torch.jit.script`: a plain graph, whose layers are replaced where the original's are not."""
        return fx.GraphModule(self, self.graph, type(self).__name__)


def convert(prepared: nn.Module) -> nn.Module:
    """The integer network of a calibrated model; `prepared` stays as it is.

    Takes and returns float tensors as the original did; int8 and uint8 tensors flow inside. All grids are fixed now.

    Args:
        prepared: what `prepare` returned, calibrated, or what `prepare_qat` returned, trained; or a module around it.

    Raises:
        InvalidArgument: the model does not come from `prepare`, or is converted already.
        InvalidState: it was not calibrated.
        CalibrationError: a weight or a bias holds NaN or an infinity.
    """
    if isinstance(prepared, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        prepared = prepared.module
    expect_calibrated("convert", prepared)
    compute_formulas(prepared)
    for layer in prepared_layers(prepared):
        layer.check_finite()
    parts = {path: m for path, m in prepared.named_modules() if isinstance(m, PreparedModel)}
    copies: dict[int, Any] = {}  # one for all: what is shared stays shared
    converted = {id(part): _Converter(part, path, copies).build() for path, part in parts.items()}
    # The memo puts each converted part in the place of its prepared one.
    model = copy.deepcopy(prepared, copies | converted).eval()
    for module in model.modules():
        as_torch_norm(module)
    return model


class _Converter:
    """Builds the converted graph node by node. A prepared value has up to two forms in it, float and integer."""

    def __init__(self, prepared: PreparedModel, prefix: str, copies: dict[int, Any]):
        self.prepared, self.prefix, self.copies = prepared, prefix, copies
        self.modules = g.modules_of(prepared)
        self.graph = fx.Graph()
        self.root: dict[str, Any] = {}
        self.torch_paths: dict[str, str] = {}  # of modules of the prepared model that are called as they are
        self.sources: dict[str, str] = {}
        self.stayed_float: dict[str, str] = {}
        self.floats: dict[fx.Node, Any] = {}  # a dtype that is known stands for the node that reads it
        self.codes: dict[fx.Node, fx.Node] = {}
        self.grids: dict[fx.Node, QParams] = {}

    def build(self) -> ConvertedModel:
        for node in self.prepared.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.floats[node] = self._copied(node)
            elif node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self.float_of))
            elif self._quantizer(node) is not None:
                self._onto_grid(node)
            elif isinstance(self.modules.get(node.target), Leave):
                self.floats[node] = self.float_of(node.args[0])
            elif self._keeps_grid(node):
                self._on_codes(node)
            elif node.op == "call_function" and node.is_impure():
                self._copied(node)  # an assertion on an argument
        self.graph.lint()
        converted = ConvertedModel(self.root, self.graph, type(self.prepared).__name__).eval()
        self._remove_unused(converted)
        converted.meta["sources"] = self.sources
        merge_layers(converted)
        converted.meta["report"] = self._report()
        converted.adopt(self.prepared.meta.get("attributes", {}))
        for path, module in converted.named_modules():
            if is_layer(module):
                module.pack_numbers()
            if hasattr(module, "reference_forward"):
                module.name = ".".join(p for p in (self.prefix, path) if p)
        return converted

    def _report(self) -> PrepareReport:
        """What `prepare` reported, and what turned out float for the grids that were chosen."""
        late = {".".join(p for p in (self.prefix, path) if p): why for path, why in self.stayed_float.items()}
        return PrepareReport(
            tuple(
                replace(row, integer=False, reason=late[row.name]) if row.name in late else row
                for row in self.prepared.report
            )
        )

    # -- the two forms of a value

    def float_of(self, node: fx.Node) -> fx.Node:
        """The node as float32 (or whatever is not quantized) in the converted graph."""
        if node not in self.floats:
            if node in self.codes and o.is_contiguous_call(node):
                self.floats[node] = self._copied(node)
            elif node in self.codes and node.meta["value"].kind == "tensor":
                layer = layer_class("dequantize")(self.grids[node])
                self.floats[node] = self._call(f"{node.name}_dequantize", layer, (self.codes[node],), node)
            else:
                self.floats[node] = (
                    self._float_output_layer(node) or self._float_borders_layer(node) or self._copied(node)
                )
        return self.floats[node]

    def _float_output_layer(self, node: fx.Node) -> fx.Node | None:
        """A linear or convolution on codes that stores float32, where only float operations read it."""
        op = self._integer_operation(node)
        if op is None or op.kind not in o.WEIGHTED or op.inputs[0] not in self.codes:
            return None
        layer = lower(unit_of(node, op, (self.grids[op.inputs[0]],), None))
        return self._call(node.target, layer, (self.codes[op.inputs[0]],), node)

    def _float_borders_layer(self, node: fx.Node) -> fx.Node | None:
        """A layer on codes that itself takes what the float layer takes, and returns floats."""
        module = self.modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(module, Prepared) or not module.float_borders:
            return None
        return self._call(node.target, module.lowered(), (self.float_of(node.all_input_nodes[0]),), node)

    def _copied(self, node: fx.Node) -> Any:
        """The same float operation in the converted graph; the dtype itself where codes have another one."""
        if node.op == "call_module":
            return self._torch_call(node, self.float_of)
        if node.op == "get_attr":
            self.root[node.target] = copy.deepcopy(_attribute(self.prepared, node.target), self.copies)
        elif node.target is getattr and node.args[1] == "dtype" and node.args[0] in self.codes:
            return node.args[0].meta["value"].dtype
        if o.reads_shape_only(node):
            return self.graph.node_copy(node, self._either)
        return self.graph.node_copy(node, self._in_order if o.reads_memory(node) else self.float_of)

    def _torch_call(self, node: fx.Node, form: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """A call of a torch module, under another path where one of its calls became an integer layer."""
        path = self.torch_paths.get(node.target)
        if path is None:
            path = self.torch_paths[node.target] = self._free(node.target)
            self.root[path] = self._float_module(self.modules[node.target])
        call = self.graph.node_copy(node, form)
        call.target = path
        return call

    def _either(self, node: fx.Node) -> fx.Node:
        """Any form: sizes are the same."""
        return self.codes[node] if node in self.codes else self.float_of(node)

    def _in_order(self, node: fx.Node) -> fx.Node:
        """The float form in the memory of the float model, where images of the default layout come in."""
        op = o.operation(node, self.modules)
        if op is not None and op.kind == o.PASS:
            return self.graph.node_copy(node, self._in_order)
        is_integer = op is not None and node.meta.get("integer", False)
        stored_by_layer = node in self.codes or (is_integer and op.kind in o.WEIGHTED)
        value = self.float_of(node)
        return self.graph.call_method("contiguous", (value,)) if stored_by_layer else value

    def _float_module(self, module: nn.Module) -> nn.Module:
        if not isinstance(module, Prepared):
            return copy.deepcopy(module, self.copies)
        return module.as_float()  # it reads a float tensor

    # -- nodes on codes

    def _integer_operation(self, node: fx.Node) -> Operation | None:
        """What the node computes, if `prepare` made it integer."""
        return o.operation(node, self.modules) if node.meta.get("integer", False) else None

    def _quantizer(self, node: fx.Node) -> Quantizer | None:
        module = self.modules.get(node.target) if node.op == "call_module" else None
        return module if isinstance(module, Quantizer) else None

    def _keeps_grid(self, node: fx.Node) -> bool:
        """Whether this is an operation that keeps the grid, and its inputs are codes on one and the same grid."""
        op = self._integer_operation(node)
        if op is None or op.kind not in o.SAME_GRID | {o.PASS, o.PAD, o.DROPOUT, "cat"}:
            return False
        grids = [self.grids.get(n) for n in op.inputs]
        return grids[0] is not None and all(grid == grids[0] for grid in grids)

    def _on_codes(self, node: fx.Node) -> None:
        op = o.operation(node, self.modules)
        grid = self.grids[node] = self.grids[op.inputs[0]]
        inputs = tuple(self.codes[n] for n in op.inputs)
        if op.kind == o.DROPOUT:
            self.codes[node] = inputs[0]
        elif op.kind == "cat":
            layer = lower(unit_of(node, op, (grid,) * len(inputs), grid))
            self.codes[node] = self._call(self._path(node), layer, (list(inputs),), node)
        elif op.kind == o.PAD:
            self.codes[node] = self._pad(node, op, grid)
        elif op.kind in o.SAME_GRID and not op.has_computed_options:
            layer = lower(unit_of(node, op, (grid,), grid))
            self.codes[node] = self._call(self._path(node), layer, inputs, node)
        else:
            self.codes[node] = self._same_call(node)

    def _same_call(self, node: fx.Node) -> fx.Node:
        """The torch operation itself, on codes."""
        if o.is_contiguous_call(node):
            return self.codes[node.args[0]]  # layout is the layers' own business
        if node.op == "call_module":
            return self._torch_call(node, self._either)
        return self.graph.node_copy(node, self._either)

    def _pad(self, node: fx.Node, op: Operation, grid: QParams) -> fx.Node:
        """Zeros are the code of zero."""
        amounts = op.options.get("pad", getattr(op.module, "padding", None))
        amounts = fx.map_arg(amounts, self._either)
        code = grid.item()[1]
        return self.graph.call_function(
            torch.nn.functional.pad, (self.codes[op.inputs[0]], amounts), {"mode": "constant", "value": code}
        )

    def _onto_grid(self, node: fx.Node) -> None:
        """A Quantizer call: what comes before it becomes an integer layer with this grid as output."""
        quantizer = self._quantizer(node)
        source = node.args[0]
        if quantizer.spec.simulated:
            layer = layer_class("fake_quantize")(quantizer.qparams())
            self.floats[node] = self._call(f"{source.name}_fake_quantize", layer, (self.float_of(source),), source)
            return
        grid = self.grids[node] = quantizer.qparams()
        if quantizer.rule is not None and quantizer.rule.is_sign:
            self.codes[node] = self._signs(node, source, grid)
            return
        if source in self.codes:
            if self.grids[source] == grid:
                self.codes[node] = self.codes[source]
            else:
                layer = lower(LoweringUnit("requantize", (self.grids[source],), grid))
                self.codes[node] = self._call(f"{node.name}_requantize", layer, (self.codes[source],), source)
            return
        self.codes[node] = self._computed(source, grid, _clamp_in(node))

    def _computed(self, source: fx.Node, grid: QParams, clamp: Clamp | None) -> fx.Node:
        """`source`, limited to `clamp`, on a grid: by an integer layer if there is one."""
        return self._integer_layer(source, grid, clamp) or self._quantized(source, grid, clamp)

    def _signs(self, node: fx.Node, source: fx.Node, grid: QParams) -> fx.Node:
        """Codes of plus and minus one. What is computed first goes onto a grid so fine that only the sign is left."""
        codes, before = self.codes.get(source), self.grids.get(source)
        if codes is None:
            zero = grid.item()[1]
            before = QParams.per_tensor(MIN_SCALE, zero, zero - 1, zero + 1, grid.dtype)
            codes = self._computed(source, before, _clamp_in(node))
        layer = lower(LoweringUnit("binarize", (before,), grid))
        return self._call(f"{node.name}_binarize", layer, (codes,), source)

    def _quantized(self, source: fx.Node, grid: QParams, clamp: Clamp | None) -> fx.Node:
        """A float tensor on its way onto a grid; one that belongs to the model is rounded now."""
        if clamp is not None:
            limited = self.graph.call_function(torch.clamp, (self.float_of(source), clamp.low, clamp.high))
            return self._call(f"{source.name}_quantize", layer_class("quantize")(grid), (limited,), source)
        if source.op != "get_attr":
            layer = layer_class("quantize")(grid)
            return self._call(f"{source.name}_quantize", layer, (self.float_of(source),), source)
        name = self._free(f"{source.name}_codes")  # the same tensor may be on another grid too
        self.root[name] = grid.quantize(_attribute(self.prepared, source.target).detach())
        return self.graph.get_attr(name)

    def _integer_layer(self, node: fx.Node, output: QParams, clamp: Clamp | None) -> fx.Node | None:
        """`node`, with a clamp that it is part of, as an integer layer; None if it reads float tensors."""
        op, source = self._integer_operation(node), node
        if clamp is None and op is not None and op.kind in o.CLAMPS:
            before = op.inputs[0]
            producer = self._integer_operation(before)
            if producer is not None and before not in self.codes and is_fused(producer.kind, op.kind):
                clamp, node, op = clamp_of(op), before, producer
        if (
            op is None
            or op.kind in (o.PASS, o.PAD, o.DROPOUT, "identity")
            or not all(n in self.codes for n in op.inputs)
        ):
            return None
        try:
            layer = lower(unit_of(node, op, tuple(self.grids[n] for n in op.inputs), output, clamp))
        except NotImplementedError as error:
            if op.kind in o.WEIGHTED:
                raise
            self.stayed_float[node.meta["path"]] = str(error)  # such as a square root where the grid has negative codes
            return None
        codes = tuple(self.codes[n] for n in op.inputs)
        return self._call(self._path(node), layer, (list(codes),) if op.kind == "cat" else codes, source)

    # -- the new graph

    def _path(self, node: fx.Node) -> str:
        return node.target if node.op == "call_module" else node.meta["path"]

    def _free(self, path: str) -> str:
        while path in self.root:
            path += "_"
        return path

    def _call(self, path: str, layer: nn.Module, args: tuple, source: fx.Node) -> fx.Node:
        path = self._free(path)
        self.root[path] = layer
        self.sources[path] = source.meta.get("origin", source.name)
        node = self.graph.call_module(path, args)
        node.meta["source"] = self.sources[path]
        node.meta["value"] = source.meta["value"]
        return node

    def _remove_unused(self, converted: ConvertedModel) -> None:
        before = _attributes_read(converted)
        converted.graph.eliminate_dead_code()
        for path in before - _attributes_read(converted):  # codes stand for them
            owner, _, name = path.rpartition(".")
            delattr(converted.get_submodule(owner), name)
        converted.delete_all_unused_submodules()
        converted.recompile()
        alive = {node.target for node in converted.graph.nodes if node.op == "call_module"}
        self.sources = {path: source for path, source in self.sources.items() if path in alive}


def _attributes_read(model: fx.GraphModule) -> set[str]:
    return {node.target for node in model.graph.nodes if node.op == "get_attr"}


def _clamp_in(node: fx.Node) -> Clamp | None:
    """The clamp that a Quantizer call of a trained model does too."""
    return Clamp(*node.kwargs["clamp"]) if "clamp" in node.kwargs else None


def _attribute(root: nn.Module, path: str) -> Any:
    for part in path.split("."):
        root = getattr(root, part)
    return root
