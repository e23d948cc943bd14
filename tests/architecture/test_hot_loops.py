"""A hot loop never touches the stack: gcc spills the accumulators of a micro-kernel silently, at half the speed."""

import re

import binary
import pytest
from binary import Function, Instruction

DOT = re.compile(r"vpdpbusd|vpdpwssd|vpmaddubsw|vpmaddwd")
STREAM = re.compile(r"v(mul|max|min)ps")
LOOKUP = re.compile(r"vpermi2b|vpermt2b|vpshufb")
POOL = re.compile(r"vpmax[us]b|vpunpck[lh]bw")


def hot_loops(pattern: re.Pattern, only: str = "") -> list[tuple[Function, list[Instruction]]]:
    return [
        (function, loop)
        for function in binary.functions()
        if only in function.name and any(pattern.match(instruction.name) for instruction in function.body)
        for loop in binary.innermost_loops(function.body)
        if any(pattern.match(instruction.name) for instruction in loop)
    ]


@pytest.mark.parametrize(
    ("pattern", "only"),
    [
        pytest.param(DOT, "", id="dot products"),
        pytest.param(STREAM, "fake_quant", id="fake_quant"),
        pytest.param(STREAM, "quantize", id="quantize"),
        pytest.param(STREAM, "norm_", id="batch norm"),
        pytest.param(STREAM, "one_panel", id="amx epilogue"),
        pytest.param(STREAM, "add_avx", id="add"),
        pytest.param(STREAM, "mul_avx", id="mul"),
        pytest.param(LOOKUP, "lookup_avx512", id="lookup"),
        pytest.param(POOL, "max_pool_avx512", id="max_pool"),
        pytest.param(POOL, "avg_pool_avx512", id="avg_pool"),
    ],
)
def test_hot_loops_do_not_touch_the_stack(pattern, only):
    loops = hot_loops(pattern, only)
    assert loops, "the binary has no such loop: was it built from csrc/?"
    spills = [
        f"{function.name}: {instruction.address:x}: {instruction.name} {instruction.operands}"
        for function, loop in loops
        for instruction in binary.stack_references(function.body, loop)
    ]
    assert not spills, "\n" + "\n".join(spills)


def instructions(*lines: str) -> tuple[Instruction, ...]:
    return tuple(Instruction(0x10 * n, *line.split(maxsplit=1)) for n, line in enumerate(lines))


def test_a_spill_is_found():
    body = instructions(
        "mov %rsp,%rbp",
        "vpdpbusd %zmm1,%zmm2,%zmm3",
        "vmovdqa64 %zmm3,-0x40(%rbp)",
        "jne 10 <kernel+0x10>",
        "vmovdqa64 %zmm3,(%rsp)",
    )
    [loop] = binary.innermost_loops(body)
    assert [i.address for i in binary.stack_references(body, loop)] == [0x20]


def test_rbp_without_a_frame_is_a_plain_register():
    body = instructions("vpdpbusd (%rbp),%zmm2,%zmm3", "jne 0 <kernel>")
    [loop] = binary.innermost_loops(body)
    assert not binary.stack_references(body, loop)


def test_only_the_innermost_loop_counts():
    body = instructions("vmovdqa64 (%rsp),%zmm1", "vpdpbusd %zmm1,%zmm2,%zmm3", "jne 10 <k>", "jne 0 <k>")
    assert [[i.address for i in loop] for loop in binary.innermost_loops(body)] == [[0x10, 0x20]]


def test_a_jump_back_to_code_outside_the_loop_is_no_loop():
    """gcc lays a rare path behind the function's end and jumps back from there."""
    body = instructions("je 40 <k>", "vmovdqa64 (%rsp),%zmm1", "vpdpbusd %zmm1,%zmm2,%zmm3", "ret x", "jmp 10 <k>")
    assert binary.innermost_loops(body) == []
