"""prepare_fx and convert_fx, and the QConfigMapping that they read."""

from collections.abc import Callable
from typing import Any

from torch import nn

from qkernels.core.convert import convert as core_convert
from qkernels.core.phases import observe, settle
from qkernels.core.prepare import PreparedModel, quantizers
from qkernels.core.prepare import prepare as core_prepare
from qkernels.core.quantizer import State
from qkernels.core.recipe import Match, Override, Recipe
from qkernels.errors import InvalidArgument, Unsupported
from qkernels.frontends.torch_ao import parse
from qkernels.frontends.torch_ao.eager import convert, override
from qkernels.frontends.torch_ao.observers import get_default_qat_qconfig, get_default_qconfig


class QConfigMapping:
    """Which module gets which qconfig: global, by type, by a regex of the path, by path; the latter win.

    A type is a class of modules, a function as the model calls it (`torch.add`; `operator.add` for `x + y`), or the
    name of a method of tensors.
    """

    def __init__(self) -> None:
        self.global_qconfig: Any = None
        self.object_type_qconfigs: dict[type | Callable | str, Any] = {}
        self.module_name_regex_qconfigs: dict[str, Any] = {}
        self.module_name_qconfigs: dict[str, Any] = {}

    def set_global(self, qconfig: Any) -> "QConfigMapping":
        self.global_qconfig = qconfig
        return self

    def set_object_type(self, object_type: type | Callable | str, qconfig: Any) -> "QConfigMapping":
        self.object_type_qconfigs[object_type] = qconfig
        return self

    def set_module_name_regex(self, module_name_regex: str, qconfig: Any) -> "QConfigMapping":
        self.module_name_regex_qconfigs[module_name_regex] = qconfig
        return self

    def set_module_name(self, module_name: str, qconfig: Any) -> "QConfigMapping":
        self.module_name_qconfigs[module_name] = qconfig
        return self


def get_default_qconfig_mapping(backend: str = "x86", version: int = 0) -> QConfigMapping:
    return QConfigMapping().set_global(get_default_qconfig(backend, version))


def get_default_qat_qconfig_mapping(backend: str = "x86", version: int = 1) -> QConfigMapping:
    return QConfigMapping().set_global(get_default_qat_qconfig(backend, version))


def mapping_recipe(mapping: Any) -> Recipe:
    """The recipe that a QConfigMapping, ours or torch.ao's, says."""
    base = mapping.global_qconfig
    overrides: list[Override] = []
    for kind, qconfig in mapping.object_type_qconfigs.items():
        match = Match("type", kind) if isinstance(kind, str) else Match.of(kind)  # a method of tensors has its name
        overrides.append(override(match, qconfig))
    # In torch.ao the first regex that fits wins, in a Recipe the last rule.
    for pattern, qconfig in reversed(mapping.module_name_regex_qconfigs.items()):
        overrides.append(override(Match("regex", pattern + r"[\s\S]*"), qconfig))
    for path, qconfig in mapping.module_name_qconfigs.items():
        overrides.append(override(Match("name", path), qconfig))
    if base is not None:
        activation, weight = parse.factory_recipe(base.activation), parse.factory_recipe(base.weight)
        return Recipe(activation, weight, tuple(overrides))
    default = Recipe()
    return Recipe(default.activation, default.weight, (Override(Match("regex", r"[\s\S]*"), skip=True), *overrides))


def prepare_fx(model: nn.Module, qconfig_mapping: Any, example_inputs: Any, **unsupported: Any) -> nn.Module:
    """The model with Quantizers that watch; then run calibration batches through it and call `convert_fx`."""
    given = {name for name, value in unsupported.items() if value}
    if given:
        raise Unsupported(f"prepare_fx: {sorted(given)} have no counterpart; skip modules with qconfig None")
    if not hasattr(qconfig_mapping, "module_name_qconfigs"):
        raise InvalidArgument(f"prepare_fx: qconfig_mapping must be a QConfigMapping, got {qconfig_mapping!r}")
    prepared = core_prepare(model, example_inputs, mapping_recipe(qconfig_mapping))
    observe(prepared)
    return prepared


def convert_fx(graph_module: nn.Module, **unsupported: Any) -> nn.Module:
    """The integer network of what `prepare_fx` gave, ours or torch.ao's."""
    given = {name for name, value in unsupported.items() if value and name != "remove_qconfig"}
    if given:
        raise Unsupported(f"convert_fx: {sorted(given)} have no counterpart")
    if not isinstance(graph_module, PreparedModel):
        return convert(graph_module)
    if any(q.state is State.OBSERVE for q in quantizers(graph_module)):
        settle(graph_module)
    return core_convert(graph_module)
