"""A second reader of plan files, written from csrc/plan/format.h alone, that runs the steps in plain torch.

Slow and simple: what the executor is compared with, besides the converted modules.
"""

import json
import operator
import struct
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from qkernels import reference
from qkernels.ops.conv import conv_output_size
from qkernels.ops.epilogue import Epilogue, ResidualAdd

DTYPES = [torch.uint8, torch.int8, torch.int32, torch.float32, torch.bfloat16, torch.float16]
SECTIONS = ["strings", "metadata", "tensors", "values", "scalars", "steps", "cells", "inputs", "outputs", "data"]
PADDING_MODES = ["zeros", "reflect", "replicate", "circular"]


class PlanFile:
    def __init__(self, blob: bytes):
        magic, version, header_bytes, file_bytes, self.checksum, *table = struct.unpack_from("<8sIIQQ20Q", blob)
        assert (magic, version, header_bytes, file_bytes) == (b"QKPLAN\r\n", 1, 192, len(blob))
        section = {
            name: blob[offset : offset + size]
            for name, offset, size in zip(SECTIONS, table[::2], table[1::2], strict=True)
        }
        assert all(offset % 64 == 0 for offset in table[::2])
        strings, data, self.cells = section["strings"], section["data"], section["cells"]
        self.metadata = json.loads(section["metadata"])
        self.tensors = [self._tensor(data, row) for row in struct.iter_unpack("<QQII5q", section["tensors"])]
        self.values = [
            SimpleNamespace(name=strings[row[0] : row[0] + row[1]].decode(), dtype=DTYPES[row[2]], rank=row[3])
            for row in struct.iter_unpack("<IIIIfiII", section["values"])
        ]
        self.scalars = list(struct.iter_unpack("<IIiiq", section["scalars"]))
        self.steps = [
            SimpleNamespace(kind=row[0], ins=row[1], outs=row[2], cells=row[3], first=row[4],
                            name=strings[row[5] : row[5] + row[6]].decode())
            for row in struct.iter_unpack("<IIIIQII", section["steps"])
        ]  # fmt: skip
        self.inputs = [(row[0], row[2 : 2 + row[1]]) for row in struct.iter_unpack("<II6q", section["inputs"])]
        self.outputs = [row[0] for row in struct.iter_unpack("<I", section["outputs"])]

    @staticmethod
    def _tensor(data: bytes, row: tuple[int, ...]) -> torch.Tensor:
        offset, size, dtype, rank, *dims = row
        if size == 0:
            return torch.empty(dims[:rank], dtype=DTYPES[dtype])
        return torch.frombuffer(bytearray(data[offset : offset + size]), dtype=DTYPES[dtype]).reshape(dims[:rank])

    def run(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """The outputs, in order."""
        env: dict[int, torch.Tensor] = {}
        for (value, sizes), x in zip(self.inputs, inputs, strict=True):
            assert len(sizes) == x.dim()
            assert all(want in (-1, got) for want, got in zip(sizes, x.shape, strict=True)), (sizes, x.shape)
            env[value] = x
        for step in self.steps:
            _Step(self, step, env).run()
        return [env[value] for value in self.outputs]

    def scalar(self, index: int, env: dict[int, torch.Tensor]) -> int:
        op, value, a, b, number = self.scalars[index]
        if op == 0:
            return number
        if op == 1:
            return env[value].shape[a]
        assert max(a, b) < index
        functions = [operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, min, max]
        return functions[op - 2](self.scalar(a, env), self.scalar(b, env))


class _Step:
    """Reads the cells of a step from front to back."""

    KINDS = (
        *("constant", "quantize", "dequantize", "linear", "conv", "add", "mul", "cat", "lookup", "max_pool"),
        *("avg_pool", "adaptive_avg_pool", "interpolate", "pad", "reshape", "permute", "slice", "expand"),
    )

    def __init__(self, file: PlanFile, step: Any, env: dict[int, torch.Tensor]):
        self.file, self.step, self.env, self.at = file, step, env, step.first
        self.inputs = [env[self.i()] for _ in range(step.ins)]
        self.outputs = [self.i() for _ in range(step.outs)]
        self.dtype = file.values[self.outputs[0]].dtype

    def run(self) -> None:
        result = getattr(self, self.KINDS[self.step.kind])(*self.inputs)
        assert self.at == self.step.first + self.step.cells, self.step.name
        (out,) = self.outputs
        value = self.file.values[out]
        assert (result.dtype, result.dim()) == (value.dtype, value.rank), (self.step.name, value, result.shape)
        self.env[out] = result

    def i(self) -> int:
        (value,) = struct.unpack_from("<q", self.file.cells, 8 * self.at)
        self.at += 1
        return value

    def f(self) -> float:
        (value,) = struct.unpack_from("<d", self.file.cells, 8 * self.at)
        self.at += 1
        return value

    def many(self, count: int) -> list[int]:
        return [self.i() for _ in range(count)]

    def tensor(self) -> torch.Tensor | None:
        index = self.i()
        return None if index == -1 else self.file.tensors[index]

    def size(self) -> int:
        return self.file.scalar(self.i(), self.env)

    def size_or_minus(self) -> int:
        index = self.i()
        return -1 if index == -1 else self.file.scalar(index, self.env)

    def operand(self) -> tuple[float, int]:
        return self.f(), self.i()

    def grid(self) -> tuple[float, int, int, int]:
        return (self.f(), *self.many(3))

    def axis(self) -> int | None:
        axis = self.i()
        return None if axis == -1 else axis

    def epilogue(self) -> Epilogue:
        grid, table, residual = self.grid(), self.tensor(), None
        if self.i():
            residual = ResidualAdd(*self.operand(), *self.grid())
        return Epilogue(self.dtype, *grid, table, residual)

    def constant(self):
        return self.tensor()

    def quantize(self, x):
        axis, scale, zero_point = self.axis(), self.tensor(), self.tensor()
        return reference.quantize(x, scale, zero_point, axis, self.i(), self.i(), self.dtype)

    def dequantize(self, q):
        axis, scale, zero_point = self.axis(), self.tensor(), self.tensor()
        return reference.dequantize(q, scale, zero_point, axis, self.dtype)

    def linear(self, x, residual=None):
        weights = [self.tensor() for _ in range(4)]
        return reference.linear(x, *weights, *self.operand(), self.epilogue(), residual)

    def conv(self, x, residual=None):
        weights = [self.tensor() for _ in range(4)]
        scale, zero_point = self.operand()
        epilogue, d = self.epilogue(), self.i()
        stride, padding, dilation, extra = self.many(d), self.many(2 * d), self.many(d), self.many(d)
        groups, transposed, mode = self.many(3)
        size = conv_output_size(x.shape[2:], weights[0].shape[2:], stride, padding, dilation, bool(transposed), extra)
        geometry = (stride, padding, dilation, groups, bool(transposed), PADDING_MODES[mode])
        return reference.conv(x, *weights, scale, zero_point, x.dtype, epilogue, *geometry, size, residual)

    def add(self, a, b):
        return reference.add(a, b, *self.operand(), *self.operand(), *self.grid(), self.dtype)

    def mul(self, a, b):
        return reference.mul(a, b, *self.operand(), *self.operand(), *self.grid(), self.dtype)

    def cat(self, *tensors):
        dim, tables = self.i(), self.tensor()
        return reference.cat(list(tensors), tables, dim)

    def lookup(self, q):
        return reference.lookup(q, self.tensor())

    def max_pool(self, q):
        d = self.i()
        return reference.max_pool(q, self.many(d), self.many(d), self.many(d), self.many(d), bool(self.i()))

    def avg_pool(self, q):
        d = self.i()
        window = (self.many(d), self.many(d), self.many(d))
        flags = (bool(self.i()), bool(self.i()), self.i() or None)
        return reference.avg_pool(q, *window, *flags, *self.operand(), *self.grid(), self.dtype)

    def adaptive_avg_pool(self, q):
        d = self.i()
        sizes = [self.size_or_minus() for _ in range(d)]
        sizes = [n if s == -1 else s for s, n in zip(sizes, q.shape[2:], strict=True)]
        return reference.adaptive_avg_pool(q, sizes, *self.operand(), *self.grid(), self.dtype)

    def interpolate(self, q):
        d, exact, sized = self.many(3)
        size = [self.size() for _ in range(d)] if sized else None
        factors = None if sized else [self.f() for _ in range(d)]
        mode = "nearest-exact" if exact else "nearest"
        return F.interpolate(q.to(torch.float64), size, factors, mode).to(q.dtype)

    def pad(self, x):
        amounts = [self.size() for _ in range(2 * self.i())]
        return F.pad(x, amounts, value=self.i())

    def reshape(self, x):
        return x.reshape([self.size() for _ in range(self.i())])

    def permute(self, x):
        return x.permute(self.many(self.i()))

    def slice(self, x):
        dim, start, stop, step = self.i(), self.size(), self.size(), self.i()
        return x[(slice(None),) * dim + (slice(start, stop, step),)]

    def expand(self, x):
        return x.expand([self.size() for _ in range(self.i())])
