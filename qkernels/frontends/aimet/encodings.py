"""Encodings, AIMET's form of grids, to and from JSON.

The grid is x = (code + offset) * scale with codes from 0: offset = qmin - zero_point of the core's grid. An encoding
holds `bitwidth` (0.6.1) or `bw` (1.0.0), and scale and offset of one or of each channel.
"""

from collections.abc import Mapping
from typing import Any

import torch

from qkernels.core.qspec import QParams
from qkernels.errors import InvalidArgument, Unsupported
from qkernels.frontends.aimet.quantizers import QuantizeDequantize

VERSIONS = ("0.6.1", "1.0.0")


def to_list(quantizer: QuantizeDequantize) -> list[dict[str, Any]]:
    """The encodings of a quantizer in the form of 0.6.1, one a channel."""
    grid = quantizer.qparams()
    ends = [
        grid.dequantize(torch.full(grid.scale.shape, code, dtype=grid.dtype)) if grid.axis is None else None
        for code in (grid.qmin, grid.qmax)
    ]
    if grid.axis is not None:
        rows = QParams(grid.scale, grid.zero_point, 0, grid.qmin, grid.qmax, grid.dtype)
        ends = [rows.dequantize(torch.full(grid.scale.shape, c, dtype=grid.dtype)) for c in (grid.qmin, grid.qmax)]
    return [
        {
            "bitwidth": quantizer.bitwidth,
            "dtype": "int",
            "is_symmetric": str(quantizer.symmetric),
            "max": high,
            "min": low,
            "offset": grid.qmin - zero_point,
            "scale": scale,
        }
        for scale, zero_point, low, high in zip(
            grid.scale.tolist(), grid.zero_point.tolist(), ends[0].tolist(), ends[1].tolist(), strict=True
        )
    ]


def to_entry(name: str, quantizer: QuantizeDequantize) -> dict[str, Any]:
    """The encodings of a quantizer in the form of 1.0.0."""
    rows = to_list(quantizer)
    return {
        "bw": quantizer.bitwidth,
        "dtype": "INT",
        "enc_type": "PER_CHANNEL" if quantizer.axis is not None else "PER_TENSOR",
        "is_sym": quantizer.symmetric,
        "name": name,
        "offset": [row["offset"] for row in rows],
        "scale": [row["scale"] for row in rows],
    }


def by_name(encodings: Any, where: str) -> dict[str, list[dict[str, Any]]]:
    """Encodings by tensor name in the form of 0.6.1, from either form."""
    if isinstance(encodings, Mapping):
        return {name: [rows] if isinstance(rows, Mapping) else list(rows) for name, rows in encodings.items()}
    found = {}
    for i, entry in enumerate(encodings):
        here = f"{where}[{i}]"
        kind = entry.get("enc_type", "PER_TENSOR")
        if entry.get("dtype", "INT") != "INT" or kind not in ("PER_TENSOR", "PER_CHANNEL"):
            raise Unsupported(f"{here}: dtype {entry.get('dtype')}, enc_type {kind} has no integer layers here")
        common = {"bitwidth": entry["bw"], "is_symmetric": str(entry["is_sym"]), "dtype": "int"}
        pairs = zip(entry["scale"], entry["offset"], strict=True)
        found[entry["name"]] = [{**common, "scale": scale, "offset": offset} for scale, offset in pairs]
    return found


def quantizer_from(
    rows: list[dict[str, Any]], shape: tuple[int, ...], axis: int, signed: bool, where: str
) -> QuantizeDequantize:
    """A quantizer with this grid, for a tensor of `shape` whose channels are at `axis`."""
    first = rows[0]
    for key in ("bitwidth", "scale", "offset", "is_symmetric"):
        if key not in first:
            raise InvalidArgument(f"{where}: encoding without {key!r}, got {sorted(first)}")
    if first.get("dtype", "int").lower() != "int":
        raise Unsupported(f"{where}: dtype {first['dtype']!r} has no integer layers")
    bits, symmetric = int(first["bitwidth"]), str(first["is_symmetric"]) == "True"
    per_channel = len(rows) > 1 or (signed and len(rows) == shape[axis])
    if len(rows) > 1 and len(rows) != shape[axis]:
        raise InvalidArgument(f"{where}: {len(rows)} encodings for {shape[axis]} channels")
    offsets = torch.tensor([int(row["offset"]) for row in rows])
    strict = symmetric and bool((offsets == -(2 ** (bits - 1)) + 1).all())
    grid_shape = tuple(n if i == axis else 1 for i, n in enumerate(shape)) if per_channel else ()
    made = QuantizeDequantize(grid_shape, bits, symmetric, signed, strict=strict, axis=axis if per_channel else None)
    spec = made.spec
    scale = torch.tensor([row["scale"] for row in rows], dtype=torch.float32)
    zero_point = spec.qmin - offsets
    made.set_qparams(QParams(scale, zero_point, made.axis, spec.qmin, spec.qmax, spec.dtype))
    return made
