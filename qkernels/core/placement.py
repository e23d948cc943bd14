"""Which operations of a graph become integer, and at which tensors grids are chosen: the decisions of `prepare`.

- the output of a layer, after a clamp fused into it; not between the two (`qkernels.core.fusion`)
- a float tensor (an input, the output of a float operation) on its way into an integer layer
- not after pooling by maximum, reshapes and the like: their output is on the grid of their input
- all inputs of a concatenation share one Quantizer, so that it only copies
- not after a last linear or convolution that only float operations read: it stores float32 directly

`qkernels.core.placed` decides otherwise: where somebody else says so.
"""

import re
from typing import Any

import torch
from torch import fx, nn

from qkernels.core import graph as g
from qkernels.core import operations as o
from qkernels.core.dynamic import PreparedDynamicLinear, why_not_dynamic
from qkernels.core.embedding import PreparedEmbedding, can_round
from qkernels.core.fusion import clamp_of, has_constant_clamp, is_fused
from qkernels.core.layers import PREPARED
from qkernels.core.lowering import LoweringUnit, lower, lowerable_kinds
from qkernels.core.operations import Operation
from qkernels.core.plain import has_hooks
from qkernels.core.qspec import QParams
from qkernels.core.quantizer import Quantizer
from qkernels.core.recipe import TensorRecipe
from qkernels.core.report import Decision, PrepareReport
from qkernels.errors import Unsupported

QUANTIZERS = "activation_quantizers"
LARGEST_K = {torch.uint8: 65_793, torch.int8: 131_071}  # products of 8-bit codes that an int32 surely holds


