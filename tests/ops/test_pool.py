"""max_pool, avg_pool, adaptive_avg_pool: torch's windows, exact sums, the same bits on every ISA."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from qkernels import ops, reference

DTYPES = (torch.uint8, torch.int8)
MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
CHANNELS = [1, 3, 16, 31, 32, 33, 63, 64, 65, 100, 256, 259, 520]


def codes(*shape: int, dtype=torch.uint8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash((seed, *shape)) % 2**31)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(dtype)


def middle(dtype, odd: int) -> int:
    return odd + (128 if dtype == torch.uint8 else 0)


def grid(q_dtype, dtype, q_scale=0.031, scale=0.02):
    low = 0 if dtype == torch.uint8 else -128
    return (q_scale, middle(q_dtype, -3), scale, middle(dtype, 7), low, low + 255, dtype)


def is_channels_last(t: torch.Tensor) -> bool:
    return t.movedim(1, -1).is_contiguous()


def windows(spatial: int, seed: int):
    """Random legal (sizes, kernel, stride, padding, dilation)."""
    rng = random.Random(seed)
    kernel = [rng.randint(1, 4) for _ in range(spatial)]
    dilation = [rng.randint(1, 3) for _ in range(spatial)]
    stride = [rng.randint(1, 4) for _ in range(spatial)]
    padding = [rng.randint(0, k // 2) for k in kernel]
    sizes = [d * (k - 1) + 1 + rng.randint(0, 6) for k, d in zip(kernel, dilation, strict=True)]
    return sizes, kernel, stride, padding, dilation


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_max_pool_equals_torch(isa, spatial, dtype, ceil_mode):
    for seed in range(25):
        sizes, kernel, stride, padding, dilation = windows(spatial, seed)
        q = codes(2, 37, *sizes, dtype=dtype, seed=seed)
        expected = MAX_POOLS[spatial](q.float(), kernel, stride, padding, dilation, ceil_mode).to(dtype)
        out = ops.max_pool(q, kernel, stride, padding, dilation, ceil_mode)
        assert torch.equal(out, expected)
        assert torch.equal(out, reference.max_pool(q, kernel, stride, padding, dilation, ceil_mode))
        assert is_channels_last(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_max_pool_of_every_channel_count(isa, dtype, channels):
    q = codes(2, channels, 6, 5, dtype=dtype).to(memory_format=torch.channels_last)
    expected = F.max_pool2d(q.float(), 3, 2, 1).to(dtype)
    assert torch.equal(ops.max_pool(q, [3, 3], [2, 2], [1, 1], [1, 1]), expected)


def test_padding_never_wins(isa):
    q = torch.full((1, 40, 3, 3), -128, dtype=torch.int8)
    assert torch.equal(ops.max_pool(q, [3, 3], [1, 1], [1, 1], [1, 1]), q)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=2)), ids=str)
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_avg_pool_equals_reference(isa, spatial, dtypes, ceil_mode):
    for seed in range(12):
        sizes, kernel, stride, padding, _ = windows(spatial, seed)
        q = codes(2, 37, *sizes, dtype=dtypes[0], seed=seed)
        for include_pad, divisor in ((True, None), (False, None), (True, 5)):
            args = (kernel, stride, padding, ceil_mode, include_pad, divisor, *grid(*dtypes))
            assert torch.equal(ops.avg_pool(q, *args), reference.avg_pool(q, *args))


@pytest.mark.parametrize("include_pad", [False, True])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_avg_pool_is_within_one_step_of_torch_on_real_values(isa, include_pad, ceil_mode):
    q = codes(2, 20, 11, 9)
    q_scale, q_zero_point, scale, zero_point, *rest = grid(torch.uint8, torch.uint8)
    real = (q.double() - q_zero_point) * q_scale
    mean = F.avg_pool2d(real, 3, 2, 1, ceil_mode, include_pad)
    out = ops.avg_pool(
        q, [3, 3], [2, 2], [1, 1], ceil_mode, include_pad, None, q_scale, q_zero_point, scale, zero_point, *rest
    )
    error = (out.double() - zero_point) * scale - mean
    inside = (out > 0) & (out < 255)
    assert error[inside].abs().max() <= scale * 0.5001


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=2)), ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
def test_global_mean_of_every_channel_count(isa, dtypes, channels):
    q = codes(2, channels, 7, 7, dtype=dtypes[0])
    args = ([1, 1], *grid(*dtypes))
    assert torch.equal(ops.adaptive_avg_pool(q, *args), reference.adaptive_avg_pool(q, *args))


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("side", [16, 17, 300])
def test_sums_of_large_windows_do_not_overflow(isa, value, side):
    q = torch.full((1, 40, side, side), value, dtype=torch.uint8)
    args = ([1, 1], 1.0, 0, 1.0, 0, 0, 255, torch.uint8)
    assert torch.equal(ops.adaptive_avg_pool(q, *args), q[..., :1, :1])


@pytest.mark.parametrize("sizes", [(1,), (7,), (4, 3), (9, 8), (2, 3, 4)], ids=str)
def test_adaptive_windows_equal_reference(isa, sizes):
    q = codes(2, 37, *[9, 8, 7][: len(sizes)])
    args = (list(sizes), *grid(torch.uint8, torch.int8))
    out = ops.adaptive_avg_pool(q, *args)
    assert torch.equal(out, reference.adaptive_avg_pool(q, *args))
    assert is_channels_last(out)


def test_ties_round_to_even(isa):
    q = torch.tensor([[1, 2], [3, 4], [0, 1]], dtype=torch.uint8).reshape(1, 3, 2)
    assert ops.avg_pool(
        q, [2], [2], [0], False, True, None, 1.0, 0, 1.0, 0, 0, 255, torch.uint8
    ).flatten().tolist() == [
        2,
        4,
        0,
    ]


def test_empty_batch_and_any_input_layout(isa):
    assert ops.max_pool(codes(0, 5, 6, 6), [2, 2], [2, 2], [0, 0], [1, 1]).shape == (0, 5, 3, 3)
    whole = codes(2, 10, 6, 12)
    for q in (whole, whole[:, ::2], whole[..., 1::2], whole.to(memory_format=torch.channels_last)[:, 2:7]):
        assert torch.equal(
            ops.max_pool(q, [2, 2], [], [1, 1], [1, 1]), F.max_pool2d(q.float(), 2, None, 1).to(torch.uint8)
        )


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 8, 15, 16, 33, 64, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_planes_in_any_order_become_channels_last(isa, channels, dtype):
    """A window of one element passes codes on, so that only their order is at stake."""
    for n, *image in ((2, 1, 1), (1, 3, 5), (2, 4, 4), (1, 7, 7), (1, 31, 33)):
        shape = (n, channels, *image)
        layouts = [codes(*shape, dtype=dtype)]
        for order in itertools.permutations(range(4)):
            place = [order.index(d) for d in range(4)]
            layouts.append(codes(*[shape[d] for d in order], dtype=dtype).permute(place))
            gaps = codes(*[2 * shape[d] + 1 for d in order], dtype=dtype)[1::2, 1::2, 1::2, 1::2]
            layouts.append(gaps.permute(place))
        for repeated in ((1, channels, 1, 1), (1, 1, *image)):
            layouts.append(codes(*repeated, dtype=dtype).expand(shape))
        for q in layouts:
            out = ops.max_pool(q, [1, 1], [1, 1], [0, 0], [1, 1])
            assert is_channels_last(out)
            assert torch.equal(out, q)


def test_bits_do_not_depend_on_the_number_of_threads(isa):
    q = codes(3, 70, 57, 55).to(memory_format=torch.channels_last)
    args = ([3, 3], [2, 2], [1, 1], True, False, None, *grid(torch.uint8, torch.uint8))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append((ops.avg_pool(q, *args), ops.max_pool(q, [3, 3], [2, 2], [1, 1], [1, 1])))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_of_padding_alone_has_the_lowest_code(isa, dtype):
    q = codes(1, 5, 1, 1, dtype=dtype) // 2 + 1
    out = ops.max_pool(q, [2, 2], [1, 1], [1, 1], [2, 2])  # the taps lie around the only pixel
    assert torch.equal(out, torch.full_like(out, torch.iinfo(dtype).min))
    assert torch.equal(out, reference.max_pool(q, [2, 2], [1, 1], [1, 1], [2, 2]))


Q = codes(1, 3, 5, 5)
MEAN = (0.1, 3, 0.1, 3, 0, 255, torch.uint8)
BAD_CALLS = {
    "float": (
        lambda: ops.max_pool(Q.float(), [2, 2], [], [0, 0], [1, 1]),
        "max_pool: q must be torch.uint8 or torch.int8",
    ),
    "dimensions": (lambda: ops.max_pool(Q[0, 0], [2], [], [0], [1]), "must have 3, 4 or 5 dimensions"),
    "kernel length": (lambda: ops.max_pool(Q, [2], [], [0, 0], [1, 1]), "kernel_size must have 2 elements"),
    "kernel": (lambda: ops.max_pool(Q, [0, 2], [], [0, 0], [1, 1]), r"kernel_size must be in \[1, 2147483647\], got 0"),
    "stride": (lambda: ops.max_pool(Q, [2, 2], [0, 1], [0, 0], [1, 1]), r"stride must be in \[1, 2147483647\], got 0"),
    "dilation": (lambda: ops.max_pool(Q, [2, 2], [], [0, 0], [0, 1]), r"dilation must be in \[1, 2147483647\], got 0"),
    "huge stride": (
        lambda: ops.max_pool(Q, [2, 2], [2**31, 1], [0, 0], [1, 1]),
        r"max_pool: stride must be in \[1, 2147483647\], got 2147483648",
    ),
    "negative padding": (
        lambda: ops.max_pool(Q, [2, 2], [], [-1, 0], [1, 1]),
        r"padding must be in \[0, 2147483647\], got -1",
    ),
    "padding": (lambda: ops.max_pool(Q, [2, 2], [], [2, 0], [1, 1]), "at most half of the window's extent 2, got 2"),
    "window": (lambda: ops.max_pool(Q, [6, 2], [], [0, 0], [1, 1]), "at most the padded input 5, got 6"),
    "empty": (lambda: ops.max_pool(Q[..., :0], [1, 1], [], [0, 0], [1, 1]), "must not be empty outside of the batch"),
    "divisor": (
        lambda: ops.avg_pool(Q, [2, 2], [], [0, 0], False, True, 0, *MEAN),
        r"divisor_override must be in \[1, 2147483647\], got 0",
    ),
    "quotient of scales": (
        lambda: ops.avg_pool(Q, [2, 2], [], [0, 0], False, True, None, 1e38, 0, 1e-37, 10, 0, 255, torch.uint8),
        r"avg_pool: q_scale / scale must be finite in float32, got 1e\+38 / 1e-37",
    ),
    "adaptive quotient of scales": (
        lambda: ops.adaptive_avg_pool(Q, [2, 2], 1e38, 0, 1e-37, 10, 0, 255, torch.uint8),
        "adaptive_avg_pool: q_scale / scale must be finite in float32",
    ),
    "scale": (
        lambda: ops.adaptive_avg_pool(Q, [1, 1], 0.0, *MEAN[1:]),
        "q_scale must be positive, finite and normal",
    ),
    "zero point": (
        lambda: ops.adaptive_avg_pool(Q, [1, 1], 0.1, 300, *MEAN[2:]),
        r"q_zero_point must be in \[0, 255\]",
    ),
    "output size": (
        lambda: ops.adaptive_avg_pool(Q, [1, 0], *MEAN),
        r"output_size must be in \[1, 2147483647\], got 0",
    ),
    "huge window": (
        lambda: ops.avg_pool(codes(1, 1, 8, 8), [2**20, 2**20], [], [0, 0], False, True, None, *MEAN),
        "avg_pool: ",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_refused_by_name(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(RuntimeError, match=message):
        call()
