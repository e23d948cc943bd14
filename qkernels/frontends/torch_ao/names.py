"""`torch`, with this front end where torch.ao.quantization is."""

import sys
from types import ModuleType
from typing import Any

import torch as real_torch
import torch.nn.intrinsic.qat

from qkernels.frontends.torch_ao import qat


class Namespace(ModuleType):
    """A module with some attributes replaced; nothing in the module itself changes."""

    def __init__(self, base: ModuleType, replaced: dict[str, Any]):
        super().__init__(base.__name__, base.__doc__)
        self.__dict__.update(replaced)
        self.__dict__["_base"] = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(self._base), *self.__dict__})


here = sys.modules["qkernels.frontends.torch_ao"]
verbs = {name: getattr(qat, name) for name in ("freeze_bn_stats", "update_bn_stats")}


def with_verbs(layers: ModuleType) -> Namespace:
    """torch.nn or torch.ao.nn, which both have these functions."""
    intrinsic = Namespace(layers.intrinsic, {"qat": Namespace(layers.intrinsic.qat, verbs)})
    return Namespace(layers, {"intrinsic": intrinsic})


ao = Namespace(real_torch.ao, {"quantization": here, "nn": with_verbs(real_torch.ao.nn)})
torch = Namespace(real_torch, {"ao": ao, "nn": with_verbs(real_torch.nn), "quantization": here})
