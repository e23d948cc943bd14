"""`prepare`: finds what can become integer and puts a Quantizer wherever a tensor gets onto a grid.

A converted network is the prepared one read literally: a tensor is integer from the Quantizer on, through operations
that keep its grid, to the next Quantizer or the next float operation. `qkernels.core.placement` says where they go.
"""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from qkernels.core import graph as g
from qkernels.core import operations as o
from qkernels.core.buffers import buffers_kept
from qkernels.core.dynamic import PreparedDynamicLinear
from qkernels.core.expect import expect_float, expect_inputs, expect_options, expect_runs
from qkernels.core.fusion import fold_batch_norms
from qkernels.core.graph import NetworkGraph, Untraceable
from qkernels.core.layers import PREPARED, Prepared
from qkernels.core.placement import Placement
from qkernels.core.plain import has_hooks, plain_copy
from qkernels.core.quantizer import Quantizer
from qkernels.core.recipe import OPTIONS, Match, Override, Recipe, function_name, make_recipe, type_name
from qkernels.core.report import Decision, PrepareReport
from qkernels.core.tracing import without_autocast
from qkernels.errors import InvalidArgument, QKernelsError, Unsupported, close_matches


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
        **options: changes to the recipe (`qkernels.core.recipe.make_recipe` says more, docs/ptq.md when to take what):
            skip: what stays float: paths, Module classes, functions, compiled regexes.
            bits, weight_bits, activation_bits: 2 to 8, of both or of one.
            observer, observer_options: how ranges of activations are chosen: "histogram", "minmax", "mse", ...
            weight_observer: how those of weights are: "minmax" or "mse".
            weight_granularity: "per_channel" or "per_tensor".
            symmetric_activations: True for the middle code as zero point.
            corrections: what is done against rounding errors: "bias", "adaround"; () for nothing.
            non_finite: what NaN and infinities in activations are: an "error", or "ignore" to leave them out.
            rule, weight_rule, activation_rule: how grids behave in training (`prepare_qat`).

    Returns:
        A module with the same forward. Its attribute `report` lists what becomes integer, what stays float, and why.
        Batch normalization is folded; torch's attention modules are taken apart into their projections. A model
        whose forward cannot be captured as one graph is prepared part by part: each part then takes and returns float
        tensors.

    Raises:
        InvalidArgument: the model is prepared or converted already or does not run on the example, an option is unknown
            or has a value that cannot be, or a rule of the recipe names what it cannot change.
        InvalidType: the model is no module, or an argument is of the wrong type.
        Unsupported: activations would need more than 8 bits, or the model cannot be prepared part by part.

    >>> import qkernels
    >>> prepared = qkernels.prepare(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), torch.randn(2, 4))
    >>> with qkernels.calibrating(prepared):
    ...     _ = prepared(torch.randn(8, 4))
    >>> converted = qkernels.convert(prepared)
    """
    expect_float("prepare", model)
    expect_options("prepare", options, OPTIONS)
    return prepare_model(model, example_inputs, make_recipe(recipe, **options))


def prepare_model(model: nn.Module, example_inputs: Any, recipe: Recipe, trained: bool = False) -> nn.Module:
    """`prepare`; with `trained` nothing is folded or dropped that training needs."""
    verb = "prepare_qat" if trained else "prepare"
    expect_inputs(verb, example_inputs, "example_inputs")
    if trained:
        recipe = replace(recipe, corrections=())  # training makes up for rounding by itself
    for activation in (recipe.activation, *(rule.activation for rule in recipe.overrides if rule.activation)):
        if activation.spec.simulated:
            raise Unsupported(f"{verb}: activations: {activation.spec.simulated}; take 2 to 8 bits and no block")
    args, kwargs = g.arguments(example_inputs)
    try:
        with without_autocast():
            prepared = _prepare_whole_or_parts(plain_copy(model), args, kwargs, recipe, trained)
    except QKernelsError:
        raise
    except Exception:  # where it is the model that failed, say so, without what torch.fx adds
        expect_runs(verb, plain_copy(model), args, kwargs)
        raise
    for layer in prepared_layers(prepared):
        if isinstance(layer, PreparedDynamicLinear):
            layer.choose_grid()
    _check_rules(verb, recipe, model, prepared)
    if not prepared.report.integer:
        warnings.warn(f"{verb}: the whole model stays float\n{prepared.report}", stacklevel=3)
    return prepared


def _prepare_whole_or_parts(model: nn.Module, args: tuple, kwargs: dict, recipe: Recipe, trained: bool) -> nn.Module:
    try:
        return prepare_graph(model, args, kwargs, recipe, trained=trained)
    except Untraceable as error:
        return _prepare_parts(model, args, kwargs, recipe, str(error), trained)


def _check_rules(verb: str, recipe: Recipe, model: nn.Module, prepared: nn.Module) -> None:
    """Refuses rules for names that nothing has or where they do nothing. A rule for a type may be for other models."""
    parts = [(path, part) for path, part in prepared.named_modules() if isinstance(part, PreparedModel)]
    given = {  # arguments and constants: tensors that no operation gives
        ".".join(p for p in (path, node.meta["path"]) if p)
        for path, part in parts
        for node in part.graph.nodes
        if node.op in ("placeholder", "get_attr")
    }
    rounded = {layer.quantizers["weight"].source for layer in prepared_layers(prepared)}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)} | rounded
    operations = {row.name for row in prepared.report} | {name for name, _ in model.named_modules()}
    operations |= {quantizer.source for quantizer in quantizers(prepared)} - given - parameters
    operations -= {""}
    weighted = {row.name for row in prepared.report if row.kind in o.WEIGHTED}
    weighted |= {name for name, module in model.named_modules() if isinstance(module, tuple(PREPARED))}
    weighted |= {name.rpartition(".")[0] for name in rounded}
    for rule in recipe.overrides:
        match, what = rule.match, "skip" if rule.skip else "an Override"
        if match.by == "type":
            continue

        def fitting(names: Iterable[str], match: Match = match) -> str | None:
            return next((name for name in sorted(names) if match(name, ())), None)

        if fitting(operations) is not None:
            only_weight = rule.weight is not None and rule.activation is None and not rule.skip
            if only_weight and fitting(weighted) is None:
                raise InvalidArgument(
                    f"{verb}: {what} for weights must name a layer that has one, got the {match.by} {match.pattern!r}"
                )
        elif (name := fitting(parameters)) is not None:
            owner = name.rpartition(".")[0]
            raise InvalidArgument(
                f"{verb}: {what} names modules and operations; {name!r} is a parameter of {owner!r}: write {owner!r}"
            )
        elif (name := fitting(given)) is None:
            known = operations | given
            hint = close_matches(match.pattern, known) if match.by == "name" else ""
            raise InvalidArgument(f"{verb}: no module, operation or input has the {match.by} {match.pattern!r}{hint}")
        elif rule.activation is None:
            raise InvalidArgument(
                f"{verb}: {what} names modules and operations; {name!r} is an input: name those that read it, or give "
                "it a grid by Override(..., activation=...)"
            )


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
    g.refuse_hooks(traced)
    if is_leaf and prefix:
        next(n for n in traced.graph.nodes if n.target == "layer").meta["path"] = ""
    with torch.no_grad():
        expected = model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    if not traced.graph.find_nodes(op="placeholder"):
        raise Untraceable("its forward takes no inputs")
    g.simplify(traced, keep_dropout=trained)

    def rule(node: fx.Node) -> Override:
        path = ".".join(p for p in (prefix, node.meta["path"]) if p)
        called = [node.target] if node.op == "call_method" else []
        if node.op == "call_function":
            called = [function_name(node.target)]
        return recipe.for_module(path, [*called, *(type_name(t) for t in node.meta["types"])])

    def stays(node: fx.Node) -> bool:
        return rule(node).skip or (node.op == "call_module" and has_hooks(traced.get_submodule(node.target)))

    norms = fold_batch_norms(traced, stays, keep_norms=trained)
    plan = Placement(traced, rule, norms, [correction.name for correction in recipe.corrections], trained)
    plan.insert_quantizers()
    if trained:
        plan.move_clamps()
    if prefix:
        _contiguous_outputs(traced.graph)
    prepared = PreparedModel(traced, traced.graph, type(model).__name__).eval()
    prepared.meta["report"] = plan.report(prefix)
    prepared.meta["recipe"] = recipe
    with torch.no_grad():
        if not g.close(expected, prepared(*copy.deepcopy(args), **copy.deepcopy(kwargs)), 1e-3):
            raise Untraceable("the simplified graph gives other outputs on the example inputs than the module")
    return prepared


def _contiguous_outputs(graph: fx.Graph) -> None:
    """The code between the parts of a model may `view` what it gets: images too lie as torch's layers leave them."""
    (output,) = graph.find_nodes(op="output")

    def contiguous(node: fx.Node) -> fx.Node:
        value = node.meta["value"]
        if value.kind != "tensor" or not value.is_float or len(value.shape) < 3:
            return node
        with graph.inserting_before(output):
            call = graph.call_method("contiguous", (node,))
        call.meta.update({name: node.meta[name] for name in ("value", "path", "types", "origin") if name in node.meta})
        return call

    output.args = fx.map_arg(output.args, contiguous)


