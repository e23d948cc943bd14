"""Each op of the schema is complete: CPU kernel, shape rule, documented wrapper, reference and opcheck sample."""

import re
from pathlib import Path

import pytest
import torch
from opcheck_samples import SAMPLES

from qkernels import _C, ops, reference

ROOT = Path(__file__).resolve().parents[2]
OPS = sorted(re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "python/schema.cpp").read_text()))
CUDA_OPS = [
    "adaptive_avg_pool", "add", "avg_pool", "batch_norm_statistics", "binary_conv2d", "binary_linear", "binary_sign",
    "binary_sign_backward", "binary_weight_pack", "cat", "conv", "conv_pack", "dequantize", "dequantize_out",
    "dorefa_gradient", "dorefa_weight", "dorefa_weight_backward", "fake_quant", "fake_quant_backward",
    "fake_quant_backward_out", "fake_quant_mask", "fake_quant_mask_backward", "fake_quant_out", "foreach_fake_quant",
    "foreach_fake_quant_backward", "foreach_observe_fake_quant", "linear", "linear_pack", "linear_rows", "lookup",
    "lsq", "lsq_backward", "lsq_backward_out", "lsq_out", "max_pool", "mul", "norm_fake_quant",
    "norm_fake_quant_backward", "observe", "observe_fake_quant_out", "observe_histogram", "observe_minmax",
    "pack_on_grid", "pack_signs", "pact", "pact_backward", "quantize", "quantize_out", "quantize_rows",
]  # fmt: skip


def has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"qkernels::{op}", key)


def test_the_schema_file_is_what_the_dispatcher_knows():
    names = torch._C._dispatch_get_all_op_names()
    registered = {name.removeprefix("qkernels::") for name in names if name.startswith("qkernels::")}
    assert set(OPS) == registered


@pytest.mark.parametrize("op", OPS)
def test_op_has_a_cpu_kernel(op):
    assert has_kernel(op, "CPU"), f"python/*.cpp registers no CPU kernel for {op}"


@pytest.mark.parametrize("op", CUDA_OPS)
def test_op_has_a_cuda_kernel_in_a_cuda_build(op):
    assert has_kernel(op, "CUDA") == _C.with_cuda


@pytest.mark.parametrize("op", OPS)
def test_op_has_a_shape_rule(op):
    entry = torch._library.simple_registry.singleton.find(f"qkernels::{op}")
    assert entry.fake_impl.kernel is not None, f"qkernels/ops has no register_fake for {op}"


@pytest.mark.parametrize("op", OPS)
def test_op_has_a_documented_wrapper(op):
    assert op in ops.__all__, f"qkernels/ops/__init__.py does not export {op}"
    assert len(getattr(ops, op).__doc__ or "") > 40, f"qkernels.ops.{op} has no docstring"


@pytest.mark.parametrize("op", OPS)
def test_op_has_a_reference(op):
    # out= and packing do not change what is computed.
    meaning = {"pack_on_grid": "linear"}.get(op, re.sub(r"_(out|pack)$", "", op))
    assert callable(getattr(reference, meaning, None)), f"qkernels/reference.py has no {meaning}"


def test_samples_belong_to_ops():
    assert set(SAMPLES) <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_op_passes_opcheck(op):
    assert SAMPLES.get(op), f"tests/ops/opcheck_samples.py has no sample for {op}"
    for make_arguments in SAMPLES[op]:
        torch.library.opcheck(getattr(torch.ops.qkernels, op).default, make_arguments())
