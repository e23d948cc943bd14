"""fake_quant that keeps one bit an element: the same outputs and gradients as with the kept input."""

import pytest
import torch

from qkernels import ops
from qkernels.testing import isa_cap, supported_isas

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g) * 4).to(dtype), torch.randn(*shape, generator=g).to(dtype)


def grid(channels=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    scale = torch.rand(channels, generator=g) * 0.05 + 0.01
    return scale, torch.randint(-5, 5, (channels,), dtype=torch.int32, generator=g)


def check(x, grad, axis):
    args = *grid(1 if axis is None else x.shape[axis]), axis, -100, 90
    y, mask, clipped, codes = ops.fake_quant_mask(x, *args)
    assert torch.equal(y, ops.fake_quant(x, *args))
    assert codes.numel() == 0
    for dtype, lift in ((torch.int8, 0), (torch.uint8, 100)):
        lifted = args[0], args[1] + lift, axis, -100 + lift, 90 + lift
        with_codes = ops.fake_quant_mask(x, *lifted, dtype)
        assert all(torch.equal(a, b) for a, b in zip(with_codes[:3], (y, mask, clipped), strict=True))
        expected = ops.quantize(x, *lifted, dtype)
        assert torch.equal(with_codes[3], expected)
        assert with_codes[3].stride() == expected.stride()
    expected = ops.fake_quant_backward(grad, x, *args)
    assert torch.equal(ops.fake_quant_mask_backward(grad, mask, axis), expected)
    ones = ops.fake_quant_backward(torch.ones_like(x), x, *args)
    assert bool(clipped) == bool((ones == 0).any())
    if axis is None:
        assert mask.numel() == (x.numel() + 7) // 8


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 8191, 8193, 100_003])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_length_and_dtype(isa, n, dtype):
    check(*tensors(n, seed=n, dtype=dtype), None)


@pytest.mark.parametrize("shape", [(3, 37, 5, 11), (2, 600, 3, 3), (5, 1, 4, 4), (1, 257, 1, 150), (0, 3, 2, 2)])
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_layout(isa, shape, axis, memory_format):
    x, grad = (t.contiguous(memory_format=memory_format) for t in tensors(*shape))
    check(x, grad, axis)


def test_large_tensors_are_stored_past_the_caches_with_the_same_bits(isa):
    x, grad = tensors(3, 3_000_017)
    check(x, grad, 0)
    check(x, grad, None)


