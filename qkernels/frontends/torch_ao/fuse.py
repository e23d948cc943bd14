"""`fuse_modules`: chains of modules become one, which gets one observer and one integer layer."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from qkernels.core.fusion import folded
from qkernels.errors import InvalidArgument, close_matches

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CLAMPS = (nn.ReLU, nn.ReLU6)


class Fused(nn.Sequential):
    """Modules that count as one: observed behind the last, converted into one layer."""

    def __iter__(self) -> Iterator[nn.Module]:
        """The modules that compute, without the observer that `prepare` adds: a hook calls that."""
        return (module for name, module in self._modules.items() if name != "activation_post_process")


def fuse_modules(
    model: nn.Module, modules_to_fuse: Sequence[Any], inplace: bool = False, **unsupported: Any
) -> nn.Module:
    """Fuses chains of modules, each a list of paths in `model`: [conv, bn], [conv, bn, relu], [linear, relu], ...

    A batch normalization is folded into what it follows; the model must be in eval mode (for training:
    `fuse_modules_qat`). The first module becomes the fused one, the others Identity.
    """
    return _fuse(model, modules_to_fuse, inplace, False, unsupported)


def fuse_modules_qat(
    model: nn.Module, modules_to_fuse: Sequence[Any], inplace: bool = False, **unsupported: Any
) -> nn.Module:
    """The same for training: batch normalization stays a module of its own inside the fused one."""
    return _fuse(model, modules_to_fuse, inplace, True, unsupported)


def _fuse(model: nn.Module, lists: Sequence[Any], inplace: bool, training: bool, unsupported: dict) -> nn.Module:
    where = "fuse_modules_qat" if training else "fuse_modules"
    torchs = ("fuser_func", "fuse_custom_config_dict")  # None is their default
    unknown = sorted(name for name, value in unsupported.items() if name not in torchs or value is not None)
    if unknown:
        raise InvalidArgument(f"{where}: unknown arguments {unknown}")
    if not inplace:
        model = copy.deepcopy(model)
    chains = [lists] if lists and isinstance(lists[0], str) else lists
    for i, chain in enumerate(chains):
        paths = list(chain)
        modules = [_submodule(model, path, f"{where}: modules_to_fuse[{i}]") for path in paths]
        fused = _fused(modules, training, f"{where}: {paths}")
        _move_hooks(modules, fused)
        for path, module in zip(paths, [fused, *(nn.Identity() for _ in paths[1:])], strict=True):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.train(modules[0].training))
    return model


def _submodule(model: nn.Module, path: str, where: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in model.named_modules() if name]
        raise InvalidArgument(f"{where}: no module {path!r}{close_matches(path, names)}") from None


def _fused(modules: list[nn.Module], training: bool, where: str) -> nn.Module:
    kinds = tuple(type(m) for m in modules)
    if len({m.training for m in modules}) != 1:
        raise InvalidArgument(f"{where}: all modules must be in training mode, or all in eval mode")
    clamp = kinds[-1] in CLAMPS
    head = kinds[:-1] if clamp else kinds
    weighted = head and head[0] in (*CONVS, nn.Linear, *TRANSPOSED)
    fits = (len(head) == 1 and clamp and (weighted or head[0] in NORMS)) or (
        len(head) == 2 and weighted and head[1] in NORMS
    )
    if not fits:
        raise InvalidArgument(
            f"{where}: cannot fuse {[k.__name__ for k in kinds]}; fusable are convolution or linear, then batch "
            "normalization, ReLU, or both; and batch normalization with ReLU"
        )
    if len(head) == 2 and not training:
        if modules[0].training:
            raise InvalidArgument(f"{where}: the modules are in training mode; call model.eval(), or fuse_modules_qat")
        layer = folded(modules[0], modules[1])
        return Fused(layer, modules[-1]) if clamp else layer
    return Fused(*modules)


def _move_hooks(modules: list[nn.Module], fused: nn.Module) -> None:
    """What ran before the first module and after the last now runs around the fused one."""
    first, last = modules[0], modules[-1]
    before, after = dict(first._forward_pre_hooks), dict(last._forward_hooks)
    first._forward_pre_hooks.clear()
    last._forward_hooks.clear()
    fused._forward_pre_hooks.update(before)
    fused._forward_hooks.update(after)