class Placement:
    """Which nodes are integer, and where Quantizers go."""

    def __init__(
        self, traced: fx.GraphModule, rule, norms: dict[str, nn.Module], corrections: list[str], trained: bool
    ):
        self.traced, self.rule, self.norms = traced, rule, norms
        self.corrections, self.trained = corrections, trained
        self.modules = g.modules_of(traced)
        self.nodes = list(traced.graph.nodes)
        self.readers = {node: list(node.users) for node in self.nodes}  # before any Quantizer
        self.operations = {node: o.operation(node, self.modules) for node in self.nodes}
        self.reasons: dict[fx.Node, str] = {}
        self.dynamic: set[fx.Node] = set()  # linear layers that quantize their input when it arrives
        for node in self.nodes:
            reason = self._why_float(node)
            if reason is not None:
                self.reasons[node] = reason
        self.integer = self._reached()
        self._prune()
        for node in self.integer:
            node.meta["integer"] = True

    # -- what can be integer

    def _why_float(self, node: fx.Node) -> str | None:
        """Why this node cannot be integer; None if it can."""
        op, value = self.operations[node], node.meta.get("value")
        if node.op == "call_module" and has_hooks(self.modules[node.target]):
            return "has forward hooks, which an integer layer would not run"
        if op is None or op.kind == "identity" or (op.kind == o.DROPOUT and node.op != "call_module"):
            return f"no integer layer for {called(node, self.modules)}"
        rule = self.rule(node)
        if rule.skip:
            return "skipped by the recipe"
        if not value.is_float or not all(n.meta["value"].is_float for n in op.inputs):
            return "does not compute float32 tensors"
        if rule.activation.dynamic:
            return self._why_float_dynamic(node, op)
        if op.kind in (o.PASS, o.DROPOUT):
            return None
        if op.kind == o.PAD:
            return self._why_float_pad(op)
        if op.kind in o.WEIGHTED:
            return self.rule(node).weight.spec.simulated or self._why_float_weighted(node, op)
        if op.kind == "interpolate" and op.has_computed_options:
            return self._why_float_interpolate(node, op)
        if op.has_computed_options:
            return f"an argument of {op.kind} is computed at run time"
        if op.kind not in lowerable_kinds():
            return f"no integer layer for {op.kind}"
        if op.kind in o.CLAMPS and not has_constant_clamp(op):
            return "its limits are not numbers"
        return self._why_not_lowered(node, op)

    def _why_float_dynamic(self, node: fx.Node, op: Operation) -> str:
        reason = self._why_no_weight(op) if op.kind in o.WEIGHTED else None
        reason = reason or why_not_dynamic(node, op, self.rule(node))
        if reason is None and self.trained:
            raise Unsupported(
                f"prepare_qat: {node.meta['path']} would quantize its input when it arrives, which is not trained: "
                "take a recipe with calibrated activations"
            )
        if reason is not None:
            return reason
        self.dynamic.add(node)
        return "quantizes its input when it arrives; input and output are float"

    def _why_no_weight(self, op: Operation) -> str | None:
        layer = op.module
        if layer is None or layer._parameters.get("weight") is None:
            return "its weight is computed, not a parameter"
        if layer.weight.dtype != torch.float32:
            return f"its weight is {layer.weight.dtype}, not float32"
        return None

    def _why_float_weighted(self, node: fx.Node, op: Operation) -> str | None:
        layer, rank = op.module, len(op.inputs[0].meta["value"].shape)
        if (reason := self._why_no_weight(op)) is not None:
            return reason
        if op.kind == "conv" and rank != layer.weight.dim():
            return "its input has no batch dimension"
        depth = layer.weight[:, 0].numel() if getattr(layer, "transposed", False) else layer.weight[0].numel()
        most = LARGEST_K[self.rule(node).activation.spec.dtype]
        if depth > most:
            return f"sums {depth} products; an int32 accumulator surely holds {most}"
        return self._why_not_lowered(node, op)

    def _why_float_pad(self, op: Operation) -> str | None:
        mode = op.options.get("mode", "constant")
        value = op.options.get("value", getattr(op.module, "value", None))
        if mode != "constant" or value not in (None, 0, 0.0):
            return f"pad with mode={mode!r}, value={value} has no integer form; there is one for zeros"
        return None

    def _why_float_interpolate(self, node: fx.Node, op: Operation) -> str | None:
        if op.options.get("mode", "nearest") not in ("nearest", "nearest-exact"):
            return f"no integer layer for interpolate with mode={op.options['mode']!r}"
        if self.rule(node).activation.spec.dtype != torch.uint8:
            return "interpolate to a size computed at run time takes uint8 only"
        return None

    def _why_not_lowered(self, node: fx.Node, op: Operation) -> str | None:
        """Tries the lowering with a stand-in for every grid."""
        dims = re.search(
            r"([123])d", getattr(node.target, "__name__", "") if op.module is None else type(op.module).__name__
        )
        rank = len(op.inputs[0].meta["value"].shape)
        if dims is not None and op.kind not in o.WEIGHTED and rank != int(dims[1]) + 2:
            return "its input has no batch dimension"
        spec = self.rule(node).activation.spec
        grid = QParams.per_tensor(1.0, spec.qmin, spec.qmin, spec.qmax, spec.dtype)
        try:
            lower(unit_of(node, op, (grid,) * len(op.inputs), grid, stand_in=True))
        except NotImplementedError as error:
            return str(error)
        return None

    # -- what is integer

    def _reached(self) -> set[fx.Node]:
        """Weighted layers, and from there on everything that can be."""
        integer: set[fx.Node] = set()
        for node in self.nodes:
            if node in self.reasons:
                continue
            op = self.operations[node]
            from_integer = any(n in integer for n in op.inputs)
            starts = op.kind in o.ARITHMETIC | o.SAME_GRID and any(n.op == "placeholder" for n in op.inputs)
            if op.kind in o.WEIGHTED or from_integer or starts:
                integer.add(node)
        return integer

    def _prune(self) -> None:
        """Leaves out what only rearranges, transforms or adds values on their way to float readers."""
        for node in reversed(self.nodes):
            if node not in self.integer or self.operations[node].kind in o.WEIGHTED | o.AVERAGES:
                continue
            layer = self._fused_into(node) or node
            if self.operations[layer].kind in o.ARITHMETIC and all(r.op == "output" for r in self.readers[node]):
                continue
            if not any(reader in self.integer for reader in self.readers[node]):
                self.integer.discard(node)
                self.reasons[node] = "only float operations read it"

    def _fused_into(self, node: fx.Node) -> fx.Node | None:
        """The layer that `node`, a clamp, is part of."""
        op = self.operations[node]
        if node not in self.integer or op is None or op.kind not in o.CLAMPS:
            return None
        before = op.inputs[0]
        if before not in self.integer or len(self.readers[before]) != 1:
            return None
        return before if is_fused(self.operations[before].kind, op.kind) else None

    # -- where grids are chosen

    def owns_grid(self, node: fx.Node) -> bool:
        """Whether the output of this integer node goes onto a grid of its own."""
        kind = self.operations[node].kind
        if kind in o.SAME_GRID or kind in (o.PASS, o.PAD, o.DROPOUT, "cat"):
            return False
        readers = self.readers[node]
        if len(readers) == 1 and self._is_fused_clamp(readers[0]):
            return False
        return kind not in o.WEIGHTED or any(reader in self.integer for reader in readers)

    def _is_fused_clamp(self, node: fx.Node) -> bool:
        return node in self.integer and self._fused_into(node) is not None

    def activation(self, node: fx.Node) -> TensorRecipe:
        """How the output of the node gets its grid; a fused clamp goes by the layer that it is part of."""
        return self.rule(self._layer_of(node)).activation

    def _layer_of(self, node: fx.Node) -> fx.Node:
        return self._fused_into(node) or node

    def insert_quantizers(self) -> None:
        self._wrap_weighted()
        owners = self._share_over_cats()
        quantizers: dict[fx.Node, str] = {}
        device = next((p.device for p in self.traced.parameters()), None)
        last_input = [n for n in self.nodes if n.op == "placeholder"][-1]

        def call(value: fx.Node, owner: fx.Node) -> fx.Node:
            """A call of the Quantizer that belongs to `owner`, on `value`, right behind it."""
            if owner not in quantizers:
                path = f"{QUANTIZERS}.{self._quantizer_name(owner)}"
                source = self._layer_of(owner).meta["path"]
                self.traced.add_submodule(
                    path, Quantizer(self.activation(owner), source, None, self.trained).to(device)
                )
                quantizers[owner] = path
            with self.traced.graph.inserting_after(last_input if value.op == "placeholder" else value):
                node = self.traced.graph.call_module(quantizers[owner], (value,))
            node.meta = {**value.meta, "integer": False}
            return node

        inserted: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            if node in self.integer and self.owns_grid(node):
                inserted[node] = call(node, owners.get(node, node))
                for reader in self.readers[node]:
                    reader.replace_input_with(node, inserted[node])
        self._quantize_float_inputs(call, owners, inserted)
        self._join_calls(set(quantizers.values()))
        self.traced.graph.lint()
        self.traced.recompile()

    def _join_calls(self, paths: set[str]) -> None:
        """What a Quantizer of a concatenation watches in one forward, it watches as one tensor."""
        called = set()
        for node in self.traced.graph.nodes:
            if node.op != "call_module" or node.target not in paths:
                continue
            if node.target in called:
                node.kwargs = {"joined": True}
                self.traced.get_submodule(node.target).joins = True
            called.add(node.target)

    def _quantizer_name(self, owner: fx.Node) -> str:
        """The node's name, with underscores if modules have an attribute of that name, such as `half`."""
        name, module, others = owner.name, nn.Module(), {node.name for node in self.nodes}
        while hasattr(module, name) or (name != owner.name and name in others):
            name += "_"
        return name

    def _quantize_float_inputs(self, call, owners: dict, inserted: dict) -> None:
        """Grids for float tensors that integer nodes read, and for cat operands that live on another grid."""
        made: dict[tuple[fx.Node, Any], fx.Node] = {}
        for node in self.nodes:
            if node not in self.integer:
                continue
            is_cat = self.operations[node].kind == "cat"
            for value in dict.fromkeys(self.operations[node].inputs):
                if not is_cat and self._is_integer_value(value):
                    continue
                if is_cat and self._grid_owner(value, owners) is owners[node]:
                    continue
                owner = owners[node] if is_cat else value
                key = (value, owner)
                if key not in made:
                    made[key] = call(inserted.get(value, value), owner)
                node.replace_input_with(inserted.get(value, value), made[key])

    def _is_integer_value(self, node: fx.Node) -> bool:
        """Whether the output is on a grid: its own, its input's, or that of the clamp it is fused with."""
        if node not in self.integer:
            return False
        kind = self.operations[node].kind
        if kind in o.WEIGHTED:
            return self.owns_grid(node) or any(self._is_fused_clamp(reader) for reader in self.readers[node])
        return True

    def _grid_owner(self, node: fx.Node, owners: dict) -> fx.Node | None:
        """The node whose Quantizer gives the grid of this value; None if it is float."""
        while self._is_integer_value(node):
            kind = self.operations[node].kind
            if kind == "cat" or self.owns_grid(node):
                return owners.get(node, node)
            if kind in o.SAME_GRID or kind in (o.PASS, o.PAD, o.DROPOUT):
                above = self.operations[node].inputs[0]
                if not self._is_integer_value(above):
                    return above
                node = above
            else:
                return None
        return None

    def _share_over_cats(self) -> dict[fx.Node, fx.Node]:
        """For each cat, and each layer whose output goes into one, the node that owns the common Quantizer."""
        parent: dict[fx.Node, fx.Node] = {}

        def root(node: fx.Node) -> fx.Node:
            while parent.get(node, node) is not node:
                node = parent[node]
            return node

        cats = [n for n in self.nodes if n in self.integer and self.operations[n].kind == "cat"]
        for cat in cats:
            parent.setdefault(cat, cat)
        for cat in cats:
            for value in self.operations[cat].inputs:
                owner = self._grid_owner(value, {})
                if owner is not None and owner in self.integer and self.activation(owner) == self.activation(cat):
                    parent[root(owner)] = root(cat)
        return {node: root(node) for node in parent}

    def _wrap_weighted(self) -> None:
        for node in self.nodes:
            norm = self.norms.get(node.target) if node.op == "call_module" else None
            if node in self.integer and self.operations[node].kind in o.WEIGHTED:
                layer = self.operations[node].module
                wrapped = PREPARED[type(layer)].of(layer, self.rule(node).weight, node.target, norm, self.trained)
                g.replace_module(self.traced, node.target, wrapped.with_corrections(self.corrections))
            elif node in self.dynamic:
                layer, rule = self.operations[node].module, self.rule(node)
                wrapped = PreparedDynamicLinear.of(layer, rule.weight, node.target)
                wrapped.activation = rule.activation.spec
                g.replace_module(self.traced, node.target, wrapped)
            elif self._only_simulated(node):
                layer = self.modules[node.target]
                wrapped = PREPARED[type(layer)].of(layer, self.rule(node).weight, node.target, norm, self.trained)
                g.replace_module(self.traced, node.target, wrapped.with_corrections(self.corrections))
            elif norm is not None:
                g.replace_module(self.traced, node.target, nn.Sequential(self.modules[node.target], norm))
            elif self.trained and node.op == "call_module" and can_round(self.modules[node.target], self.rule(node)):
                self.reasons[node] = "looks up codes of its weight; its output is float"
                if type(self.traced.get_submodule(node.target)) is nn.Embedding:
                    layer = self.modules[node.target]
                    made = PreparedEmbedding.of(layer, self.rule(node).weight, node.target, None, self.trained)
                    g.replace_module(self.traced, node.target, made)

    def _only_simulated(self, node: fx.Node) -> bool:
        """Whether its weight goes onto a grid for which there is no integer layer."""
        simulated = self.reasons.get(node) and self.reasons[node] == self.rule(node).weight.spec.simulated
        return simulated and node.op == "call_module" and type(self.modules[node.target]) in PREPARED

    def move_clamps(self) -> None:
        """Makes each fused clamp part of the Quantizer call behind it: one pass over the tensor less."""
        for node in self.nodes:
            layer = self._fused_into(node)
            if layer is None:
                continue
            clamp = clamp_of(self.operations[node])
            for call in list(node.users):
                call.kwargs = {**call.kwargs, "clamp": (clamp.low, clamp.high)}
            layer.meta["origin"] = node.meta["origin"]
            node.replace_all_uses_with(layer)
            self.traced.graph.erase_node(node)
        self.traced.graph.lint()
        self.traced.recompile()

    def report(self, prefix: str) -> PrepareReport:
        rows = []
        for node in self.nodes:
            value, op = node.meta.get("value"), self.operations[node]
            if node.op not in ("call_module", "call_function", "call_method") or value is None:
                continue
            if value.kind == "other" and node.op != "call_module":
                continue
            if node.op == "call_function" and isinstance(node.target, type):
                continue  # what outputs are put into
            hooked = node.op == "call_module" and has_hooks(self.modules[node.target])
            if op is not None and op.kind in (o.PASS, o.DROPOUT) and not hooked:
                continue
            name = ".".join(p for p in (prefix, node.meta["path"]) if p)
            kind = called(node, self.modules) if op is None else op.kind
            integer = node in self.integer or node in self.dynamic
            reason = "" if integer else self.reasons.get(node, "neither reads nor feeds an integer tensor")
            rows.append(Decision(name, kind, integer, reason))
        return PrepareReport(tuple(rows))


def called(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        return type(modules[node.target]).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", repr(node.target))


def unit_of(
    node: fx.Node,
    op: Operation,
    inputs: tuple[QParams, ...],
    output: QParams | None,
    clamp=None,
    stand_in: bool = False,
) -> LoweringUnit:
    """What `node` computes, as the lowering table wants it. `stand_in`: before there is a grid for the weight."""
    options = dict(op.options)
    shape = op.inputs[0].meta["value"].shape
    if op.module is None or op.kind == "mean":
        options["rank"] = len(shape)
    if op.kind == "mean":
        options.setdefault("dim", None)
    if op.kind == "cat":
        options["dim"] = options.get("dim", 0)
    if op.kind not in o.WEIGHTED:
        return LoweringUnit(op.kind, inputs, output, op.module, options, clamp=clamp)
    layer = op.module
    if stand_in:
        weight, grid = layer.weight.detach()[:0], QParams.per_tensor(1.0, 0, -127, 127, torch.int8)
        bias = None if layer.bias is None else layer.bias.detach()
    else:
        weight, bias, grid = layer.canonical()
    return LoweringUnit(op.kind, inputs, output, layer, options, weight, bias, grid, clamp)
