"""Reads the compiled part with binutils: symbols and disassembly."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache

import pytest

from qkernels import _C


def _run(tool: str, *arguments: str) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} (binutils) is not on this machine")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


@cache
def undefined_symbols() -> list[str]:
    return [line.split()[-1] for line in _run("nm", "-D", "--undefined-only", _C.__file__).splitlines()]


@cache
def exported_symbols() -> list[str]:
    return [line.split()[-1] for line in _run("nm", "-D", "--defined-only", _C.__file__).splitlines()]


@cache
def needed_libraries() -> list[str]:
    return re.findall(r"NEEDED\s+(\S+)", _run("objdump", "-p", _C.__file__))


@cache
def weak_symbols() -> set[str]:
    lines = (line.split() for line in _run("nm", _C.__file__).splitlines())
    return {fields[-1] for fields in lines if len(fields) == 3 and fields[1] in "wWvVu"}


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str


@cache
def functions() -> dict[str, list[Instruction]]:
    """Symbol -> instructions, of everything that the binary defines. Names stay mangled."""
    result: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in _run("objdump", "-d", "--no-show-raw-insn", _C.__file__).splitlines():
        head = re.fullmatch(r"[0-9a-f]+ <(.+)>:", line)
        if head:
            body = result.setdefault(head.group(1), [])
            continue
        match = re.fullmatch(
            r"\s*([0-9a-f]+):\s+((?:\{\w+\} |(?:rep|repz|repnz|lock|notrack|bnd) )*)(\S+)\s*(.*)", line
        )
        if match:
            body.append(Instruction(int(match.group(1), 16), match.group(3), match.group(4)))
    return result


def innermost_loops(body: list[Instruction]) -> list[list[Instruction]]:
    """The instruction runs that a backward jump closes and that hold no other such run."""
    spans = set()
    for instruction in body:
        target = re.match(r"([0-9a-f]+) <", instruction.operands)
        if instruction.name.startswith("j") and target:
            begin = int(target.group(1), 16)
            if body[0].address <= begin <= instruction.address:
                spans.add((begin, instruction.address))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[i for i in body if begin <= i.address <= end] for begin, end in sorted(inner)]


def stack_references(body: list[Instruction], loop: list[Instruction]) -> list[Instruction]:
    """Memory operands of the loop on the stack. rbp counts where it is the frame pointer, else it is a register."""
    has_frame = any(i.name == "mov" and i.operands.startswith("%rsp,%rbp") for i in body)
    pattern = r"\(%r(sp|bp)\b" if has_frame else r"\(%rsp\b"
    return [i for i in loop if re.search(pattern, i.operands)]
