"""Prepared models whose Quantizers somebody else has put in place.

`prepare` decides by itself where tensors get onto a grid. A front end whose original leaves that to the user (stubs,
observers at modules, quantizers at modules) says it here: `Places`. Everything else (tracing, lowering, conversion) is
shared, and nothing is placed that is not asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from qkernels.core import graph as g
from qkernels.core import operations as o
from qkernels.core.fusion import as_convolution
from qkernels.core.graph import Untraceable
from qkernels.core.layers import PREPARED, Prepared
from qkernels.core.operations import Operation
from qkernels.core.placement import Placement
from qkernels.core.prepare import PreparedModel
from qkernels.core.qspec import QParams, QSpec
from qkernels.core.quantizer import Quantizer, State
from qkernels.core.recipe import Match, Override, Recipe, TensorRecipe
from qkernels.core.report import Decision, PrepareReport
from qkernels.core.tracing import without_autocast
from qkernels.errors import Unsupported

# Without a Quantizer of their own these may stay on the grid that they read.
KEEP_GRID = o.CLAMPS | {"avg_pool", "adaptive_avg_pool", "mean"}
BATCH_NORM_WEIGHT = TensorRecipe(QSpec.weight())
# What torch's kernels compute on codes without an observer, as scale and zero point of uint8.
TORCHS_GRIDS = {"sigmoid": (1 / 256, 0), "hardsigmoid": (1 / 256, 0), "tanh": (2 / 256, 128)}
WEIGHT_QUANTIZER = "weight_quantizer"  # of a call, in the meta of its node


class Leave(nn.Identity):
    """Where a tensor leaves the integers: what comes out is float, whatever reads it."""

    traced_as_leaf = True


@dataclass(frozen=True)
class Places:
    """Quantizers that have their grids, by the path of the module in the model that they belong to.

    A Quantizer may also stand in the model itself, as a module that its forward calls; it may occur in several places,
    which then share a grid.

    Attributes:
        inputs: on the tensor arguments, in order; None leaves one alone.
        outputs: on the output.
        weights: of linear and convolution layers.
        keep_grids: a clamp or an average without a Quantizer stays on the grid of its input, as in torch.ao;
            otherwise it is computed in float.
        torchs_grids: a sigmoid, hardsigmoid, tanh or gelu without one has the grid that torch's kernel gives it.
    """

    inputs: Mapping[str, Sequence[Quantizer | None]] = field(default_factory=dict)
    outputs: Mapping[str, Quantizer] = field(default_factory=dict)
    weights: Mapping[str, Quantizer] = field(default_factory=dict)
    keep_grids: bool = False
    torchs_grids: bool = False

    def below(self, path: str) -> "Places":
        """The places inside the module at `path`, seen from there."""

        def cut(table: Mapping[str, Any]) -> dict[str, Any]:
            return {name[len(path) + 1 :]: value for name, value in table.items() if name.startswith(path + ".")}

        return Places(cut(self.inputs), cut(self.outputs), cut(self.weights), self.keep_grids, self.torchs_grids)


def prepare_placed(model: nn.Module, args: tuple, kwargs: dict, places: Places) -> nn.Module:
    """A model ready for `convert`, in eval mode, that computes with the grids of `places`. Uses up `model`.

    A model without a graph is prepared part by part, as by `prepare`.

    Raises:
        Unsupported: no part of it that holds a Quantizer has a graph.
    """
    model.eval()
    found = [*(m for m in model.modules() if isinstance(m, Quantizer)), *places.outputs.values()]
    found += [q for row in places.inputs.values() for q in row if q is not None]
    for quantizer in found:
        quantizer.state = State.OFF
    with without_autocast():
        try:
            prepared: nn.Module = _placed_graph(model, args, kwargs, places, "")
        except Untraceable as error:
            prepared = _placed_parts(model, args, kwargs, places, str(error))
    for quantizer in (*found, *places.weights.values()):
        quantizer.state = State.FROZEN
    return prepared


def _placed_graph(model: nn.Module, args: tuple, kwargs: dict, places: Places, prefix: str) -> PreparedModel:
    traced = g.trace(model, args, kwargs)
    g.positional_inputs(traced)
    _insert(traced, places)
    if places.torchs_grids:
        _insert_torchs_grids(traced)
    _weights_of_calls(traced)
    g.simplify(traced)
    _batch_norms_on_codes(traced)
    plan = _PlacedPlan(traced, places)
    plan.finish()
    prepared = PreparedModel(traced, traced.graph, type(model).__name__).eval()
    prepared.meta["report"] = plan.report(prefix)
    prepared.meta["recipe"] = Recipe()
    return prepared


def _insert(traced: fx.GraphModule, places: Places) -> None:
    """Calls of the placed Quantizers around the calls of their modules."""
    names: dict[int, str] = {}
    modules = g.modules_of(traced)

    def call(quantizer: Quantizer, value: fx.Node, path: str) -> fx.Node:
        name = names.setdefault(id(quantizer), path.replace(".", "_"))
        if not hasattr(traced, name):
            traced.add_submodule(name, quantizer)
        node = traced.graph.call_module(name, (value,))
        node.meta = dict(value.meta)
        return node

    for node in list(traced.graph.nodes):
        if node.op != "call_module" or isinstance(modules[node.target], Quantizer):
            continue
        for i, quantizer in enumerate(places.inputs.get(node.target, ())):
            if quantizer is None or i >= len(node.args) or not isinstance(node.args[i], fx.Node):
                continue
            with traced.graph.inserting_before(node):
                made = call(quantizer, node.args[i], f"{node.target}.input{i}_quantizer")
            node.args = (*node.args[:i], made, *node.args[i + 1 :])
        if node.target in places.outputs:
            with traced.graph.inserting_after(node):
                readers = list(node.users)
                made = call(places.outputs[node.target], node, f"{node.target}.output_quantizer")
            for reader in readers:
                reader.replace_input_with(node, made)
    traced.recompile()


def _insert_torchs_grids(traced: fx.GraphModule) -> None:
    """Quantizers behind the functions that torch computes on codes without an observer: gelu stays on its grid."""
    modules, grids = g.modules_of(traced), {}  # value -> the path of the Quantizer whose grid it is on
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(modules[node.target], Quantizer):
            grids[node] = node.target
            continue
        op = o.operation(node, modules)
        if op is None or not op.inputs or any(n not in grids for n in op.inputs):
            continue
        if any(reader.op == "call_module" and isinstance(modules[reader.target], Quantizer) for reader in node.users):
            continue
        name = grids[op.inputs[0]]
        if op.kind in KEEP_GRID | o.SAME_GRID | {o.PASS, o.PAD, o.DROPOUT}:
            grids[node] = name
        elif op.kind in TORCHS_GRIDS or op.kind == "gelu":
            if op.kind != "gelu":
                name = f"{node.name}_grid"
                modules[name] = _fixed(*TORCHS_GRIDS[op.kind], node.name)
                traced.add_submodule(name, modules[name])
            with traced.graph.inserting_after(node):
                call = traced.graph.call_module(name, (node,))
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call, lambda user, call=call: user is not call)
            grids[call] = name
    traced.recompile()


def _fixed(scale: float, zero_point: int, source: str) -> Quantizer:
    quantizer = Quantizer(TensorRecipe(QSpec.activation()), source, 1)
    spec = quantizer.spec
    quantizer.set_qparams(QParams.per_tensor(scale, zero_point, spec.qmin, spec.qmax, spec.dtype))
    quantizer.state = State.FROZEN
    return quantizer


def _weights_of_calls(traced: fx.GraphModule) -> None:
    """A Quantizer between a parameter and the function whose weight it is becomes that of a layer in its place."""
    modules = g.modules_of(traced)
    for node in list(traced.graph.nodes):
        op = o.operation(node, modules)
        weight = op.options.get("weight") if op is not None and op.kind in o.WEIGHTED else None
        if not isinstance(weight, fx.Node) or weight.op != "call_module" or weight.args[0].op != "get_attr":
            continue
        if isinstance(modules[weight.target], Quantizer):
            node.meta[WEIGHT_QUANTIZER] = modules[weight.target]
            node.replace_input_with(weight, weight.args[0])
            if not weight.users:
                traced.graph.erase_node(weight)


def _batch_norms_on_codes(traced: fx.GraphModule) -> None:
    """A batch normalization that reads a Quantizer becomes a 1x1 convolution, for which there is a kernel."""
    modules = g.modules_of(traced)
    for node in traced.graph.nodes:
        if node.op != "call_module" or type(modules[node.target]) not in o.BATCH_NORMS:
            continue
        norm, source = modules[node.target], node.args[0]
        rank = len(source.meta["value"].shape)
        quantized = source.op == "call_module" and isinstance(modules[source.target], Quantizer)
        if quantized and norm.running_mean is not None and 3 <= rank <= 5:
            conv = as_convolution(norm, rank - 2)
            conv.takes_own_grid = True
            g.replace_module(traced, node.target, conv)


class _PlacedPlan(Placement):
    """Marks the nodes that can be integer and gives weights their grids; `convert` sees which of them read codes."""

    def __init__(self, traced: fx.GraphModule, places: Places):
        self.places = places
        modules = g.modules_of(traced)
        recipes = [m.recipe for m in modules.values() if isinstance(m, Quantizer) and not m.spec.simulated]
        usual = recipes[0] if recipes else TensorRecipe(QSpec.activation())

        def rule(node: fx.Node) -> Override:
            return Override(Match("name", node.meta["path"]), usual, BATCH_NORM_WEIGHT)

        super().__init__(traced, rule, {}, [], trained=False)

    def _why_float(self, node: fx.Node) -> str | None:
        if self._is_quantizer(node) or isinstance(self.modules.get(node.target), Leave):
            return "not an operation"
        return super()._why_float(node)

    def _why_float_weighted(self, node: fx.Node, op: Operation) -> str | None:
        own = isinstance(op.module, Prepared) or getattr(op.module, "takes_own_grid", False)
        quantizer = op.module.quantizers["weight"] if isinstance(op.module, Prepared) else self._weight_quantizer(node)
        if op.module is not None and quantizer is None and not own:
            return "its weight has no quantizer"
        if quantizer is not None and quantizer.spec.simulated:
            return f"its weight: {quantizer.spec.simulated}"
        return super()._why_float_weighted(node, op)

    def _weight_quantizer(self, node: fx.Node) -> Quantizer | None:
        placed = self.places.weights.get(node.target, self.places.weights.get(node.meta["path"]))
        return node.meta.get(WEIGHT_QUANTIZER, placed)

    def _is_quantizer(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self.modules[node.target], Quantizer)

    def _reached(self) -> set[fx.Node]:
        """What reads codes, and can be computed on them, up to the next Quantizer."""
        self.codes: dict[fx.Node, fx.Node] = {}  # value -> the Quantizer call whose grid it is on
        integer: set[fx.Node] = set()
        for node in self.nodes:
            op = self.operations[node]
            if self._is_quantizer(node):
                if not self.modules[node.target].spec.simulated:
                    self.codes[node] = node
            elif node not in self.reasons and all(n in self.codes or self._fuses(n, op, integer) for n in op.inputs):
                grid = self._kept_grid(node, op)
                if grid is not None:
                    self.codes[node] = grid
                    integer.add(node)
                elif op.kind in o.WEIGHTED or any(self._gives_codes(r) for r in self._readers_past_clamp(node)):
                    integer.add(node)
            if node not in integer and node not in self.reasons:
                self.reasons[node] = self._why_not_reached(op)
        return integer

    def _gives_codes(self, node: fx.Node) -> bool:
        return self._is_quantizer(node) and not self.modules[node.target].spec.simulated

    def _fuses(self, node: fx.Node, reader: Operation, integer: set[fx.Node]) -> bool:
        """Whether `node` is a layer that the clamp `reader` is part of."""
        return node in integer and reader.kind in o.CLAMPS and len(node.users) == 1

    def _readers_past_clamp(self, node: fx.Node) -> list[fx.Node]:
        readers = list(node.users)
        op = self.operations[readers[0]] if len(readers) == 1 else None
        return list(readers[0].users) if op is not None and op.kind in o.CLAMPS else readers

    def _kept_grid(self, node: fx.Node, op: Operation) -> fx.Node | None:
        """The Quantizer call whose grid the output of `node` stays on, without a Quantizer of its own."""
        grids = [self.codes.get(n) for n in op.inputs]
        same = all(grid is not None and grid.target == grids[0].target for grid in grids)
        if op.kind in o.SAME_GRID or op.kind in (o.PASS, o.PAD):
            return grids[0]
        if any(self._is_quantizer(reader) for reader in node.users):
            return None
        if (op.kind == "cat" and same) or (self.places.keep_grids and op.kind in KEEP_GRID):
            return grids[0]
        return None

    def _why_not_reached(self, op: Operation) -> str:
        floats = [n for n in op.inputs if n not in self.codes]
        for node in floats:
            if self._is_quantizer(node):
                return f"it reads a tensor on a grid of its own kind: {self.modules[node.target].spec.simulated}"
        if floats:
            return f"it reads a float tensor ({floats[0].meta['path'] or floats[0].name})"
        return "no quantizer follows it"

    def _prune(self) -> None:
        """Everything placed stays."""

    def finish(self) -> None:
        """Weights get their Quantizers, averages and clamps that keep a grid call the Quantizer they keep."""
        for node in self.nodes:
            op = self.operations[node]
            if node not in self.integer:
                continue
            if op.kind in o.WEIGHTED:
                self._wrap(node, op.module)
            elif op.kind in KEEP_GRID and node in self.codes:
                readers = list(node.users)
                with self.traced.graph.inserting_after(node):
                    kept = self.traced.graph.call_module(self.codes[node].target, (node,))
                kept.meta = {**node.meta, "integer": False}
                for reader in readers:
                    reader.replace_input_with(node, kept)
        self._simulate_float_layers()
        self.traced.graph.lint()
        self.traced.recompile()

    def _wrap(self, node: fx.Node, layer: nn.Module) -> None:
        if isinstance(layer, Prepared):
            return
        quantizer = self._weight_quantizer(node)
        wrapped = PREPARED[type(layer)].of(layer, BATCH_NORM_WEIGHT, node.target)
        if quantizer is None:
            wrapped.observe_weight()
            wrapped.quantizers["weight"].choose()
            wrapped.quantizers["weight"].state = State.FROZEN
        else:
            wrapped.quantizers["weight"] = quantizer
        g.replace_module(self.traced, node.target, wrapped)

    def _simulate_float_layers(self) -> None:
        """A layer that reads a float tensor has its weight rounded all the same."""
        for node in self.nodes:
            op = self.operations[node]
            if node in self.integer or op is None or op.kind not in o.WEIGHTED or op.module is None:
                continue
            quantizer = self._weight_quantizer(node)
            if quantizer is not None and type(op.module) in PREPARED:
                wrapped = PREPARED[type(op.module)].of(op.module, quantizer.recipe, node.target)
                wrapped.quantizers["weight"] = quantizer
                g.replace_module(self.traced, node.target, wrapped)

    def report(self, prefix: str) -> PrepareReport:
        rows = super().report(prefix)
        return PrepareReport(tuple(row for row in rows if row.reason != "not an operation"))


def _placed_parts(model: nn.Module, args: tuple, kwargs: dict, places: Places, reason: str) -> nn.Module:
    """Prepares the largest parts of `model` that have a graph and hold a Quantizer, in place."""
    with torch.no_grad():
        calls = g.first_calls(model, args, kwargs)
    rows = [Decision("", type(model).__name__, False, f"has no graph: {reason}")]

    def visit(owner: nn.Module, path: str) -> None:
        for name, child in list(owner.named_children()):
            here = f"{path}.{name}" if path else name
            inner = places.below(here)
            holds = inner.outputs or inner.inputs or any(isinstance(m, Quantizer) for m in child.modules())
            if not holds or isinstance(child, Quantizer) or id(child) not in calls:
                continue
            try:
                prepared = _placed_graph(child, *calls[id(child)], inner, here)
            except Untraceable as error:
                rows.append(Decision(here, type(child).__name__, False, f"has no graph: {error}"))
                visit(child, here)
                continue
            prepared.adopt(g.plain_attributes(child))
            setattr(owner, name, prepared)
            rows.extend(prepared.report)

    visit(model, "")
    if not any(row.integer for row in rows):
        raise Unsupported(
            f"{type(model).__name__} has no graph ({reason}), and no part of it that becomes integer has one. Put the "
            "stubs around parts without control flow"
        )
    model.report, model.recipe = PrepareReport(tuple(rows)), Recipe()
    return model
