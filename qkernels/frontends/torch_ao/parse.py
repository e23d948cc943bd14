"""What torch.ao's objects, or ours of the same names, mean to the core: recipes, grids and places."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from qkernels.core import operations as o
from qkernels.core.fusion import folded
from qkernels.core.layers import PreparedConvTranspose2d
from qkernels.core.placed import Leave, Places
from qkernels.core.qspec import INTEGER_RANGE, QParams, QSpec
from qkernels.core.quantizer import Quantizer
from qkernels.core.recipe import TensorRecipe
from qkernels.core.registry import is_layer
from qkernels.core.training import enable_fake_quant
from qkernels.errors import InvalidState, Unsupported
from qkernels.frontends.torch_ao.fuse import Fused
from qkernels.frontends.torch_ao.observers import DTYPES, QSCHEMES, histogram_codes

KINDS = {
    "MinMaxObserver": "minmax",
    "PerChannelMinMaxObserver": "minmax",
    "MovingAverageMinMaxObserver": "moving_average",
    "MovingAveragePerChannelMinMaxObserver": "moving_average",
    "HistogramObserver": "histogram",
}
OBSERVER_HOOKS = {"_observer_forward_hook", "_observer_forward_pre_hook", "observe_output"}


def is_a(module: nn.Module, name: str) -> bool:
    """Whether the module is of our class of that name, or of torch.ao's."""
    return any(c.__name__ == name and c.__module__.startswith(("torch.", "qkernels.")) for c in type(module).__mro__)


def is_fixed(observer: nn.Module) -> bool:
    return is_a(getattr(observer, "activation_post_process", observer), "FixedQParamsObserver")


def is_observer(module: nn.Module) -> bool:
    return hasattr(module, "calculate_qparams") or isinstance(module, Quantizer)


def tensor_recipe(observer: nn.Module, where: str = "") -> TensorRecipe:
    """The recipe that an observer or fake-quantize module stands for."""
    if hasattr(observer, "recipe"):
        return observer.recipe
    inner = getattr(observer, "activation_post_process", observer)
    dtype, qscheme = getattr(inner, "dtype", None), getattr(inner, "qscheme", None)
    if dtype not in DTYPES or qscheme not in QSCHEMES or getattr(inner, "is_dynamic", False):
        raise Unsupported(f"{where}{type(inner).__name__}(dtype={dtype}, qscheme={qscheme}) stands for no 8-bit grid")
    symmetric, per_channel = QSCHEMES[qscheme]
    eps = float(getattr(inner, "eps", torch.finfo(torch.float32).eps))
    axis = inner.ch_axis if per_channel else 0
    spec = QSpec(DTYPES[dtype], inner.quant_min, inner.quant_max, symmetric, per_channel, axis, eps)
    kind = KINDS.get(type(inner).__name__, "minmax")
    options = histogram_codes(spec) if kind == "histogram" else {}
    if kind == "histogram" and inner.bins != 2048:
        options["bins"] = inner.bins
    if kind == "moving_average" and inner.averaging_constant != 0.01:
        options["momentum"] = inner.averaging_constant
    return TensorRecipe(spec, kind, tuple(options.items()))


def factory_recipe(factory: Callable[[], nn.Module], where: str = "QConfig", fixed: bool = False) -> TensorRecipe:
    """The recipe of `QConfig.activation` or `QConfig.weight`, of which nothing else is taken (if `fixed`, its grid)."""
    made = factory()
    for cls in (type(made), type(getattr(made, "activation_post_process", made))):
        if not cls.__module__.startswith(("torch.ao.", "qkernels.")):
            raise Unsupported(f"{where}: {cls.__name__} is a class of your own; only eager prepare() takes it")
    if is_fixed(made) and not fixed:
        raise Unsupported(f"{where}: a fixed grid (FixedQParams...) is for activations in prepare() and prepare_qat()")
    return tensor_recipe(made, f"{where}: ")


def quantizer_of(observer: nn.Module, source: str, axis: int | None = None, is_weight: bool = False) -> Quantizer:
    """A Quantizer with the grid that the observer has found (on `axis`, if not its own); without one if it saw no data.

    An observer chooses scale and zero point for its range, but torch's integer layers clamp outputs to the range of the
    dtype: so do ours. A fake-quantize module has clamped in training, and its range stays, as does that of a weight.
    """
    if isinstance(observer, Quantizer):
        return observer
    recipe = tensor_recipe(observer)
    recipe = recipe if axis is None else replace(recipe, spec=replace(recipe.spec, axis=axis))
    if not is_weight and not hasattr(observer, "fake_quant_enabled") and not recipe.spec.simulated:
        qmin, qmax = INTEGER_RANGE[recipe.spec.dtype]
        recipe = replace(recipe, spec=replace(recipe.spec, qmin=qmin, qmax=qmax))
    low = getattr(getattr(observer, "activation_post_process", observer), "min_val", None)
    if low is not None and (low.numel() == 0 or bool(torch.isinf(low).any())):
        return Quantizer(recipe, source, 1)
    scale, zero_point = observer.calculate_qparams()
    axis = recipe.spec.axis if recipe.spec.per_channel else None
    grid = QParams(scale, zero_point, axis, recipe.spec.qmin, recipe.spec.qmax, recipe.spec.dtype)
    quantizer = Quantizer(recipe, source, grid.scale.numel()).to(grid.scale.device)
    quantizer.set_qparams(grid)
    return quantizer


