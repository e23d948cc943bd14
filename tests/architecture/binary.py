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


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str

    @property
    def jump_target(self) -> int | None:
        target = re.match(r"([0-9a-f]+) <", self.operands) if self.name.startswith("j") else None
        return int(target.group(1), 16) if target else None


@dataclass(frozen=True)
class Function:
    name: str  # mangled
    body: tuple[Instruction, ...]


@dataclass(frozen=True)
class Symbol:
    binding: str  # LOCAL, GLOBAL, WEAK
    source: str  # the file of a static function; empty for one that is only hidden


@cache
def symbols() -> dict[int, Symbol]:
    """By address. Where several names share one, WEAK wins."""
    found: dict[int, Symbol] = {}
    source = ""
    for line in _run("readelf", "-sW", _C.__file__).split(".symtab", 1)[-1].splitlines():
        fields = line.split()
        if len(fields) < 7 or not fields[0].endswith(":"):
            continue
        kind, binding = fields[3], fields[4]
        if kind == "FILE":
            source = fields[7] if len(fields) > 7 else ""
        elif kind == "FUNC":
            address = int(fields[1], 16)
            if address not in found or binding == "WEAK":
                found[address] = Symbol(binding, source if binding == "LOCAL" else "")
    return found


@cache
def functions() -> list[Function]:
    found: list[tuple[str, list[Instruction]]] = []
    for line in _run("objdump", "-d", "--no-show-raw-insn", _C.__file__).splitlines():
        head = re.fullmatch(r"[0-9a-f]+ <(.+)>:", line)
        if head:
            found.append((head.group(1), []))
            continue
        match = re.fullmatch(r"\s*([0-9a-f]+):\s+(?:(?:rep|repz|repnz|lock|notrack|bnd) )*(\S+)\s*(.*)", line)
        if match:
            found[-1][1].append(Instruction(int(match.group(1), 16), match.group(2), match.group(3)))
    return [Function(name, tuple(body)) for name, body in found if body]


# ---- loops: the natural loops of the control flow graph --------------------------------------------------------------


def basic_blocks(body: tuple[Instruction, ...]) -> tuple[list[tuple[Instruction, ...]], list[list[int]]]:
    """The blocks in memory order and the successors of each. Calls fall through; jumps out of the function end."""
    index = {instruction.address: n for n, instruction in enumerate(body)}
    leaders = {0}
    for n, instruction in enumerate(body):
        if instruction.jump_target in index:
            leaders.add(index[instruction.jump_target])
        if instruction.name.startswith("j") or instruction.name.startswith("ret"):
            leaders.add(n + 1)
    starts = sorted(n for n in leaders if n < len(body))
    blocks = [body[begin:end] for begin, end in zip(starts, [*starts[1:], len(body)], strict=True)]
    number = {block[0].address: n for n, block in enumerate(blocks)}
    successors = []
    for n, block in enumerate(blocks):
        last, after = block[-1], []
        if last.jump_target in number:
            after.append(number[last.jump_target])
        if not last.name.startswith(("jmp", "ret", "ud2", "hlt")) and n + 1 < len(blocks):
            after.append(n + 1)
        successors.append(after)
    return blocks, successors


def natural_loops(successors: list[list[int]]) -> dict[int, set[int]]:
    """Header -> the blocks of its loop."""
    count = len(successors)
    predecessors: list[list[int]] = [[] for _ in range(count)]
    for n, after in enumerate(successors):
        for m in after:
            predecessors[m].append(n)
    everything = set(range(count))
    dominators = [{0}] + [everything] * (count - 1)
    changed = True
    while changed:
        changed = False
        for n in range(1, count):
            before = [dominators[p] for p in predecessors[n]]
            new = (set.intersection(*before) if before else set()) | {n}
            if new != dominators[n]:
                dominators[n], changed = new, True
    loops: dict[int, set[int]] = {}
    for tail, after in enumerate(successors):
        for head in after:
            if head in dominators[tail]:
                body, todo = loops.setdefault(head, {head}), [tail]
                while todo:
                    n = todo.pop()
                    if n not in body:
                        body.add(n)
                        todo += predecessors[n]
    return loops


def innermost_loops(body: tuple[Instruction, ...]) -> list[list[Instruction]]:
    """The instructions of each loop that holds no other loop."""
    blocks, successors = basic_blocks(body)
    loops = natural_loops(successors)
    return [
        [instruction for n in sorted(inside) for instruction in blocks[n]]
        for head, inside in loops.items()
        if not any(other != head and other in inside for other in loops)
    ]


def stack_references(body: tuple[Instruction, ...], loop: list[Instruction]) -> list[Instruction]:
    """Memory operands of the loop on the stack. rbp counts where it is the frame pointer, else it is a register."""
    has_frame = any(i.name == "mov" and i.operands.startswith("%rsp,%rbp") for i in body)
    pattern = r"\(%r(sp|bp)\b" if has_frame else r"\(%rsp\b"
    return [i for i in loop if re.search(pattern, i.operands)]
