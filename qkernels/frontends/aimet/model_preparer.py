"""prepare_model: function calls become modules, so that each can have quantizers of its own."""

import logging
from collections.abc import Collection, Iterable
from typing import Any

from torch import fx, nn

from qkernels.core.functional import Functional, SplitSiLU, calls_to_modules
from qkernels.core.tracing import Tracer
from qkernels.errors import InvalidArgument, Unsupported, close_matches

logger = logging.getLogger("ModelPreparer")


class _Tracer(Tracer):
    def __init__(self, leaves: Collection[nn.Module] = ()):  # without arguments when a pickled graph is read
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.leaves or isinstance(m, Functional) or super().is_leaf_module(m, module_qualified_name)


def prepare_model(
    model: nn.Module,
    modules_to_exclude: Iterable[nn.Module] | None = None,
    module_classes_to_exclude: Iterable[type] | None = None,
    concrete_args: dict[str, Any] | None = None,
) -> fx.GraphModule:
    """The graph of `model` with a module `module_<name>` for each function that can have quantizers.

    A module that is called several times becomes one module a call, whose parameters are copies; SiLU becomes a sigmoid
    and a product.
    """
    leaves, classes = set(modules_to_exclude or ()), tuple(module_classes_to_exclude or ())
    leaves |= {m for m in model.modules() if isinstance(m, classes)}
    names = [name for name, _ in model.named_modules()]
    for module in leaves:
        if not isinstance(module, nn.Module):
            hint = close_matches(str(module), names)
            raise InvalidArgument(f"prepare_model: modules_to_exclude holds modules, got {module!r}{hint}")
    try:
        graph = _Tracer(leaves).trace(model, concrete_args)
    except Exception as error:  # forward is foreign code
        raise Unsupported(
            f"prepare_model: {type(model).__name__} has no graph ({error}); name the modules with control flow in "
            "modules_to_exclude"
        ) from error
    prepared = fx.GraphModule(model, graph)
    calls_to_modules(prepared, lambda why, name: logger.info("%-19s: Adding new module for node: {%s} ", why, name))
    for path, module in list(prepared.named_modules()):
        if type(module) is nn.SiLU:
            prepared.set_submodule(path, SplitSiLU())
    known = set(model.modules())  # which keep their modes
    for module in prepared.modules():
        module.training = module.training if module in known else model.training
    return prepared
