"""Many tensors in one call give the bits of the calls one by one."""

import pytest
import torch

from qkernels import ops, reference
from qkernels.testing import isa_cap, supported_isas

MIN_SCALE = 2.0**-50


def weights(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(64, 3, 3, 3), (5, 1, 3, 3), (10, 300), (7,), (1, 40_000), (300, 9), (2, 2, 1, 5), (0, 4), (3, 0)]
    ws = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    ws.append(torch.randn(6, 4, 3, 3, generator=g).to(dtype).contiguous(memory_format=torch.channels_last))
    return ws, [0, 0, 0, None, 0, None, 0, 0, None, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ends", [(-127, 127, True), (-128, 127, False), (-8, 7, False)])
@pytest.mark.parametrize("code_dtype", [None, torch.int8])
def test_chosen_grids_equal_the_reference(isa, dtype, ends, code_dtype):
    ws, axes = weights(dtype)
    ours = ops.foreach_observe_fake_quant(ws, axes, *ends, MIN_SCALE, code_dtype)
    expected = reference.foreach_observe_fake_quant(ws, axes, *ends, MIN_SCALE, code_dtype)
    for a, b in zip(ours, expected, strict=True):
        assert len(a) == len(b)
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert torch.equal(x, y), i
    assert [y.stride() for y in ours[0]] == [w.stride() for w in ws]


@pytest.mark.parametrize("ends", [(-127, 127, True), (-100, 50, False), (1, 16, False), (1, 16, True)])
def test_an_empty_row_has_the_grid_of_zeros(isa, ends):
    empty, zeros, axes = [torch.empty(5, 0), torch.empty(0, 3)], [torch.zeros(5, 1), torch.zeros(1)], [0, None]
    expected = ops.foreach_observe_fake_quant(zeros, axes, *ends, MIN_SCALE)[2:]
    for choose in (ops.foreach_observe_fake_quant, reference.foreach_observe_fake_quant):
        for ours, grids in zip(choose(empty, axes, *ends, MIN_SCALE)[2:], expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, grids, strict=True))


def test_given_grids_equal_the_calls_one_by_one(isa):
    ws, axes = weights()
    _, _, scales, zero_points = ops.foreach_observe_fake_quant(ws, axes, -128, 127, False, MIN_SCALE)
    scales = [s * 0.5 for s in scales]
    ours = ops.foreach_fake_quant(ws, scales, zero_points, axes, -128, 127)
    for y, w, *grid in zip(ours, ws, scales, zero_points, axes, strict=True):
        assert torch.equal(y, ops.fake_quant(w, *grid, -128, 127))


@pytest.mark.parametrize("ends", [(-127, 127, True), (-8, 7, False)])
def test_gradients_equal_those_of_fake_quant(isa, ends):
    ws, axes = weights()
    grads = [g.to(w.dtype) for g, w in zip(weights(seed=1)[0], ws, strict=True)]
    leaves = [w.requires_grad_() for w in ws]
    ys, _, scales, zero_points = ops.foreach_observe_fake_quant(leaves, axes, *ends, MIN_SCALE)
    ours = torch.autograd.grad(ys, leaves, grads)
    halves = [s * 0.5 for s in scales]
    given = torch.autograd.grad(ops.foreach_fake_quant(leaves, halves, zero_points, axes, *ends[:2]), leaves, grads)
    for i, (w, grad, axis) in enumerate(zip(ws, grads, axes, strict=True)):
        w = w.detach()
        assert torch.equal(ours[i], ops.fake_quant_backward(grad, w, scales[i], zero_points[i], axis, *ends[:2]))
        assert torch.equal(given[i], ops.fake_quant_backward(grad, w, halves[i], zero_points[i], axis, *ends[:2]))
    if ends[2]:  # nothing is clipped by a symmetric grid
        assert all(a.data_ptr() == g.data_ptr() for a, g in zip(ours, grads, strict=True))


