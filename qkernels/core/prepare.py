"""`prepare`: finds what can become integer and puts a Quantizer wherever a tensor gets onto a grid.

A converted network is the prepared one read literally: a tensor is integer from the Quantizer on, through operations
that keep its grid, to the next Quantizer or the next float operation. Where Quantizers go:

- the output of a layer, after a clamp fused into it; not between the two (`qkernels.core.fusion`)
- a float tensor (an input, the output of a float operation) on its way into an integer layer
- not after pooling by maximum, reshapes and the like: their output is on the grid of their input
- all inputs of a concatenation share one Quantizer, so that it only copies
- not after a last linear or convolution that only float operations read: it stores float32 directly
"""

import copy
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from qkernels.core import graph as g
from qkernels.core import operations as o
from qkernels.core.fusion import clamp_of, fold_batch_norms, has_constant_clamp, is_fused
from qkernels.core.graph import NetworkGraph, Untraceable
from qkernels.core.layers import PREPARED, Prepared
from qkernels.core.lowering import LoweringUnit, lower, lowerable_kinds
from qkernels.core.operations import Operation
from qkernels.core.plain import plain_copy
from qkernels.core.qspec import QParams
from qkernels.core.quantizer import Quantizer
from qkernels.core.recipe import Override, Recipe, TensorRecipe, make_recipe, type_name
from qkernels.core.report import Decision, PrepareReport
from qkernels.errors import InvalidArgument, InvalidType, Unsupported

QUANTIZERS = "activation_quantizers"
LARGEST_K = {torch.uint8: 65_793, torch.int8: 131_071}  # products of 8-bit codes that an int32 surely holds


class PreparedModel(NetworkGraph):
    """A float model with Quantizers: what `prepare` returns for a model that has a graph."""

    @property
    def recipe(self) -> Recipe:
        """What `prepare` carried out."""
        return self.meta["recipe"]


def prepare(model: nn.Module, example_inputs: Any, recipe: "str | Recipe" = "int8", **options: Any) -> nn.Module:
    """A copy of `model`, in eval mode, that is ready for calibration; `model` itself is not touched.

    Args:
        model: a float32 module.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments for its forward. They decide the
            kinds and ranks of tensors, not their sizes: other batch and image sizes work afterwards.
        recipe: a name ("int8"), or a `Recipe`.
        **options: changes to the recipe, see `qkernels.core.recipe.make_recipe`: observer, weight_granularity, bits,
            skip=[path, Module class or compiled regex, ...], ...

    Returns:
        A module with the same forward. Its attribute `report` lists what becomes integer, what stays float, and why.
        Batch normalization is folded; torch's attention modules are taken apart into their projections. A model
        whose forward cannot be captured as one graph is prepared part by part: each part then takes and returns float
        tensors.

    >>> import qkernels
    >>> prepared = qkernels.prepare(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), torch.randn(2, 4))
    >>> with qkernels.calibrating(prepared):
    ...     _ = prepared(torch.randn(8, 4))
    >>> converted = qkernels.convert(prepared)
    """
    check_float(model, "prepare")
    return prepare_model(model, example_inputs, make_recipe(recipe, **options))


def check_float(model: nn.Module, verb: str) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidType(f"{verb}: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidType(
            f"{verb}: model is a TorchScript module, which has no Python forward: give the original module"
        )
    if any(isinstance(m, Quantizer) for m in model.modules()):
        raise InvalidArgument(f"{verb}: the model is prepared already")


def prepare_model(model: nn.Module, example_inputs: Any, recipe: Recipe, trained: bool = False) -> nn.Module:
    """`prepare`; with `trained` nothing is folded or dropped that training needs."""
    if trained:
        recipe = replace(recipe, corrections=())  # training makes up for rounding by itself
    args, kwargs = g.arguments(example_inputs)
    work = plain_copy(model)
    try:
        prepared: nn.Module = prepare_graph(work, args, kwargs, recipe, trained=trained)
    except Untraceable as error:
        prepared = _prepare_parts(work, args, kwargs, recipe, str(error), trained)
    if not prepared.report.integer:
        warnings.warn(f"prepare: the whole model stays float\n{prepared.report}", stacklevel=3)
    return prepared


