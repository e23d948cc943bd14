"""What the `_out` ops write to: memory of their own or, where they allow it, that of an input, but not a part of it."""

import math

import pytest
import torch

from qkernels import ops
from qkernels.errors import InvalidArgument

N = 70_000
SCALE, ZERO_POINT, INF = torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32), float("inf")
STATE = torch.tensor([INF]), torch.tensor([-INF]), torch.ones(1), torch.zeros(1, dtype=torch.int32), None
RULE = None, 0, 15, False, 1e-6, None, "x"

# name -> (a call with what it reads and out, how many tensors it reads)
CALLS = {
    "fake_quant": (lambda out, x: ops.fake_quant_out(x, SCALE, ZERO_POINT, None, 0, 15, out), 1),
    "lsq": (lambda out, x: ops.lsq_out(x, SCALE, ZERO_POINT.float(), None, 0, 15, out), 1),
    "fake_quant_backward": (
        lambda out, grad, x: ops.fake_quant_backward_out(grad, x, SCALE, ZERO_POINT, None, 0, 15, out),
        2,
    ),
    "lsq_backward": (
        lambda out, grad, x: ops.lsq_backward_out(grad, x, SCALE, ZERO_POINT.float(), None, 0, 15, 1.0, out)[0],
        2,
    ),
    "observe_fake_quant": (
        lambda out, x: ops.observe_fake_quant_out(x, *(None if t is None else t.clone() for t in STATE), *RULE, out),
        1,
    ),
    "quantize": (lambda out, x: ops.quantize_out(x, SCALE, ZERO_POINT, None, 0, 15, out.view(torch.uint8)[:N]), 1),
    "dequantize": (lambda out, q: ops.dequantize_out(q.view(torch.uint8)[:N], SCALE, ZERO_POINT, None, out), 1),
}
NEVER_IN_PLACE = ("observe_fake_quant", "quantize", "dequantize")


def floats(seed: int, n: int = N + 1) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CALLS)
def test_out_that_overlaps_a_part_of_what_is_read_is_refused(name):
    call, reads = CALLS[name]
    for k in range(reads):
        for shift in (1, -1):
            memory, operands = floats(0), [floats(1, N), floats(2, N)][:reads]
            parts = memory[:N], memory[1:]
            operands[k], out = parts[::shift]
            kept = memory.clone()
            with pytest.raises(RuntimeError, match=f"{name}: out must .* got a part of its memory"):
                call(out, *operands)
            assert torch.equal(memory, kept)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in NEVER_IN_PLACE])
def test_out_may_be_what_is_read(name):
    call, reads = CALLS[name]
    for k in range(reads):
        operands = [floats(1, N), floats(2, N)][:reads]
        expected = call(torch.empty(N), *operands).clone()
        assert torch.equal(call(operands[k], *operands), expected)
        assert torch.equal(operands[k], expected)


@pytest.mark.parametrize("name", NEVER_IN_PLACE)
def test_out_must_not_be_what_is_read(name):
    x = floats(0, N)
    with pytest.raises(RuntimeError, match=f"{name}: out must .*memory"):
        CALLS[name][0](x, x)


def test_out_beside_what_is_read_is_fine():
    memory = floats(0, 2 * N)
    expected = ops.fake_quant(memory[:N], SCALE, ZERO_POINT, None, 0, 15)
    assert torch.equal(CALLS["fake_quant"][0](memory[N:], memory[:N]), expected)


def test_out_in_another_order_of_the_same_memory_is_refused():
    x = floats(0, 30).reshape(5, 6)
    grad = x.reshape(-1).as_strided((5, 6), (1, 5))
    with pytest.raises(RuntimeError, match="fake_quant_backward: out must be one with grad"):
        ops.fake_quant_backward_out(grad, x.clone(), SCALE, ZERO_POINT, None, 0, 15, x)


def test_out_is_not_the_grid():
    scale = torch.full((4,), 0.1)
    with pytest.raises(RuntimeError, match="fake_quant: out must share no memory with scale"):
        ops.fake_quant_out(torch.ones(4), scale, ZERO_POINT.expand(4), 0, 0, 15, scale)


def test_int32_codes_may_become_floats_in_place():
    q = torch.arange(-50, 50, dtype=torch.int32)
    expected = ops.dequantize(q, SCALE, torch.zeros(1, dtype=torch.int32), None)
    out = ops.dequantize_out(q, SCALE, torch.zeros(1, dtype=torch.int32), None, q.view(torch.float32))
    assert torch.equal(out, expected)


X, ZERO = torch.randn(8), torch.zeros(1, dtype=torch.int32)
CODES = torch.zeros(8, dtype=torch.int8)
WRITING = {
    "fake_quant_out": lambda out: ops.fake_quant_out(X, SCALE, ZERO, None, -8, 7, out),
    "fake_quant_backward_out": lambda out: ops.fake_quant_backward_out(X, X, SCALE, ZERO, None, -8, 7, out),
    "lsq_out": lambda out: ops.lsq_out(X, SCALE, ZERO.float(), None, -8, 7, out),
    "lsq_backward_out": lambda out: ops.lsq_backward_out(X, X, SCALE, ZERO.float(), None, -8, 7, 1.0, out),
    "dequantize_out": lambda out: ops.dequantize_out(CODES, SCALE, ZERO, None, out),
    "observe_fake_quant_out": lambda out: ops.observe_fake_quant_out(
        X, torch.ones(1), torch.ones(1), SCALE.clone(), ZERO.clone(), None, None, -8, 7, False, 1e-9, None, "x", out
    ),
}


@pytest.mark.parametrize("name", WRITING)
def test_a_backward_that_needs_what_was_overwritten_is_an_error(name):
    leaf = torch.randn(8, requires_grad=True)
    kept = leaf * 1
    square = kept * kept
    with torch.no_grad():
        WRITING[name](kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@pytest.mark.parametrize("name", WRITING)
def test_out_has_no_gradient(name):
    with pytest.raises(InvalidArgument, match=f"^{name}: out must not require a gradient"):
        WRITING[name](torch.zeros(8, requires_grad=True))
    with torch.inference_mode():
        WRITING[name](torch.zeros(8))


def test_a_grid_that_an_observer_moves_is_not_that_of_an_earlier_forward():
    x, low, high, scale = torch.tensor([0.5, 5.0], requires_grad=True), torch.zeros(1), torch.zeros(1), SCALE.clone()
    y = ops.fake_quant(x, scale, ZERO, None, -8, 7)
    ops.observe(torch.tensor([-80.0, 70.0]), low, high, scale, ZERO.clone(), None, None, 0, 255, False, 1e-9, None, "x")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    low, high, bins = torch.tensor([math.inf]), torch.tensor([-math.inf]), torch.zeros(16)
    ops.observe_histogram(X, X.min()[None], X.max()[None], low, high, bins)
    assert [t._version for t in (low, high, bins)] == [1, 1, 1]