def test_an_output_that_is_not_used_has_no_gradient():
    ws, axes = [torch.randn(4, 5).requires_grad_() for _ in range(3)], [0, 0, 0]
    for symmetric in (True, False):
        ys, *_ = ops.foreach_observe_fake_quant(ws, axes, -8, 7, symmetric, MIN_SCALE)
        grads = torch.autograd.grad(ys[1].sum(), ws, allow_unused=True)
        assert grads[1] is not None
        assert grads[0] is None or not grads[0].any()


def test_compiled_equals_eager():
    def loss(*ws):
        ys, codes, scales, _ = ops.foreach_observe_fake_quant(list(ws), [0, None], -8, 7, False, MIN_SCALE, torch.int8)
        halves, zeros = [s * 0.5 for s in scales], [torch.zeros_like(s, dtype=torch.int32) for s in scales]
        zs = ops.foreach_fake_quant(list(ws), halves, zeros, [0, None], -8, 7)
        return sum((y**2).sum() for y in ys) + sum((z**3).sum() for z in zs), codes

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        ws = [w.clone().requires_grad_() for w in (weights()[0][2], weights()[0][5])]
        value, codes = run(*ws)
        value.backward()
        results.append((value.detach(), *codes, *(w.grad for w in ws)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_threads_and_instruction_sets_do_not_change_bits():
    ws, axes = weights()
    ws, axes = ws * 3, axes * 3
    results = []
    before = torch.get_num_threads()
    try:
        for isa in supported_isas():
            with isa_cap(isa):
                for threads in (1, 2, 3, 8):
                    torch.set_num_threads(threads)
                    results.append(ops.foreach_observe_fake_quant(ws, axes, -128, 127, False, MIN_SCALE, torch.int8))
    finally:
        torch.set_num_threads(before)
    for result in results:
        for a, b in zip(result, results[0], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_no_tensors_are_no_work():
    assert ops.foreach_observe_fake_quant([], [], -8, 7, True, MIN_SCALE) == ([], [], [], [])
    assert ops.foreach_fake_quant([], [], [], [], -8, 7) == []


X, S, Z = torch.ones(2, 3), torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([X.double()], [None], -8, 7, True, 1e-9), "xs must be torch.float32, torch.bfloat16 or torch.float16"),
        (([X.t()], [0], -8, 7, True, 1e-9), "each of xs must be dense with its channels outermost"),
        (([X], [2], -8, 7, True, 1e-9), "axis must be in"),
        (([X], [0], 7, 7, True, 1e-9), "qmin must be below qmax"),
        (([X], [0], -8, 7, True, 0.0), "min_scale must be positive"),
        (([X], [0], -8, 200, True, 1e-9, torch.int8), "qmin and qmax must satisfy"),
        (([X], [0], -8, 7, True, 1e-9, torch.int32), "code_dtype must be torch.uint8 or torch.int8"),
        (([X, X * float("nan")], [0, 0], -8, 7, True, 1e-9), r"xs\[1\] must be finite"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, message):
    with pytest.raises(RuntimeError, match=f"foreach_observe_fake_quant: {message}"):
        ops.foreach_observe_fake_quant(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([X], [S, S], [Z], [None], -8, 7), "scales must have 1 elements"),
        (([X], [S], [Z], [0], -8, 7), "scale must have 2 elements"),
        (([X], [-S], [Z], [None], -8, 7), "scale must be positive"),
        (([X], [S], [Z + 9], [None], -8, 7), "zero_point must be in"),
    ],
)
def test_a_bad_grid_is_refused_by_name(arguments, message):
    with pytest.raises(RuntimeError, match=f"foreach_fake_quant: {message}"):
        ops.foreach_fake_quant(*arguments)
    with pytest.raises(RuntimeError, match=f"foreach_fake_quant_backward: {message}"):
        ops.foreach_fake_quant_backward([X], *arguments)