def weight_quantizer(layer: nn.Module, observer: nn.Module, path: str) -> Quantizer:
    """A Quantizer for the weight of now: what torch.ao, too, decides only when it converts.

    Channels of a transposed convolution are its outputs, as everywhere in the core; torch.ao prepares no such layer.
    """
    weight, spec, axis = layer.weight.detach(), tensor_recipe(observer).spec, None
    if spec.per_channel and "ConvTranspose" in type(layer).__name__:
        weight, axis = PreparedConvTranspose2d.rows(layer, weight).movedim(0, spec.axis), 0
    observer(weight)
    return quantizer_of(observer, f"{path}.weight", axis, is_weight=True)


def places_of(model: nn.Module) -> Places:
    """Where the observers of a calibrated model are. Changes `model`: stubs and observers become Quantizers."""
    quantizers: dict[int, Quantizer] = {}

    def quantizer(observer: nn.Module, source: str) -> Quantizer:
        if id(observer) not in quantizers:
            quantizers[id(observer)] = quantizer_of(observer, source)
        return quantizers[id(observer)]

    qconfigs = _graph_qconfigs(model) if isinstance(model, fx.GraphModule) else None
    outputs: dict[str, Quantizer] = {}
    weights: dict[str, Quantizer] = {}
    _from_torch_qat(model)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        observer = module._modules.get("activation_post_process")
        observed = observer is not None and is_observer(observer)
        if is_observer(module) and not path.rpartition(".")[2].startswith("activation_post_process"):
            continue  # the observer inside a fake-quantize module, or one that nothing calls
        if is_a(module, "DeQuantStub"):
            _replace(model, path, Leave())
        elif is_a(module, "QuantStub") and observed:
            _replace(model, path, quantizer(observer, path))
        elif is_observer(module) and isinstance(model, fx.GraphModule):
            _replace(model, path, quantizer(module, path))
        elif observed and o.MODULES.get(getattr(module, "float_class", type(module))) is not None:
            outputs[path] = quantizer(observer, path)
            _strip(module)
        elif observed:  # a fused module or FloatFunctional, which calls its observer itself
            module.activation_post_process = quantizer(observer, path)
        if o.MODULES.get(type(module)) in o.WEIGHTED:
            qconfig = getattr(module, "qconfig", None) if qconfigs is None else qconfigs.get(path)
            if hasattr(module, "weight_post_process"):
                weights[path] = weight_quantizer(module, module.weight_post_process, path)
            elif qconfig is not None:
                weights[path] = weight_quantizer(module, qconfig.weight(), path)
    return Places(outputs=outputs, weights=weights, keep_grids=True, torchs_grids=qconfigs is None)


def _from_torch_qat(model: nn.Module) -> None:
    """Layers of torch.ao.nn.(intrinsic.)qat become float ones, batch normalization folded in, with a clamp behind."""
    for path, module in list(model.named_modules()):
        if not (type(module).__module__.startswith("torch.ao.nn") and hasattr(module, "weight_fake_quant")):
            continue
        float_class = next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn.") and c in o.MODULES)
        layer = copy.copy(module)
        layer.__class__ = float_class
        layer._modules, layer._forward_hooks = {}, type(module._forward_hooks)()
        if hasattr(module, "bn"):
            layer = folded(layer, module.bn)
        layer.__dict__["weight_post_process"] = module.weight_fake_quant
        fused = Fused(layer, *([nn.ReLU()] if "ReLU" in type(module).__name__ else []))
        if "activation_post_process" in module._modules:  # in a graph the observer is a node of its own
            fused.activation_post_process = module.activation_post_process
            fused._forward_hooks.update(module._forward_hooks)
        _replace(model, path, fused.eval())


def _graph_qconfigs(model: fx.GraphModule) -> dict[str, Any]:
    """The qconfig of each layer of a graph that torch.ao prepared, also of layers inside fused modules."""
    if any(map(is_layer, model.modules())):
        raise InvalidState("convert: the model is converted already")
    if "_observed_graph_module_attrs" not in model.meta:
        raise InvalidState("convert: this graph does not come from prepare_fx")
    by_node: Mapping[str, Any] = model.meta["_observed_graph_module_attrs"].node_name_to_qconfig
    found = {}
    for node in model.graph.nodes:
        if node.op == "call_module" and by_node.get(node.name) is not None:
            for path, _ in model.get_submodule(node.target).named_modules(prefix=node.target):
                found[path] = by_node[node.name]
    return found


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _strip(module: nn.Module) -> None:
    """Takes the observer off a module."""
    del module.activation_post_process
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "__name__", "") in OBSERVER_HOOKS:
                del hooks[key]


def observed_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode; what was watched without rounding has its grids."""
    work = copy.deepcopy(model).eval()
    enable_fake_quant(work)
    return work