# --- a model without a graph -----------------------------------------------------------------------------------------


def _prepare_parts(
    model: nn.Module, args: tuple, kwargs: dict, recipe: Recipe, reason: str, trained: bool = False
) -> nn.Module:
    """Prepares every part of `model` that has a graph, in place; the code between the parts stays as it is."""
    with torch.no_grad():
        expected = copy.deepcopy(model)(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        calls = g.distinct_calls(model, args, kwargs)
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
            elif len(calls.get(id(child), ())) > 1:
                why = "is called with different arguments"
            elif id(child) in calls:
                try:
                    prepared = prepare_graph(child, *calls[id(child)][0], recipe, here, trained)
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
        with torch.no_grad(), buffers_kept(model), _parameters_hidden(model):
            return model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    except QKernelsError:
        raise
    except Exception as error:  # foreign code that reads more of a part than its outputs
        reason = ": ".join(text for text in (type(error).__name__, str(error)) if text)
        raise Unsupported(
            f"prepare: {type(model).__name__} cannot be prepared part by part: its code reads what its parts no longer "
            f"have ({reason}). Name the parts to leave alone in skip=[...]"
        ) from error


@contextmanager
def _parameters_hidden(model: nn.Module) -> Iterator[None]:
    """Inside, nobody finds Parameters in what becomes integer layers, which hold buffers alone."""
    tables = {}
    for module in (inner for layer in (*prepared_layers(model), *quantizers(model)) for inner in layer.modules()):
        tables.setdefault(module, module._parameters)
    for module, parameters in tables.items():
        module._parameters = {}
        module.__dict__.update(parameters)
    try:
        yield
    finally:
        for module, parameters in tables.items():
            module._parameters = parameters
            for name in parameters:
                del module.__dict__[name]


def quantizers(model: nn.Module) -> Iterable[Quantizer]:
    return (m for m in model.modules() if isinstance(m, Quantizer))


def prepared_layers(model: nn.Module) -> Iterable[Prepared]:
    return (m for m in model.modules() if isinstance(m, Prepared))
