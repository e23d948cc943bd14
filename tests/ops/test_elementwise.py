"""lookup, add, mul, cat: the same bits on every ISA, in every layout, for every mix of uint8 and int8."""

import itertools

import pytest
import torch

from qkernels import ops, reference

DTYPES = (torch.uint8, torch.int8)
LENGTHS = [0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 16_383, 16_385, 40_001]
BINARY = {"add": (ops.add, reference.add), "mul": (ops.mul, reference.mul)}


def seeded(*key) -> torch.Generator:
    return torch.Generator().manual_seed(hash(key) % 2**31)


def codes(*shape: int, dtype=torch.uint8, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(seed, *shape)).view(dtype)


def middle(dtype, odd: int) -> int:
    return odd + (128 if dtype == torch.uint8 else 0)


def every_pair(dtype_a, dtype_b) -> tuple[torch.Tensor, torch.Tensor]:
    """All 65,536 pairs of codes."""
    byte = torch.arange(256, dtype=torch.uint8)
    return byte.repeat_interleave(256).view(dtype_a), byte.repeat(256).view(dtype_b)


def grids(dtype_a, dtype_b, dtype, a_scale=0.031, b_scale=0.0173, scale=0.037, qmin=None, qmax=None):
    low = 0 if dtype == torch.uint8 else -128
    qmin, qmax = low if qmin is None else qmin, low + 255 if qmax is None else qmax
    zero_point = middle(dtype, 5)
    return (a_scale, middle(dtype_a, 3), b_scale, middle(dtype_b, -7), scale, zero_point, qmin, qmax, dtype)


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=3)), ids=str)
def test_every_pair_of_codes_equals_reference(isa, op, dtypes):
    kernel, oracle = BINARY[op]
    a, b = every_pair(*dtypes[:2])
    # Usual scales; powers of two, which give ties; a tiny output scale, which saturates; a narrow grid.
    for options in ({}, {"a_scale": 0.5, "b_scale": 0.25, "scale": 0.5}, {"scale": 1e-30}, {"scale": 1e30}):
        grid = grids(*dtypes, **options)
        assert torch.equal(kernel(a, b, *grid), oracle(a, b, *grid))
    z = middle(dtypes[2], 5)
    narrow = grids(*dtypes, qmin=z, qmax=z + 9)
    assert torch.equal(kernel(a, b, *narrow), oracle(a, b, *narrow))


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize("n", LENGTHS)
def test_every_length_equals_reference(isa, op, n):
    kernel, oracle = BINARY[op]
    a, b = codes(n + 3, seed=1)[3:], codes(n + 1, dtype=torch.int8, seed=2)[1:]
    grid = grids(torch.uint8, torch.int8, torch.uint8)
    assert torch.equal(kernel(a, b, *grid), oracle(a, b, *grid))


def nhwc(t: torch.Tensor) -> torch.Tensor:
    return t.to(memory_format=torch.channels_last)


BROADCASTS = {
    "same_shape": ((2, 19, 5, 7), (2, 19, 5, 7)),
    "gate": ((2, 19, 5, 7), (2, 19, 1, 1)),
    "wide_gate": ((2, 70, 3, 3), (2, 70, 1, 1)),
    "gate_first": ((2, 19, 1, 1), (2, 19, 5, 7)),
    "one_batch": ((2, 19, 5, 7), (19, 5, 7)),
    "last_dimension": ((2, 19, 5, 7), (7,)),
    "spatial_map": ((2, 19, 5, 7), (2, 1, 5, 7)),
    "scalar": ((2, 19, 5, 7), ()),
    "both": ((2, 19, 1, 7), (1, 19, 5, 1)),
    "empty": ((0, 19, 5, 7), (1, 19, 1, 1)),
    "single": ((1,), (1,)),
}


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize("shapes", BROADCASTS)
@pytest.mark.parametrize("layouts", ["contiguous", "channels_last", "mixed", "sliced"])
def test_every_broadcast_and_layout_equals_reference(isa, op, shapes, layouts):
    kernel, oracle = BINARY[op]
    a, b = (codes(*shape, seed=k) for k, shape in enumerate(BROADCASTS[shapes]))
    if layouts in ("channels_last", "mixed") and a.dim() == 4:
        a = nhwc(a)
    if layouts == "channels_last" and b.dim() == 4:
        b = nhwc(b)
    if layouts == "sliced":
        a, b = (torch.cat([t, t], -1)[..., : t.shape[-1]] if t.dim() else t for t in (a, b))
    grid = grids(torch.uint8, torch.uint8, torch.int8)
    out = kernel(a, b, *grid)
    assert torch.equal(out, oracle(a, b, *grid))
    full = next((t for t in (a, b) if t.shape == out.shape), None)
    expected = torch.empty_like(full).stride() if full is not None else torch.empty(out.shape).stride()
    assert out.stride() == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_add_equals_torch_quantized_add_in_its_vector_body(isa):
    """torch's scalar tail has another formula, so the length is a multiple of its vector."""
    a, b = codes(65_536, seed=3), codes(65_536, seed=4)
    qa = torch._make_per_tensor_quantized_tensor(a, 0.031, 131)
    qb = torch._make_per_tensor_quantized_tensor(b, 0.0173, 121)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = torch.ops.quantized.add(qa, qb, 0.037, 133).int_repr()
    finally:
        torch.set_num_threads(before)
    ours = ops.add(a, b, 0.031, 131, 0.0173, 121, 0.037, 133, 0, 255, torch.uint8)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