# --- a model with a graph --------------------------------------------------------------------------------------------


def prepare_graph(
    model: nn.Module, args: tuple, kwargs: dict, recipe: Recipe, prefix: str = "", trained: bool = False
) -> PreparedModel:
    """The prepared graph of `model`, which lies at `prefix` in the whole model. Uses up `model`.

    Raises:
        Untraceable: `model` has no faithful graph.
    """
    is_leaf = type(model) in o.MODULES
    if is_leaf:
        model = nn.Sequential(OrderedDict(layer=model))
    traced = g.trace(model, args, kwargs)
    if is_leaf and prefix:
        next(n for n in traced.graph.nodes if n.target == "layer").meta["path"] = ""
    with torch.no_grad():
        expected = model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    g.simplify(traced, keep_dropout=trained)

    def rule(node: fx.Node) -> Override:
        path = ".".join(p for p in (prefix, node.meta["path"]) if p)
        return recipe.for_module(path, [type_name(t) for t in node.meta["types"]])

    norms = fold_batch_norms(traced, lambda node: rule(node).skip, keep_norms=trained)
    plan = _Plan(traced, rule, norms, [correction.name for correction in recipe.corrections], trained)
    plan.insert_quantizers()
    if trained:
        plan.move_clamps()
    prepared = PreparedModel(traced, traced.graph, type(model).__name__).eval()
    prepared.meta["report"] = plan.report(prefix)
    prepared.meta["recipe"] = recipe
    with torch.no_grad():
        if not g.close(expected, prepared(*copy.deepcopy(args), **copy.deepcopy(kwargs)), 1e-3):
            raise Untraceable("the simplified graph gives other outputs on the example inputs than the module")
    return prepared


class _Plan:
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
        if op is None or op.kind == "identity" or (op.kind == o.DROPOUT and node.op != "call_module"):
            return f"no integer layer for {_called(node, self.modules)}"
        if self.rule(node).skip:
            return "skipped by the recipe"
        if not value.is_float or not all(n.meta["value"].is_float for n in op.inputs):
            return "does not compute float32 tensors"
        if op.kind in (o.PASS, o.DROPOUT):
            return None
        if op.kind == o.PAD:
            return self._why_float_pad(op)
        if op.kind in o.WEIGHTED:
            return self._why_float_weighted(node, op)
        if op.kind == "interpolate" and any(isinstance(v, fx.Node) for v in op.options.values()):
            return self._why_float_interpolate(node, op)
        if any(isinstance(v, fx.Node) for v in op.options.values()):
            return f"an argument of {op.kind} is computed at run time"
        if op.kind not in lowerable_kinds():
            return f"no integer layer for {op.kind}"
        if op.kind in o.CLAMPS and not has_constant_clamp(op):
            return "its limits are not numbers"
        return self._why_not_lowered(node, op)

    def _why_float_weighted(self, node: fx.Node, op: Operation) -> str | None:
        layer, rank = op.module, len(op.inputs[0].meta["value"].shape)
        if layer is None or layer._parameters.get("weight") is None:
            return "its weight is computed, not a parameter"
        if layer.weight.dtype != torch.float32:
            return f"its weight is {layer.weight.dtype}, not float32"
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
        """Leaves out what only rearranges or transforms values on their way to float readers."""
        for node in reversed(self.nodes):
            if node not in self.integer or self.operations[node].kind in o.WEIGHTED | o.ARITHMETIC:
                continue
            layer = self._fused_into(node)
            if layer is not None and self.operations[layer].kind in o.ARITHMETIC:
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
                path = f"{QUANTIZERS}.{owner.name}"
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
        self.traced.graph.lint()
        self.traced.recompile()

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
            elif norm is not None:
                g.replace_module(self.traced, node.target, nn.Sequential(self.modules[node.target], norm))

    def move_clamps(self) -> None:
        """Makes each fused clamp part of the Quantizer call behind it: one pass over the tensor less."""
        for node in self.nodes:
            layer = self._fused_into(node)
            if layer is None:
                continue
            clamp = clamp_of(self.operations[node])
            for call in list(node.users):
                call.kwargs = {"clamp": (clamp.low, clamp.high)}
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
            if op is not None and op.kind in (o.PASS, o.DROPOUT):
                continue
            name = ".".join(p for p in (prefix, node.meta["path"]) if p)
            kind = _called(node, self.modules) if op is None else op.kind
            reason = "" if node in self.integer else self.reasons.get(node, "neither reads nor feeds an integer tensor")
            rows.append(Decision(name, kind, node in self.integer, reason))
        return PrepareReport(tuple(rows))


