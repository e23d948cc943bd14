"""Encodings, AIMET's form of grids, to and from JSON.

The grid is `x = (code + offset) * scale` with codes from 0. An encoding holds `bitwidth` (0.6.1) or `bw` (1.0.0), and
scale and offset of one or of each channel; in 0.6.1 also the ends `min` and `max`. In 2.0.0 it holds what ONNX says:
`output_dtype`, `y_scale`, `y_zero_point` and, with a grid for each channel, `axis`; all stand in one list.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from qkernels.core.attach import OUTPUT, PARAMETERS
from qkernels.core.grids import Grid, Grids
from qkernels.core.onnx_names import Place, place_of
from qkernels.core.qspec import MAX_BITS
from qkernels.errors import InvalidArgument, Unsupported, close_matches
from qkernels.frontends.common import check_keys, check_one_of

VERSIONS = ("0.6.1", "1.0.0", "2.0.0")
TABLES = ("activation_encodings", "param_encodings")
LIST = "encodings"  # of 2.0.0
HEADER = ("version", "producer", "excluded_layers", "quantizer_args")


def rows_of(grid: Grid) -> list[dict[str, Any]]:
    """A grid in the form of 0.6.1: an encoding a channel."""
    grid.check_no_blocks("encodings")
    if 2**grid.bits - grid.codes > 1:
        raise Unsupported(f"encodings: no bitwidth has {grid.codes} codes; {2**grid.bits} or one less")
    common = {"bitwidth": grid.bits, "dtype": "int", "is_symmetric": str(grid.symmetric)}
    numbers = zip(grid.scale, grid.offset, *grid.ends(), strict=True)
    return [{**common, "max": high, "min": low, "offset": o, "scale": s} for s, o, low, high in numbers]


def entry_of(name: str, grid: Grid) -> dict[str, Any]:
    """A grid in the form of 1.0.0."""
    grid.check_no_blocks(f"encodings: {name}")
    if grid.is_even and not grid.symmetric:
        raise Unsupported(f"{name}: encodings of 1.0.0 have no affine grid of {grid.codes} codes; those of 0.6.1 do")
    kind = "PER_CHANNEL" if grid.per_channel else "PER_TENSOR"
    return {
        **{"bw": grid.bits, "dtype": "INT", "enc_type": kind, "is_sym": grid.symmetric, "name": name},
        **{"offset": list(grid.offset), "scale": list(grid.scale)},
    }


def entry_of_2(name: str, grid: Grid, axis: int) -> dict[str, Any]:
    """A grid in the form of 2.0.0."""
    grid.check_no_blocks(f"encodings: {name}")
    if grid.is_even:
        raise Unsupported(f"{name}: encodings of 2.0.0 have no grid of {grid.codes} codes; those of 0.6.1 do")
    lowest = -(grid.codes // 2) if grid.symmetric else 0
    scale, zero_point = list(grid.scale), [lowest - offset for offset in grid.offset]
    entry = {"name": name, "output_dtype": f"{'' if grid.symmetric else 'u'}int{grid.bits}"}
    entry |= {"y_scale": scale if grid.per_channel else scale[0]}
    if any(zero_point):
        entry |= {"y_zero_point": zero_point if grid.per_channel else zero_point[0]}
    return entry | ({"axis": axis} if grid.per_channel else {})


def write(
    grids: Grids, version: str, name_of: Callable[[str, str], str], axis_of: Callable[[str], int] = lambda path: 0
) -> dict[str, Any]:
    """Grids by tensor name, in the form of `version`.

    `name_of(path, key)` names the activations, `axis_of(path)` says along which dimension a weight has its channels.
    """
    check_one_of(version, VERSIONS, "encoding_version")
    if version == "2.0.0":
        named = [(p, k, g, k in PARAMETERS) for p, table in grids.items() for k, g in table.items()]
        return {LIST: [entry_of_2(f"{p}.{k}" if w else name_of(p, k), g, axis_of(p)) for p, k, g, w in named]}
    tables: list[Any] = []
    for weights in (False, True):
        places = [(p, k, g) for p, table in grids.items() for k, g in table.items() if (k in PARAMETERS) is weights]
        named = [(f"{p}.{k}" if weights else name_of(p, k), g) for p, k, g in places]
        new = version == "1.0.0"
        tables.append([entry_of(*pair) for pair in named] if new else {name: rows_of(g) for name, g in named})
    return dict(zip(TABLES, tables, strict=True))


def write_by_module(grids: Grids) -> dict[str, Any]:
    """Grids by module, in the form of 0.6.1."""
    activations: dict[str, Any] = {}
    for path, table in grids.items():
        for key, grid in table.items():
            if key not in PARAMETERS:
                side, index = (OUTPUT, "0") if key == OUTPUT else ("input", key.removeprefix("input"))
                activations.setdefault(path, {}).setdefault(side, {})[index] = rows_of(grid)[0]
    weights = {f"{p}.{k}": rows_of(g) for p, table in grids.items() for k, g in table.items() if k in PARAMETERS}
    return dict(zip(TABLES, (activations, weights), strict=True))


def read(
    encodings: Mapping[str, Any],
    paths: Collection[str],
    strict: bool = True,
    graph: Callable[[], Mapping[str, list[Place]]] = dict,
) -> Grids:
    """The grids of encodings of any form.

    Args:
        paths: the modules that there are.
        strict: a name that fits none of them is an error.
        graph: gives the places of the tensors that are not named after a module.
    """
    found: Grids = {}
    check_keys(encodings, (*TABLES, LIST, *HEADER), "encodings")
    if not encodings.keys() & {*TABLES, LIST}:
        raise InvalidArgument(f"encodings: none of {[*TABLES, LIST]}, only the keys {sorted(encodings)}")
    if LIST in encodings:
        encodings = _in_tables(encodings[LIST])
    entries = [*_activations(encodings.get(TABLES[0], {}), paths, graph), *_parameters(encodings.get(TABLES[1], {}))]
    if not entries:
        raise InvalidArgument("encodings: there is no encoding")
    for where, path, key, rows in entries:
        if path in paths:
            found.setdefault(path, {})[key] = grid_of(rows, where)
        elif strict:
            known = [f"{p}.{key}" if key in PARAMETERS else p for p in paths]
            named = f"{path}.{key}" if key in PARAMETERS else path
            hint = close_matches(named, known)
            if where == f"{TABLES[0]}.{path}":
                hint += "; names of an ONNX graph need that file (onnx_file=), <prefix>_torch.encodings names modules"
            raise InvalidArgument(f"{where}: the model has no such tensor{hint}")
    return found


def _in_tables(entries: Any) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The list of 2.0.0 as the two tables of 0.6.1."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {table: {} for table in TABLES}
    for i, entry in enumerate(entries):
        where = f"{LIST}[{i}]"
        _needs(entry, ("name", "output_dtype"), where)
        dtype = re.fullmatch(r"(u?)int(\d+)", str(entry.get("output_dtype")))
        if dtype is None or "y_scale" not in entry or "block_size" in entry:
            raise Unsupported(f"{where}: only intN and uintN with y_scale and without block_size, got {entry!r:.200}")
        scale, bits = entry["y_scale"], int(dtype[2])
        wide = isinstance(scale, list)
        scale = scale if wide else [scale]
        zero_point = entry.get("y_zero_point", 0)
        zero_point = zero_point if isinstance(zero_point, list) else [zero_point] * len(scale)
        _same_length(scale, zero_point, where)
        symmetric, lowest = not dtype[1] and not any(zero_point), 0 if dtype[1] else -(2 ** (bits - 1))
        common = {"bitwidth": bits, "is_symmetric": str(symmetric), "enc_type": "PER_CHANNEL" if wide else "PER_TENSOR"}
        name = entry["name"]
        table = found[TABLES[name.rpartition(".")[2] in PARAMETERS]]
        table[name] = [{**common, "scale": s, "offset": lowest - z} for s, z in zip(scale, zero_point, strict=True)]
    return found


def _parameters(table: Any) -> Iterator[tuple[str, str, str, list]]:
    for name, rows in _by_name(table, TABLES[1]).items():
        path, _, key = name.rpartition(".")
        if key not in PARAMETERS:
            raise Unsupported(f"{TABLES[1]}.{name}: only 'weight' and 'bias' have grids; leave it out")
        yield f"{TABLES[1]}.{name}", path, key, rows


def _activations(
    table: Any, paths: Collection[str], graph: Callable[[], Mapping[str, list[Place]]]
) -> Iterator[tuple[str, str, str, list]]:
    """(where, module, key, encodings) of each activation, whether by module or by the tensor's name."""
    if isinstance(table, Mapping) and any("input" in row or "output" in row for row in table.values()):
        for path, sides in table.items():
            for side, tensors in sides.items():
                where = f"{TABLES[0]}.{path}.{side}"
                check_one_of(side, ("input", "output"), where)
                for index, row in tensors.items():
                    if side == "output" and index != "0":
                        raise InvalidArgument(f"{where}.{index}: modules have one output")
                    yield f"{where}.{index}", path, OUTPUT if side == "output" else f"input{index}", [row]
        return
    for name, rows in _by_name(table, TABLES[0]).items():
        place = place_of(name, paths)
        for path, key in [place] if place else graph().get(name, [(name, OUTPUT)]):
            yield f"{TABLES[0]}.{name}", path, key, rows