def test_hostile_values_follow_the_contract(isa):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, inf, -inf, 3e38, -3e38, 1e-40, 0.0, -0.0] * 6)
    for value in (nan, inf, -0.0, 1e-42):
        for dtype in DTYPES:
            grad = torch.full_like(x, value, dtype=dtype)
            args = torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32), None, -128, 127
            y, mask, *_ = ops.fake_quant_mask(x.to(dtype), *args)
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            assert torch.equal(y.view(bits), ops.fake_quant(x.to(dtype), *args).view(bits))
            ours = ops.fake_quant_mask_backward(grad, mask, None)
            assert torch.equal(ours.view(bits), ops.fake_quant_backward(grad, x.to(dtype), *args).view(bits))


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("layout", ["plain", "sliced", "grad transposed"])
def test_autograd_equals_the_kept_input(axis, layout):
    x, grad = tensors(24, 40)
    if layout == "sliced":
        x = tensors(24, 80)[0][:, ::2]
    if layout == "grad transposed":
        grad = grad.t().contiguous().t()
    args = *grid(1 if axis is None else 40), axis, -100, 90
    grads = []
    for keep in ("input", "mask"):
        leaf = x.detach().requires_grad_()
        ops.fake_quant(leaf, *args, keep=keep).backward(grad)
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_the_backward_of_a_tensor_without_clipping_is_the_incoming_gradient_itself():
    x, grad = tensors(64)
    x.requires_grad_()
    y = ops.fake_quant(x, torch.tensor([1.0]), torch.tensor([0], dtype=torch.int32), None, -128, 127, keep="mask")
    assert torch.autograd.grad(y, x, grad)[0].data_ptr() == grad.data_ptr()


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_compiled_equals_eager(axis):
    args = *grid(1 if axis is None else (64, 33)[axis]), axis, -100, 90

    def loss(x, weight):
        return (ops.fake_quant(x * weight, *args, keep="mask") ** 2).sum()

    x, weight = tensors(64, 33)
    grads = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = weight.clone().requires_grad_()
        run(x, leaf).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_threads_and_instruction_sets_do_not_change_bits():
    x, grad = tensors(7, 30_011)
    args = *grid(7), 0, -100, 90
    results = []
    before = torch.get_num_threads()
    try:
        for isa in supported_isas():
            with isa_cap(isa):
                for threads in (1, 2, 3, 8):
                    torch.set_num_threads(threads)
                    y, mask, *_ = ops.fake_quant_mask(x, *args)
                    results.append((y, mask, ops.fake_quant_mask_backward(grad, mask, 0)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_bad_input_is_refused_by_name():
    x, scale, zero_point = torch.ones(3, 4), torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32)
    with pytest.raises(ValueError, match='keep must be "input" or "mask", got 7'):
        ops.fake_quant(x, scale, zero_point, None, -8, 7, keep=7)
    for change, message in [
        ((x.double(), scale, zero_point, None, -8, 7), "x must be torch.float32"),
        ((x, -scale, zero_point, None, -8, 7), "scale must be positive"),
        ((x, scale, zero_point, 0, -8, 7), "scale must have 3 elements"),
        ((x, scale, zero_point, None, 7, 7), "qmin must be below qmax"),
    ]:
        with pytest.raises(RuntimeError, match=f"fake_quant_mask: {message}"):
            ops.fake_quant_mask(*change)
    mask = torch.zeros(2, dtype=torch.uint8)
    for change, message in [
        ((x.int(), mask, None), "grad must be torch.float32"),
        ((x, mask, 0), "mask must be a contiguous uint8 tensor of 3 elements"),
        ((x, mask.int(), None), "mask must be a contiguous uint8 tensor of 2 elements"),
        ((torch.ones(1).expand(3, 4), mask, None), "grad must be dense"),
        ((x, mask, 3), "axis must be in"),
    ]:
        with pytest.raises(RuntimeError, match=f"fake_quant_mask_backward: {message}"):
            ops.fake_quant_mask_backward(*change)


def test_codes_come_with_the_straight_through_gradient(isa):
    x, grad = tensors(2, 5, 4, 3)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    ends = -100, 90
    y, codes = ops.fake_quant_codes(x, *grid(), *ends, torch.int8)
    y.backward(grad)
    assert torch.equal(codes, ops.quantize(x.detach(), *grid(), None, *ends, torch.int8))
    assert torch.equal(x.grad, ops.fake_quant_backward(grad, x.detach(), *grid(), None, *ends))
    with pytest.raises(RuntimeError, match=r"fake_quant_mask: code_dtype must be torch.uint8 or torch.int8"):
        ops.fake_quant_mask(x, *grid(), None, *ends, torch.int32)
    with pytest.raises(RuntimeError, match="fake_quant_mask: qmin"):
        ops.fake_quant_mask(x, *grid(), None, *ends, torch.uint8)


LIMITS = [(0.0, None), (0.0, 0.6), (-0.4, 0.5), (None, 0.3), (0.3, 0.6), (-0.6, -0.3), (0.25, 0.25), (-1e30, 1e30)]


@pytest.mark.parametrize(("floor", "ceiling"), LIMITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_clamp_in_front_gives_the_codes_of_the_clamped_tensor(isa, floor, ceiling, dtype):
    x, grad = tensors(37, 1000, dtype=dtype)
    scale, zero_point = grid()
    limits = {"floor": floor, "ceiling": ceiling}
    y, mask, _, codes = ops.fake_quant_mask(x, scale, zero_point, None, -100, 90, torch.int8, **limits)
    clamped = x.float().clamp(floor, ceiling)
    expected = torch.fake_quantize_per_tensor_affine(clamped, scale, zero_point, -100, 90)
    assert torch.equal(y, expected.to(dtype))
    assert torch.equal(codes, ops.quantize(clamped, scale, zero_point, None, -100, 90, torch.int8))
    for gradients in (True, False):
        leaf = x.clone().requires_grad_(gradients)
        assert torch.equal(ops.fake_quant(leaf, scale, zero_point, None, -100, 90, "mask", **limits), y)
    leaf = x.clone().requires_grad_()
    y, codes_again = ops.fake_quant_codes(leaf, scale, zero_point, -100, 90, torch.int8, floor, ceiling)
    y.backward(grad)
    assert torch.equal(codes_again, codes)
    assert torch.equal(leaf.grad, ops.fake_quant_mask_backward(grad, mask, None))
    rounded = torch.round(x.float() / scale) + zero_point  # half a step outside of an end still passes
    assert torch.equal(leaf.grad != 0, (rounded >= codes.min()) & (rounded <= codes.max()) & (grad != 0))


def test_clamps_that_make_no_sense_are_refused_by_name():
    x, scale, zero_point = torch.ones(3, 4), torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32)
    for limits in ((1.0, 0.0), (float("nan"), None), (None, float("nan"))):
        with pytest.raises(RuntimeError, match="fake_quant_mask: floor must not be above ceiling"):
            ops.fake_quant_mask(x, scale, zero_point, None, -8, 7, None, *limits)
    with pytest.raises(RuntimeError, match="fake_quant_mask: floor and ceiling need one grid"):
        ops.fake_quant_mask(x, scale.expand(3), zero_point.expand(3), 0, -8, 7, None, 0.0)
    with pytest.raises(ValueError, match='fake_quant: floor and ceiling need keep="mask"'):
        ops.fake_quant(x, scale, zero_point, None, -8, 7, floor=0.0)
    with pytest.raises(ValueError, match='fake_quant: floor and ceiling need keep="mask" and no group_size'):
        ops.fake_quant(x, scale.expand(3, 2), zero_point.expand(3, 2), 1, -8, 7, "mask", 2, ceiling=1.0)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_second_derivatives_are_those_of_the_kept_input(axis):
    x = tensors(64, 33)[0]
    args = *grid(1 if axis is None else x.shape[axis]), axis, -100, 90
    seconds = []
    for keep in ("input", "mask"):
        leaf = x.clone().requires_grad_()
        loss = (
            ops.fake_quant(leaf.t(), *args[:2], None if axis is None else 1 - axis, *args[3:], keep=keep) ** 2
        ).sum()
        first = torch.autograd.grad(loss + (leaf**3).sum(), leaf, create_graph=True)[0]
        seconds.append(torch.autograd.grad((first**2).sum(), leaf)[0])
    assert torch.equal(*seconds)
    passes = ops.fake_quant_backward(torch.ones_like(x), x, *args)
    assert bool((passes == 0).any())
