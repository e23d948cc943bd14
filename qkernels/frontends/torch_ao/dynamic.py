"""quantize_dynamic: linear layers that quantize their input when it arrives: no calibration, no graph."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.ao.quantization import default_dynamic_qconfig

from qkernels.core.containers import become
from qkernels.core.convert import convert
from qkernels.core.plain import plain_copy
from qkernels.core.prepare import prepare
from qkernels.core.recipe import RECIPES
from qkernels.errors import InvalidArgument, Unsupported, close_matches
from qkernels.frontends.torch_ao.eager import check_qconfig
from qkernels.frontends.torch_ao.parse import factory_recipe

_DEFAULT = (nn.Linear,)


def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Iterable[type | str] | Mapping[type | str, Any] | None = None,
    dtype: torch.dtype = torch.qint8,
    mapping: None = None,
    inplace: bool = False,
) -> nn.Module:
    """A copy of `model` in eval mode whose linear layers run on 8-bit codes: floats in, floats out.

    Each row of a layer's input gets a grid of its own when it arrives (torch.ao: one grid for the whole input), weights
    have one for each output channel.

    Args:
        model: any module; it needs no graph.
        qconfig_spec: which layers: the class nn.Linear, paths of modules (all linear layers below them), or a dict with
            such keys and qconfigs of 8 bits, where None leaves them float. None means all of them.
        dtype: torch.qint8.
        inplace: the object `model` itself is changed.

    Raises:
        Unsupported: another class (nn.LSTM, ...), another dtype, also of a qconfig, or a mapping.
        InvalidArgument: a path that no module has, or a value that is no qconfig.
    """
    if mapping is not None or dtype != torch.qint8:
        raise Unsupported(f"quantize_dynamic: only dtype=torch.qint8 and mapping=None, got {dtype} and {mapping}")
    given = qconfig_spec
    if not isinstance(given, Mapping):
        given = dict.fromkeys(_DEFAULT if given is None else given, default_dynamic_qconfig)
    work = plain_copy(model)
    _check(given, [path for path, _ in work.named_modules()])
    spec = {key: qconfig is not None for key, qconfig in given.items()}
    layers: dict[nn.Module, nn.Module] = {}
    for path, module in list(work.named_modules()):
        if type(module) is nn.Linear and _wanted(spec, path):
            layers[module] = _integer(module, path)
    for module in list(work.modules()):
        module._modules.update({name: layers.get(child, child) for name, child in module._modules.items()})
    work = layers.get(work, work)
    return become(model, work) if inplace else work


def _check(given: Mapping[type | str, Any], paths: list[str]) -> None:
    for key, qconfig in given.items():
        name = getattr(key, "__name__", key)
        if isinstance(key, str) and key not in paths:
            raise InvalidArgument(
                f"quantize_dynamic: the model has no module {key!r}{close_matches(key, filter(None, paths))}"
            )
        if not isinstance(key, str) and key is not nn.Linear:
            raise Unsupported(
                f"quantize_dynamic: {name} has no form that quantizes its input when it arrives; name nn.Linear only"
            )
        if qconfig is not None:
            check_qconfig(qconfig, f"quantize_dynamic: {name}")
            spec = factory_recipe(qconfig.weight, f"quantize_dynamic: {name}").spec
            if (spec.dtype, spec.qmax) != (torch.int8, 127):
                raise Unsupported(f"quantize_dynamic: {name}: weights are torch.qint8 up to 127, got {spec}")


def _wanted(spec: Mapping[type | str, bool], path: str) -> bool:
    """The longest path that holds the layer decides, else its class."""
    holders = [key for key in spec if isinstance(key, str) and f"{path}.".startswith(f"{key}.")]
    return spec[max(holders, key=len)] if holders else spec.get(nn.Linear, False)


def _integer(layer: nn.Linear, path: str) -> nn.Module:
    example = torch.zeros(1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    integer = convert(prepare(layer, example, RECIPES["int8-dynamic"])).get_submodule("layer")
    integer.name = path
    return integer