def _by_name(table: Any, where: str) -> dict[str, list[dict[str, Any]]]:
    """Encodings by tensor name in the form of 0.6.1, from either form."""
    if isinstance(table, Mapping):
        return {name: [rows] if isinstance(rows, Mapping) else list(rows) for name, rows in table.items()}
    if not isinstance(table, list):
        raise InvalidArgument(f"{where}: must be a dict or a list, got {table!r}")
    found = {}
    for i, entry in enumerate(table):
        _needs(entry, ("name", "bw", "is_sym", "scale", "offset"), f"{where}[{i}]")
        kind = entry.get("enc_type", "PER_TENSOR")
        if entry.get("dtype", "INT") != "INT" or kind not in ("PER_TENSOR", "PER_CHANNEL"):
            raise Unsupported(f"{where}[{i}]: dtype {entry.get('dtype')}, enc_type {kind} has no integer layers here")
        _same_length(entry["scale"], entry["offset"], f"{where}[{i}]")
        common = {"bitwidth": entry["bw"], "is_symmetric": str(entry["is_sym"]), "enc_type": kind}
        pairs = zip(entry["scale"], entry["offset"], strict=True)
        found[entry["name"]] = [{**common, "scale": scale, "offset": offset} for scale, offset in pairs]
    return found


def _same_length(scale: Any, offset: Any, where: str) -> None:
    if not isinstance(scale, list) or not isinstance(offset, list) or len(scale) != len(offset):
        raise InvalidArgument(f"{where}: must have as many offsets as scales, got {scale!r:.200} and {offset!r:.200}")


