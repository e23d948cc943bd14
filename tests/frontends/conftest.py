"""Fixtures of the front ends; AIMET, if it is in a folder of its own (QKERNELS_AIMET_PATH), behind what is here."""

import os
import sys

import pytest
import torch

sys.path += filter(None, os.environ.get("QKERNELS_AIMET_PATH", "").split(os.pathsep))


@pytest.fixture
def seeded_engine():
    """Seed 0, and torch's quantized engine as it was afterwards."""
    engine = torch.backends.quantized.engine
    torch.manual_seed(0)
    yield
    torch.backends.quantized.engine = engine