def _called(node: fx.Node, modules: dict[str, nn.Module]) -> str:
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


# --- a model without a graph -----------------------------------------------------------------------------------------


def _prepare_parts(
    model: nn.Module, args: tuple, kwargs: dict, recipe: Recipe, reason: str, trained: bool = False
) -> nn.Module:
    """Prepares every part of `model` that has a graph, in place; the code between the parts stays as it is."""
    with torch.no_grad():
        expected = copy.deepcopy(model)(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        calls = _first_calls(model, args, kwargs)
    rows = [Decision("", type(model).__name__, False, f"has no graph: {reason}")]
    done: dict[int, nn.Module] = {}

    def visit(owner: nn.Module, path: str) -> None:
        for name, child in list(owner.named_children()):
            here = f"{path}.{name}" if path else name
            if id(child) in done:
                setattr(owner, name, done[id(child)])
                continue
            if not any(type(m) in PREPARED for m in child.modules()):
                continue
            why = None
            if recipe.for_module(here, [type_name(type(child))]).skip:
                why = "skipped by the recipe"
            elif id(child) in calls:
                try:
                    prepared = prepare_graph(child, *calls[id(child)], recipe, here, trained)
                except Untraceable as error:
                    why = f"has no graph: {error}"
                else:
                    prepared.adopt(g.plain_attributes(child))
                    done[id(child)] = prepared
                    setattr(owner, name, prepared)
                    rows.extend(prepared.report)
                    continue
            elif type(child) in PREPARED:
                why = "the example inputs do not reach it"
            if why is not None:
                rows.append(Decision(here, type(child).__name__, False, why))
            if why != "skipped by the recipe":
                visit(child, here)

    visit(model, "")
    model.report, model.recipe = PrepareReport(tuple(rows)), recipe
    got = _run_with_parts(model, args, kwargs)
    if not g.close(expected, got, 1e-3):
        raise Unsupported(
            f"prepare: {type(model).__name__} cannot be prepared part by part: with its parts replaced it gives other "
            "outputs on the example inputs. Name the parts to leave alone in skip=[...]"
        )
    return model


def _run_with_parts(model: nn.Module, args: tuple, kwargs: dict) -> Any:
    try:
        with torch.no_grad():
            return model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    except AttributeError as error:  # foreign code that reads more of a part than its outputs
        raise Unsupported(
            f"prepare: {type(model).__name__} cannot be prepared part by part: its code reads what its parts no longer "
            f"have ({error}). Name the parts to leave alone in skip=[...]"
        ) from error


def _first_calls(model: nn.Module, args: tuple, kwargs: dict) -> dict[int, tuple[tuple, dict]]:
    """The arguments of the first call of every submodule, by the id of the module."""
    calls: dict[int, tuple[tuple, dict]] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.setdefault(id(module), (copy.deepcopy(args), copy.deepcopy(kwargs)))

    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in model.modules() if m is not model]
    try:
        model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def quantizers(model: nn.Module) -> Iterable[Quantizer]:
    return (m for m in model.modules() if isinstance(m, Quantizer))


def prepared_layers(model: nn.Module) -> Iterable[Prepared]:
    return (m for m in model.modules() if isinstance(m, Prepared))
