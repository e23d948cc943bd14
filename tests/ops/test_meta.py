"""Tensors without contents: all of them, and an op gives such; a lone one is refused, for torch asks no kernel then."""

import pytest
import torch

from qkernels import ops

X = torch.linspace(-1, 1, 12).reshape(3, 4)
CODES = X.mul(100).to(torch.int8)
SCALE, ZERO = torch.tensor([0.1]), torch.zeros(1, dtype=torch.int32)
GRID = (None, -128, 127)


def lone(tensor):
    return tensor.to("meta")


CALLS = {
    "fake_quant": lambda: ops.fake_quant(X, lone(SCALE), ZERO, *GRID),
    "zero_point": lambda: ops.fake_quant(X, SCALE, lone(ZERO), *GRID),
    "quantize": lambda: ops.quantize(X, lone(SCALE), ZERO, *GRID, torch.int8),
    "dequantize": lambda: ops.dequantize(CODES, SCALE, lone(ZERO), None),
    "lookup": lambda: ops.lookup(CODES, lone(torch.zeros(256, dtype=torch.int8))),
    "foreach": lambda: ops.foreach_fake_quant([X, X], [SCALE, lone(SCALE)], [ZERO] * 2, [None] * 2, -8, 7),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_lone_meta_tensor_is_refused(call):
    with pytest.raises(RuntimeError, match=r"^\w+: \w+ must be on cpu, as the other tensors are, got meta$"):
        call()


def test_an_output_is_not_left_as_it_was():
    out = torch.full_like(X, 123.0)
    with pytest.raises(RuntimeError, match="fake_quant_out: scale must be on cpu"):
        ops.fake_quant_out(X, lone(SCALE), ZERO, *GRID, out)
    assert (out == 123.0).all()


def test_meta_tensors_alone_give_meta_tensors():
    codes = ops.quantize(lone(X), lone(SCALE), lone(ZERO), *GRID, torch.int8)
    assert (codes.device.type, codes.dtype, codes.shape) == ("meta", torch.int8, X.shape)
