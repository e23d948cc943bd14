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


def test_a_meta_tensor_in_front_of_others_is_refused():
    image = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    state = torch.ones(1), torch.ones(1), SCALE.clone(), ZERO.clone()
    for call in (
        lambda: ops.fake_quant_out(lone(X), SCALE, ZERO, *GRID, torch.zeros_like(X)),
        lambda: ops.lsq_backward(lone(X), X, SCALE, ZERO.float(), *GRID, 1.0),
        lambda: ops.binary_sign_backward(lone(X), X),
        lambda: ops.batch_norm_statistics(lone(image), None, None, torch.zeros(3), torch.ones(3), 0.1, 1e-5),
        lambda: ops.observe(lone(X), *state, None, *GRID, False, 1e-9, None, "x"),
    ):
        with pytest.raises(RuntimeError, match=r"^\w+: \w+ must be on meta, as the other tensors are, got cpu$"):
            call()


def test_training_has_shapes_on_the_meta_device():
    x = torch.randn(4, 8, device="meta", requires_grad=True)
    scale, zero_point = lone(SCALE), lone(ZERO)
    assert ops.fake_quant(x, scale, zero_point, *GRID, keep="mask").shape == (4, 8)
    assert ops.foreach_observe_fake_quant([x], [None], -8, 7, True, 1e-9)[0][0].shape == (4, 8)
    state = lone(torch.ones(1)), lone(torch.ones(1)), scale, zero_point, None
    y = ops.observe_fake_quant(x, *state, *GRID, False, 1e-9, None, "x")
    y.sum().backward()
    assert x.grad.shape == (4, 8)
