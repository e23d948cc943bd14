"""What the `_out` ops write to: memory of their own or, where they allow it, that of an input, but not a part of it."""

import pytest
import torch

from qkernels import ops

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