def test_lookup_equals_indexing(isa, dtype, table_dtype, n):
    table = codes(256, dtype=table_dtype, seed=5)
    q = codes(n + 1, dtype=dtype, seed=6)[1:]
    assert torch.equal(ops.lookup(q, table), table[q.view(torch.uint8).long()])


def test_lookup_of_every_byte_through_permutations(isa):
    q = torch.arange(256, dtype=torch.uint8)
    for seed in range(50):
        table = torch.randperm(256, generator=seeded(seed)).to(torch.uint8)
        assert torch.equal(ops.lookup(q, table), table)


def test_lookup_keeps_the_layout(isa):
    table = codes(256, seed=7)
    for q in (
        nhwc(codes(2, 5, 4, 3)),
        codes(2, 5, 4, 3).permute(3, 0, 2, 1),
        codes(4, 10)[:, ::2],
        codes(4, 10)[:, :3],
    ):
        out = ops.lookup(q, table)
        assert torch.equal(out, reference.lookup(q, table))
        assert out.stride() == torch.empty_like(q).stride()


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sizes", [(1,), (3, 5), (64, 1, 130), (0, 4), (0, 0)], ids=str)
def test_cat_equals_reference(isa, dim, layout, sizes):
    shape = [2, 6, 5, 7]
    tensors = []
    for k, size in enumerate(sizes):
        shape[dim] = size
        tensors.append(codes(*shape, dtype=DTYPES[k % 2], seed=k).contiguous(memory_format=layout))
    tables = torch.stack([codes(256, seed=k) for k in range(len(sizes))])
    out = ops.cat(tensors, tables, dim)
    assert torch.equal(out, reference.cat(tensors, tables, dim))
    if out.numel():
        assert out.is_contiguous(memory_format=layout)


def test_cat_with_identity_tables_is_torch_cat(isa):
    identity = torch.arange(256, dtype=torch.uint8)
    tensors = [nhwc(codes(2, c, 5, 7, seed=c)) for c in (3, 16, 70)]
    assert torch.equal(ops.cat(tensors, identity.repeat(3, 1), 1), torch.cat(tensors, 1))


def test_cat_of_unequal_layouts_and_slices(isa):
    tables = torch.stack([codes(256, seed=k) for k in range(3)])
    tensors = [nhwc(codes(2, 4, 5, 7)), codes(2, 4, 5, 7), codes(2, 4, 5, 14)[..., ::2]]
    assert torch.equal(ops.cat(tensors, tables, 1), reference.cat(tensors, tables, 1))


def test_bits_do_not_depend_on_the_number_of_threads(isa):
    a, b = nhwc(codes(4, 40, 61, 53, seed=1)), codes(4, 40, 1, 1, seed=2)
    grid = grids(torch.uint8, torch.uint8, torch.uint8)
    tables = torch.stack([codes(256, seed=k) for k in range(2)])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append((ops.mul(a, b, *grid), ops.lookup(a, tables[0]), ops.cat([a, a], tables, 1)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=2)), ids=str)
def test_two_operands_may_repeat_one_code_along_a_row(isa, op, dtypes):
    kernel, oracle = BINARY[op]
    grid = (0.5, middle(dtypes[0], 10), 0.25, middle(dtypes[1], 20), 1.0, 30, 0, 255, torch.uint8)
    for n in (1, 2, 16, 65, 20_000):
        pairs = [
            (codes(4, 1, dtype=dtypes[0], seed=1).expand(4, n), codes(4, 1, dtype=dtypes[1], seed=2).expand(4, n)),
            (
                codes(5, 3, 1, 1, dtype=dtypes[0]),
                codes(5, 16, dtype=dtypes[1]).as_strided((5, 1, 1, n), (16, 16, 16, 0)),
            ),
        ]
        for a, b in pairs:
            assert torch.equal(kernel(a, b, *grid), oracle(a, b, *grid))


