"""Quantizers at the modules of a living model, where somebody else says so: on weights, inputs and outputs.

`prepare` rebuilds a model as a graph and decides by itself where grids go. Here the model stays the object that the
user holds, with its Parameters, and computes with what was attached; `as_prepared` leads to `convert` and `verify`.
"""

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import ops
from qkernels.core.containers import become
from qkernels.core.layers import PREPARED, Prepared
from qkernels.core.norm import Norm
from qkernels.core.operations import BATCH_NORMS, output_channels
from qkernels.core.placed import Places, prepare_placed
from qkernels.core.quantizer import Quantizer, State
from qkernels.core.recipe import TensorRecipe
from qkernels.errors import InvalidArgument, InvalidState, InvalidType, Unsupported

WEIGHT, BIAS, OUTPUT = "weight", "bias", "output"
PARAMETERS = (WEIGHT, BIAS)


@dataclass(frozen=True)
class Site:
    """What gets a grid at one module.

    Attributes:
        inputs: recipes of tensor arguments by position.
        output, weight, bias: recipes, or None to leave them alone.
        norm: the path of the batch normalization that becomes part of the layer.
        folds: while it is trained, the norm is folded by its running statistics, which take a convolution of their own.
        start_step: for so many training steps the Quantizers only watch.
        gradient_bits: the gradient of the output is rounded to so many bits, stochastically; None: it is not.
    """

    inputs: Mapping[int, TensorRecipe] = field(default_factory=dict)
    output: TensorRecipe | None = None
    weight: TensorRecipe | None = None
    norm: str | None = None
    folds: bool = False
    start_step: int = 0
    gradient_bits: int | None = None
    bias: TensorRecipe | None = None


class Originals:
    """What the modules of a model were before `attach`.

    The tables of hooks stay those of the original: a handle that the user has works on, before, while and after.
    """

    def __init__(self):
        self.was: list[tuple[nn.Module, type, dict[str, Any], dict[str, Any]]] = []

    def replace(self, module: nn.Module, new: nn.Module) -> None:
        """Turns the object `module` into `new`, for everybody who holds it."""
        self.was.append((module, module.__class__, module.__dict__, dict(new.__dict__)))
        become(module, new)

    def restore(self) -> None:
        """Takes everything off again. Parameters, statistics and attributes keep what has been made of them since."""
        for module, cls, state, attached in reversed(self.was):
            now = module.__dict__
            _strip_hooks(module)
            for table in ("_parameters", "_buffers"):
                state[table].update({name: t for name, t in now[table].items() if name in state[table]})
            state.update({name: v for name, v in now.items() if name not in attached or v is not attached[name]})
            module.__class__, module.__dict__ = cls, state
        self.was.clear()


class _Absorbed:
    """Where a batch normalization was that is a part of the layer before it now: its tensors, and nothing to do.

    Who looks for batch normalizations finds it, and what is frozen by `eval()` is that part of the layer.
    """

    absorbed: tuple[Norm]  # in a tuple, as it is a submodule of the layer

    def forward(self, x: Tensor) -> Tensor:
        return x

    def train(self, mode: bool = True) -> nn.Module:
        self.absorbed[0].training = mode
        return super().train(mode)


class AbsorbedBatchNorm1d(_Absorbed, nn.BatchNorm1d):
    pass


class AbsorbedBatchNorm2d(_Absorbed, nn.BatchNorm2d):
    pass


class AbsorbedBatchNorm3d(_Absorbed, nn.BatchNorm3d):
    pass


ABSORBED = dict(zip(BATCH_NORMS, (AbsorbedBatchNorm1d, AbsorbedBatchNorm2d, AbsorbedBatchNorm3d), strict=True))


def _absorbed(norm: nn.Module, into: Norm) -> nn.Module:
    made = _twin(norm, ABSORBED[type(norm)])
    made.absorbed, made._parameters, made._buffers = (into,), into._parameters, into._buffers
    return made


def _twin(module: nn.Module, cls: type) -> nn.Module:
    """A module of `cls` with everything that `module` has; `copy.copy` refuses those with parametrizations."""
    made = cls.__new__(cls)
    made.__dict__.update(module.__dict__)
    return made


