"""`make gpu-check` refuses clearly where nothing can be checked, and its cases are sound on the CPU."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qkernels import ops

SCRIPT = Path(__file__).with_name("gpu_check.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run `make gpu-check`")
def test_without_a_gpu_it_says_so_and_fails():
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout.startswith("gpu-check: nothing was checked: ")


def test_its_linear_cases_run_on_the_cpu(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_check

    dtypes, codes = set(), set()
    for name, pack, epilogue, x, residual in itertools.islice(gpu_check.linear_cases(small=True), 0, None, 11):
        out = ops.linear(x, ops.linear_pack(*pack, epilogue), pack[0].shape[0], epilogue.dtype, residual)
        assert out.dtype == epilogue.dtype, name
        dtypes.add(out.dtype)
        if out.dtype == torch.uint8:
            codes |= set(out.unique().tolist())
    assert len(dtypes) == 5
    assert len(codes) > 64  # not all clamped


def test_its_convolutions_run_on_the_cpu(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_check

    for name, pack, geometry, x, residual, epilogue, size in gpu_check.conv_cases(small=True):
        outputs = pack[0].shape[1] * geometry["groups"] if geometry["transposed"] else pack[0].shape[0]
        out = ops.conv(x, ops.conv_pack(*pack, epilogue, **geometry), residual, outputs, size, epilogue.dtype)
        assert list(out.shape) == [2, outputs, *size], name


def test_every_cuda_op_is_in_its_list(monkeypatch):
    """What gpu-check compares is what the architecture test demands."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.syspath_prepend(str(SCRIPT.parents[1] / "architecture"))
    monkeypatch.syspath_prepend(str(SCRIPT.parents[1] / "ops"))
    import gpu_check
    import test_op_table

    assert sorted(gpu_check.CUDA_OPS) == sorted(test_op_table.CUDA_OPS)