A = codes(2, 3)
HUGE = torch.zeros(1, dtype=torch.uint8).expand(2**62)
OUT = (0.04, 3, 0, 255, torch.uint8)
BAD_CALLS = {
    "float operand": (
        lambda: ops.add(A.float(), A, 0.1, 0, 0.1, 0, *OUT),
        "add: a must be torch.uint8 or torch.int8, got torch.float32",
    ),
    "bool operand": (
        lambda: ops.mul(A, A.bool(), 0.1, 0, 0.1, 0, *OUT),
        "mul: b must be torch.uint8 or torch.int8, got torch.bool",
    ),
    "shapes": (lambda: ops.add(A, codes(4), 0.1, 0, 0.1, 0, *OUT), r"broadcasts with a, got a \[2, 3\] and b \[4\]"),
    "scale": (lambda: ops.add(A, A, 0.0, 0, 0.1, 0, *OUT), "add: a_scale must be positive, finite and normal"),
    "tiny scale": (lambda: ops.mul(A, A, 0.1, 0, 1e-40, 0, *OUT), "mul: b_scale must be positive, finite and normal"),
    "huge scale": (lambda: ops.mul(A, A, 0.1, 0, 0.1, 0, 1e39, 3, 0, 255, torch.uint8), "mul: scale must be positive"),
    "product of scales": (
        lambda: ops.mul(A, A, 1e30, 0, 1e30, 0, 1.0, 7, 0, 255, torch.uint8),
        r"mul: a_scale \* b_scale / scale must be finite in float32, got 1e\+30 \* 1e\+30 / 1",
    ),
    "quotient of scales": (
        lambda: ops.mul(A, A, 1e20, 0, 1.0, 0, 1e-20, 7, 0, 255, torch.uint8),
        r"mul: a_scale \* b_scale / scale must be finite in float32",
    ),
    "reach of a": (
        lambda: ops.add(A, A, 3e37, 200, 1.0, 200, 1.0, 7, 0, 255, torch.uint8),
        r"add: 255 \* a_scale must be finite in float32, got a_scale 3e\+37",
    ),
    "reach of b": (
        lambda: ops.add(A, A, 1.0, 200, 3e37, 200, 1.0, 7, 0, 255, torch.uint8),
        r"add: 255 \* b_scale must be finite in float32",
    ),
    "operand zero point": (lambda: ops.add(A, A, 0.1, -1, 0.1, 0, *OUT), r"a_zero_point must be in \[0, 255\]"),
    "zero point": (
        lambda: ops.add(A, A, 0.1, 0, 0.1, 0, 0.1, 256, 0, 8, torch.uint8),
        r"zero_point must be in \[0, 255\]",
    ),
    "dtype": (
        lambda: ops.add(A, A, 0.1, 0, 0.1, 0, 0.1, 9, 0, 8, torch.int16),
        "dtype must be torch.uint8 or torch.int8",
    ),
    "grid": (lambda: ops.add(A, A, 0.1, 0, 0.1, 0, 0.1, 9, -1, 80, torch.uint8), "0 <= qmin <= qmax <= 255"),
    "short table": (lambda: ops.lookup(A, codes(255)), r"lookup: table must have shape \[256\], got \[255\]"),
    "float table": (lambda: ops.lookup(A, torch.zeros(256)), "lookup: table must be torch.uint8 or torch.int8"),
    "float codes": (lambda: ops.lookup(A.float(), codes(256)), "lookup: q must be torch.uint8 or torch.int8"),
    "cat of nothing": (lambda: ops.cat([], codes(0, 256), 0), "cat: tensors must not be empty"),
    "cat tables": (lambda: ops.cat([A, A], codes(1, 256), 0), r"cat: tables must have shape \[2, 256\]"),
    "cat shapes": (lambda: ops.cat([A, codes(2, 4)], codes(2, 256), 0), "outside of dimension 0"),
    "cat dims": (lambda: ops.cat([A, codes(2)], codes(2, 256), 0), "every tensor must have 2 dimensions"),
    "cat axis": (lambda: ops.cat([A, A], codes(2, 256), 2), "cat: axis must be in"),
    "cat sizes": (
        lambda: ops.cat([HUGE] * 3, codes(3, 256), 0),
        r"cat: tensors must have together at most 2\^63 - 1 elements in dimension 0",
    ),
    "cat floats": (lambda: ops.cat([A, A.float()], codes(2, 256), 0), "every tensor must be torch.uint8 or torch.int8"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_refused_by_name(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(RuntimeError, match=message):
        call()