def attach(model: nn.Module, sites: Mapping[str, Site], trained: bool = True) -> Originals:
    """Puts Quantizers into `model`, in place; the Parameters stay the same objects under the same names.

    Args:
        sites: what to round, by the path of the module.
        trained: the grids follow the training steps by the rule of their recipe; otherwise the Quantizers are off,
            until `qkernels.core.phases.observe`.

    Raises:
        InvalidArgument: a weight recipe for a module whose weight is not computed with, or a norm that does not fit.
    """
    for path, site in sites.items():
        _check(model.get_submodule(path), path, site)
    originals = Originals()
    try:
        for path, site in sites.items():
            _attach(model, path, site, trained, originals)
    except BaseException:
        originals.restore()
        raise
    return originals


def _check(module: nn.Module, path: str, site: Site) -> None:
    if isinstance(module._modules.get("quantizers"), nn.ModuleDict):
        raise InvalidState(
            f"{path}: has quantizers already; one quantizer at a time rounds a module, take them off first"
        )
    for name, recipe in ((WEIGHT, site.weight), (BIAS, site.bias)):
        value = getattr(module, name, None)
        if recipe is None or not isinstance(value, Tensor):
            continue
        if module._parameters.get(name) is None:
            remedy = "prune.remove, remove_weight_norm, remove_spectral_norm or remove_parametrizations"
            raise Unsupported(f"{path}.{name}: is computed and no Parameter; make it one first by {remedy}")
        if value.dtype == torch.float64:
            raise InvalidType(f"{path}.{name}: must be float32, got {value.dtype}; quantize model.float()")


def _attach(model: nn.Module, path: str, site: Site, trained: bool, originals: Originals) -> None:
    module = model.get_submodule(path)
    layered = site.weight is not None and type(module) in PREPARED
    made = _with_weight(model, path, module, site, trained) if layered else _twin(module, type(module))
    if not layered:
        made._modules = {**module._modules, "quantizers": nn.ModuleDict()}
    if trained and site.gradient_bits is not None:
        made.gradient_bits = site.gradient_bits
    originals.replace(module, made)
    if site.norm is not None:
        norm = model.get_submodule(site.norm)
        originals.replace(norm, _absorbed(norm, module.norm))
    device = next((p.device for p in model.parameters()), None)
    for key, recipe in [*((f"input{i}", r) for i, r in site.inputs.items()), (OUTPUT, site.output)]:
        if recipe is not None:
            module.quantizers[key] = Quantizer(recipe, f"{path}.{key}", None, trained).to(device)
    module.register_forward_pre_hook(_by_position, with_kwargs=True)
    if not layered:
        _attach_parameters(module, path, site, trained)
    if site.inputs:
        module.register_forward_pre_hook(_round_inputs)
    if site.output is not None:
        module.register_forward_hook(_round_output)
    if "gradient_bits" in vars(made):
        module.register_forward_hook(_round_gradient)
    for quantizer in module.quantizers.values():
        quantizer.state = State.TRAIN if trained else State.OFF
        quantizer.delay = site.start_step if trained else 0


def _with_weight(model: nn.Module, path: str, module: nn.Module, site: Site, trained: bool) -> nn.Module:
    norm = None if site.norm is None else model.get_submodule(site.norm)
    if norm is not None and (type(norm) not in BATCH_NORMS or norm.running_mean is None):
        raise InvalidArgument(f"{path}: {site.norm} is no batch normalization with running statistics")
    channels = output_channels(module)
    if norm is not None and norm.num_features != channels:
        raise InvalidArgument(f"{path}: {site.norm} is for {norm.num_features} channels, the layer has {channels}")
    layer = PREPARED[type(module)].of(module, site.weight, path, norm, trained)
    if norm is not None:
        layer.norm.folds = site.folds
    if site.bias is not None:
        if norm is not None and not site.folds:
            raise Unsupported(
                f"{path}: the bias is that of the folded layer, but {site.norm} is not folded in training"
            )
        layer.round_bias(site.bias, path)
    return layer.train(module.training)


def _attach_parameters(module: nn.Module, path: str, site: Site, trained: bool) -> None:
    """Quantizers of the parameters of a module that computes with what it finds under their names."""
    for name, recipe in ((WEIGHT, site.weight), (BIAS, site.bias)):
        parameter = module._parameters.get(name)
        if recipe is None:
            continue
        if parameter is None:
            raise InvalidArgument(f"{path}: a {type(module).__name__} has no {name} that can be rounded")
        quantizer = Quantizer(recipe, f"{path}.{name}", len(parameter), trained, is_weight=True)
        module.quantizers[name] = quantizer.to(parameter.device)
    if any(name in module.quantizers for name in PARAMETERS):
        module.register_forward_pre_hook(_round_parameters)
        module.register_forward_hook(_restore_parameters, always_call=True)


