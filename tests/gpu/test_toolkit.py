"""A build says so where its static CUDA runtime may ask more of the driver than torch does."""

import importlib.util
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("qkernels_setup", Path(__file__).parents[2] / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("toolkit", "torch_cuda", "is_told"),
    [
        ("13.0", "12.8", True),
        ("13.0", "13.1", False),
        ("12.9", "12.4", False),
        ("12.9", "13.0", False),
        ("13.0", None, False),
    ],
)
def test_a_toolkit_of_a_later_major_version_is_told(build, monkeypatch, toolkit, torch_cuda, is_told):
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    caution = build.too_new_for_driver(build.Cuda(Path("/cuda"), toolkit, [], ""))
    assert ("needs a driver for it" in caution) == is_told
    assert "warning:" not in caution  # which would fail `make build`
