"""Objects that the user holds stay what they were, around what `convert` made."""

from torch import nn


def become(model: nn.Module, other: nn.Module) -> nn.Module:
    """Turns the object `model` into `other`, for everybody who holds it."""
    model.__class__ = other.__class__
    model.__dict__ = other.__dict__
    return model


def keep_containers(converted: nn.Module, original: nn.Module) -> nn.Module:
    """Gives the sequences and lists of `original` their class back, so that `converted.features[1]` works.

    A graph holds plain modules where the original had containers, and only those children that it calls; the others
    come back as Identity.
    """
    for path, container in original.named_modules():
        kind = next((k for k in (nn.Sequential, nn.ModuleList) if isinstance(container, k)), None)
        parent, _, leaf = path.rpartition(".")
        owner = _submodule(converted, parent)
        plain = None if owner is None else owner._modules.get(leaf)
        if kind is None or type(plain) is not nn.Module:
            continue
        made = kind()
        made.train(plain.training)
        for name in container._modules:
            made._modules[name] = plain._modules.get(name, nn.Identity())
        made._modules.update({k: m for k, m in plain._modules.items() if k not in made._modules})
        owner._modules[leaf] = made
    return converted


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    for name in path.split(".") if path else ():
        model = model._modules.get(name)
        if model is None:
            return None
    return model
