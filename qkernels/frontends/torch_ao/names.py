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
intrinsic = Namespace(
    real_torch.nn.intrinsic,
    {
        "qat": Namespace(
            real_torch.nn.intrinsic.qat, {name: getattr(qat, name) for name in ("freeze_bn_stats", "update_bn_stats")}
        )
    },
)
torch = Namespace(
    real_torch,
    {
        "ao": Namespace(real_torch.ao, {"quantization": here}),
        "nn": Namespace(real_torch.nn, {"intrinsic": intrinsic}),
        "quantization": here,
    },
)
