"""The bytes of a plan, as csrc/plan/format.h lays them out: the executor reads nothing else."""

import json
import struct
from collections.abc import Iterable

import torch
from torch import Tensor

from qkernels.ops.plan import plan_checksum
from qkernels.plan.steps import MAX_RANK, Network, Value

MAGIC = b"QKPLAN\r\n"
VERSION = 1
_ALIGN = 64
_DTYPES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int32: 2,
    torch.float32: 3,
    torch.bfloat16: 4,
    torch.float16: 5,
}
_SECTIONS = 10
_HEADER = struct.Struct(f"<8sIIQQ{2 * _SECTIONS}Q")
_CHECKSUM_AT = 24


def plan_bytes(network: Network) -> bytearray:
    """The network as the bytes of a file."""
    return _Writer(network).write()


class _Writer:
    def __init__(self, network: Network):
        self.network = network
        self.strings = bytearray()
        self.string_at: dict[str, tuple[int, int]] = {}
        self.cells = bytearray()

    def write(self) -> bytearray:
        n = self.network
        tensors, data = self._tensors()
        values = b"".join(map(self._value, n.values))
        scalars = b"".join(struct.pack("<IIiiq", s.op, s.value, s.a, s.b, s.number) for s in n.scalars)
        steps = b"".join(map(self._step, n.steps))
        inputs = b"".join(map(self._input, n.inputs))
        outputs = b"".join(struct.pack("<I", value.index) for value in n.outputs)
        metadata = json.dumps(n.metadata, allow_nan=False).encode()
        return _assembled([self.strings, metadata, tensors, values, scalars, steps, self.cells, inputs, outputs, data])

    def _string(self, text: str) -> tuple[int, int]:
        if text not in self.string_at:
            encoded = text.encode()
            self.string_at[text] = (len(self.strings), len(encoded))
            self.strings += encoded
        return self.string_at[text]

    def _tensors(self) -> tuple[bytes, bytearray]:
        rows, data = [], bytearray()
        for tensor in self.network.tensors:
            content = _content(tensor)
            dims = [*tensor.shape, *(0,) * (5 - tensor.dim())]
            rows.append(struct.pack("<QQII5q", len(data), len(content), _DTYPES[tensor.dtype], tensor.dim(), *dims))
            data += content
            _pad(data)
        return b"".join(rows), data

    def _value(self, value: Value) -> bytes:
        name = self._string(value.name)
        return struct.pack("<IIIIfiII", *name, _DTYPES[value.dtype], value.rank, value.scale, value.zero_point, 0, 0)

    def _step(self, step) -> bytes:
        first = len(self.cells) // 8
        cells = [*step.inputs, *step.outputs, *step.attributes]
        self.cells += b"".join(map(_cell, cells))
        counts = (len(step.inputs), len(step.outputs), len(cells))
        return struct.pack("<IIIIQII", step.kind, *counts, first, *self._string(step.name))

    def _input(self, value: Value) -> bytes:
        sizes = [-1 if size is None else size for size in value.sizes]
        return struct.pack(f"<II{MAX_RANK}q", value.index, value.rank, *sizes, *(0,) * (MAX_RANK - value.rank))


def _cell(value: int | float) -> bytes:
    return struct.pack("<d", value) if isinstance(value, float) else struct.pack("<q", value)


def _content(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _pad(data: bytearray) -> None:
    data += bytes(-len(data) % _ALIGN)


def _assembled(sections: Iterable[bytes | bytearray]) -> bytearray:
    body, table = bytearray(_HEADER.size), []
    for section in sections:
        _pad(body)
        table += [len(body), len(section)]
        body += section
    _pad(body)
    _HEADER.pack_into(body, 0, MAGIC, VERSION, _HEADER.size, len(body), 0, *table)
    struct.pack_into("<Q", body, _CHECKSUM_AT, plan_checksum(bytes(body), _CHECKSUM_AT))
    return body
