"""prepare and convert on modules, without a graph in the user's hands."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from qkernels.core import operations as o
from qkernels.core.containers import become, keep_containers
from qkernels.core.convert import convert as core_convert
from qkernels.core.graph import arguments
from qkernels.core.outline import example, guessed_input, outline
from qkernels.core.placed import TORCHS_GRIDS, prepare_placed
from qkernels.core.prepare import PreparedModel, quantizers
from qkernels.core.recipe import Match, Override, Recipe
from qkernels.core.tables import UNARY
from qkernels.errors import InvalidArgument, InvalidState, Unsupported
from qkernels.frontends.torch_ao import parse
from qkernels.frontends.torch_ao.observers import QConfig

EXAMPLE = "_example_outline"
FIXED = TORCHS_GRIDS | {"softmax": TORCHS_GRIDS["sigmoid"]}  # in torch's mappings
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
OBSERVED_KINDS = (frozenset(UNARY) | o.WEIGHTED | {"batch_norm"}) - {"relu", "hardtanh", "clamp", *TORCHS_GRIDS, "gelu"}


def prepare(
    model: nn.Module,
    inplace: bool = False,
    allow_list: Iterable[type] | None = None,
    observer_non_leaf_module_list: Iterable[type] = (),
    prepare_custom_config_dict: None = None,
) -> nn.Module:
    """Puts an observer behind every module that has a qconfig; then run calibration batches through the model.

    `model.qconfig`, or that of a module in it, holds for everything below up to the next one; None leaves float.
    """
    if prepare_custom_config_dict:
        raise Unsupported("prepare: prepare_custom_config_dict: write custom modules of torch.nn modules instead")
    if not inplace:
        model = copy.deepcopy(model)
    propagate_qconfig(model)
    if not any(getattr(m, "qconfig", None) for m in model.modules()):
        raise InvalidArgument("prepare: no module has a qconfig; set model.qconfig = get_default_qconfig('x86')")
    _observe(model, allow_list, tuple(observer_non_leaf_module_list or ()))
    model.register_forward_pre_hook(note_example, with_kwargs=True)
    return model


def propagate_qconfig(model: nn.Module, qconfig: QConfig | None = None) -> None:
    """Gives every module the qconfig of the nearest module around it that has one."""
    model.qconfig = getattr(model, "qconfig", qconfig)
    if model.qconfig is not None:
        check_qconfig(model.qconfig, f"{type(model).__name__}.qconfig")
    for name, child in model.named_children():
        if not name.startswith("activation_post_process"):
            propagate_qconfig(child, model.qconfig)


def check_qconfig(qconfig: Any, where: str) -> None:
    if not hasattr(qconfig, "activation") or not hasattr(qconfig, "weight"):
        raise InvalidArgument(f"{where}: must be a QConfig, such as get_default_qconfig('x86'), got {qconfig!r}")


def _observe(model: nn.Module, allow_list: Iterable[type] | None, non_leaf: tuple[type, ...]) -> None:
    for name, child in model.named_children():
        if name == "activation_post_process":
            continue
        fused = parse.is_a(child, "Fused") or parse.is_a(child, "_FusedModule")
        if child.qconfig is not None:
            if parse.is_a(child, "FloatFunctional"):
                child.activation_post_process = child.qconfig.activation()
            elif fused or isinstance(child, non_leaf) or _is_observed(child, allow_list):
                child.add_module("activation_post_process", child.qconfig.activation())
                child.register_forward_hook(observe_output, prepend=True)
        if not fused:
            _observe(child, allow_list, non_leaf)


def _is_observed(module: nn.Module, allow_list: Iterable[type] | None) -> bool:
    if allow_list is not None:
        return type(module) in allow_list
    known = o.MODULES.get(type(module)) in OBSERVED_KINDS or isinstance(module, (*NORMS, nn.Softmax, nn.PReLU))
    return known or parse.is_a(module, "QuantStub")


def observe_output(module: nn.Module, args: tuple, output: Any) -> Any:
    return module.activation_post_process(output)


def note_example(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Remembers the kinds of arguments, for the graph that `convert` needs."""
    if EXAMPLE not in module.__dict__:
        module.__dict__[EXAMPLE] = outline((args, kwargs))


