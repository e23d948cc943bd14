"""Stands in for packages that qkernels imports and `make gpu-check` does not use, where a machine has only torch and no
way to anything else. Import it before qkernels."""

import importlib.util
import sys
from types import ModuleType

import torch.hub  # noqa: F401  (has a stand-in for tqdm of its own, and takes it before there is this one)


def _is_missing(name: str) -> bool:
    return name not in sys.modules and importlib.util.find_spec(name) is None


def _refuse(*_, **__):
    raise ModuleNotFoundError("gpu-check runs without safetensors: models cannot be saved or loaded")


if _is_missing("tqdm"):
    tqdm = ModuleType("tqdm")
    tqdm.tqdm = lambda batches, **_: batches
    sys.modules["tqdm"] = tqdm
if _is_missing("safetensors"):
    safetensors, for_torch = ModuleType("safetensors"), ModuleType("safetensors.torch")
    for_torch.save = for_torch.load = for_torch.save_file = for_torch.load_file = _refuse
    safetensors.torch = for_torch
    sys.modules.update({"safetensors": safetensors, "safetensors.torch": for_torch})