def _by_position(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Arguments by position, the only ones that Quantizers know.

    Every attached module has this hook: where hooks are torch calls the layer, and does not compute with its weight in
    a fast path of the block around it.
    """
    if not kwargs:
        return None
    called = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    return called.args[1:], called.kwargs


def _round_parameters(module: nn.Module, args: tuple) -> None:
    for name in PARAMETERS:
        if name in module.quantizers:
            module.__dict__[name] = module.quantizers[name](module._parameters[name])  # in front of the Parameter


def _restore_parameters(module: nn.Module, args: tuple, output: Tensor) -> None:
    for name in PARAMETERS:
        module.__dict__.pop(name, None)


def _round_inputs(module: nn.Module, args: tuple) -> tuple:
    quantizers = module.quantizers
    return tuple(quantizers[f"input{i}"](x) if f"input{i}" in quantizers else x for i, x in enumerate(args))


def _round_output(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
    if isinstance(output, tuple):  # a maximum comes with its indices
        return module.quantizers[OUTPUT](output[0]), *output[1:]
    return module.quantizers[OUTPUT](output)


def _round_gradient(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return ops.round_gradient(output, module.gradient_bits) if module.training else output


_HOOKS = (_by_position, _round_inputs, _round_output, _round_gradient, _round_parameters, _restore_parameters)


def attached(model: nn.Module, paths: Iterable[str] | None = None) -> Iterator[tuple[str, str, Quantizer]]:
    """(path, "weight", "output" or "input0", ..., Quantizer) of everything attached, or of that at `paths`."""
    places = model.named_modules() if paths is None else ((path, model.get_submodule(path)) for path in paths)
    for path, module in places:
        quantizers = module._modules.get("quantizers")
        if isinstance(quantizers, nn.ModuleDict):
            for key, quantizer in quantizers.items():
                yield path, key, quantizer


def as_prepared(model: nn.Module, args: tuple, kwargs: dict) -> nn.Module:
    """A copy of `model` as `prepare` would have made it, with the grids that the attached Quantizers have now.

    Raises:
        InvalidState: nothing is attached, or a Quantizer has no grid yet.
    """
    work = copy.deepcopy(model).eval()
    found = list(attached(work))
    if not found:
        raise InvalidState(f"convert: {type(model).__name__} has no quantizers")
    blind = [(path, quantizer.source) for path, _, quantizer in found if not quantizer.has_grid()]
    idle = _not_called(model, {path for path, _ in blind}, args, kwargs)
    if missing := [source for path, source in blind if path not in idle]:
        raise InvalidState(f"convert: {', '.join(missing)} saw no data; train or calibrate the model first")
    places = Places({}, {}, {}, keep_grids=True)
    for path, key, quantizer in found:
        if path in idle:
            continue
        if key == OUTPUT and getattr(work.get_submodule(path), "return_indices", False):
            raise Unsupported(f"convert: {path}: there are no integers for a maximum that comes with its indices")
        if key == OUTPUT:
            places.outputs[path] = quantizer
        elif key not in PARAMETERS:
            row = places.inputs.setdefault(path, [])
            position = int(key.removeprefix("input"))
            row += [None] * (position + 1 - len(row))
            row[position] = quantizer
        elif not isinstance(work.get_submodule(path), Prepared):
            layer = work.get_submodule(path)
            with torch.no_grad():  # there is nothing else to do with it
                layer._parameters[key] = nn.Parameter(quantizer(layer._parameters[key]))
    for path in {path for path, _, _ in found}:
        _strip(work.get_submodule(path))
    for module in [module for module in work.modules() if isinstance(module, _Absorbed)]:
        become(module, nn.Identity().eval())
    with torch.no_grad():
        return prepare_placed(work, args, kwargs, places)


def _not_called(model: nn.Module, paths: set[str], args: tuple, kwargs: dict) -> set[str]:
    """Those of the modules at `paths` that a call with these arguments passes by."""
    if not paths:
        return set()
    probe, called = copy.deepcopy(model).eval(), set()
    for _, _, quantizer in attached(probe):
        quantizer.state = State.OFF
    for path in paths:
        probe.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: called.add(path))
    with torch.no_grad():
        probe(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    return paths - called


def _strip_hooks(module: nn.Module) -> None:
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if hook in _HOOKS]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _strip(module: nn.Module) -> None:
    _strip_hooks(module)
    if isinstance(module, Prepared):
        for key in [key for key in module.quantizers if key not in PARAMETERS]:
            del module.quantizers[key]
    else:
        del module.quantizers