def convert(
    module: nn.Module,
    mapping: None = None,
    inplace: bool = False,
    remove_qconfig: bool = True,
    is_reference: bool = False,
    convert_custom_config_dict: None = None,
    *,
    example_inputs: Any = None,
) -> nn.Module:
    """The integer network of a calibrated or trained model, prepared here or by torch.ao itself (eager or FX).

    Args:
        inplace: the object `module` becomes the integer network; else it stays as it is and can train on.
        example_inputs: as for `qkernels.prepare`. Needed only where no batch passed (torch.ao prepared the model, or
            `load_state_dict` filled it), and only if its input cannot be guessed from its first layer.
    """
    for name, value in (("mapping", mapping), ("convert_custom_config_dict", convert_custom_config_dict)):
        if value:
            raise Unsupported(f"convert: {name}: the integer layers are those of qkernels.nn")
    if is_reference:
        raise Unsupported("convert: is_reference=True: qkernels.exact(torch_ao.prepared(model)) is the reference")
    converted = keep_containers(core_convert(prepared(module, example_inputs)), module)
    for part in converted.modules():
        if type(part) is nn.Sequential:
            part._modules.pop("activation_post_process", None)  # an observer, of which an Identity is left
    return become(module, converted) if inplace else converted


def prepared(module: nn.Module, example_inputs: Any = None) -> nn.Module:
    """The same network as `qkernels.prepare` gives it, with the grids that the observers found.

    For `qkernels.verify`, `qkernels.exact` and `qkernels.compare`.
    """
    if isinstance(module, PreparedModel):
        return module
    work = parse.observed_copy(module)
    work._forward_pre_hooks.clear()
    work._forward_pre_hooks_with_kwargs.clear()
    places = parse.places_of(work)
    if not places.weights and not places.outputs and next(quantizers(work), None) is None:
        raise InvalidState("convert: no module of the model has observers; call prepare first")
    args, kwargs = _arguments(module, work, example_inputs)
    result = prepare_placed(work, args, kwargs, places)
    blind = [q.source for q in quantizers(result) if not q.has_grid()]
    if blind:
        raise InvalidState(f"convert: the observers of {', '.join(blind)} saw no data; run batches through it first")
    floats = {row.name: row.reason for row in result.report.stayed_float}
    simulated = any(q.spec.simulated for q in quantizers(result))  # then float layers are what was asked for
    for path in places.weights:
        if path in floats and not simulated:
            cure = "Take them off" if "hooks" in floats[path] else "Put a QuantStub before it"
            raise InvalidState(
                f"convert: {path} has a qconfig but cannot be integer: {floats[path]}. {cure}, or set its qconfig to "
                "None before prepare"
            )
    return result


def _arguments(module: nn.Module, work: nn.Module, example_inputs: Any) -> tuple[tuple, dict]:
    if example_inputs is not None:
        return arguments(example_inputs)
    if EXAMPLE in module.__dict__:
        return example(module.__dict__[EXAMPLE])
    guess = guessed_input(work)
    if guess is None:
        raise InvalidArgument(
            f"convert: cannot guess an input of {type(module).__name__}; say convert(model, example_inputs=x)"
        )
    return (guess,), {}


def recipe(model: nn.Module) -> Recipe:
    """The recipe that the qconfigs of `model` say: that of its root, and overrides where a module has another one."""
    root = getattr(model, "qconfig", None)
    if root is None:
        raise InvalidArgument("recipe: the model's root has no qconfig")
    activation, weight = parse.factory_recipe(root.activation), parse.factory_recipe(root.weight)
    overrides: list[Override] = []

    def visit(module: nn.Module, path: str, inherited: Any) -> None:
        for name, child in module.named_children():
            here = f"{path}.{name}" if path else name
            own = getattr(child, "qconfig", inherited)
            if own is not inherited and own != inherited:
                overrides.append(override(Match("name", here), own))
            visit(child, here, own)

    visit(model, "", root)
    return Recipe(activation, weight, tuple(overrides))


def override(match: Match, qconfig: Any) -> Override:
    if qconfig is None:
        return Override(match, skip=True)
    where, recipes = f"QConfigMapping: {match.pattern}", []
    check_qconfig(qconfig, where)
    if type(qconfig.activation()).__name__ == "ReuseInputObserver":  # torch's for a reshape, which the core knows
        return Override(match)
    for factory in (qconfig.activation, qconfig.weight):
        # torch's defaults give a type without weight a float32 placeholder, and a sigmoid a fixed grid.
        made, kind = factory(), match.pattern.rpartition(".")[2].lower().rstrip("_") if match.by == "type" else None
        default = parse.is_fixed(made) and FIXED.get(kind) == tuple(map(float, made.calculate_qparams()))
        silent = default or getattr(made, "dtype", None) is torch.float32
        recipes.append(None if silent else parse.factory_recipe(factory, where))
    return Override(match, *recipes)


def quantize(
    model: nn.Module, run_fn: Any, run_args: Iterable[Any], mapping: None = None, inplace: bool = False, **options: Any
) -> nn.Module:
    """prepare, calibrate by `run_fn(model, *run_args)`, convert."""
    if mapping is not None:
        raise Unsupported(f"quantize: mapping: the integer layers are those of qkernels.nn, got {mapping!r}")
    model = prepare(model, inplace, **options).eval()
    run_fn(model, *run_args)
    return convert(model, inplace=inplace)
