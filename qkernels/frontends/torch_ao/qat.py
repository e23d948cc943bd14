"""prepare_qat, and the switches that a training loop applies."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from qkernels.core import training
from qkernels.core.layers import PREPARED
from qkernels.core.prepare import quantizers
from qkernels.core.qspec import QParams
from qkernels.core.quantizer import Quantizer, State
from qkernels.core.training import prepare_qat as core_prepare_qat
from qkernels.errors import InvalidArgument, InvalidState, Unsupported
from qkernels.frontends.torch_ao import parse
from qkernels.frontends.torch_ao.eager import _is_observed, convert, note_example, observe_output, propagate_qconfig
from qkernels.frontends.torch_ao.fuse import CLAMPS, NORMS, Fused
from qkernels.frontends.torch_ao.fx import mapping_recipe, refuse


def prepare_qat(model: nn.Module, mapping: None = None, inplace: bool = False) -> nn.Module:
    """Makes layers with a qconfig train with rounded weights and outputs. The Parameters stay the same objects.

    A fused batch normalization is trained as part of its layer; `convert` folds it.
    """
    if mapping is not None:
        raise Unsupported("prepare_qat: mapping: the layers are those of the core")
    if not model.training:
        raise InvalidState("prepare_qat: the model is in eval mode; call model.train() first")
    if not inplace:
        model = copy.deepcopy(model)
    propagate_qconfig(model)
    if not any(getattr(m, "qconfig", None) for m in model.modules()):
        raise InvalidArgument("prepare_qat: no module has a qconfig: model.qconfig = get_default_qat_qconfig('x86')")
    _train(model, "")
    for quantizer in quantizers(model):
        quantizer.state = State.TRAIN
    model.register_forward_pre_hook(note_example, with_kwargs=True)
    return model


def quantize_qat(model: nn.Module, run_fn: Any, run_args: Iterable[Any], inplace: bool = False) -> nn.Module:
    """prepare_qat, train by `run_fn(model, *run_args)`, convert."""
    model = prepare_qat((model if inplace else copy.deepcopy(model)).train(), inplace=True)
    run_fn(model, *run_args)
    return convert(model.eval(), inplace=True)


def _train(model: nn.Module, path: str) -> None:
    for name, child in model.named_children():
        here = f"{path}.{name}" if path else name
        if child.qconfig is None:
            _train(child, here)
            continue
        layer = _trained_layer(child, here)
        if layer is not None:
            layer.qconfig = child.qconfig
            setattr(model, name, layer)
        elif not parse.is_a(child, "FloatFunctional") and not _is_observed(child, None):
            _train(child, here)
            continue
        target = layer or child
        target.activation_post_process = _activation(child.qconfig, here)
        if not parse.is_a(child, "FloatFunctional"):
            target.register_forward_hook(observe_output, prepend=True)


def _activation(qconfig: Any, path: str) -> Quantizer:
    recipe, made = parse.factory_recipe(qconfig.activation, path, fixed=True), qconfig.activation()
    quantizer, spec = Quantizer(recipe, path, None, trained=True), recipe.spec
    if parse.is_fixed(made):
        quantizer.set_qparams(QParams(*made.calculate_qparams(), None, spec.qmin, spec.qmax, spec.dtype))
        quantizer.rule.observes = False  # in no state does data change the grid
    return quantizer


def _trained_layer(module: nn.Module, path: str) -> nn.Module | None:
    """The layer that trains in the place of `module`: a linear or convolution, with what is fused to it."""
    fused = parse.is_a(module, "Fused") or parse.is_a(module, "_FusedModule")
    parts = list(module.children()) if fused else [module]
    if type(parts[0]) not in PREPARED:
        return None
    norm = next((p for p in parts if type(p) in NORMS), None)
    clamp = next((p for p in parts if type(p) in CLAMPS), None)
    recipe = parse.factory_recipe(module.qconfig.weight, f"{path}.weight")
    layer = PREPARED[type(parts[0])].of(parts[0], recipe, path, norm, trained=True)
    layer.observe_weight()
    layer.quantizers["weight"].choose()
    if clamp is not None:
        layer = Fused(layer, clamp)
    if fused:
        layer._forward_pre_hooks, layer._forward_hooks = module._forward_pre_hooks, module._forward_hooks
    return layer.train(module.training)


def prepare_qat_fx(
    model: nn.Module,
    qconfig_mapping: Any,
    example_inputs: Any,
    prepare_custom_config: None = None,
    backend_config: None = None,
) -> nn.Module:
    """The graph of the model, ready to train; then `convert_fx`."""
    refuse("prepare_qat_fx", prepare_custom_config=prepare_custom_config, backend_config=backend_config)
    return core_prepare_qat(model, example_inputs, mapping_recipe(qconfig_mapping, "prepare_qat_fx"))


def _switch(name: str) -> Callable[[nn.Module], None]:
    """The phase of the core of that name, which also moves stand-alone fake-quantize modules."""
    phase = getattr(training, name)

    def switch(module: nn.Module) -> None:
        phase(module)
        for part in module.modules():
            if hasattr(part, "fake_quant_enabled"):
                getattr(part, name)()

    switch.__name__ = switch.__qualname__ = name
    switch.__doc__ = f"{phase.__doc__} For `model.apply`, or for a whole model."
    return switch


enable_observer = _switch("enable_observer")
disable_observer = _switch("disable_observer")
enable_fake_quant = _switch("enable_fake_quant")
disable_fake_quant = _switch("disable_fake_quant")
freeze_bn_stats = training.freeze_bn
update_bn_stats = training.unfreeze_bn
