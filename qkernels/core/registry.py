"""The table of converted layers by the name that a saved model uses: core owns it, `qkernels.nn` fills it."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from qkernels.errors import CheckpointError, InvalidArgument

_LAYERS: dict[str, type[nn.Module]] = {}

LayerType = TypeVar("LayerType", bound=type[nn.Module])


def layer(kind: str) -> Callable[[LayerType], LayerType]:
    """Registers a converted layer class under `kind` and gives it the attribute `kind`.

    The class has `get_config() -> dict` (plain JSON values with "kind") and `from_config(config)`, which together with
    the state dict rebuild a layer.
    """

    def register(cls: LayerType) -> LayerType:
        if kind in _LAYERS:
            raise InvalidArgument(f"layer: {kind!r} is already {_LAYERS[kind].__qualname__}")
        cls.kind = kind
        _LAYERS[kind] = cls
        return cls

    return register


def layer_class(kind: str) -> type[nn.Module]:
    """The class registered under `kind`."""
    if kind not in _LAYERS:
        raise CheckpointError(f"load: unknown layer kind {kind!r}; this version has {sorted(_LAYERS)}")
    return _LAYERS[kind]


def is_layer(module: nn.Module) -> bool:
    """Whether the module is a converted layer."""
    return type(module) in _LAYERS.values()