def _needs(entry: Any, keys: Collection[str], where: str) -> None:
    for key in keys:
        if not isinstance(entry, Mapping) or key not in entry:
            got = sorted(entry) if isinstance(entry, Mapping) else repr(entry)
            raise InvalidArgument(f"{where}: encoding without {key!r}, got {got}")


def grid_of(rows: list[dict[str, Any]], where: str) -> Grid:
    """The grid of the encodings of one tensor."""
    first = rows[0] if rows else {}
    if isinstance(first, Mapping) and str(first.get("dtype", "int")).lower() != "int":
        raise Unsupported(f"{where}: dtype {first['dtype']!r} has no integer layers")
    for row in rows or [first]:
        _needs(row, ("bitwidth", "scale", "offset", "is_symmetric"), where)
    try:
        bits, symmetric = int(first["bitwidth"]), str(first["is_symmetric"]) == "True"
        scale, offset = tuple(float(row["scale"]) for row in rows), tuple(int(row["offset"]) for row in rows)
        ends = [float(first[end]) for end in ("min", "max") if end in first]
    except (TypeError, ValueError):
        raise InvalidArgument(
            f"{where}: bitwidth, scale and offset must be numbers, and min and max, got {first!r}"
        ) from None
    if not 2 <= bits <= MAX_BITS:
        raise InvalidArgument(f"{where}: bitwidth must be from 2 to {MAX_BITS}, got {bits}")
    codes = 2**bits
    grid = Grid(scale, offset, codes, symmetric, first.get("enc_type") == "PER_CHANNEL" or len(rows) > 1).checked(where)
    if symmetric and all(o == 1 - codes // 2 for o in offset):
        return replace(grid, codes=codes - 1)  # as many on both sides
    if len(ends) == 2:
        said = (ends[1] - ends[0]) / scale[0] + 1
        if not any(abs(said - n) < 0.5 for n in (codes, codes - 1)):  # nor if it is NaN
            raise InvalidArgument(f"{where}: from min to max there are {said:g} codes, in bitwidth {bits} {codes}")
        return replace(grid, codes=round(said))
    return grid
